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
//!                   replication::Receiver    drops what comes twice, idle progress, gaps
//!                     └ decode::assembler    rows → positioned changes, cut into messages
//!                         ├ pgoutput           bytes → row messages
//!                         └ mapping            rows → tuples and attributes
//!                                             │ changelog::Entry
//!                                             ▼
//!                   app::log_and_hub ─┬────────────────────┐
//!                                     ▼                    ▼
//!                   changelog (durable, bounded)     hub::window (recent, in memory)
//!                                     │                    │ hub::releaser: visible in PostgreSQL?
//!                                     └─────────┬──────────┘
//!                                               ▼
//!                   hub::Subscription      one reader over both tiers, per subscriber
//!                                               ▼
//!                   api::watch             who may read it, limits, why it ends; behind access::admission
//!                     ├ api::grpc            base.v1.Watch: frames, made by api::encode
//!                     └ api::http            the same over HTTP: JSON lines, Server-Sent Events
//!
//!  api::grpc::{data, tenancy} ──▶ store ──SQL──▶ PostgreSQL     base.v1.Data, base.v1.Tenancy: one more writer
//! ```
//!
//! The rooms, from the ground up:
//!
//! | room | what it does | may wait or do I/O |
//! | --- | --- | --- |
//! | [`model`] | the words: positions, changes, transactions, gaps, snap tokens, diagnostics | no |
//! | [`decode`] | rows of the stream → changes: pgoutput, mapping, assembler | no |
//! | [`postgres`] | connecting to PostgreSQL; what its catalogs say of tables, publication and slot | yes |
//! | [`replication`] | the session on the slot: reads, checks, acknowledges | yes |
//! | [`changelog`] | the durable log: its contract, and one on local disk | yes |
//! | [`hub`] | recent messages, what is visible, and every subscription | yes |
//! | [`store`] | writes the tables of the preset `tuples` | yes |
//! | [`access`] | who gets in, and whom we trust | yes |
//! | [`api`] | the services over gRPC and HTTP | yes |
//! | [`admin`] | setup, doctor, and the slot's monitor | yes |
//! | [`app`] | builds `serve` from these, and takes it down in order | yes |
//! | [`cli`] | the command line; [`config`] reads what it runs with | yes |
//!
//! Beside them: [`metrics`], [`yaml`], [`thread`], [`dev_postgres`] for `dev` and tests, and `simulation`, the deterministic test of the
//! engine. What may use what is held by `tests/architecture.rs`; ARCHITECTURE.md says where to start for what.

pub mod access;
pub mod admin;
pub mod api;
pub mod app;
pub mod changelog;
pub mod cli;
pub mod config;
pub mod decode;
pub mod dev_postgres;
pub mod hub;
pub mod metrics;
pub mod model;
pub mod postgres;
pub mod replication;
#[cfg(test)]
mod simulation;
pub mod store;
pub mod thread;
pub mod yaml;
