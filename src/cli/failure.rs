//! Why a server does not do what a command asks of it, in words, and whether it is worth trying again.
//!
//! What libraries say of a broken connection ("transport error", "h2 protocol error") is of no use to a reader, so that it is
//! told by its cause.

use super::connection::Untrusted;
use crate::api::grpc::status;
use rustls::AlertDescription;
use std::error::Error as StdError;
use std::io::{self, ErrorKind};
use std::time::Duration;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// The pause of who is one too many, where the server does not say how long.
const BUSY_PAUSE: Duration = Duration::from_secs(1);

/// Of the alerts of TLS after its handshake, all are about the client's certificate.
const CERTIFICATE_WANTED: &str = "it asks for a certificate that it trusts: see --client-cert and --client-key";

/// Why there is no answer, or none that helps. The text has no subject where it is the server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// The same may go well in a moment, but not before `pause`.
    Passing { text: String, pause: Duration },
    /// It goes the same way until somebody changes something.
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

    /// Of a connection that cannot be made, or broke.
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

    /// Of a call that was refused, or ended.
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

/// Whether the status was made here, of a connection that broke, and did not come from the server.
pub(super) fn is_local(status: &Status) -> bool {
    StdError::source(status).is_some()
}

/// What the server says; where it tells an API's caller what to do, only what happened.
fn words(status: &Status) -> String {
    let reason = status::reason(status).unwrap_or_default();
    let happened = match reason.as_str() {
        "SHUTTING_DOWN" => "the server is shutting down",
        "POSTGRES_UNREACHABLE" => "the server cannot ask PostgreSQL at the moment",
        "TRANSACTION_STILL_RUNNING" => "the transaction of the snap token is still running",
        "TOO_MANY_SUBSCRIBERS" => "the server has as many streams as it may (service.watch.subscribers_max)",
        "RATE_LIMITED" => "the server gets more requests than it may take (server.rate_limit)",
        "ISSUER_UNREACHABLE" => "the server cannot fetch the keys of the tokens' issuer",
        "MISSING_BEARER_TOKEN" => {
            let message = status.message();
            return format!(
                "{message}. Here it is taken from --token-file FILE, or TUPLEWATCH_TOKEN in the environment"
            );
        }
        // From something that is no gRPC server, like a proxy.
        _ if status.message().starts_with("grpc-status header missing") => {
            let http = status.message().rsplit(' ').next().unwrap_or_default();
            return format!("the answer is not from tuplewatch (HTTP status {http}): is this the port of gRPC?");
        }
        _ if status.message().is_empty() => "the server says no more",
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
    // The transport keeps the type of this one to itself.
    let is_not_http2 = cause.to_string().contains("HTTP/2 was not negotiated");
    is_not_http2.then(|| Failure::lasting("it does not speak gRPC: is this the port of gRPC?"))
}

fn of_io(error: &io::Error) -> Failure {
    // `source` passes over what an io::Error was made of.
    if let Some(failure) = error.get_ref().and_then(|inner| of_cause(inner)) {
        return failure;
    }
    // HTTP/2 keeps of an error of TLS no more than its text, and a name that is not found never was more than that.
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
        ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable => "the network has no way to it",
        kind => return Failure::passing(kind.to_string()),
    })
}

fn of_tls(error: &rustls::Error) -> Failure {
    match error {
        rustls::Error::InvalidCertificate(error) => {
            Failure::lasting(format!("the server's certificate is not trusted: {error}"))
        }
        // What came is no record of TLS.
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
            // Before TLS 1.3 this also stands for a certificate that is missing.
            | AlertDescription::HandshakeFailure,
        ) => Failure::lasting(CERTIFICATE_WANTED),
        rustls::Error::AlertReceived(AlertDescription::ProtocolVersion) | rustls::Error::PeerIncompatible(_) => {
            Failure::lasting("it speaks no version of TLS that is spoken here")
        }
        _ => Failure::passing("the TLS handshake failed"),
    }
}

fn of_http2(error: &h2::Error) -> Failure {
    // We found fault with the very first bytes: TLS and HTTP/1 look like impossible frames.
    let is_other_protocol =
        !error.is_remote() && matches!(error.reason(), Some(h2::Reason::FRAME_SIZE_ERROR | h2::Reason::PROTOCOL_ERROR));
    if is_other_protocol {
        return Failure::lasting(
            "it does not speak gRPC without TLS: write https:// if it has a certificate, and the port of gRPC",
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
    fn causes_are_named_in_our_own_words() {
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
    fn a_status_is_either_transient_or_lasting() {
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
        let told = Duration::from_millis(250);
        assert_eq!(busy(ErrorDetails::with_retry_info(Some(told))), pause(told));
        let proxy = Status::unavailable("grpc-status header missing, mapped from HTTP status code 503");
        assert!(Failure::of_status(&proxy).text().starts_with("the answer is not from tuplewatch (HTTP status 503)"));
        assert_eq!(Failure::of_status(&status::shutting_down()), passing("the server is shutting down"));
    }
}
