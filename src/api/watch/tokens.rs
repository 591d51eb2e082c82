//! The snap tokens that clients are given.

use crate::hub::Origin;
use crate::model::lsn::{CommitTime, Position, Xid8};
use crate::model::snap_token::{Form, SnapToken};
use crate::model::timeline::History;
use crate::model::transaction::Message;
use std::sync::Arc;

/// Writes positions as tokens.
#[derive(Clone, Debug)]
pub struct Tokens {
    source: [u8; 8],
    history: Arc<History>,
}

impl Tokens {
    /// For positions of this source and history.
    pub fn new((source, history): &Origin) -> Self {
        Self { source: source.hash(), history: history.clone() }
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

    /// The token of a position, which is taken whatever form messages have.
    pub fn write(&self, position: Position, commit_time: CommitTime) -> String {
        let timeline = self.history.writer_of(position.extent()).hash();
        SnapToken::Position { source: self.source, timeline, position, commit_time }.to_string()
    }
}
