//! The certificate, the key and the client authority of a listener: read and checked at start, for gRPC and HTTP alike.
//!
//! What is wrong with a file is said with its path and its configuration key, before anything is served. The content of a
//! key is in no message. Files are read once: a new certificate takes a restart.

use crate::config::Tls;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

/// A client that has not finished its handshake by then is cut off: it holds a connection and proves nothing.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Why a listener cannot have TLS.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("cannot read {path} ({key}): {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// The configuration key that names it.
        key: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file holds something else.
    #[error("{path} ({key}) holds no {what} in PEM form")]
    Foreign {
        /// The file.
        path: String,
        /// The configuration key that names it.
        key: String,
        /// What it should hold.
        what: &'static str,
    },
    /// They do not belong together, or are of a kind that is not supported.
    #[error("the certificate, key or client_ca of {section} cannot be used: {reason}")]
    Unusable {
        /// The section of the configuration.
        section: &'static str,
        /// Why.
        reason: String,
    },
}

/// Does the handshakes of a listener, with files that are known to work. Cheap to clone.
#[derive(Clone)]
pub struct Acceptor(TlsAcceptor);

impl Acceptor {
    /// Reads and checks the files that `section` of the configuration (`server.grpc.tls`) names, for a listener that speaks
    /// `protocol` (ALPN). Where there is a client authority, every client must have a certificate.
    ///
    /// # Errors
    /// Where a file cannot be read or used.
    pub async fn read(section: &'static str, files: &Tls, protocol: &[u8]) -> Result<Self, Error> {
        let cert = File::read(section, "cert", &files.cert).await?;
        let key = File::read(section, "key", &files.key).await?;
        let client_ca = match &files.client_ca {
            Some(path) => Some(File::read(section, "client_ca", path).await?),
            None => None,
        };
        let mut config = server_config(section, &cert, &key, client_ca.as_ref())?;
        config.alpn_protocols = vec![protocol.to_vec()];
        Ok(Self(Arc::new(config).into()))
    }

    /// The handshake with a client.
    ///
    /// # Errors
    /// Where it fails, or takes longer than 10 s.
    pub async fn accept(&self, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        tokio::time::timeout(HANDSHAKE_MAX, self.0.accept(stream)).await.map_err(|_| io::ErrorKind::TimedOut)?
    }
}

fn server_config(
    section: &'static str,
    cert: &File,
    key: &File,
    client_ca: Option<&File>,
) -> Result<ServerConfig, Error> {
    let unusable = |error: &dyn std::error::Error| Error::Unusable { section, reason: error.to_string() };
    // Named here: a second implementation in the tree would leave rustls without a choice.
    let provider = Arc::new(ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(&error))?;
    let builder = match client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let mut roots = RootCertStore::empty();
            for certificate in file.certificates()? {
                roots.add(certificate).map_err(|error| unusable(&error))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| unusable(&error))?)
        }
    };
    let key = PrivateKeyDer::from_pem_slice(&key.pem).map_err(|_| key.foreign("private key"))?;
    builder.with_single_cert(cert.certificates()?, key).map_err(|error| unusable(&error))
}

/// One file, and what to call it.
struct File {
    path: String,
    key: String,
    pem: Vec<u8>,
}

impl File {
    async fn read(section: &str, name: &str, path: &Path) -> Result<Self, Error> {
        let (key, shown) = (format!("{section}.{name}"), path.display().to_string());
        match tokio::fs::read(path).await {
            Ok(pem) => Ok(Self { path: shown, key, pem }),
            Err(source) => Err(Error::Unreadable { path: shown, key, source }),
        }
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, Error> {
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.pem).collect();
        certificates.ok().filter(|found| !found.is_empty()).ok_or_else(|| self.foreign("certificate"))
    }

    fn foreign(&self, what: &'static str) -> Error {
        Error::Foreign { path: self.path.clone(), key: self.key.clone(), what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertifiedKey, generate_simple_self_signed};
    use std::path::PathBuf;

    #[tokio::test]
    async fn unusable_files_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| -> PathBuf {
            let path = directory.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let other = generate_simple_self_signed(["localhost".to_owned()]).unwrap().signing_key;
        let (cert, key) = (write("c.pem", &cert.pem()), write("k.pem", &signing_key.serialize_pem()));
        let (other, noise) = (write("o.pem", &other.serialize_pem()), write("n.pem", "noise"));
        let nowhere = directory.path().join("nowhere.pem");
        let check = async |cert: &PathBuf, key: &PathBuf, client_ca: Option<&PathBuf>, says: &str| {
            let files = Tls { cert: cert.clone(), key: key.clone(), client_ca: client_ca.cloned() };
            let said = Acceptor::read("server.grpc.tls", &files, b"h2").await.map(drop);
            let said = said.map_or_else(|error| error.to_string(), |()| String::new());
            let said = said.replace(&format!("{}/", directory.path().display()), "");
            assert!(said.starts_with(says) && said.is_empty() == says.is_empty(), "{said}");
        };
        check(&cert, &key, None, "").await;
        check(&cert, &key, Some(&cert), "").await;
        check(&nowhere, &key, None, "cannot read nowhere.pem (server.grpc.tls.cert): No such file").await;
        check(&cert, &nowhere, None, "cannot read nowhere.pem (server.grpc.tls.key): No such file").await;
        check(&cert, &key, Some(&nowhere), "cannot read nowhere.pem (server.grpc.tls.client_ca): No such file").await;
        check(&noise, &key, None, "n.pem (server.grpc.tls.cert) holds no certificate in PEM form").await;
        check(&cert, &cert, None, "c.pem (server.grpc.tls.key) holds no private key in PEM form").await;
        check(&cert, &key, Some(&key), "k.pem (server.grpc.tls.client_ca) holds no certificate in PEM form").await;
        let unusable = "the certificate, key or client_ca of server.grpc.tls cannot be used: ";
        check(&cert, &other, None, unusable).await;
    }
}
