//! State that all parts of a run share: the number of steps, and whether the process is alive.

use fastrand::Rng;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use tokio::sync::watch;

/// The number of last steps that are printed when a run fails.
const TRACE_MAX: usize = 150;

/// Shared by the scripted server, the disk, and the readers. Cheap to clone.
#[derive(Clone)]
pub(super) struct World {
    inner: Arc<Mutex<Inner>>,
    /// Whether the process of the present life is dead.
    dead: watch::Sender<bool>,
    /// How many readers have everything.
    done: watch::Sender<usize>,
}

struct Inner {
    /// Chooses everything that is left to chance outside tuplewatch.
    random: Rng,
    steps: u64,
    /// At which steps the process dies.
    crashes: BTreeSet<u64>,
    trace: Vec<String>,
    /// The violated rule.
    violation: Option<String>,
}

impl World {
    pub(super) fn new(seed: u64, crashes: BTreeSet<u64>) -> Self {
        let inner = Inner { random: Rng::with_seed(seed), steps: 0, crashes, trace: Vec::new(), violation: None };
        Self { inner: Arc::new(Mutex::new(inner)), dead: watch::Sender::new(false), done: watch::Sender::new(0) }
    }

    /// Counts a step of the process; it dies here if this is the one. Whether it lives.
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

    /// Something outside the process happened.
    pub(super) fn note(&self, what: String) {
        self.inner.lock().unwrap().trace.push(format!("  {what}"));
    }

    /// Something that must not happen did.
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

    /// A reader has everything.
    pub(super) fn tell_done(&self) {
        self.done.send_modify(|done| *done += 1);
    }

    /// Completes when so many have everything.
    pub(super) async fn all_done(&self, count: usize) {
        let _ = self.done.subscribe().wait_for(|done| *done >= count).await;
    }

    /// Another process begins.
    pub(super) fn revive(&self) {
        self.dead.send_replace(false);
    }

    pub(super) fn steps(&self) -> u64 {
        self.inner.lock().unwrap().steps
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.inner.lock().unwrap().violation.clone()
    }

    /// The last steps, to examine a failure.
    pub(super) fn trace(&self) -> String {
        let inner = self.inner.lock().unwrap();
        let from = inner.trace.len().saturating_sub(TRACE_MAX);
        inner.trace[from..].join("\n")
    }

    /// A digest of all steps, to compare runs.
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
