//! An open stream: it turns the items of a subscription into envelopes.
//!
//! A stream takes items from the hub only when its protocol has room for them, and holds memory only for messages that
//! are ready. It ends when the hub ends it or when the credentials expire, and records the reason in the metrics.

use super::{Error, Tokens};
use crate::api::encode::Encoder;
use crate::hub::{End, Hub, Item, Subscription};
use crate::metrics::{Edge, metrics};
use crate::model::lsn::{CommitLsn, Xid8};
use crate::model::snap_token::Form;
use bytes::Bytes;
use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::SystemTime;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, Sleep};

/// The number of messages for which an idle stream keeps memory.
const READY_MAX: usize = 4;

/// An open stream. Dropping it releases its resources.
pub(crate) struct Stream {
    hub: Hub,
    token_form: Form,
    subscription: Subscription,
    /// The time at which the credentials expire, and the stream must end. Messages that are ready are sent first.
    expires: Option<Pin<Box<Sleep>>>,
    ready: VecDeque<Arc<Item>>,
    before: Before,
    counted: Counted,
    _permit: OwnedSemaphorePermit,
}

pub(crate) struct Next {
    /// The encoded message.
    pub(crate) envelope: Bytes,
    /// Whether no other message is ready, and the polling task is registered for the next one.
    pub(crate) is_all: bool,
}

/// The transaction that precedes a transaction of several messages, with the commit LSN of the latter.
enum Before {
    Unknown,
    LookingUp(CommitLsn, Pin<Box<dyn Future<Output = Result<Option<Xid8>, End>> + Send>>),
    Known(CommitLsn, Option<Xid8>),
}

/// Counts an open stream until it is dropped. If it has no reason by then, the client has gone away.
struct Counted {
    edge: &'static Edge,
    /// The reason of the error that the subscriber received.
    reason: Option<&'static str>,
}

impl Counted {
    fn begin(edge: &'static Edge) -> Self {
        edge.subscribers.inc();
        Self { edge, reason: None }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.edge.subscribers.dec();
        metrics().streams_ended(self.edge.protocol, self.reason.unwrap_or("CLIENT_GONE")).inc();
    }
}

impl Stream {
    pub(super) fn new(
        hub: Hub,
        token_form: Form,
        subscription: Subscription,
        expires_at: Option<SystemTime>,
        edge: &'static Edge,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            hub,
            token_form,
            subscription,
            expires: expires_at.and_then(instant).map(|at| Box::pin(tokio::time::sleep_until(at))),
            ready: VecDeque::new(),
            before: Before::Unknown,
            counted: Counted::begin(edge),
            _permit: permit,
        }
    }

    /// Counts the stream as ended by this error, which its client receives.
    pub(crate) fn end(&mut self, error: &Error) {
        self.counted.reason = Some(error.reason().unwrap_or("INTERNAL"));
    }

    /// The number of messages that the next polls return without asking the hub.
    pub(crate) fn ready(&self) -> usize {
        self.ready.len()
    }

    /// Polls for the next message, encoded. If none is ready, it takes about `bytes` of messages from the hub, or 16
    /// times as many from the log.
    ///
    /// # Errors
    /// If the stream cannot continue. Every later call then returns the same error.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        encoder: Encoder,
        bytes: usize,
    ) -> Poll<Result<Next, Error>> {
        // The task may have been woken since these messages were taken from the hub.
        let mut is_all = false;
        loop {
            if let Some(item) = self.ready.front().cloned() {
                let envelope = ready!(self.poll_envelope(cx, &item, encoder))?;
                self.ready.pop_front();
                return Poll::Ready(Ok(Next { envelope: item.keep(envelope), is_all }));
            }
            if let Some(expires) = &mut self.expires
                && expires.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Err(Error::Expired));
            }
            // An idle stream holds no memory for messages, because there can be many idle streams.
            self.ready.shrink_to(READY_MAX);
            is_all = match ready!(self.subscription.poll_next(cx, bytes, &mut self.ready)) {
                Ok(is_all) => is_all,
                Err(end) => return Poll::Ready(Err(self.error_of(end)?)),
            };
        }
    }

    fn poll_envelope(&mut self, cx: &mut Context<'_>, item: &Item, encoder: Encoder) -> Poll<Result<Bytes, Error>> {
        let Encoder { form, encode } = encoder;
        if let Some(made) = item.made(form) {
            return Poll::Ready(Ok(made.clone()));
        }
        let before = ready!(self.poll_before(cx, item))?;
        let tokens = self.tokens()?;
        let encode = |message: &_| encode(message, &tokens.of_message(message, self.token_form, before));
        Poll::Ready(self.hub.envelope(item, form, encode).map_err(Error::Unsendable))
    }

    /// Returns the id of the transaction before, for a message that needs it for its token: one inside a transaction,
    /// if tokens have the form of transaction ids.
    fn poll_before(&mut self, cx: &mut Context<'_>, item: &Item) -> Poll<Result<Option<Xid8>, Error>> {
        let commit = item.message.header.commit;
        if self.token_form == Form::Native || item.message.end.is_some() {
            return Poll::Ready(Ok(None));
        }
        loop {
            self.before = match &mut self.before {
                Before::Known(of, before) if *of == commit => return Poll::Ready(Ok(*before)),
                Before::LookingUp(of, lookup) if *of == commit => match ready!(lookup.as_mut().poll(cx)) {
                    Ok(before) => Before::Known(commit, before),
                    Err(end) => {
                        self.before = Before::Unknown;
                        return Poll::Ready(Err(self.error_of(end)?));
                    }
                },
                _ => {
                    let hub = self.hub.clone();
                    Before::LookingUp(
                        commit,
                        Box::pin(async move { hub.transaction_before(commit).await.map_err(End::Log) }),
                    )
                }
            };
        }
    }

    fn error_of(&self, end: End) -> Result<Error, Error> {
        Ok(Error::of_end(end, self.subscription.scope(), self.tokens()?))
    }

    fn tokens(&self) -> Result<Tokens, Error> {
        // The origin of the items, even if the server has continued on another history since.
        self.subscription.origin().map(Tokens::new).ok_or(Error::NoSource)
    }
}

/// Converts to the clock of timers. `None` if the time is beyond its range.
fn instant(at: SystemTime) -> Option<Instant> {
    Instant::now().checked_add(at.duration_since(SystemTime::now()).unwrap_or_default())
}
