//! Envelopes: the encoded messages of a version of the API, made from the changes of a message. The first stream that
//! needs an envelope encodes it, once for each form, and all other streams share its bytes
//! ([`Hub::envelope`](crate::hub::Hub::envelope)).

pub mod base_v1;

use crate::hub::EnvelopeForm;
use crate::model::transaction::Message;
use bytes::Bytes;

/// The encoder of one form of envelopes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Encoder {
    pub(crate) form: EnvelopeForm,
    /// Encodes a message and its snap token.
    pub(crate) encode: fn(&Message, &str) -> Result<Bytes, Malformed>,
}

/// A change that the assembler did not encode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a change does not decode")]
pub struct Malformed;
