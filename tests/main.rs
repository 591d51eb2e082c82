//! tuplewatch against real PostgreSQL: clusters that the tests start, and the program itself as a process.
//!
//! - `support`: a cluster, a server, a subscriber, writers, and an independent reading of what was committed.
//! - `scenarios`: a file for each hazard.
//!
//! Every test has a cluster of its own: a slot's creation waits for all transactions of its cluster, and half of the tests
//! stop theirs. `TUPLEWATCH_PG_BIN` chooses the PostgreSQL; where there is none, every test fails and says so.
//! `TUPLEWATCH_SEED` repeats the random choices of a run that failed (not the scheduling of processes).

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stderr,
    reason = "a test fails where it expected something, and tells what led to it"
)]

mod support {
    pub(crate) mod api;
    pub(crate) mod change;
    pub(crate) mod crowd;
    pub(crate) mod disk;
    #[expect(dead_code, reason = "the soak uses the rest")]
    pub(crate) mod faults;
    pub(crate) mod foreign;
    pub(crate) mod http;
    pub(crate) mod interruption;
    pub(crate) mod issuer;
    #[expect(dead_code, reason = "the soak uses the rest")]
    pub(crate) mod oracle;
    pub(crate) mod permify;
    pub(crate) mod port;
    pub(crate) mod postgres;
    pub(crate) mod proxy;
    #[expect(dead_code, reason = "the benchmarks use the rest")]
    pub(crate) mod raw_watch;
    pub(crate) mod recording;
    pub(crate) mod reference;
    pub(crate) mod reset_wal;
    pub(crate) mod scrape;
    pub(crate) mod server;
    pub(crate) mod sql;
    pub(crate) mod standby;
    pub(crate) mod stream;
    pub(crate) mod wait;
    pub(crate) mod writer;
}

mod scenarios {
    mod acknowledgement_delay;
    mod authn;
    mod backlog;
    mod certificates;
    mod cli;
    mod clients;
    mod data;
    mod dev;
    mod disk;
    mod doctor;
    mod examples;
    mod failover;
    mod feedback;
    mod gap;
    mod health;
    mod http;
    mod inheritance;
    mod lifecycle;
    mod long_transaction;
    mod memory;
    mod metrics;
    mod oracle;
    mod packaging;
    mod partitions;
    mod passwords;
    mod permify;
    mod position;
    mod publication;
    mod rate_limit;
    mod recorded;
    mod refusals;
    mod requests;
    mod retention;
    mod row_security;
    mod rows;
    mod schema;
    mod session_defaults;
    mod slot;
    mod slow_client;
    mod subscribers;
    mod tenancy;
    mod timeline;
    mod timestamps;
    mod tls;
    mod tokens;
    mod transactions;
    mod values;
    mod visibility;
    mod xid;
}
