//! A disk that a test fills.

use super::postgres::Postgres;
use super::server::Server;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use std::fs::File;
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// Above the reserve at first. What the log writes here, its journals included, and what others write meanwhile, stays far
/// below.
const ROOM: u64 = 400 * MIB;

/// A disk with as much room as the test wants, for change logs. One at a time, also where every test is a process.
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
        // Nobody else fills this one, but in containers it is often small.
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

    /// A node that keeps its log here.
    pub(crate) async fn serve(&self, postgres: &Postgres, flags: &[(&str, &str)]) -> Server {
        let reserve = format!("{}B", self.reserve);
        let flags: Vec<_> = flags.iter().copied().chain([("--changelog-disk-reserve", reserve.as_str())]).collect();
        let mut server = Server::prepare(postgres, &flags).await;
        server.keep_log_in(tempfile::tempdir_in(&self.root).unwrap());
        server.start().await;
        server.serving().await;
        server
    }

    /// Takes room, so that so much less than the reserve is left; nothing where it is less already.
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
