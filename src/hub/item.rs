//! A message on its way to subscribers, with its envelopes: the bytes that are sent, one for each form.

use crate::metrics::metrics;
use crate::model::change::TenantId;
use crate::model::lsn::CommitLsn;
use crate::model::transaction::{Message, TenantMessage};
use bytes::Bytes;
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

/// A form in which messages are sent. `api::encode` makes its bytes.
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

/// The long messages that readers hold and that are not, or no longer, in the window. Readers that find the same one in the log share it, with
/// its envelopes.
#[derive(Debug, Default)]
pub(super) struct LongItems(Mutex<HashMap<(TenantId, CommitLsn, u64), Weak<Item>>>);

/// Shorter messages are not worth the search: this is about as much as is sent at a time.
pub(super) const LONG_BYTES: usize = 16 << 10;

impl LongItems {
    /// The item of a message that was read from the log.
    pub(super) fn share(&self, of: TenantMessage) -> Arc<Item> {
        if of.message.changes.len() < LONG_BYTES {
            return Item::new(of);
        }
        let key = (of.tenant.clone(), of.message.header.commit, of.message.last_step);
        let mut items = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // After a divergence the same place can have another message, and another node may have cut this one elsewhere.
        if let Some(known) = items.get(&key).and_then(Weak::upgrade).filter(|known| known.of == of) {
            return known;
        }
        if items.len() == items.capacity() {
            items.retain(|_, item| item.strong_count() > 0);
        }
        let item = Item::new(of);
        items.insert(key, Arc::downgrade(&item));
        item
    }
}

/// One envelope.
#[derive(Debug, Default)]
struct Slot {
    made: OnceLock<Bytes>,
    /// Held by the caller that makes the envelope.
    making: Mutex<()>,
    /// There was no room to keep it: each reader makes its own.
    is_not_kept: AtomicBool,
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

    /// An envelope of this item that keeps the item: as long as the envelope waits to be sent, other readers of the log find both.
    pub fn keep(self: &Arc<Self>, envelope: Bytes) -> Bytes {
        struct Kept {
            envelope: Bytes,
            _item: Arc<Item>,
        }
        impl AsRef<[u8]> for Kept {
            fn as_ref(&self) -> &[u8] {
                &self.envelope
            }
        }
        if envelope.len() < LONG_BYTES { envelope } else { Bytes::from_owner(Kept { envelope, _item: self.clone() }) }
    }

    /// The envelope, if it was made.
    pub fn made(&self, form: EnvelopeForm) -> Option<&Bytes> {
        self.slot(form).made.get()
    }

    /// The envelope. The first caller makes it, and others wait meanwhile, because they would take as long to make it. It is kept for them if
    /// `keep` agrees.
    pub(super) fn make<E>(
        &self,
        form: EnvelopeForm,
        make: impl FnOnce(&Message) -> Result<Bytes, E>,
        keep: impl FnOnce(&Bytes) -> bool,
    ) -> Result<Bytes, E> {
        let slot = self.slot(form);
        if slot.is_not_kept.load(Ordering::Relaxed) {
            return make(&self.message);
        }
        // A panic while it was made has made nothing.
        let _making = slot.making.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = slot.made.get() {
            return Ok(made.clone());
        }
        let made = make(&self.message)?;
        if keep(&made) {
            // The lock keeps others from setting it meanwhile.
            let _ = slot.made.set(made.clone());
        } else {
            slot.is_not_kept.store(true, Ordering::Relaxed);
        }
        Ok(made)
    }
}
