//! The connection of `watch` and `health` to a server: address, TLS, and credentials.

use crate::access::trust::{self, Authorities, Refused};
use anyhow::{Context as _, bail};
use clap::ValueHint;
use http::Uri;
use http::uri::Authority;
use hyper_util::rt::TokioIo;
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tower_service::Service;

/// There is no flag for the token, because flags are visible to everybody who lists processes.
const TOKEN_VARIABLE: &str = "TUPLEWATCH_TOKEN";

const DEFAULT_SERVER: &str = "http://127.0.0.1:3478";

#[derive(Debug, clap::Args)]
pub(super) struct ConnectionArgs {
    /// Address of the server
    #[arg(long, default_value = DEFAULT_SERVER, value_name = "URL", value_parser = server_url, value_hint = ValueHint::Url)]
    pub(super) server: String,
    /// Certificate authority of an https server (PEM), if the system does not trust it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    ca_cert: Option<PathBuf>,
    /// Certificate to present to an https server (PEM)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// Private key of the certificate to present (PEM)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "client_cert")]
    client_key: Option<PathBuf>,
    /// File with the key or token to present, read again for each connection. Default: TUPLEWATCH_TOKEN in the
    /// environment
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    token_file: Option<PathBuf>,
}

/// Accepts a scheme, a host and a port. Any other part would be ignored, so it is refused.
fn server_url(text: &str) -> Result<String, String> {
    let is_server = |uri: &Uri| {
        let is_place = |authority: &Authority| {
            let (whole, host) = (authority.as_str(), authority.host());
            !whole.contains('@')
                && !matches!(host, "" | "[]")
                && (whole == host || authority.port_u16().is_some_and(|port| port != 0))
        };
        matches!(uri.scheme_str(), Some("http" | "https"))
            && matches!(uri.path(), "" | "/")
            && uri.query().is_none()
            && uri.authority().is_some_and(is_place)
    };
    match text.parse::<Uri>() {
        Ok(uri) if is_server(&uri) => Ok(text.to_owned()),
        _ => Err("write http://host:port or https://host:port".to_owned()),
    }
}

/// The longest wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// These windows let a server send megabytes ahead. Small windows would add latency.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

impl ConnectionArgs {
    /// The flags that were set, for another command.
    pub(super) fn flags(&self) -> Vec<String> {
        let server = (self.server != DEFAULT_SERVER).then(|| self.server.clone());
        let file = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let flags = [
            ("--server", server),
            ("--ca-cert", file(&self.ca_cert)),
            ("--client-cert", file(&self.client_cert)),
            ("--client-key", file(&self.client_key)),
            ("--token-file", file(&self.token_file)),
        ];
        flags.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?])).flatten().collect()
    }

    pub(super) fn connector(&self) -> anyhow::Result<Connector> {
        let endpoint = |url: String| -> anyhow::Result<Endpoint> {
            Ok(Endpoint::from_shared(url)?
                .connect_timeout(CONNECT_MAX)
                .http2_keep_alive_interval(Duration::from_secs(20))
                .keep_alive_timeout(Duration::from_secs(10))
                .initial_stream_window_size(STREAM_WINDOW)
                .initial_connection_window_size(CONNECTION_WINDOW))
        };
        let Some(rest) = self.server.strip_prefix("https:") else {
            return Ok(Connector { endpoint: endpoint(self.server.clone())?, tls: None });
        };
        let authorities = match &self.ca_cert {
            Some(path) => Authorities::Own(certificates("--ca-cert", path)?),
            None => Authorities::Public(system_roots()),
        };
        let identity = match (&self.client_cert, &self.client_key) {
            (Some(cert), Some(key)) => {
                let private = PrivateKeyDer::from_pem_slice(&read(key)?).ok();
                let private =
                    private.with_context(|| format!("{} (--client-key) holds no private key", key.display()))?;
                Some((certificates("--client-cert", cert)?, private))
            }
            _ => None,
        };
        let mut config =
            trust::client_config(authorities, true, identity).context("the certificates cannot be used")?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        // The connector does TLS below HTTP. With an https URL, tonic would ask for TLS of its own.
        let endpoint = endpoint(format!("http:{rest}"))?.origin(self.server.parse()?);
        Ok(Connector { endpoint, tls: Some(Tls(Arc::new(config).into())) })
    }

    /// The value of the header `authorization`. It reads the file each time, because the token may have been renewed.
    pub(super) fn authorization(&self) -> anyhow::Result<Option<AsciiMetadataValue>> {
        let (from, token) = match &self.token_file {
            Some(path) => (path.display().to_string(), Some(String::from_utf8(read(path)?))),
            None => {
                let token = std::env::var_os(TOKEN_VARIABLE).map(|token| String::from_utf8(token.into_encoded_bytes()));
                (TOKEN_VARIABLE.to_owned(), token)
            }
        };
        let Some(token) = token else { return Ok(None) };
        // The original errors would quote the token.
        let value = token.ok().and_then(|token| format!("Bearer {}", token.trim()).parse().ok());
        let mut value: AsciiMetadataValue = value.with_context(|| format!("{from} holds no token"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn certificates(flag: &str, path: &Path) -> anyhow::Result<Vec<rustls::pki_types::CertificateDer<'static>>> {
    let found = trust::certificates(&read(path)?);
    if found.is_empty() {
        bail!("{} ({flag}) holds no certificate in PEM form", path.display());
    }
    Ok(found)
}

/// The certificates that the machine trusts. Unreadable ones are skipped.
fn system_roots() -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let _ = roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    roots
}

/// The endpoint and the TLS settings, for any number of connections.
#[derive(Clone)]
pub(super) struct Connector {
    endpoint: Endpoint,
    tls: Option<Tls>,
}

impl Connector {
    /// Connects to the server.
    ///
    /// # Errors
    /// The connection failed. If the server's certificate is the reason, the causes include [`Refused`].
    pub(super) async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        match &self.tls {
            None => self.endpoint.connect().await,
            Some(tls) => self.endpoint.connect_with_connector(tls.clone()).await,
        }
    }
}

/// Connects and does the TLS handshake. rustls' own connector would not apply the rules of [`trust`].
#[derive(Clone)]
struct Tls(TlsConnector);

/// A certificate that is not trusted, with the remedy.
#[derive(Debug, thiserror::Error)]
#[error("{0}. {remedy}", remedy = .0.remedy("--ca-cert"))]
pub(super) struct Untrusted(Refused);

impl Service<Uri> for Tls {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let tls = self.0.clone();
        let connect = async move {
            // An IPv6 address has brackets only in a URL.
            let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
            let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
            let stream = TcpStream::connect((host, uri.port_u16().unwrap_or(443))).await?;
            stream.set_nodelay(true)?;
            let untrusted = |error: io::Error| match Refused::of(&error) {
                Some(refused) => io::Error::other(Untrusted(refused.clone())),
                None => error,
            };
            Ok(TokioIo::new(tls.connect(name, stream).await.map_err(untrusted)?))
        };
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        Box::pin(async move { tokio::time::timeout(CONNECT_MAX, connect).await.map_err(late)? })
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_a_scheme_a_host_and_a_port() {
        for text in ["http://127.0.0.1:3478", "https://feed.example", "http://[::1]:3478/", "HTTP://h:1"] {
            assert_eq!(server_url(text).as_deref(), Ok(text));
        }
        for text in [
            "",
            "localhost:3478",
            "ftp://h:1",
            "unix:///tmp/s",
            "http://",
            "http://:3478",
            "http://h:",
            "http://h:0",
            "http://h:99999",
            "http://h:x",
            "http://h h:1",
            "http://user@h:1",
            "http://h:1/base.v1.Watch",
            "http://h:1?tenant=t1",
            "https://",
        ] {
            assert!(server_url(text).is_err(), "{text}");
        }
    }
}
