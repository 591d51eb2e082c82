//! Snap tokens: what a client hands back to go on where it was.
//!
//! Opaque to clients. Our own are base64 in the URL-safe alphabet without padding (the standard alphabet and padding are
//! read too), 60 characters; their numbers are big endian.
//!
//! A **position token** is what Watch emits:
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | version, `0x01` |
//! | 1..9 | source hash |
//! | 9..17 | hash of the timeline that wrote the position |
//! | 17..25 | LSN of the position |
//! | 25..33 | row steps of the position |
//! | 33..41 | commit timestamp, µs since 2000-01-01, for people |
//! | 41..45 | check: the first bytes of SHA-256 over 0..41 |
//!
//! A **transaction token** is what `tuplewatch.snap_token()` returns inside a transaction, "the state right after this
//! transaction":
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | version, `0x02` |
//! | 1..9 | source hash |
//! | 9..25 | random id, also in the logical message that the function emits |
//! | 25..33 | xid8 of the transaction |
//! | 33..41 | LSN floor: the transaction commits at or after it |
//! | 41..45 | check, as above |
//!
//! The check is there to tell a damaged token from a good one; it is no signature. The first byte is never an ASCII digit
//! and the length never 8, so that Permify's two forms of token stay distinct from these:
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | xid8, *little* endian: after that transaction. What Watch emits in the preset `permify`, in standard base64 |
//! | text | `XID:XMIN:XMAX:XIP,XIP…`: a transaction, and the snapshot that it took |
//!
//! Those name no database and no timeline: one of another database is not noticed.

use crate::model::lsn::{CommitTime, Lsn, Position, Snapshot, Xid8};
use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::prelude::BASE64_STANDARD as STANDARD;
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

const VERSION_POSITION: u8 = 0x01;
const VERSION_TRANSACTION: u8 = 0x02;
const BODY_BYTES: usize = 41;
const TOKEN_BYTES: usize = 45;

/// Longest text that is looked at. Far above our 60 characters, as Permify's text form lists running transactions.
pub const TEXT_BYTES_MAX: usize = 64 << 10;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &URL_SAFE,
    GeneralPurposeConfig::new().with_encode_padding(false).with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// The random id that ties a transaction token to its logical message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TokenId(pub [u8; 16]);

/// A decoded snap token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SnapToken {
    /// A place in the stream.
    Position {
        /// Hash of the source it belongs to.
        source: [u8; 8],
        /// Hash of the timeline that wrote it.
        timeline: [u8; 8],
        /// Everything up to here has been received.
        position: Position,
        /// Of the last transaction received, for people.
        commit_time: CommitTime,
    },
    /// The state right after one transaction.
    Transaction {
        /// Hash of the source it belongs to.
        source: [u8; 8],
        /// The id in that transaction's logical message.
        id: TokenId,
        /// The transaction's id. Not unique: after a crash an unflushed one is used again.
        xid: Xid8,
        /// The transaction's commit LSN is not below this.
        floor: Lsn,
    },
    /// Permify's 8 bytes: the state right after the transaction with this id.
    Xid(Xid8),
    /// Permify's text: what a transaction saw, and its own changes.
    Snapshot {
        /// The transaction.
        xid: Xid8,
        /// What it saw of others.
        snapshot: Snapshot,
    },
}

/// The form of the tokens that Watch emits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// [`SnapToken::Position`].
    Native,
    /// [`SnapToken::Xid`], which Permify takes too.
    Permify,
}

/// Why a text is no snap token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Longer than any token.
    #[error("the snap token is longer than {TEXT_BYTES_MAX} bytes: it is none of ours")]
    TooLong,
    /// Not base64.
    #[error("the snap token is not base64: pass it back exactly as it was received")]
    NotBase64,
    /// Another length, an unknown version or a wrong check.
    #[error("the snap token is damaged, cut short, or of an unknown version: pass it back exactly as it was received")]
    Damaged,
}

impl SnapToken {
    /// Hash of the source that the token belongs to, where it names one.
    pub const fn source(&self) -> Option<[u8; 8]> {
        match self {
            Self::Position { source, .. } | Self::Transaction { source, .. } => Some(*source),
            Self::Xid(_) | Self::Snapshot { .. } => None,
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(TOKEN_BYTES);
        match self {
            Self::Position { source, timeline, position, commit_time } => {
                body.push(VERSION_POSITION);
                body.extend_from_slice(source);
                body.extend_from_slice(timeline);
                body.extend_from_slice(&position.lsn.0.to_be_bytes());
                body.extend_from_slice(&position.steps.to_be_bytes());
                body.extend_from_slice(&commit_time.0.to_be_bytes());
            }
            Self::Transaction { source, id, xid, floor } => {
                body.push(VERSION_TRANSACTION);
                body.extend_from_slice(source);
                body.extend_from_slice(&id.0);
                body.extend_from_slice(&xid.0.to_be_bytes());
                body.extend_from_slice(&floor.0.to_be_bytes());
            }
            Self::Xid(xid) => return xid.0.to_le_bytes().to_vec(),
            Self::Snapshot { xid, snapshot } => return format!("{xid}:{snapshot}").into_bytes(),
        }
        let check = check_of(&body);
        body.extend_from_slice(&check);
        body
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; TOKEN_BYTES] = bytes.try_into().ok()?;
        let (body, check) = bytes.split_at(BODY_BYTES);
        if check != check_of(body) {
            return None;
        }
        let mut rest = body;
        let [version] = take(&mut rest)?;
        let source = take(&mut rest)?;
        match version {
            VERSION_POSITION => {
                let timeline = take(&mut rest)?;
                let lsn = Lsn(u64::from_be_bytes(take(&mut rest)?));
                let steps = u64::from_be_bytes(take(&mut rest)?);
                let commit_time = CommitTime(i64::from_be_bytes(take(&mut rest)?));
                Some(Self::Position { source, timeline, position: Position { lsn, steps }, commit_time })
            }
            VERSION_TRANSACTION => {
                let id = TokenId(take(&mut rest)?);
                let xid = Xid8(u64::from_be_bytes(take(&mut rest)?));
                let floor = Lsn(u64::from_be_bytes(take(&mut rest)?));
                Some(Self::Transaction { source, id, xid, floor })
            }
            _ => None,
        }
    }

    /// Permify's two forms, in exactly the base64 that Permify takes: eight bytes have no check that would tell them from a
    /// part of something longer.
    fn of_permify(text: &str) -> Option<Self> {
        let bytes = STANDARD.decode(text).ok()?;
        let snapshot = || {
            let (xid, snapshot) = std::str::from_utf8(&bytes).ok()?.split_once(':')?;
            Some(Self::Snapshot { xid: Xid8(xid.parse().ok()?), snapshot: snapshot.parse().ok()? })
        };
        // Eight characters of text would be an id beyond all that are ever handed out.
        snapshot().or_else(|| Some(Self::Xid(Xid8(u64::from_le_bytes(bytes.as_slice().try_into().ok()?)))))
    }
}

/// Cuts the next `N` bytes off the front.
fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

fn check_of(body: &[u8]) -> [u8; 4] {
    let digest: [u8; 32] = Sha256::digest(body).into();
    let [a, b, c, d, ..] = digest;
    [a, b, c, d]
}

impl fmt::Display for SnapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.to_bytes();
        f.write_str(&match self {
            Self::Position { .. } | Self::Transaction { .. } => BASE64.encode(bytes),
            // As Permify writes them.
            Self::Xid(_) | Self::Snapshot { .. } => STANDARD.encode(bytes),
        })
    }
}

impl FromStr for SnapToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(Error::TooLong);
        }
        if let Some(token) = Self::of_permify(text) {
            return Ok(token);
        }
        let url_safe: String = text
            .chars()
            .map(|c| match c {
                '+' => '-',
                '/' => '_',
                c => c,
            })
            .collect();
        let bytes = BASE64.decode(url_safe).map_err(|_| Error::NotBase64)?;
        Self::from_bytes(&bytes).ok_or(Error::Damaged)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens() -> impl Strategy<Value = SnapToken> {
        let source = any::<[u8; 8]>();
        prop_oneof![
            (source, any::<[u8; 8]>(), any::<(u64, u64)>(), any::<i64>()).prop_map(
                |(source, timeline, (lsn, steps), time)| SnapToken::Position {
                    source,
                    timeline,
                    position: Position { lsn: Lsn(lsn), steps },
                    commit_time: CommitTime(time),
                }
            ),
            (source, any::<[u8; 16]>(), any::<(u64, u64)>()).prop_map(|(source, id, (xid, floor))| {
                SnapToken::Transaction { source, id: TokenId(id), xid: Xid8(xid), floor: Lsn(floor) }
            }),
        ]
    }

    proptest! {
        #[test]
        fn native_tokens_round_trip(token in tokens()) {
            let text = token.to_string();
            prop_assert_eq!(text.len(), 60);
            prop_assert_eq!(text.parse(), Ok(token.clone()));
            let standard = text.replace('-', "+").replace('_', "/");
            prop_assert_eq!(standard.parse(), Ok(token));
        }

        #[test]
        fn permifys_tokens_round_trip(
            xid in 0..1u64 << 56,
            (xmin, xmax) in any::<(u64, u64)>(),
            running in proptest::collection::vec(any::<u64>(), 0..100),
        ) {
            prop_assert_eq!(SnapToken::Xid(Xid8(xid)).to_string().parse(), Ok(SnapToken::Xid(Xid8(xid))));
            let list: Vec<String> = running.iter().map(u64::to_string).collect();
            let text = format!("{xid}:{xmin}:{xmax}:{}", list.join(","));
            let token: SnapToken = STANDARD.encode(&text).parse().unwrap();
            let expected = format!("{xmin}:{xmax}:{}", list.join(",")).parse().unwrap();
            prop_assert_eq!(&token, &SnapToken::Snapshot { xid: Xid8(xid), snapshot: expected });
            prop_assert_eq!(token.to_string().parse(), Ok(token));
        }

        #[test]
        fn arbitrary_text_is_refused(text in ".{0,200}") {
            prop_assert!(text.parse::<SnapToken>().is_err());
        }

        #[test]
        fn arbitrary_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            prop_assert!(BASE64.encode(&bytes).parse::<SnapToken>().is_err());
            // Any eight are an id.
            prop_assert_eq!(STANDARD.encode(&bytes).parse::<SnapToken>().is_ok(), bytes.len() == 8);
        }

        #[test]
        fn every_flipped_bit_is_detected(token in tokens(), bit in 0usize..TOKEN_BYTES * 8) {
            let mut bytes = token.to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(BASE64.encode(bytes).parse::<SnapToken>(), Err(Error::Damaged));
        }

        #[test]
        fn token_order_is_stream_order(a in any::<(u64, u64)>(), b in any::<(u64, u64)>()) {
            let bytes = |(lsn, steps)| SnapToken::Position {
                source: [0; 8],
                timeline: [0; 8],
                position: Position { lsn: Lsn(lsn), steps },
                commit_time: CommitTime(0),
            }.to_bytes();
            let (a_bytes, b_bytes) = (bytes(a), bytes(b));
            prop_assert_eq!(a_bytes[..BODY_BYTES].cmp(&b_bytes[..BODY_BYTES]), a.cmp(&b));
        }
    }

    #[test]
    fn native_tokens_differ_from_permifys() {
        for version in [VERSION_POSITION, VERSION_TRANSACTION] {
            assert!(!version.is_ascii_digit());
        }
        assert_ne!(TOKEN_BYTES, 8);
    }

    #[test]
    fn permifys_tokens_are_read_as_permify_writes_them() {
        assert_eq!(SnapToken::Xid(Xid8(818)).to_string(), "MgMAAAAAAAA=");
        assert_eq!("MgMAAAAAAAA=".parse(), Ok(SnapToken::Xid(Xid8(818))));
        assert_eq!("MgMAAAAAAAA".parse::<SnapToken>(), Err(Error::Damaged));
        let check = |text: &str, xid: u64, snapshot: &str| {
            let token = SnapToken::Snapshot { xid: Xid8(xid), snapshot: snapshot.parse().unwrap() };
            assert_eq!(token.to_string(), STANDARD.encode(text));
            assert_eq!(STANDARD.encode(text).parse(), Ok(token));
        };
        check("818:818:819:", 818, "818:818:819:".split_once(':').unwrap().1);
        check("900:818:901:818,850", 900, "818:901:818,850");
        // Eight characters.
        check("10:9:11:", 10, "9:11:");
        for damaged in ["818", "818:", "818:818:819", "818:818:819:x", "818:818:819:1:2", "x:818:819:", ":818:819:1"] {
            assert_eq!(STANDARD.encode(damaged).parse::<SnapToken>(), Err(Error::Damaged), "{damaged}");
        }
    }

    #[test]
    fn long_text_is_refused_without_decoding() {
        assert_eq!("A".repeat(1 << 20).parse::<SnapToken>(), Err(Error::TooLong));
        assert_eq!("".parse::<SnapToken>(), Err(Error::Damaged));
    }
}
