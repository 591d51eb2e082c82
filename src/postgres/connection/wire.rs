//! The stream of bytes to an address, with TLS if it is requested.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject as _};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::access::trust::{self, Authorities, Refused};

/// The parameters of `database.uri` for TLS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tls {
    pub(super) mode: SslMode,
    /// The authorities of the server's certificate. `None` for Mozilla's.
    pub(super) root_cert: Option<PathBuf>,
    /// The certificate and the key of the client.
    pub(super) identity: Option<(PathBuf, PathBuf)>,
}

/// The modes of libpq, without `allow`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SslMode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    pub(super) const fn verifies(self) -> bool {
        matches!(self, Self::VerifyCa | Self::VerifyFull)
    }
}

/// A failure to establish TLS.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the server does not support TLS")]
    NotOffered,
    #[error("'{0}' is not a name that a certificate can contain")]
    HostName(String),
    #[error(transparent)]
    File(#[from] FileError),
    /// The server's certificate is refused.
    #[error(transparent)]
    Refused(Refused),
    /// Any other failure, of either side.
    #[error("the TLS handshake failed: {0}")]
    Handshake(#[source] io::Error),
}

/// A failure to use the files that `database.uri` names. `setting` is the parameter.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error("cannot read {} ({setting}): {source}", path.display())]
    Read { setting: &'static str, path: PathBuf, source: io::Error },
    #[error("{} ({setting}) contains no certificate in PEM form", path.display())]
    NoCertificate { setting: &'static str, path: PathBuf },
    #[error("{} (sslkey) contains no key", path.display())]
    NoKey { path: PathBuf, source: pem::Error },
    #[error("sslcert and sslkey cannot be used: {0}")]
    Identity(#[source] rustls::Error),
}

/// Bytes in both directions.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Unpin + Send + Sync {
    /// The TCP socket, if the bytes go over TCP.
    fn tcp(&self) -> Option<BorrowedFd<'_>>;
}

impl Duplex for TcpStream {
    fn tcp(&self) -> Option<BorrowedFd<'_>> {
        Some(self.as_fd())
    }
}

impl Duplex for TlsStream<TcpStream> {
    fn tcp(&self) -> Option<BorrowedFd<'_>> {
        self.get_ref().0.tcp()
    }
}

impl Duplex for UnixStream {
    fn tcp(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// A connection of any kind.
pub(super) type Wire = Box<dyn Duplex>;

/// Asks the server for TLS, and performs the handshake. `host` is the name or the address for which the certificate
/// must be valid.
pub(super) async fn upgrade(mut stream: TcpStream, tls: &Tls, host: &str) -> Result<Wire, Error> {
    if tls.mode == SslMode::Disable {
        return Ok(Box::new(stream));
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await.map_err(Error::Handshake)?;
    // Read exactly one byte: bytes that a man in the middle sends after it must not become a part of the encrypted
    // stream.
    match stream.read_u8().await.map_err(Error::Handshake)? {
        b'S' => {}
        _ if tls.mode == SslMode::Prefer => return Ok(Box::new(stream)),
        _ => return Err(Error::NotOffered),
    }
    let name = ServerName::try_from(host.to_owned()).map_err(|_| Error::HostName(host.to_owned()))?;
    let connected = TlsConnector::from(Arc::new(tls.config().await?)).connect(name, stream).await;
    match connected {
        Ok(stream) => Ok(Box::new(stream)),
        Err(error) => Err(Refused::of(&error).cloned().map_or_else(|| Error::Handshake(error), Error::Refused)),
    }
}

impl Tls {
    /// Reads the files for each connection, so that the next one uses a renewed certificate.
    async fn config(&self) -> Result<rustls::ClientConfig, FileError> {
        let authorities = match &self.root_cert {
            _ if !self.mode.verifies() => Authorities::Anybody,
            None => Authorities::Public(RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() }),
            Some(path) => Authorities::Own(certificates("sslrootcert", path).await?),
        };
        let identity = match &self.identity {
            None => None,
            Some((cert, key)) => {
                let pem = read("sslkey", key).await?;
                let private = PrivateKeyDer::from_pem_slice(&pem);
                let private = private.map_err(|source| FileError::NoKey { path: key.clone(), source })?;
                Some((certificates("sslcert", cert).await?, private))
            }
        };
        trust::client_config(authorities, self.mode == SslMode::VerifyFull, identity).map_err(FileError::Identity)
    }
}

async fn certificates(setting: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let found = trust::certificates(&read(setting, path).await?);
    if found.is_empty() {
        return Err(FileError::NoCertificate { setting, path: path.to_owned() });
    }
    Ok(found)
}

async fn read(setting: &'static str, path: &Path) -> Result<Vec<u8>, FileError> {
    tokio::fs::read(path).await.map_err(|source| FileError::Read { setting, path: path.to_owned(), source })
}
