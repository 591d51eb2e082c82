//! Fields of protobuf messages, for the hand-written encoders. They compute all lengths first, then write the bytes in
//! one pass.

use bytes::BufMut as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

/// The bytes of a length-delimited field whose number is below 16.
pub(crate) fn field_len(content_bytes: usize) -> usize {
    1 + encoded_len_varint(content_bytes as u64) + content_bytes
}

/// The bytes of a string field. proto3 omits an empty one.
pub(crate) fn text_len(text: &str) -> usize {
    if text.is_empty() { 0 } else { field_len(text.len()) }
}

/// Writes the key and the length of a field.
pub(crate) fn put_head(number: u32, content_bytes: usize, out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(content_bytes as u64, out);
}

/// Writes a field with this content.
pub(crate) fn put_bytes(number: u32, content: &[u8], out: &mut Vec<u8>) {
    put_head(number, content.len(), out);
    out.put_slice(content);
}

/// Writes a string field, unless the string is empty.
pub(crate) fn put_text(number: u32, text: &str, out: &mut Vec<u8>) {
    if !text.is_empty() {
        put_bytes(number, text.as_bytes(), out);
    }
}
