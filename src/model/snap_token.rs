//! Snap tokens: a client returns its last one to resume where it was.
//!
//! Tokens are opaque to clients. tuplewatch's own are base64 in the URL-safe alphabet without padding, of 60 characters or more. The
//! standard alphabet and padding are accepted too. Numbers are big endian.
//!
//! A **position token** is a place in the stream of one tenant, or between two transactions of any stream:
//!
//! | bytes | content |
//! | --- | --- |
//! | 0 | version, `0x01` |
//! | 1..9 | source hash |
//! | 9..17 | hash of the timeline that wrote the position |
//! | 17..25 | LSN of the position |
//! | 25..33 | row steps of the position |
//! | 33..41 | commit timestamp, µs since 2000-01-01, for people |
//! | 41..45 | check: the first bytes of SHA-256 over 0..41 |
//!
//! A **token between tenants** is a place of a stream of all tenants inside a transaction (see [`Place`]):
//!
//! | bytes | what |
//! | --- | --- |
//! | 0 | version, `0x03` |
//! | 1..41 | as in a position token |
//! | 41..49 | row steps of the tenant; all ones for all of them |
//! | 49..n | the tenant's id |
//! | n..n+4 | check, as above |
//!
//! A **transaction token** is returned by `tuplewatch.snap_token()` inside a transaction. It means "the state right
//! after this transaction":
//!
//! | bytes | content |
//! | --- | --- |
//! | 0 | version, `0x02` |
//! | 1..9 | source hash |
//! | 9..25 | random id, also in the logical message that the function emits |
//! | 25..33 | xid8 of the transaction |
//! | 33..41 | LSN floor: the transaction commits at or after it |
//! | 41..45 | check, as above |
//!
//! The check distinguishes a damaged token from a valid one; it is not a signature. The first byte is never an ASCII
//! digit and there are never 8 bytes, so Permify's two forms of token remain distinct from these:
//!
//! | bytes | content |
//! | --- | --- |
//! | 8 | xid8, *little* endian: after that transaction. Watch emits these in the preset `permify`, in standard base64 |
//! | text | `XID:XMIN:XMAX:XIP,XIP…`: a transaction, and the snapshot that it took |
//!
//! Permify's tokens name no database and no timeline, so a token of another database is not detected.

use crate::model::change::TenantId;
use crate::model::lsn::{CommitTime, Lsn, Position, Snapshot, Xid8};
use crate::model::scope::Place;
use crate::model::timeline::{SourceId, TimelineId};
use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use base64::prelude::BASE64_STANDARD as STANDARD;
use sha2::{Digest, Sha256};
use std::fmt;
use std::str::FromStr;

const VERSION_POSITION: u8 = 0x01;
const VERSION_TRANSACTION: u8 = 0x02;
const VERSION_BETWEEN_TENANTS: u8 = 0x03;
/// Before the check; of a token between tenants, without the tenant.
const BODY_BYTES: usize = 41;
const CHECK_BYTES: usize = 4;

/// The longest accepted text. It is far above 60 characters, because Permify's text form lists running transactions.
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
        /// The source that the token belongs to.
        source: SourceId,
        /// The timeline that wrote the place.
        timeline: TimelineId,
        /// The client has received everything up to this place.
        place: Place,
        /// The commit time of the last received transaction, for people.
        commit_time: CommitTime,
    },
    /// The state right after one transaction.
    Transaction {
        /// The source that the token belongs to.
        source: SourceId,
        /// The id in that transaction's logical message.
        id: TokenId,
        /// The id of the transaction. It is not unique: after a crash, the id of an unflushed transaction is used
        /// again.
        xid: Xid8,
        /// The transaction's commit LSN is not below this.
        floor: Lsn,
    },
    /// Permify's 8 bytes: the state right after the transaction with this id.
    Xid(Xid8),
    /// Permify's text: a transaction together with its snapshot.
    Snapshot {
        /// The transaction.
        xid: Xid8,
        /// The other transactions that it saw.
        snapshot: Snapshot,
    },
}

/// The form of the tokens that Watch emits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// [`SnapToken::Position`].
    Native,
    /// [`SnapToken::Xid`], which Permify accepts too.
    Permify,
}

/// The reason why a text is not a snap token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It is longer than any token.
    #[error("the snap token is longer than {TEXT_BYTES_MAX} bytes: it is none of ours")]
    TooLong,
    /// It is not base64.
    #[error("the snap token is not base64: pass it back exactly as it was received")]
    NotBase64,
    /// It has another length, an unknown version or a wrong check.
    #[error("the snap token is damaged, cut short, or of an unknown version: pass it back exactly as it was received")]
    Damaged,
}

impl SnapToken {
    /// The source that the token belongs to, if the token names one.
    pub const fn source(&self) -> Option<SourceId> {
        match self {
            Self::Position { source, .. } | Self::Transaction { source, .. } => Some(*source),
            Self::Xid(_) | Self::Snapshot { .. } => None,
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(BODY_BYTES + CHECK_BYTES);
        match self {
            Self::Position { source, timeline, place, commit_time } => {
                body.push(if place.within.is_some() { VERSION_BETWEEN_TENANTS } else { VERSION_POSITION });
                body.extend_from_slice(&source.0);
                body.extend_from_slice(&timeline.0);
                body.extend_from_slice(&place.position.lsn.0.to_be_bytes());
                body.extend_from_slice(&place.position.steps.to_be_bytes());
                body.extend_from_slice(&commit_time.0.to_be_bytes());
                if let Some((tenant, steps)) = &place.within {
                    body.extend_from_slice(&steps.to_be_bytes());
                    body.extend_from_slice(tenant.as_str().as_bytes());
                }
            }
            Self::Transaction { source, id, xid, floor } => {
                body.push(VERSION_TRANSACTION);
                body.extend_from_slice(&source.0);
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
        let (body, check) = bytes.split_last_chunk::<CHECK_BYTES>()?;
        if *check != check_of(body) {
            return None;
        }
        let mut rest = body;
        let [version] = take(&mut rest)?;
        let source = SourceId(take(&mut rest)?);
        let token = match version {
            VERSION_POSITION | VERSION_BETWEEN_TENANTS => {
                let timeline = TimelineId(take(&mut rest)?);
                let lsn = Lsn(u64::from_be_bytes(take(&mut rest)?));
                let steps = u64::from_be_bytes(take(&mut rest)?);
                let commit_time = CommitTime(i64::from_be_bytes(take(&mut rest)?));
                let mut place = Place::from(Position { lsn, steps });
                if version == VERSION_BETWEEN_TENANTS {
                    let steps = u64::from_be_bytes(take(&mut rest)?);
                    let tenant = TenantId::new(std::str::from_utf8(std::mem::take(&mut rest)).ok()?).ok()?;
                    place.within = Some((tenant, steps));
                }
                Self::Position { source, timeline, place, commit_time }
            }
            VERSION_TRANSACTION => {
                let id = TokenId(take(&mut rest)?);
                let xid = Xid8(u64::from_be_bytes(take(&mut rest)?));
                let floor = Lsn(u64::from_be_bytes(take(&mut rest)?));
                Self::Transaction { source, id, xid, floor }
            }
            _ => return None,
        };
        rest.is_empty().then_some(token)
    }

    /// Decodes Permify's two forms, only in the base64 that Permify accepts: eight bytes have no check that would
    /// distinguish them from a part of a longer token.
    fn of_permify(text: &str) -> Option<Self> {
        let bytes = STANDARD.decode(text).ok()?;
        let snapshot = || {
            let (xid, snapshot) = std::str::from_utf8(&bytes).ok()?.split_once(':')?;
            Some(Self::Snapshot { xid: Xid8(xid.parse().ok()?), snapshot: snapshot.parse().ok()? })
        };
        // As an id, eight characters of text would exceed all ids that are ever assigned.
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
            // Permify writes standard base64.
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
        let source = any::<[u8; 8]>().prop_map(SourceId);
        let within = proptest::option::of(("\\PC{1,20}", any::<u64>()))
            .prop_map(|within| within.map(|(tenant, steps)| (TenantId::new(&tenant).unwrap(), steps)));
        prop_oneof![
            (source.clone(), any::<[u8; 8]>(), any::<(u64, u64)>(), within, any::<i64>()).prop_map(
                |(source, timeline, (lsn, steps), within, time)| SnapToken::Position {
                    source,
                    timeline: TimelineId(timeline),
                    place: Place { position: Position { lsn: Lsn(lsn), steps }, within },
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
            let is_between = matches!(&token, SnapToken::Position { place: Place { within: Some(_), .. }, .. });
            prop_assert!(text.len() == 60 || is_between, "{}", text);
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
        fn every_flipped_bit_is_detected(token in tokens(), bit in any::<proptest::sample::Index>()) {
            let mut bytes = token.to_bytes();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(BASE64.encode(bytes).parse::<SnapToken>(), Err(Error::Damaged));
        }

        #[test]
        fn token_order_is_stream_order(a in any::<(u64, u64)>(), b in any::<(u64, u64)>()) {
            let bytes = |(lsn, steps)| SnapToken::Position {
                source: SourceId([0; 8]),
                timeline: TimelineId([0; 8]),
                place: Position { lsn: Lsn(lsn), steps }.into(),
                commit_time: CommitTime(0),
            }.to_bytes();
            let (a_bytes, b_bytes) = (bytes(a), bytes(b));
            prop_assert_eq!(a_bytes[..BODY_BYTES].cmp(&b_bytes[..BODY_BYTES]), a.cmp(&b));
        }
    }

    #[test]
    fn native_tokens_differ_from_permifys() {
        for version in [VERSION_POSITION, VERSION_TRANSACTION, VERSION_BETWEEN_TENANTS] {
            assert!(!version.is_ascii_digit());
        }
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
