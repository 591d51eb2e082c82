//! A substitute for `pg_resetwal`, which some installations lack: a stopped cluster continues at another transaction id or LSN.
//!
//! A new WAL segment gets one record, the shutdown checkpoint that the control file then points to. Layouts, the same in
//! PostgreSQL 14 to 18 as far as they are used here: `ControlFileData` (catalog/pg_control.h), `XLogLongPageHeaderData`
//! (access/xlog_internal.h), `XLogRecord` (access/xlogrecord.h); numbers are in native byte order.

use std::fs;
use std::ops::Range;
use std::path::Path;

/// In `ControlFileData`.
const STATE: usize = 16;
const SHUT_DOWN: u32 = 1;
const CHECKPOINT_LSN: usize = 32;
/// The copy of the checkpoint, and offsets in it.
const CHECKPOINT: usize = 40;
const REDO: usize = 0;
const TIMELINE: usize = 8;
const NEXT_XID: usize = 24;
/// The checksum is the last field, somewhere in this range.
const CONTROL_BYTES: Range<usize> = 256..512;

/// In `XLogLongPageHeaderData`.
const PAGE_INFO: usize = 2;
const LONG_HEADER: u16 = 2;
const PAGE_ADDRESS: usize = 8;
const PAGE_HEADER_BYTES: usize = 40;

/// `XLogRecord`, and the header between it and the data of a short record.
const RECORD_BYTES: usize = 24;
const RECORD_CRC: usize = 20;
const DATA_SHORT: u8 = 255;
const DATA_HEADER_BYTES: usize = 2;

/// The next transaction gets `next_xid` (whose lower half must begin a page of pg_xact: a multiple of 32,768), or the WAL
/// continues at the segment of `lsn`. The cluster must be shut down and have no slots, because their WAL is removed.
pub(crate) fn reset_wal(pgdata: &Path, next_xid: Option<u64>, lsn: Option<u64>) {
    let control_path = pgdata.join("global/pg_control");
    let mut control = fs::read(&control_path).unwrap();
    assert_eq!(u32_at(&control, STATE), SHUT_DOWN, "a cluster that was shut down");
    let crc_at = CONTROL_BYTES.step_by(4).find(|at| crc32c(&[&control[..*at]]) == u32_at(&control, *at));
    let crc_at = crc_at.expect("the control file's checksum");

    let wal = pgdata.join("pg_wal");
    let timeline = u32_at(&control, CHECKPOINT + TIMELINE);
    let is_segment = |name: &str| name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    let names = fs::read_dir(&wal).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let segments: Vec<String> = names.filter(|name| is_segment(name)).collect();
    let segment_bytes = fs::metadata(wal.join(&segments[0])).unwrap().len();
    let name = |segment: u64| {
        let in_4_gib = (1 << 32) / segment_bytes;
        format!("{timeline:08X}{:08X}{:08X}", segment / in_4_gib, segment % in_4_gib)
    };

    // The last checkpoint shows the length of one in this version.
    let last = u64_at(&control, CHECKPOINT_LSN);
    let mut contents = fs::read(wal.join(name(last / segment_bytes))).unwrap();
    let record_length = u32_at(&contents, usize::try_from(last % segment_bytes).unwrap());
    let checkpoint_bytes = usize::try_from(record_length).unwrap() - RECORD_BYTES - DATA_HEADER_BYTES;

    let start = lsn.map_or((last / segment_bytes + 1) * segment_bytes, |lsn| lsn - lsn % segment_bytes);
    let redo = start + PAGE_HEADER_BYTES as u64;
    put(&mut control, CHECKPOINT_LSN, &redo.to_ne_bytes());
    put(&mut control, CHECKPOINT + REDO, &redo.to_ne_bytes());
    if let Some(xid) = next_xid {
        assert_eq!(xid % 32_768, 0, "on the first page of pg_xact that is not there yet");
        put(&mut control, CHECKPOINT + NEXT_XID, &xid.to_ne_bytes());
    }
    let crc = crc32c(&[&control[..crc_at]]);
    put(&mut control, crc_at, &crc.to_ne_bytes());

    // All zero except for the length: no transaction, no previous record, a shutdown checkpoint of the resource manager XLOG.
    let mut record = vec![0; RECORD_BYTES];
    put(&mut record, 0, &record_length.to_ne_bytes());
    let mut data = vec![DATA_SHORT, u8::try_from(checkpoint_bytes).unwrap()];
    data.extend(&control[CHECKPOINT..CHECKPOINT + checkpoint_bytes]);
    let crc = crc32c(&[&data, &record[..RECORD_CRC]]);
    put(&mut record, RECORD_CRC, &crc.to_ne_bytes());

    contents[PAGE_HEADER_BYTES..].fill(0);
    put(&mut contents, PAGE_INFO, &LONG_HEADER.to_ne_bytes());
    put(&mut contents, PAGE_ADDRESS, &start.to_ne_bytes());
    put(&mut contents, PAGE_HEADER_BYTES, &record);
    put(&mut contents, PAGE_HEADER_BYTES + RECORD_BYTES, &data);

    // Overwrites an existing file, which has the right owner.
    let (kept, others) = segments.split_first().unwrap();
    fs::rename(wal.join(kept), wal.join("new")).unwrap();
    others.iter().for_each(|other| fs::remove_file(wal.join(other)).unwrap());
    fs::write(wal.join("new"), contents).unwrap();
    fs::rename(wal.join("new"), wal.join(name(start / segment_bytes))).unwrap();
    fs::write(control_path, control).unwrap();
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Castagnoli's CRC, bit by bit: the data is short.
fn crc32c(parts: &[&[u8]]) -> u32 {
    let bytes = parts.iter().flat_map(|part| part.iter());
    !bytes.fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ (0x82F6_3B78 & (crc & 1).wrapping_neg()))
    })
}
