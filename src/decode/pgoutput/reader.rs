//! A cursor over untrusted bytes that checks every read.

use super::Error;

#[derive(Clone, Debug)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(super) const fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(super) const fn rest(&self) -> &'a [u8] {
        self.rest
    }

    /// The next `length` bytes. `what` names them in the error.
    pub(super) fn bytes(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], Error> {
        let (head, tail) = self.rest.split_at_checked(length).ok_or(Error::Truncated(what))?;
        self.rest = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        let (head, tail) = self.rest.split_first_chunk().ok_or(Error::Truncated(what))?;
        self.rest = tail;
        Ok(*head)
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, Error> {
        self.array(what).map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, Error> {
        self.array(what).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, Error> {
        self.array(what).map(u32::from_be_bytes)
    }

    pub(super) fn i32(&mut self, what: &'static str) -> Result<i32, Error> {
        self.array(what).map(i32::from_be_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, Error> {
        self.array(what).map(u64::from_be_bytes)
    }

    pub(super) fn i64(&mut self, what: &'static str) -> Result<i64, Error> {
        self.array(what).map(i64::from_be_bytes)
    }

    /// A NUL-terminated string in any encoding, without the NUL.
    pub(super) fn c_string(&mut self, what: &'static str) -> Result<&'a [u8], Error> {
        let length = self.rest.iter().position(|byte| *byte == 0).ok_or(Error::Truncated(what))?;
        let text = self.bytes(length, what)?;
        self.u8(what)?;
        Ok(text)
    }

    /// A NUL-terminated UTF-8 string.
    pub(super) fn str(&mut self, what: &'static str) -> Result<&'a str, Error> {
        std::str::from_utf8(self.c_string(what)?).map_err(|_| Error::NotUtf8(what))
    }
}
