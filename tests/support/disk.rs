//! A disk for change logs that a test fills.

use super::postgres::Postgres;
use super::server::Server;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::fs::File;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// Free space above the reserve at the beginning. The log with its journals, and other writers on this disk, need far less.
const ROOM: u64 = 400 * MIB;

/// A disk whose free space the test controls. One at a time, even if every test is a process.
pub(crate) struct Disk {
    root: PathBuf,
    _directory: TempDir,
    filler: File,
    filled: u64,
    reserve: u64,
    _alone: File,
}

impl Disk {
    pub(crate) async fn new() -> Self {
        // Other programs rarely fill it, but in containers it is often small.
        let memory = Path::new("/dev/shm");
        let has_room = statvfs(memory).is_ok_and(|_| free(memory) > 4 * ROOM);
        let root = if has_room { memory.to_owned() } else { std::env::temp_dir() };
        let alone = File::open(&root).unwrap();
        let alone = tokio::task::spawn_blocking(move || alone.lock().map(|()| alone)).await.unwrap().unwrap();
        let needed = 2 * ROOM;
        assert!(free(&root) > needed, "tests of full disks need {} MiB free in {}", needed / MIB, root.display());
        let directory = tempfile::tempdir_in(&root).unwrap();
        let filler = File::create(directory.path().join("filler")).unwrap();
        let reserve = free(&root) - ROOM;
        Self { root, _directory: directory, filler, filled: 0, reserve, _alone: alone }
    }

    /// A node with its log on this disk.
    pub(crate) async fn serve(&self, postgres: &Postgres, flags: &[(&str, &str)]) -> Server {
        let reserve = format!("{}B", self.reserve);
        let flags: Vec<_> = flags.iter().copied().chain([("--changelog-disk-reserve", reserve.as_str())]).collect();
        let mut server = Server::prepare(postgres, &flags).await;
        server.keep_log_in(tempfile::tempdir_in(&self.root).unwrap());
        server.start().await;
        server.serving().await;
        server
    }

    /// Fills the disk until the free space is `short` bytes below the reserve. Does nothing if it is below the reserve already.
    pub(crate) fn leave_below_reserve(&mut self, short: u64) {
        let Some(more) = free(&self.root).checked_sub(self.reserve) else { return };
        fallocate(&self.filler, FallocateFlags::empty(), self.filled, more + short).unwrap();
        self.filled += more + short;
    }

    pub(crate) fn give_room(&mut self) {
        self.filler.set_len(0).unwrap();
        self.filled = 0;
        assert!(free(&self.root) > self.reserve, "others took the room");
    }
}

fn free(path: &Path) -> u64 {
    let stat = statvfs(path).unwrap();
    stat.f_bavail * stat.f_frsize
}
