//! The shared state of a run: its steps, and whether the process is alive.

use fastrand::Rng;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// The most trailing steps that a failure prints.
const TRACE_MAX: usize = 150;

/// The state that the scripted server, the disk and the readers share. Cheap to clone.
#[derive(Clone)]
pub(super) struct World {
    inner: Arc<Mutex<Inner>>,
    /// Whether the process is dead.
    dead: watch::Sender<bool>,
    /// The number of readers that are finished.
    done: watch::Sender<usize>,
}

struct Inner {
    /// Makes all random choices outside of tuplewatch.
    random: Rng,
    steps: u64,
    /// The steps at which the process dies.
    crashes: BTreeSet<u64>,
    trace: Vec<String>,
    /// The first violated property.
    violation: Option<String>,
}

impl World {
    pub(super) fn new(seed: u64, crashes: BTreeSet<u64>) -> Self {
        let inner = Inner { random: Rng::with_seed(seed), steps: 0, crashes, trace: Vec::new(), violation: None };
        Self { inner: Arc::new(Mutex::new(inner)), dead: watch::Sender::new(false), done: watch::Sender::new(0) }
    }

    /// Counts a step of the process, at which it may die. Returns whether it lives.
    pub(super) fn step(&self, what: impl FnOnce() -> String) -> bool {
        if self.is_dead() {
            return false;
        }
        let mut inner = self.inner.lock().unwrap();
        inner.steps += 1;
        let line = format!("{} {}", inner.steps, what());
        inner.trace.push(line);
        if inner.crashes.contains(&inner.steps) {
            inner.trace.push("  the process dies".into());
            self.dead.send_replace(true);
        }
        !self.is_dead()
    }

    /// Records an event outside of the process.
    pub(super) fn note(&self, what: String) {
        self.inner.lock().unwrap().trace.push(format!("  {what}"));
    }

    /// Records a violated property, and ends the run.
    pub(super) fn violate(&self, what: String) {
        self.inner.lock().unwrap().violation.get_or_insert(what);
        self.dead.send_replace(true);
    }

    pub(super) fn is_dead(&self) -> bool {
        *self.dead.borrow()
    }

    /// Completes when the process dies.
    pub(super) async fn died(&self) {
        let _ = self.dead.subscribe().wait_for(|dead| *dead).await;
    }

    /// Reports that a reader is finished.
    pub(super) fn report_done(&self) {
        self.done.send_modify(|done| *done += 1);
    }

    /// Completes when `count` readers are finished.
    pub(super) async fn all_done(&self, count: usize) {
        let _ = self.done.subscribe().wait_for(|done| *done >= count).await;
    }

    /// Starts the next life of the process.
    pub(super) fn revive(&self) {
        self.dead.send_replace(false);
    }

    pub(super) fn steps(&self) -> u64 {
        self.inner.lock().unwrap().steps
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.inner.lock().unwrap().violation.clone()
    }

    /// The last steps, for the message of a failure.
    pub(super) fn trace(&self) -> String {
        let inner = self.inner.lock().unwrap();
        let from = inner.trace.len().saturating_sub(TRACE_MAX);
        inner.trace[from..].join("\n")
    }

    /// All steps, to compare runs.
    pub(super) fn whole_trace(&self) -> Vec<String> {
        self.inner.lock().unwrap().trace.clone()
    }

    /// A number below `bound`.
    pub(super) fn below(&self, bound: u64) -> u64 {
        self.inner.lock().unwrap().random.u64(..bound)
    }

    /// True once in `times`.
    pub(super) fn once_in(&self, times: u64) -> bool {
        self.below(times) == 0
    }
}
