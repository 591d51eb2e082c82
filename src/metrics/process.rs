//! Readings about this process from the operating system, under the names that Prometheus' own libraries use.

use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};
use std::sync::LazyLock;
use std::time::{SystemTime, UNIX_EPOCH};

/// The resources of the process. `None` if the operating system does not report the value.
#[derive(Clone, Debug, Default)]
pub(crate) struct Process {
    /// Processor time, in user and system mode.
    pub cpu_seconds: f64,
    pub resident_bytes: Option<u64>,
    pub open_fds: Option<u64>,
    /// The limit of open descriptors.
    pub max_fds: Option<u64>,
    /// The start of the process, in seconds since 1970.
    pub start_time_seconds: f64,
}

impl Process {
    /// Reads the current values. The first call counts as the start of the process.
    pub(crate) fn read() -> Self {
        static STARTED: LazyLock<f64> =
            LazyLock::new(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64()));
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        Self {
            cpu_seconds: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
            resident_bytes: resident_bytes(),
            // One descriptor belongs to the directory that is being read.
            open_fds: std::fs::read_dir("/proc/self/fd").ok().map(|open| (open.count() as u64).saturating_sub(1)),
            max_fds: getrlimit(Resource::Nofile).current,
            start_time_seconds: *STARTED,
        }
    }
}

/// `VmRSS` of proc(5), which is in KiB.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
