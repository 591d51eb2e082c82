//! A message on its way to subscribers, with its envelopes: what is sent of it, in each form that there is.

use crate::metrics::metrics;
use crate::model::transaction::{Message, TenantMessage};
use bytes::Bytes;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A form that messages are sent in. The bytes of it are made by `api::encode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EnvelopeForm {
    /// A `base.v1.WatchResponse`, as a message of gRPC.
    BaseV1Frame,
    /// The same as a line of JSON.
    BaseV1Json,
}

impl EnvelopeForm {
    pub(super) fn count_made(self) {
        match self {
            Self::BaseV1Frame => metrics().frames_made.inc(),
            Self::BaseV1Json => metrics().lines_made.inc(),
        }
    }

    /// Whether [`Transaction::bytes`](crate::model::transaction::Transaction::bytes) has counted it, made or not.
    pub(super) const fn is_counted_up_front(self) -> bool {
        matches!(self, Self::BaseV1Frame)
    }
}

/// A message, and its envelopes as far as somebody has asked for them.
#[derive(Debug)]
pub struct Item {
    of: TenantMessage,
    frame: Slot,
    json: Slot,
    /// Whether the window has it, and counts its bytes. Changes only while the window is locked.
    in_window: AtomicBool,
}

/// One envelope.
#[derive(Debug, Default)]
struct Slot {
    made: OnceLock<Bytes>,
    /// Held by whoever makes it.
    making: Mutex<()>,
}

impl Deref for Item {
    type Target = TenantMessage;

    fn deref(&self) -> &TenantMessage {
        &self.of
    }
}

impl Item {
    /// For one reader, or several that share it beside the window.
    pub(super) fn new(of: TenantMessage) -> Arc<Self> {
        Arc::new(Self::with(of, false))
    }

    /// For the window.
    pub(super) fn in_window(of: TenantMessage) -> Arc<Self> {
        Arc::new(Self::with(of, true))
    }

    /// The rest of it for a reader that has a part.
    pub(super) fn cut(&self, rest: Message) -> Arc<Self> {
        Self::new(TenantMessage { message: rest, ..self.of.clone() })
    }

    fn with(of: TenantMessage, in_window: bool) -> Self {
        Self { of, frame: Slot::default(), json: Slot::default(), in_window: AtomicBool::new(in_window) }
    }

    pub(super) fn is_in_window(&self) -> bool {
        self.in_window.load(Ordering::Relaxed)
    }

    pub(super) fn leave_window(&self) {
        self.in_window.store(false, Ordering::Relaxed);
    }

    const fn slot(&self, form: EnvelopeForm) -> &Slot {
        match form {
            EnvelopeForm::BaseV1Frame => &self.frame,
            EnvelopeForm::BaseV1Json => &self.json,
        }
    }

    /// The envelope, if it was made.
    pub fn made(&self, form: EnvelopeForm) -> Option<&Bytes> {
        self.slot(form).made.get()
    }

    /// The envelope: made by whoever asks first, while others wait, who would take as long to make it themselves. It is kept for them
    /// if `keep` agrees.
    pub(super) fn make<E>(
        &self,
        form: EnvelopeForm,
        make: impl FnOnce(&Message) -> Result<Bytes, E>,
        keep: impl FnOnce(&Bytes) -> bool,
    ) -> Result<Bytes, E> {
        let slot = self.slot(form);
        // A panic while it was made has made nothing.
        let _making = slot.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = slot.made.get() {
            return Ok(made.clone());
        }
        let made = make(&self.message)?;
        if keep(&made) {
            // Nobody else sets it meanwhile.
            let _ = slot.made.set(made.clone());
        }
        Ok(made)
    }
}
