//! Envelopes: from the changes of a message to what a version of the API sends. An envelope is made once for each form, by the first
//! stream that needs it, and all others share the bytes ([`Hub::envelope`](crate::hub::Hub::envelope)).

pub mod base_v1;

use crate::hub::EnvelopeForm;
use crate::model::transaction::Message;
use bytes::Bytes;

/// Makes the envelopes of one form.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    /// The form.
    pub form: EnvelopeForm,
    /// From a message and its snap token.
    pub encode: fn(&Message, &str) -> Result<Bytes, Malformed>,
}

/// A change is not what the assembler encodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a change does not decode")]
pub struct Malformed;
