//! Fields of protobuf messages, for the encoders that are written by hand: lengths first, then the bytes in one pass.

use bytes::BufMut as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint};

/// Bytes of a field with a length, whose number is below 16.
pub(crate) fn field_len(content_bytes: usize) -> usize {
    1 + encoded_len_varint(content_bytes as u64) + content_bytes
}

/// Bytes of a string; proto3 leaves an empty one out.
pub(crate) fn text_len(text: &str) -> usize {
    if text.is_empty() { 0 } else { field_len(text.len()) }
}

/// Key and length of a field.
pub(crate) fn put_head(number: u32, content_bytes: usize, out: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, out);
    encode_varint(content_bytes as u64, out);
}

/// A field with these contents.
pub(crate) fn put_bytes(number: u32, content: &[u8], out: &mut Vec<u8>) {
    put_head(number, content.len(), out);
    out.put_slice(content);
}

/// A string, unless it is empty.
pub(crate) fn put_text(number: u32, text: &str, out: &mut Vec<u8>) {
    if !text.is_empty() {
        put_bytes(number, text.as_bytes(), out);
    }
}
