//! The snap tokens that clients are given.

use crate::hub::Origin;
use crate::model::lsn::{CommitTime, Xid8};
use crate::model::scope::Place;
use crate::model::snap_token::{Form, SnapToken};
use crate::model::timeline::{History, SourceId};
use crate::model::transaction::Message;
use std::sync::Arc;

/// Writes positions as tokens.
#[derive(Clone, Debug)]
pub struct Tokens {
    source: SourceId,
    history: Arc<History>,
}

impl Tokens {
    /// For positions of this source and history.
    pub fn new((source, history): &Origin) -> Self {
        Self { source: source.id(), history: history.clone() }
    }

    /// The token of a message. An id alone cannot say "inside a transaction": all messages of it but the last have the one of
    /// the transaction before, and whoever comes back with that gets them once more. Where the log has none before, the
    /// position it is.
    pub fn of_message(&self, message: &Message, form: Form, before: Option<Xid8>) -> String {
        let xid = if message.end.is_some() { Some(message.header.xid) } else { before };
        match (form, xid) {
            (Form::Permify, Some(xid)) => SnapToken::Xid(xid).to_string(),
            _ => self.write(message.reached(), message.header.commit_time),
        }
    }

    /// The token of a place, which is taken whatever form messages have.
    pub fn write(&self, place: impl Into<Place>, commit_time: CommitTime) -> String {
        let place = place.into();
        let timeline = self.history.writer_of(place.extent()).id();
        SnapToken::Position { source: self.source, timeline, place, commit_time }.to_string()
    }
}
