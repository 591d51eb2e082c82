//! Where a server is, and how to get in.

use anyhow::Context as _;
use clap::ValueHint;
use http::uri::Authority;
use std::path::PathBuf;
use std::time::Duration;
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Uri};

/// Not a flag: those are seen by everybody who lists processes.
const TOKEN_VARIABLE: &str = "TUPLEWATCH_TOKEN";

const DEFAULT_SERVER: &str = "http://127.0.0.1:3478";

#[derive(Debug, clap::Args)]
pub(super) struct ConnectionArgs {
    /// Where the server is
    #[arg(long, default_value = DEFAULT_SERVER, value_name = "URL", value_parser = server_url, value_hint = ValueHint::Url)]
    pub(super) server: String,
    /// Certificate authority of an https server (PEM), where it is none of the system's
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    ca_cert: Option<PathBuf>,
    /// Certificate to present to an https server (PEM)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "client_key")]
    client_cert: Option<PathBuf>,
    /// Private key of the certificate to present (PEM)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "client_cert")]
    client_key: Option<PathBuf>,
    /// File with the key or token to present; read again for each connection. Without it, TUPLEWATCH_TOKEN in the environment
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    token_file: Option<PathBuf>,
}

/// Scheme, host and port, and nothing that would be passed over.
fn server_url(text: &str) -> Result<String, String> {
    let is_server = |uri: &Uri| {
        let is_place = |authority: &Authority| {
            let (whole, host) = (authority.as_str(), authority.host());
            !matches!(host, "" | "[]") && (whole == host || authority.port_u16().is_some_and(|port| port != 0))
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

/// Windows that let a server send megabytes ahead; small ones cost latency.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

impl ConnectionArgs {
    /// What was given of it, for another command.
    pub(super) fn flags(&self) -> Vec<String> {
        let server = (self.server != DEFAULT_SERVER).then(|| self.server.clone());
        let file = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
        let given = [
            ("--server", server),
            ("--ca-cert", file(&self.ca_cert)),
            ("--client-cert", file(&self.client_cert)),
            ("--client-key", file(&self.client_key)),
            ("--token-file", file(&self.token_file)),
        ];
        given.into_iter().filter_map(|(flag, value)| Some([flag.to_owned(), value?])).flatten().collect()
    }

    pub(super) fn endpoint(&self) -> anyhow::Result<Endpoint> {
        let endpoint = Endpoint::from_shared(self.server.clone())?
            .connect_timeout(Duration::from_secs(5))
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(10))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        if !self.server.starts_with("https:") {
            return Ok(endpoint);
        }
        let tls = match &self.ca_cert {
            Some(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?)),
            None => ClientTlsConfig::new().with_enabled_roots(),
        };
        let tls = match (&self.client_cert, &self.client_key) {
            (Some(cert), Some(key)) => tls.identity(Identity::from_pem(read(cert)?, read(key)?)),
            _ => tls,
        };
        endpoint.tls_config(tls).context("the certificates cannot be used")
    }

    /// What to send as `authorization`. It is the present content of the file, which somebody may renew.
    pub(super) fn authorization(&self) -> anyhow::Result<Option<AsciiMetadataValue>> {
        let (from, token) = match &self.token_file {
            Some(path) => (path.display().to_string(), Some(String::from_utf8(read(path)?))),
            None => {
                let token = std::env::var_os(TOKEN_VARIABLE).map(|token| String::from_utf8(token.into_encoded_bytes()));
                (TOKEN_VARIABLE.to_owned(), token)
            }
        };
        let Some(token) = token else { return Ok(None) };
        // The errors would quote the token.
        let value = token.ok().and_then(|token| format!("Bearer {}", token.trim()).parse().ok());
        let mut value: AsciiMetadataValue = value.with_context(|| format!("{from} holds no token"))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

fn read(path: &std::path::Path) -> anyhow::Result<Vec<u8>> {
    std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))
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
