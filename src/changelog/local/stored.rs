//! The keyspace `meta`: its keys, and the JSON of its values.
//!
//! | key | value |
//! | --- | --- |
//! | `state` | [`Stored`], JSON |
//! | `tail` | LSN (8, big endian) |
//! | `segments` | see [`super::segments`] |
//! | `gap/`, end position (16), start position (16), tenant | [`StoredGap`], JSON |
//! | `horizon/`, tenant; no tenant for all of them | see [`super::record`] |
//! | `abandoned/`, xid8 (8, big endian) | nothing |

use super::super::Origin;
use super::record;
use crate::model::change::TenantId;
use crate::model::lsn::{Lsn, Position, Xid8};
use crate::model::scope::Scope;
use crate::model::timeline::{History, Source, Timeline};
use crate::model::transaction::{Gap, GapReason};
use serde::{Deserialize, Serialize};

pub(super) const META_STATE: &[u8] = b"state";
pub(super) const META_TAIL: &[u8] = b"tail";
pub(super) const META_SEGMENTS: &[u8] = b"segments";
pub(super) const META_GAP: &[u8] = b"gap/";
pub(super) const META_HORIZON: &[u8] = b"horizon/";
const META_ABANDONED: &[u8] = b"abandoned/";

pub(super) fn meta_horizon(scope: &Scope) -> Vec<u8> {
    [META_HORIZON, scope.tenant().map_or("", TenantId::as_str).as_bytes()].concat()
}

pub(super) fn meta_abandoned(xid: Xid8) -> Vec<u8> {
    [META_ABANDONED, &xid.0.to_be_bytes()].concat()
}

pub(super) fn meta_gap(gap: &Gap) -> Vec<u8> {
    // Keys sort by the ends of gaps, like the stream. The tenant makes a key unique.
    let tenant = gap.tenant.as_ref().map_or("", TenantId::as_str);
    [META_GAP, &record::write_position(gap.to), &record::write_position(gap.from), tenant.as_bytes()].concat()
}

pub(super) fn pair(position: Position) -> (u64, u64) {
    (position.lsn.0, position.steps)
}

pub(super) fn unpair((lsn, steps): (u64, u64)) -> Position {
    Position { lsn: Lsn(lsn), steps }
}

pub(super) fn write_gap(gap: &Gap) -> StoredGap {
    let (table, detail) = gap.reason.details();
    StoredGap {
        tenant: gap.tenant.as_ref().map(|tenant| tenant.as_str().to_owned()),
        from: pair(gap.from),
        to: pair(gap.to),
        code: gap.reason.code().to_owned(),
        table: table.to_owned(),
        detail: detail.to_owned(),
        writers: gap.writers.iter().map(|xid| xid.0).collect(),
    }
}

pub(super) fn read_gap(stored: StoredGap) -> Option<Gap> {
    Some(Gap {
        tenant: stored.tenant.map(|tenant| TenantId::new(&tenant)).transpose().ok()?,
        from: unpair(stored.from),
        to: unpair(stored.to),
        reason: GapReason::from_code(&stored.code, &stored.table, &stored.detail)?,
        writers: stored.writers.into_iter().map(Xid8).collect(),
    })
}

pub(super) fn write_origin(origin: &Origin) -> StoredOrigin {
    StoredOrigin {
        system_identifier: origin.source.system_identifier,
        database_oid: origin.source.database_oid,
        timelines: origin.history.timelines().map(|timeline| (timeline.number, timeline.begin.0)).collect(),
        lsn: origin.lsn.0,
        xid: origin.xid.0,
    }
}

pub(super) fn read_origin(stored: &StoredOrigin) -> Option<Origin> {
    let timelines =
        stored.timelines.iter().map(|(number, begin)| Timeline { number: *number, begin: Lsn(*begin) }).collect();
    Some(Origin {
        source: Source { system_identifier: stored.system_identifier, database_oid: stored.database_oid },
        history: History::from_timelines(timelines)?,
        lsn: Lsn(stored.lsn),
        xid: Xid8(stored.xid),
    })
}

/// The part of [`State`](super::super::State) that changes rarely, as JSON under `meta/state`.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct Stored {
    pub(super) origin: Option<StoredOrigin>,
    pub(super) verified: Option<(String, u64)>,
    pub(super) mapping: Option<[u8; 32]>,
    /// At most the tail.
    #[serde(default)]
    pub(super) watermark: u64,
    /// Commit LSN of the transaction with staged messages, and their highest row step.
    pub(super) staged: Option<(u64, u64)>,
    /// Gaps that end at or before this position were dropped.
    pub(super) gaps_floor: (u64, u64),
}

#[derive(Clone, Serialize, Deserialize)]
pub(super) struct StoredOrigin {
    pub(super) system_identifier: u64,
    pub(super) database_oid: u32,
    /// Number and begin of each timeline.
    pub(super) timelines: Vec<(u32, u64)>,
    pub(super) lsn: u64,
    pub(super) xid: u64,
}

#[derive(Serialize, Deserialize)]
pub(super) struct StoredGap {
    pub(super) tenant: Option<String>,
    pub(super) from: (u64, u64),
    pub(super) to: (u64, u64),
    pub(super) code: String,
    pub(super) table: String,
    pub(super) detail: String,
    #[serde(default)]
    pub(super) writers: Vec<u64>,
}
