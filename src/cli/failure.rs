//! Explains a failed connection or call, and decides whether a retry may help.
//!
//! The libraries' descriptions of a broken connection ("transport error", "h2 protocol error") do not help a user. So
//! the text is derived from the innermost cause.

use super::connection::Untrusted;
use crate::api::grpc::status;
use rustls::AlertDescription;
use std::error::Error as StdError;
use std::io::{self, ErrorKind};
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// The wait after RESOURCE_EXHAUSTED, if the server does not name one.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

/// All alerts that TLS sends after its handshake are about the client's certificate.
const CERTIFICATE_WANTED: &str = "it asks for a certificate that it trusts: see --client-cert and --client-key";

/// The reason of a failure. In most texts the server is the implied subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// A retry may succeed, but not before `pause` is over.
    Passing { text: String, pause: Duration },
    /// A retry fails until somebody changes something.
    Lasting(String),
}

impl Failure {
    fn passing(text: impl Into<String>) -> Self {
        Self::Passing { text: text.into(), pause: Duration::ZERO }
    }

    fn lasting(text: impl Into<String>) -> Self {
        Self::Lasting(text.into())
    }

    pub(super) fn text(&self) -> &str {
        match self {
            Self::Passing { text, .. } | Self::Lasting(text) => text,
        }
    }

    /// The failure of a connection that could not be made, or broke.
    pub(super) fn of_connection(error: &(dyn StdError + 'static)) -> Self {
        let mut next = Some(error);
        while let Some(cause) = next {
            if let Some(failure) = of_cause(cause) {
                return failure;
            }
            next = cause.source();
        }
        Self::passing("the connection was lost")
    }

    /// The failure of a call that the server refused or ended.
    pub(super) fn of_status(status: &Status) -> Self {
        if is_local(status) {
            return Self::of_connection(status);
        }
        let text = words(status);
        match status.code() {
            Code::ResourceExhausted => {
                let pause = status.get_details_retry_info().and_then(|info| info.retry_delay);
                Self::Passing { text, pause: pause.unwrap_or(BUSY_PAUSE) }
            }
            Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal | Code::DeadlineExceeded => {
                Self::passing(text)
            }
            _ => Self::Lasting(text),
        }
    }
}

/// Whether the status comes from a broken connection and not from the server.
pub(super) fn is_local(status: &Status) -> bool {
    StdError::source(status).is_some()
}

/// The server's explanation. Messages that address the caller of an API are replaced by the fact alone.
fn words(status: &Status) -> String {
    let reason = status::reason(status).unwrap_or_default();
    let happened = match reason.as_str() {
        "SHUTTING_DOWN" => "the server is shutting down",
        "POSTGRES_UNREACHABLE" => "the server cannot reach PostgreSQL at the moment",
        "TRANSACTION_STILL_RUNNING" => "the transaction of the snap token is still running",
        "TOO_MANY_SUBSCRIBERS" => "the server has reached its limit of open streams (service.watch.subscribers_max)",
        "RATE_LIMITED" => "the server has reached its rate limit (server.rate_limit)",
        "ISSUER_UNREACHABLE" => "the server cannot fetch the keys of the tokens' issuer",
        "MISSING_BEARER_TOKEN" => {
            let message = status.message();
            return format!("{message}. Set --token-file FILE, or TUPLEWATCH_TOKEN in the environment");
        }
        // Sent by a peer that is not a gRPC server, such as a proxy.
        _ if status.message().starts_with("grpc-status header missing") => {
            let http = status.message().rsplit(' ').next().unwrap_or_default();
            return format!("the answer is not from tuplewatch (HTTP status {http}): is this the port of gRPC?");
        }
        _ if status.message().is_empty() => "the server gave no reason",
        _ => status.message(),
    };
    happened.to_owned()
}

fn of_cause(cause: &(dyn StdError + 'static)) -> Option<Failure> {
    if let Some(error) = cause.downcast_ref::<io::Error>() {
        return Some(of_io(error));
    }
    if let Some(untrusted) = cause.downcast_ref::<Untrusted>() {
        return Some(Failure::lasting(untrusted.to_string()));
    }
    if let Some(error) = cause.downcast_ref::<rustls::Error>() {
        return Some(of_tls(error));
    }
    if let Some(error) = cause.downcast_ref::<h2::Error>() {
        return Some(error.get_io().map_or_else(|| of_http2(error), of_io));
    }
    // The transport does not export the type of this error.
    let is_not_http2 = cause.to_string().contains("HTTP/2 was not negotiated");
    is_not_http2.then(|| Failure::lasting("it does not speak gRPC: is this the port of gRPC?"))
}

fn of_io(error: &io::Error) -> Failure {
    // `source` skips the error inside an io::Error.
    if let Some(failure) = error.get_ref().and_then(|inner| of_cause(inner)) {
        return failure;
    }
    // HTTP/2 keeps only the text of a TLS error, and a failed name lookup never has more than a text.
    let text = error.to_string();
    if text.contains("received fatal alert") {
        return Failure::lasting(CERTIFICATE_WANTED);
    }
    if text.contains("failed to lookup address") {
        return Failure::passing("its name cannot be resolved");
    }
    Failure::passing(match error.kind() {
        ErrorKind::ConnectionRefused => "Connection refused",
        ErrorKind::ConnectionReset
        | ErrorKind::ConnectionAborted
        | ErrorKind::BrokenPipe
        | ErrorKind::UnexpectedEof => "the connection was closed",
        ErrorKind::TimedOut => "no answer in time",
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "the network has no route to it",
        kind => return Failure::passing(kind.to_string()),
    })
}

fn of_tls(error: &rustls::Error) -> Failure {
    match error {
        rustls::Error::InvalidCertificate(error) => {
            Failure::lasting(format!("the server's certificate is not trusted: {error}"))
        }
        // The peer did not send a TLS record.
        rustls::Error::InvalidMessage(_) => Failure::lasting("it does not speak TLS: write http:// instead of https://"),
        rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol) => {
            Failure::lasting("it does not speak gRPC: is this the port of gRPC?")
        }
        rustls::Error::AlertReceived(
            AlertDescription::CertificateRequired
            | AlertDescription::NoCertificate
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            // Before TLS 1.3 this alert also means a missing certificate.
            | AlertDescription::HandshakeFailure,
        ) => Failure::lasting(CERTIFICATE_WANTED),
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion) | rustls::Error::PeerIncompatible(_) => {
            Failure::lasting("it supports no TLS version that tuplewatch supports")
        }
        _ => Failure::passing("the TLS handshake failed"),
    }
}

fn of_http2(error: &h2::Error) -> Failure {
    // The very first bytes were invalid. TLS and HTTP/1 look like impossible frames.
    let is_other_protocol =
        !error.is_remote() && matches!(error.reason(), Some(h2::Reason::FRAME_SIZE_ERROR | h2::Reason::PROTOCOL_ERROR));
    if is_other_protocol {
        return Failure::lasting(
            "it does not speak gRPC without TLS: write https:// if it uses TLS, and check that this is the port of gRPC",
        );
    }
    Failure::passing("the connection was closed")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tonic_types::ErrorDetails;

    fn passing(text: &str) -> Failure {
        Failure::passing(text)
    }

    #[test]
    fn failures_are_explained_by_their_cause() {
        let tls = |error| io::Error::new(ErrorKind::InvalidData, error);
        for (error, is_lasting, says) in [
            (io::Error::from(ErrorKind::ConnectionRefused), false, "Connection refused"),
            (io::Error::from_raw_os_error(111), false, "Connection refused"),
            (io::Error::from(ErrorKind::UnexpectedEof), false, "the connection was closed"),
            (io::Error::from(ErrorKind::TimedOut), false, "no answer in time"),
            (
                io::Error::other("failed to lookup address information: Name or service not known"),
                false,
                "its name cannot be resolved",
            ),
            (
                tls(rustls::Error::InvalidCertificate(rustls::CertificateError::BadSignature)),
                true,
                "the server's certificate is not trusted",
            ),
            (
                tls(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)),
                true,
                "does not speak TLS",
            ),
            (tls(rustls::Error::AlertReceived(AlertDescription::CertificateRequired)), true, "--client-cert"),
            (io::Error::new(ErrorKind::InvalidData, "received fatal alert: UnknownCA"), true, "--client-cert"),
            (tls(rustls::Error::HandshakeNotComplete), false, "the TLS handshake failed"),
        ] {
            let mut status = Status::unknown("transport error");
            status.set_source(Arc::new(error));
            let failure = Failure::of_status(&status);
            assert_eq!(matches!(failure, Failure::Lasting(_)), is_lasting, "{failure:?}");
            assert!(failure.text().contains(says), "{failure:?}");
        }
    }

    #[test]
    fn statuses_are_transient_or_lasting() {
        for code in [Code::Unavailable, Code::Unknown, Code::Cancelled, Code::Internal, Code::DeadlineExceeded] {
            assert_eq!(Failure::of_status(&Status::new(code, "text")), passing("text"), "{code:?}");
        }
        for code in [
            Code::Unauthenticated,
            Code::PermissionDenied,
            Code::InvalidArgument,
            Code::NotFound,
            Code::Unimplemented,
            Code::FailedPrecondition,
            Code::OutOfRange,
        ] {
            assert_eq!(Failure::of_status(&Status::new(code, "text")), Failure::Lasting("text".into()), "{code:?}");
        }
        let busy = |details| Failure::of_status(&Status::with_error_details(Code::ResourceExhausted, "text", details));
        let pause = |pause| Failure::Passing { text: "text".into(), pause };
        assert_eq!(busy(ErrorDetails::new()), pause(BUSY_PAUSE));
        let retry_delay = Duration::from_millis(250);
        assert_eq!(busy(ErrorDetails::with_retry_info(Some(retry_delay))), pause(retry_delay));
        let proxy = Status::unavailable("grpc-status header missing, mapped from HTTP status code 503");
        assert!(Failure::of_status(&proxy).text().starts_with("the answer is not from tuplewatch (HTTP status 503)"));
        assert_eq!(
            Failure::of_status(&crate::api::watch::Error::ShuttingDown.into()),
            passing("the server is shutting down")
        );
    }
}
