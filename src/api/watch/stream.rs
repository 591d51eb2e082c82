//! An open stream: from the items of a subscription to their envelopes.

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

/// Messages that an idle stream keeps room for.
const READY_MAX: usize = 4;

/// See the module. Dropped, it gives back all it holds.
pub struct Stream {
    hub: Hub,
    token_form: Form,
    subscription: Subscription,
    /// When it must end. What is ready is sent before.
    expires: Option<Pin<Box<Sleep>>>,
    ready: VecDeque<Arc<Item>>,
    before: Before,
    counted: Counted,
    _permit: OwnedSemaphorePermit,
}

/// The next message of a stream.
pub struct Next {
    /// What is sent of it.
    pub envelope: Bytes,
    /// There are no others behind those that are ready, and whoever polled is woken when there are.
    pub is_all: bool,
}

/// The transaction before one that is in several messages, by its commit LSN.
enum Before {
    Unknown,
    LookedUp(CommitLsn, Pin<Box<dyn Future<Output = Result<Option<Xid8>, End>> + Send>>),
    Known(CommitLsn, Option<Xid8>),
}

/// A stream, among those that are open until it is dropped. Where nobody has said why it ended, the client has gone.
struct Counted {
    edge: &'static Edge,
    /// Of the error that the subscriber was told.
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
    pub fn end(&mut self, error: &Error) {
        self.counted.reason = Some(error.reason().unwrap_or("INTERNAL"));
    }

    /// Messages that the next polls return without asking the hub.
    pub fn ready(&self) -> usize {
        self.ready.len()
    }

    /// The next message, encoded. Where none is ready, about `bytes` of messages are taken from the hub, or 16 times as many from the
    /// log.
    ///
    /// # Errors
    /// Where there is no going on; the same again on every later call.
    pub fn poll_next(&mut self, cx: &mut Context<'_>, encoder: Encoder, bytes: usize) -> Poll<Result<Next, Error>> {
        // Whoever polled when those that are ready were taken may have been woken since.
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
            // Held only while there is something in it: idle streams are many.
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

    /// What the token of a message says that is not the last of its transaction, where it has to be a transaction's.
    fn poll_before(&mut self, cx: &mut Context<'_>, item: &Item) -> Poll<Result<Option<Xid8>, Error>> {
        let commit = item.message.header.commit;
        if self.token_form == Form::Native || item.message.end.is_some() {
            return Poll::Ready(Ok(None));
        }
        loop {
            self.before = match &mut self.before {
                Before::Known(of, before) if *of == commit => return Poll::Ready(Ok(*before)),
                Before::LookedUp(of, lookup) if *of == commit => match ready!(lookup.as_mut().poll(cx)) {
                    Ok(before) => Before::Known(commit, before),
                    Err(end) => {
                        self.before = Before::Unknown;
                        return Poll::Ready(Err(self.error_of(end)?));
                    }
                },
                _ => {
                    let hub = self.hub.clone();
                    Before::LookedUp(
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
        // Of the batch, and not of what the server may have gone on to since.
        self.subscription.origin().map(Tokens::new).ok_or(Error::NoSource)
    }
}

/// The same moment on the clock that timers go by. `None`: beyond all times.
fn instant(at: SystemTime) -> Option<Instant> {
    Instant::now().checked_add(at.duration_since(SystemTime::now()).unwrap_or_default())
}
