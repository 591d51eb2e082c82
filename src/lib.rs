//! tuplewatch: a change feed for relationship-based authorization data in PostgreSQL.
//!
//! Applications write relation tuples and attributes into ordinary tables. tuplewatch tails one `pgoutput` replication slot,
//! turns committed rows into changes, keeps a bounded durable log of them, and streams them over gRPC and HTTP to any
//! number of subscribers. Every message carries a snap token; whoever comes back with one gets exactly the rest.
//!
//! ```text
//!  any writer ──SQL──▶ PostgreSQL ──WAL──▶ walsender (pgoutput)
//!                                             │  one replication connection
//!                                             ▼
//!                   replication::Session   reconnects, checks, acknowledges
//!                                             │ events
//!                                             ▼
//!                   replication::Intake    drops what comes twice, idle progress, breaks
//!                     └ assembler          rows → positioned changes, cut into messages
//!                         ├ pgoutput         bytes → row messages           (pure)
//!                         └ mapping          rows → tuples and attributes   (pure)
//!                                             │ changelog::Entry
//!                                             ▼
//!                   app::Joined ─────┬─────────────────────┐
//!                                    ▼                     ▼
//!                   changelog (durable, bounded)     hub::window (recent, in memory)
//!                                    │                     │ hub::publisher: visible in PostgreSQL?
//!                                    └──────────┬──────────┘
//!                                               ▼
//!                   hub::Subscription      one reader over both tiers, per subscriber
//!                                               ▼
//!                   grpc::watch            base.v1.Watch, behind admission
//!                         └ http           the same over HTTP: JSON lines, Server-Sent Events
//!
//!  grpc::data, grpc::tenancy ──▶ store ──SQL──▶ PostgreSQL     base.v1.Data, base.v1.Tenancy: one more writer
//! ```
//!
//! To read it from the ground up:
//!
//! 1. The words: [`lsn`] (LSNs, positions, transaction ids), [`timeline`] (sources and histories), [`change`] (tuples,
//!    attributes, their bytes), [`transaction`] (messages and breaks), [`snap_token`], [`finding`] (what a check says).
//! 2. Rows to changes, without I/O: [`pgoutput`], [`mapping`], [`assembler`].
//! 3. The engine: [`changelog`], [`hub`], [`replication`], and [`store`], which writes the tables of the `tuples` preset.
//! 4. The edges: [`grpc`], [`http`], [`cli`]; who gets in: [`admission`], [`authn`], [`tls`]; whom we trust: [`trust`]; and what
//!    they need:
//!    [`config`], [`yaml`], [`connections`], [`thread`], [`telemetry`], [`dev_postgres`]. [`metrics`] is what the engine and the edges count
//!    with.
//! 5. [`app`], which joins all of it.
//!
//! What may use what is held by a test (`tests/architecture.rs`); why it is so is in ARCHITECTURE.md.

pub mod admission;
pub mod app;
pub mod assembler;
pub mod authn;
pub mod change;
pub mod changelog;
pub mod cli;
pub mod config;
pub mod connections;
pub mod dev_postgres;
pub mod finding;
pub mod grpc;
pub mod http;
pub mod hub;
pub mod lsn;
pub mod mapping;
pub mod metrics;
pub mod pgoutput;
pub mod replication;
pub mod snap_token;
pub mod store;
pub mod telemetry;
pub mod thread;
pub mod timeline;
pub mod tls;
pub mod transaction;
pub mod trust;
pub mod yaml;
