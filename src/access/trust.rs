//! Which certificate of a server is trusted: as libpq and curl decide, so that a certificate that works with `psql` works here.
//!
//! rustls is stricter than OpenSSL in three ways that meet people who made their own certificate. This verifier does the whole
//! check with the same library (webpki), and then:
//!
//! - **A certificate that is itself in the file of authorities is trusted**, also where it is marked as an authority (`CA:TRUE`,
//!   which `openssl req -x509` writes by default). It is compared byte for byte; validity and name are checked all the same.
//! - **A name that is only in the common name** counts where the certificate has no alternative names at all, and an authority
//!   of the user's own vouches for it. Public authorities always write alternative names.
//! - **Names are checked only where that is asked for**: `sslmode=verify-ca` does not.
//!
//! Certificates of X.509 version 1 are not understood. For these, and for whatever else is refused, [`Refused`] says what to do.

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme};
use std::sync::Arc;
use std::{fmt, io};
use webpki::{EndEntityCert, KeyUsage};

/// Who vouches for a server.
#[derive(Debug)]
pub enum Authorities {
    /// Anybody: whoever answers is taken for the server (`sslmode=prefer` and `require`).
    Anybody,
    /// The authorities of a file, and servers whose own certificate is in it.
    Own(Vec<CertificateDer<'static>>),
    /// Public ones.
    Public(RootCertStore),
}

/// Why a server's certificate is not trusted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// By nobody who is trusted.
    #[error("no authority that is trusted has issued the server's certificate")]
    UnknownIssuer,
    /// It is for somebody else.
    #[error("the server's certificate is not valid for {expected}: it is for {presented}")]
    OtherName {
        /// Whom we wanted to talk to.
        expected: String,
        /// The names in it.
        presented: String,
    },
    /// Over, or yet to come.
    #[error("the server's certificate {0}")]
    OutOfTime(&'static str),
    /// An authority's, and not one that was named.
    #[error("the server's certificate is one of an authority (CA:TRUE)")]
    Authority,
    /// From before 1996, or made without extensions.
    #[error("the server's certificate is of X.509 version 1, which holds no names and is not supported")]
    Version1,
    /// Anything else, in the words of the library.
    #[error("the server's certificate cannot be used: {0}")]
    Unusable(String),
}

impl Refused {
    /// The cause, where a handshake failed for such a reason.
    pub fn of(error: &io::Error) -> Option<&Self> {
        match error.get_ref()?.downcast_ref()? {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) => cause.downcast_ref(),
            _ => None,
        }
    }

    /// What to do about it. `setting` names the file of authorities: `sslrootcert`, `--ca-cert`.
    pub fn remedy(&self, setting: &str) -> String {
        match self {
            Self::UnknownIssuer => {
                format!("Name the file with the certificate of the authority that issued the server's in {setting}")
            }
            Self::OtherName { .. } => {
                format!(
                    "Connect by a name that is in the certificate, or let the server have another. {NEW_CERTIFICATE}"
                )
            }
            Self::OutOfTime(_) => format!("Renew the server's certificate, or correct the clock. {NEW_CERTIFICATE}"),
            Self::Authority => format!(
                "If it is the server's own, name a copy of exactly this certificate in {setting}. If not: {NEW_CERTIFICATE}"
            ),
            Self::Version1 | Self::Unusable(_) => NEW_CERTIFICATE.to_owned(),
        }
    }
}

/// Two commands for a certificate that everybody takes.
const NEW_CERTIFICATE: &str = "Have the authority issue a new one, with HOST as the clients write it (for an address \
     IP:ADDRESS instead of DNS:HOST): openssl req -new -key server.key -subj /CN=HOST -addext subjectAltName=DNS:HOST \
     -addext basicConstraints=CA:FALSE -out server.csr; openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key \
     -CAcreateserial -copy_extensions copy -days 365 -out server.crt";

/// A client's certificates and its key.
pub type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// The configuration of a client that trusts these, and compares the certificate with the server's name if `names`.
///
/// # Errors
/// Where the certificate and the key of the client cannot be used.
pub fn client_config(
    authorities: Authorities,
    names: bool,
    identity: Option<Identity>,
) -> Result<ClientConfig, rustls::Error> {
    // Named here: a second implementation in the tree would leave rustls without a choice.
    let provider = Arc::new(ring::default_provider());
    let verifier = Verifier::new(authorities, names, provider.clone());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    match identity {
        Some((certificates, key)) => builder.with_client_auth_cert(certificates, key),
        None => Ok(builder.with_no_client_auth()),
    }
}

/// The certificates of a PEM file; none where there is no such thing in it.
pub fn certificates(pem: &[u8]) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().unwrap_or_default()
}

struct Verifier {
    /// Nothing is verified without.
    roots: Option<RootCertStore>,
    /// Servers and authorities alike.
    own: Vec<CertificateDer<'static>>,
    names: bool,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(authorities: Authorities, names: bool, provider: Arc<CryptoProvider>) -> Self {
        let (roots, own) = match authorities {
            Authorities::Anybody => (None, Vec::new()),
            Authorities::Public(roots) => (Some(roots), Vec::new()),
            Authorities::Own(own) => {
                let mut roots = RootCertStore::empty();
                // Others may still be there to be compared.
                let _ = roots.add_parsable_certificates(own.iter().cloned());
                (Some(roots), own)
            }
        };
        Self { roots, own, names, provider }
    }

    fn check(
        &self,
        roots: &RootCertStore,
        presented: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Refused> {
        let certificate = EndEntityCert::try_from(presented).map_err(refused)?;
        let issued = certificate.verify_for_usage(
            self.provider.signature_verification_algorithms.all,
            &roots.roots,
            intermediates,
            now,
            KeyUsage::server_auth(),
            None,
            None,
        );
        match issued {
            Ok(_) => {}
            // webpki looks at the validity before it looks whether it is an authority, and says so first.
            Err(webpki::Error::CaUsedAsEndEntity) if self.own.iter().any(|own| own == presented) => {}
            Err(error) => return Err(refused(error)),
        }
        if !self.names {
            return Ok(());
        }
        let presented = match certificate.verify_is_valid_for_subject_name(name) {
            Ok(()) => return Ok(()),
            Err(webpki::Error::CertNotValidForName(context)) => hosts(&context.presented),
            Err(error) => return Err(refused(error)),
        };
        if !presented.is_empty() || self.own.is_empty() {
            return Err(other_name(name, &presented));
        }
        let common_name = common_name(certificate.subject()).unwrap_or_default();
        match name {
            ServerName::DnsName(host) if matches(&common_name, host.as_ref()) => Ok(()),
            _ => Err(other_name(name, &[common_name])),
        }
    }
}

/// Of the alternative names those that a host can have; webpki has them as `DnsName("db")` and `IpAddress(10.0.0.1)`.
fn hosts(alternative_names: &[String]) -> Vec<String> {
    let host = |name: &String| {
        let inside = name.strip_prefix("DnsName(").or_else(|| name.strip_prefix("IpAddress("))?;
        Some(inside.trim_end_matches(')').trim_matches('"').to_owned())
    };
    alternative_names.iter().filter_map(host).collect()
}

fn other_name(expected: &ServerName<'_>, presented: &[String]) -> Refused {
    Refused::OtherName { expected: expected.to_str().into_owned(), presented: presented.join(", ") }
}

fn refused(error: webpki::Error) -> Refused {
    match error {
        webpki::Error::UnknownIssuer => Refused::UnknownIssuer,
        webpki::Error::CertExpired { .. } => Refused::OutOfTime("has expired"),
        webpki::Error::CertNotValidYet { .. } => Refused::OutOfTime("is not valid yet"),
        webpki::Error::CaUsedAsEndEntity => Refused::Authority,
        webpki::Error::UnsupportedCertVersion => Refused::Version1,
        other => Refused::Unusable(other.to_string()),
    }
}

/// As libpq compares it: without regard to case, and with a wildcard for the whole of the first label.
fn matches(pattern: &str, name: &str) -> bool {
    let whole = pattern.eq_ignore_ascii_case(name);
    let wild = pattern.strip_prefix("*.").zip(name.split_once('.'));
    whole || wild.is_some_and(|(parent, (_, rest))| parent.contains('.') && parent.eq_ignore_ascii_case(rest))
}

/// The last common name of a subject in DER. An attribute is `06 03 55 04 03` (the OID 2.5.4.3), the tag of a kind of string,
/// a length, and the text.
fn common_name(subject: &[u8]) -> Option<String> {
    const OID: &[u8] = &[0x06, 0x03, 0x55, 0x04, 0x03];
    let at = subject.windows(OID.len()).rposition(|window| window == OID)?;
    let (&[_, length], text) = subject.get(at + OID.len()..)?.split_first_chunk::<2>()?;
    // A longer one has a length of several bytes, and no host a name like that.
    let text = text.get(..usize::from(length)).filter(|_| length < 0x80)?;
    String::from_utf8(text.to_vec()).ok().filter(|text| !text.contains('\0'))
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").field("names", &self.names).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        presented: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let as_error = |refused: Refused| CertificateError::Other(OtherError(Arc::new(refused)));
            self.check(roots, presented, intermediates, name, now).map_err(as_error)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if self.roots.is_none() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if self.roots.is_none() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};

    fn params(names: &[&str], common_name: &str) -> CertificateParams {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params
    }

    fn authority(mut params: CertificateParams) -> CertificateParams {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    fn self_signed(params: &CertificateParams) -> CertificateDer<'static> {
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    /// Whether a server with this certificate is accepted as `name` if the certificates in `own` are trusted.
    fn verify(
        own: &[&CertificateDer<'static>],
        presented: &CertificateDer<'static>,
        names: bool,
        name: &str,
    ) -> Result<(), Refused> {
        let own = own.iter().map(|certificate| (*certificate).clone()).collect();
        let verifier = Verifier::new(Authorities::Own(own), names, Arc::new(ring::default_provider()));
        let name = ServerName::try_from(name.to_owned()).unwrap();
        verifier.check(verifier.roots.as_ref().unwrap(), presented, &[], &name, UnixTime::now())
    }

    #[test]
    fn a_named_self_signed_certificate_is_trusted() {
        let own = self_signed(&authority(params(&["db"], "db")));
        let other = self_signed(&authority(params(&["db"], "db")));
        assert_eq!(verify(&[&own], &own, true, "db"), Ok(()));
        assert_eq!(verify(&[&other, &own], &own, true, "db"), Ok(()));
        // The same subject and names, and another key.
        assert_eq!(verify(&[&other], &own, true, "db"), Err(Refused::Authority));
        assert!(matches!(verify(&[&own], &own, true, "elsewhere"), Err(Refused::OtherName { .. })));
        assert_eq!(verify(&[&own], &own, false, "elsewhere"), Ok(()));
        for (from, until, what) in [(2001, 2002, "has expired"), (2901, 2902, "is not valid yet")] {
            let mut params = authority(params(&["db"], "db"));
            (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(until, 1, 1));
            let untimely = self_signed(&params);
            assert_eq!(verify(&[&untimely], &untimely, true, "db"), Err(Refused::OutOfTime(what)));
        }
    }

    #[test]
    fn an_authority_vouches_for_names_and_addresses() {
        let key = KeyPair::generate().unwrap();
        let ca = authority(params(&[], "ca"));
        let root = ca.self_signed(&key).unwrap().der().clone();
        let issuer = Issuer::new(ca, key);
        let issue =
            |params: CertificateParams| params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().der().clone();
        let server = issue(params(&["db", "*.example.com", "10.0.0.1", "::1"], "ignored"));
        let check = |name: &str, trusted: bool| {
            assert_eq!(verify(&[&root], &server, true, name).is_ok(), trusted, "{name}");
            assert_eq!(verify(&[&root], &server, false, name), Ok(()), "{name}");
        };
        for name in ["db", "a.example.com", "10.0.0.1", "::1"] {
            check(name, true);
        }
        for name in ["ignored", "example.com", "a.b.example.com", "10.0.0.2", "::2"] {
            check(name, false);
        }
        let stranger = self_signed(&params(&["db"], "db"));
        assert_eq!(verify(&[&root], &stranger, false, "db"), Err(Refused::UnknownIssuer));
    }

    #[test]
    fn the_common_name_counts_without_alternative_names() {
        let check = |params: CertificateParams, name: &str, trusted: bool| {
            let own = self_signed(&params);
            assert_eq!(verify(&[&own], &own, true, name).is_ok(), trusted, "{name}");
        };
        check(params(&[], "db"), "db", true);
        check(params(&[], "DB.example.com"), "db.example.com", true);
        check(params(&[], "*.example.com"), "db.example.com", true);
        check(params(&[], "*.com"), "example.com", false);
        check(params(&[], "db"), "db2", false);
        check(params(&["other"], "db"), "db", false);
        check(params(&["10.0.0.1"], "db"), "db", false);
        // Only libpq compares addresses with a common name too.
        check(params(&[], "10.0.0.1"), "10.0.0.1", false);
        check(authority(params(&[], "db")), "db", true);
        let mut with_uri = params(&[], "db");
        with_uri.subject_alt_names.push(rcgen::SanType::URI("spiffe://x/db".try_into().unwrap()));
        check(with_uri, "db", true);
    }

    #[test]
    fn names_are_printed_as_written() {
        let own = self_signed(&params(&["db", "10.0.0.1"], "ignored"));
        let refused = verify(&[&own], &own, true, "elsewhere").unwrap_err();
        assert_eq!(refused.to_string(), "the server's certificate is not valid for elsewhere: it is for db, 10.0.0.1");
    }
}
