//! Envelopes: from the changes of a message to what a version of the API sends. A message is encoded once for each version, by the first
//! stream that needs it, and all others share the bytes ([`Item`](crate::hub::Item)).

pub mod base_v1;
