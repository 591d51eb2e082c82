//! A subscriber's stream.

use super::change::Change;
use super::wait::within;
use prost::Message as _;
use std::time::Duration;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status, Streaming};
use tonic_types::StatusExt;
use tuplewatch::api::grpc::proto::watch_client::WatchClient;
use tuplewatch::api::grpc::proto::{WatchRequest, WatchResponse};

/// An open stream of one tenant's changes.
pub(crate) struct Stream {
    responses: Streaming<WatchResponse>,
    start_token: String,
    may_be_empty: bool,
}

/// One message of a stream.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) token: String,
    pub(crate) changes: Vec<Change>,
    /// On the wire.
    pub(crate) bytes: usize,
}

impl Stream {
    /// Opens a stream. Returns with the response headers, when the start is fixed.
    pub(crate) async fn open(endpoint: &Endpoint, tenant: &str, token: &str) -> Result<Self, Status> {
        let channel = endpoint.connect().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Self::open_on(channel, tenant, token).await
    }

    pub(crate) async fn open_on(channel: Channel, tenant: &str, token: &str) -> Result<Self, Status> {
        Self::open_as("", channel, tenant, token).await
    }

    /// With this `authorization` header, if it is not empty.
    pub(crate) async fn open_as(
        authorization: &str,
        channel: Channel,
        tenant: &str,
        token: &str,
    ) -> Result<Self, Status> {
        let request = WatchRequest { tenant_id: tenant.to_owned(), snap_token: token.to_owned() };
        let mut request = Request::new(request);
        if !authorization.is_empty() {
            request.metadata_mut().insert("authorization", authorization.parse().unwrap());
        }
        let response = WatchClient::new(channel).watch(request).await?;
        let start_token = response.metadata().get("snap-token").map(|token| token.to_str().unwrap().to_owned());
        let start_token = start_token.unwrap_or_default();
        Ok(Self { responses: response.into_inner(), start_token, may_be_empty: false })
    }

    /// The token that resumes from the start of the stream.
    pub(crate) fn start_token(&self) -> &str {
        &self.start_token
    }

    /// Accepts messages without changes, which a mapping with a table of transactions causes.
    pub(crate) fn with_empty(self) -> Self {
        Self { may_be_empty: true, ..self }
    }

    /// The next message, or the status at the end. A stream never ends without a status.
    pub(crate) async fn try_next(&mut self) -> Result<Message, Status> {
        let Some(response) = self.responses.message().await? else { panic!("a stream ended without a status") };
        let bytes = response.encoded_len();
        let changes = response.changes.expect("a response with changes");
        assert!(self.may_be_empty || !changes.tuple_changes.is_empty(), "a message without changes");
        assert!(!changes.snap_token.is_empty(), "a message without a token");
        let decoded = changes.tuple_changes.into_iter().map(Change::decode).collect();
        Ok(Message { token: changes.snap_token, changes: decoded, bytes })
    }

    pub(crate) async fn next(&mut self) -> Message {
        match within("the next message", self.try_next()).await {
            Ok(message) => message,
            Err(status) => panic!("the stream ended: {status:?}"),
        }
    }

    /// The next message, which must have exactly this change.
    pub(crate) async fn expect(&mut self, change: Change) -> Message {
        let message = self.next().await;
        assert_eq!(message.changes, [change]);
        message
    }

    /// All messages up to and including the one with this change.
    pub(crate) async fn up_to(&mut self, last: &Change) -> Vec<Message> {
        let mut messages = Vec::new();
        loop {
            let message = self.next().await;
            let is_last = message.changes.contains(last);
            messages.push(message);
            if is_last {
                return messages;
            }
        }
    }

    /// The remaining messages, and the status at the end.
    pub(crate) async fn ending(&mut self) -> (Vec<Message>, Status) {
        let mut messages = Vec::new();
        loop {
            match within("the stream ends", self.try_next()).await {
                Ok(message) => messages.push(message),
                Err(status) => return (messages, status),
            }
        }
    }

    /// Fails if there is a message. To be called after an event that would cause one: the short wait is only for its way through the
    /// sockets.
    pub(crate) async fn expect_silence(&mut self) {
        if let Ok(next) = tokio::time::timeout(Duration::from_millis(200), self.try_next()).await {
            panic!("unexpected message: {next:?}");
        }
    }
}

/// All changes of these messages.
pub(crate) fn changes(messages: &[Message]) -> Vec<Change> {
    messages.iter().flat_map(|message| message.changes.iter().cloned()).collect()
}

/// Code and `ErrorInfo.reason` of a refusal.
pub(crate) fn reason(status: &Status) -> (Code, String) {
    let details = status.get_error_details();
    let info = details.error_info();
    if let Some(info) = info {
        assert_eq!(info.domain, "tuplewatch");
    }
    (status.code(), info.map(|info| info.reason.clone()).unwrap_or_default())
}

/// A value of `ErrorInfo.metadata`.
pub(crate) fn metadata(status: &Status, key: &str) -> String {
    optional_metadata(status, key).unwrap_or_else(|| panic!("no {key} in {status:?}"))
}

/// A value of `ErrorInfo.metadata`, if it is there.
pub(crate) fn optional_metadata(status: &Status, key: &str) -> Option<String> {
    let details = status.get_error_details();
    details.error_info().and_then(|info| info.metadata.get(key)).cloned()
}
