//! A `WatchResponse` as a gRPC message: a "Length-Prefixed-Message" of gRPC over HTTP/2.
//!
//! | bytes | content |
//! | --- | --- |
//! | 1 | 0: not compressed |
//! | 4 | length of the rest, big-endian |
//! | | the response |
//! | | field 15, the padding of a short response |
//!
//! Short messages are padded so that no DATA frame is short. For every short frame that waits to be read, an h2 client
//! charges the connection 256 bytes less the length of the frame, and it closes the connection when the charges reach
//! half of its window. Frames of more than 170 bytes fill the window before that, and then flow control makes the
//! stream wait.

use super::put_response;
use crate::api::encode::{Encoder, Malformed};
use crate::hub::EnvelopeForm;
use crate::model::transaction::Message;
use bytes::Bytes;
use prost::encoding::{WireType, encode_key, encode_varint};

pub(crate) const FRAME: Encoder = Encoder { form: EnvelopeForm::BaseV1Frame, encode };

/// The length to which frames are padded, see the module. It is below 256, the length from which h2 writes each frame
/// separately.
pub(crate) const BYTES_MIN: usize = 192;
const PREFIX_BYTES: usize = 5;
/// The unknown field of `WatchResponse` that pads short ones. Clients skip unknown fields.
const PADDING: u32 = 15;
/// The key and the length of the padding take no more.
const PADDING_HEAD_BYTES: usize = 3;

fn encode(message: &Message, snap_token: &str) -> Result<Bytes, Malformed> {
    let mut frame = vec![0; PREFIX_BYTES];
    put_response(snap_token, &message.changes, &mut frame)?;
    let missing = BYTES_MIN.saturating_sub(frame.len());
    if missing > 0 {
        frame.reserve_exact(PADDING_HEAD_BYTES + missing);
        encode_key(PADDING, WireType::LengthDelimited, &mut frame);
        encode_varint(missing as u64, &mut frame);
        frame.resize(frame.len() + missing, 0);
    }
    if let Some(([_, length @ ..], response)) = frame.split_first_chunk_mut::<PREFIX_BYTES>() {
        // Far below 4 GiB, because changes are limited.
        *length = u32::try_from(response.len()).unwrap_or(u32::MAX).to_be_bytes();
    }
    Ok(frame.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::grpc::proto;
    use crate::model::lsn::{CommitLsn, CommitTime, EndLsn, Lsn, Xid8};
    use crate::model::transaction::{Header, MessageBuilder};
    use prost::Message as _;

    #[test]
    fn no_frame_is_short() {
        let header = Header { commit: CommitLsn(Lsn(1)), xid: Xid8(1), commit_time: CommitTime(0) };
        for change_bytes in 0..300 {
            let mut builder = MessageBuilder::default();
            // An unknown field of DataChanges can have any length.
            let mut change = Vec::new();
            prost::encoding::bytes::encode(9, &vec![1; change_bytes], &mut change);
            builder.push(1, &change, change.len());
            let message = builder.finish(header, Some(EndLsn(Lsn(2))));
            let frame = encode(&message, "token").unwrap();
            assert!(frame.len() >= BYTES_MIN, "{}", frame.len());
            let (prefix, response) = frame.split_at(PREFIX_BYTES);
            assert_eq!(prefix, [&[0][..], &u32::try_from(response.len()).unwrap().to_be_bytes()].concat());
            let decoded = proto::WatchResponse::decode(response).unwrap();
            assert_eq!(decoded.changes.unwrap().snap_token, "token");
        }
    }
}
