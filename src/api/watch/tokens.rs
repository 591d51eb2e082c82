//! The snap tokens that clients receive: the conversion of positions into text.
//!
//! Messages have tokens in the configured form. Starts and errors always have native tokens, because an id of a
//! transaction can only denote its end. The bytes of tokens are defined in [`crate::model::snap_token`].

use crate::hub::Origin;
use crate::model::lsn::{CommitTime, Xid8};
use crate::model::scope::Place;
use crate::model::snap_token::{Form, SnapToken};
use crate::model::timeline::{History, SourceId};
use crate::model::transaction::Message;
use std::sync::Arc;

/// Writes positions as tokens.
#[derive(Clone, Debug)]
pub(crate) struct Tokens {
    source: SourceId,
    history: Arc<History>,
}

impl Tokens {
    /// A writer for positions of this source and history.
    pub(crate) fn new((source, history): &Origin) -> Self {
        Self { source: source.id(), history: history.clone() }
    }

    /// Returns the token of a message. A transaction id cannot denote a place inside a transaction. In that form, all
    /// messages of a transaction except the last carry the id of the transaction before, and a client that resumes with
    /// it receives them again. If the log contains no transaction before, the token is the position.
    pub(crate) fn of_message(&self, message: &Message, form: Form, before: Option<Xid8>) -> String {
        let xid = if message.end.is_some() { Some(message.header.xid) } else { before };
        match (form, xid) {
            (Form::Permify, Some(xid)) => SnapToken::Xid(xid).to_string(),
            _ => self.write(message.reached(), message.header.commit_time),
        }
    }

    /// Returns the native token of a place, whatever the form of the messages' tokens.
    pub(crate) fn write(&self, place: impl Into<Place>, commit_time: CommitTime) -> String {
        let place = place.into();
        let timeline = self.history.writer_of(place.extent()).id();
        SnapToken::Position { source: self.source, timeline, place, commit_time }.to_string()
    }
}
