//! tuplewatch: a change feed for relationship-based authorization data in PostgreSQL.
//!
//! Applications write relation tuples and attributes into ordinary tables. tuplewatch tails one `pgoutput` replication
//! slot, turns committed rows into changes, keeps them in a bounded durable log, and streams them over gRPC and HTTP to
//! any number of subscribers. Every message carries a snap token. A subscriber that returns with its last token
//! receives exactly the changes after it.
//!
//! ```text
//!  any writer ──SQL──▶ PostgreSQL ──WAL──▶ walsender (pgoutput)
//!                                             │  one replication connection
//!                                             ▼
//!                   postgres::connection   bytes → Begin, Change, Commit
//!                                             ▼
//!                   replication::Session   reconnects, checks, acknowledges
//!                                             │ events
//!                                             ▼
//!                   replication::Receiver    drops repeated transactions; idle progress, gaps
//!                     └ decode::assembler    rows → positioned changes, cut into messages
//!                         ├ pgoutput           bytes → row messages
//!                         └ mapping            rows → tuples and attributes
//!                                             │ changelog::Entry
//!                                             ▼
//!                   app::log_and_hub ─┬────────────────────┐
//!                                     ▼                    ▼
//!                   changelog::recorder → local      hub::window (recent, in memory)
//!                                     │                    │ hub::releaser: visible in PostgreSQL?
//!                                     └─────────┬──────────┘
//!                                               ▼
//!                   hub::Subscription      one reader over both tiers, per subscriber
//!                                               ▼
//!                   api::watch             checks the tenant, limits streams, ends them; behind access::admission
//!                     ├ api::grpc            base.v1.Watch: frames, made by api::encode
//!                     └ api::http            the same over HTTP: JSON lines, Server-Sent Events
//!
//!  api::grpc::{data, tenancy} ──▶ store ──SQL──▶ PostgreSQL     base.v1.Data, base.v1.Tenancy: one more writer
//! ```
//!
//! The rooms, from the ground up:
//!
//! | room | task | may wait or do I/O |
//! | --- | --- | --- |
//! | [`model`] | the shared types: positions, changes, transactions, gaps, snap tokens, diagnostics | no |
//! | [`decode`] | turns rows of the stream into changes: pgoutput, mapping, assembler | no |
//! | [`postgres`] | connects to PostgreSQL; reads tables, publication and slot from its catalogs | yes |
//! | [`replication`] | the session on the slot: reads, checks, acknowledges | yes |
//! | [`changelog`] | the contract of the durable log, and its implementation on local disk | yes |
//! | [`hub`] | recent messages, visibility, and every subscription | yes |
//! | [`store`] | writes the tables of the preset `tuples` | yes |
//! | [`access`] | authentication, admission, TLS, and trust in certificates | yes |
//! | [`api`] | the services over gRPC and HTTP | yes |
//! | [`admin`] | `setup`, `doctor`, and the monitor of the slot | yes |
//! | [`app`] | builds `serve` from these rooms, and shuts it down in order | yes |
//! | [`cli`] | the command line; [`config`] reads its settings | yes |
//!
//! Beside them: [`metrics`], [`yaml`], [`thread`], [`dev_postgres`] for `dev` and tests, and `simulation`, the
//! deterministic test of the engine. `tests/architecture.rs` enforces the permitted dependencies. ARCHITECTURE.md lists
//! the place to start for each kind of change.

mod access;
mod admin;
pub mod api;
pub mod app;
pub mod changelog;
pub mod cli;
pub mod config;
pub mod decode;
pub mod dev_postgres;
pub mod hub;
mod metrics;
pub mod model;
mod postgres;
mod replication;
#[cfg(test)]
mod simulation;
mod store;
mod thread;
pub mod yaml;
