//! `base.v1` on the wire is, byte for byte, what it was before the engine was restructured.
//!
//! `tests/recorded/` has what each case does as SQL, and in a text of the case's name what a build of commit e64428b sent: the last one
//! before log format 3, whose log and hub still held encoded `base.v1`. Each case is run again here. Every message, header, trailer and
//! error detail must be the same, but for what `tests/support/recording.rs` lists: above all snap tokens, and where a message is cut.
//!
//! Clients rely on these bytes, so a difference is a fault of the program and not of the recording. A recording is made anew only where
//! `base.v1` changes on purpose, or where a case is added. In the second case the same build makes it, and what it sends for the other
//! cases stays as it is:
//!
//! ```text
//! TUPLEWATCH_BIN=/path/to/that/tuplewatch TUPLEWATCH_RECORD='a build of commit e64428b' cargo test --test main scenarios::recorded
//! ```

use crate::support::permify::{Permify, Tables};
use crate::support::postgres::Postgres;
use crate::support::raw_watch::{Connection, Windows};
use crate::support::recording::{Recording, assert_same};
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::wait::within;
use h2::RecvStream;
use std::fmt;
use tuplewatch::model::lsn::{Lsn, Xid8};
use tuplewatch::model::scope::Place;
use tuplewatch::model::snap_token::{SnapToken, TEXT_BYTES_MAX, TokenId};
use tuplewatch::model::timeline::{SourceId, TimelineId};

/// Large transactions come in several messages.
const CUT: (&str, &str) = ("--service-watch-message-size-max", "16KiB");

/// A request to watch.
enum Request<'a> {
    Grpc {
        tenant: &'a str,
        token: &'a str,
    },
    /// JSON lines.
    Post {
        path: &'a str,
        body: &'a str,
    },
    /// Server-Sent Events.
    Get {
        path: &'a str,
        last_event_id: &'a str,
    },
}

use Request::{Get, Grpc, Post};

const fn grpc(tenant: &str) -> Request<'_> {
    Grpc { tenant, token: "" }
}

impl fmt::Display for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Grpc { tenant, .. } => write!(f, "gRPC '{tenant}'"),
            Post { path, .. } => write!(f, "POST {path}"),
            Get { path, .. } => write!(f, "GET {path}"),
        }
    }
}

/// An answer whose head is there: its start is fixed.
enum Answer {
    Grpc(http::Response<RecvStream>),
    Http(reqwest::Response),
}

/// What a stream of a tenant sent, and the token from which it began.
struct Sent {
    tenant: String,
    start_token: String,
    lines: Vec<String>,
}

/// A node, and what it sends.
struct Case {
    server: Server,
    sql: Sql,
    recording: Recording,
    sent: Vec<Sent>,
}

impl Case {
    async fn begin(server: Server, sql: Sql) -> Self {
        // Statements of many rows take them in the order of the table.
        sql.run("SET enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan = off").await;
        Self { server, sql, recording: Recording::default(), sent: Vec::new() }
    }

    async fn ask(&self, request: &Request<'_>) -> Answer {
        let answer = async {
            let http = match *request {
                Grpc { tenant, token } => {
                    let connection = Connection::open(self.server.address(), Windows::WIDE).await;
                    return Answer::Grpc(connection.request(tenant, token).await);
                }
                Post { path, body } => reqwest::Client::new().post(self.server.url(path)).body(body.to_owned()),
                Get { path, last_event_id } => {
                    reqwest::Client::new().get(self.server.url(path)).header("last-event-id", last_event_id)
                }
            };
            Answer::Http(http.send().await.unwrap())
        };
        within("an answer begins", answer).await
    }

    /// Records what these requests are sent while the script runs, whose paragraphs are transactions.
    async fn record(&mut self, requests: &[Request<'_>], script: &str) {
        let mut answers = Vec::new();
        for request in requests {
            answers.push((request, self.ask(request).await));
        }
        for transaction in script.split("\n\n") {
            self.sql.run(transaction).await;
        }
        for (request, answer) in answers {
            self.record_answer(request, answer).await;
        }
    }

    async fn record_answer(&mut self, request: &Request<'_>, answer: Answer) {
        self.recording.ask(&request.to_string());
        match answer {
            Answer::Http(response) => self.recording.http(response).await,
            Answer::Grpc(response) => {
                let start_token = response.headers().get("snap-token").map(|token| token.to_str().unwrap().to_owned());
                let lines = self.recording.grpc(response).await;
                if let (Grpc { tenant, .. }, Some(start_token)) = (request, start_token) {
                    self.sent.push(Sent { tenant: (*tenant).to_owned(), start_token, lines });
                }
            }
        }
    }

    /// Records an answer that comes by itself.
    async fn record_now(&mut self, what: &str, request: Request<'_>) {
        self.recording.ask(what);
        let answer = self.ask(&request).await;
        self.record_answer(&request, answer).await;
    }

    /// Records how streams end at what a statement does.
    async fn record_gap(&mut self, tenant: &str, statement: &str) {
        self.recording.ask(statement);
        let path = format!("/v1/tenants/{tenant}/watch");
        let requests = [grpc(tenant), Post { path: &path, body: "{}" }, Get { path: &path, last_event_id: "" }];
        self.record(&requests, statement).await;
    }

    /// Another process has nothing of it in memory, and sends the same from disk.
    async fn replay(&mut self) {
        self.server.kill_and_restart().await;
        for Sent { tenant, start_token, lines } in std::mem::take(&mut self.sent) {
            let request = Grpc { tenant: &tenant, token: &start_token };
            let Answer::Grpc(response) = self.ask(&request).await else { unreachable!("gRPC answers by gRPC") };
            let again = self.recording.grpc_again(response).await;
            assert_same(&format!("{tenant} from disk"), &lines, &again);
        }
    }
}

#[tokio::test]
async fn the_preset_tuples() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[CUT]).await;
    let sql = postgres.sql().await;
    sql.run("INSERT INTO tuplewatch.tenants (id, name) VALUES ('t2', '')").await;
    let mut case = Case::begin(server, sql).await;
    let requests = [
        grpc("t1"),
        grpc("t2"),
        Post { path: "/v1/tenants/t1/watch", body: "{}" },
        Post { path: "/v1/watch/watch", body: r#"{"tenant_id": "t1"}"# },
        Get { path: "/v1/tenants/t1/watch", last_event_id: "" },
    ];
    case.record(&requests, include_str!("../recorded/tuples.sql")).await;
    case.record(&[grpc("t1")], include_str!("../recorded/large.sql")).await;
    case.record_gap("t2", "TRUNCATE tuplewatch.attributes").await;
    case.replay().await;
    case.recording.compare("tuples");
}

#[tokio::test]
async fn the_preset_permify() {
    let postgres = Postgres::start().await;
    let permify = Permify::create(&postgres, "public", Tables::New).await;
    let server = permify.serve(&postgres, &[CUT]).await;
    let mut case = Case::begin(server, permify.sql().await).await;
    let requests = [
        grpc("t1"),
        grpc("t2"),
        Post { path: "/v1/tenants/t2/watch", body: "{}" },
        Get { path: "/v1/tenants/t2/watch", last_event_id: "" },
    ];
    case.record(&requests, include_str!("../recorded/permify.sql")).await;
    case.record_gap("t1", "TRUNCATE relation_tuples").await;
    case.replay().await;
    case.recording.compare("permify");
}

#[tokio::test]
async fn a_mapping_of_ones_own() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    sql.run(include_str!("../recorded/mapping_tables.sql")).await;
    let mapping = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/recorded/mapping.yaml");
    let server = Server::serve(&postgres, &[("--mapping-file", mapping)]).await;
    let mut case = Case::begin(server, sql).await;
    let requests =
        [grpc("acme"), grpc("Müller & Söhne"), Post { path: "/v1/watch/watch", body: r#"{"tenant_id": "acme"}"# }];
    case.record(&requests, include_str!("../recorded/mapping.sql")).await;
    case.record_gap("acme", "INSERT INTO shop.facts VALUES ('acme', '', 'bad', 'no JSON', 'live')").await;
    let without_relation =
        "INSERT INTO shop.folders (company, kind, folder, subject) VALUES ('acme', 'k', 1, gen_random_uuid())";
    case.record_gap("acme", without_relation).await;
    case.replay().await;
    // Such a gap begins at the last check, so that of what came since nothing comes again.
    case.record_gap("acme", "ALTER TYPE shop.role RENAME VALUE 'reader' TO 'viewer'").await;
    case.recording.compare("mapping");
}

/// Each is refused, and says why in its headers.
#[tokio::test]
async fn starts_that_are_refused() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--service-watch-resolve-timeout", "1s")]).await;
    let mut case = Case::begin(server, postgres.sql().await).await;
    let (_, _, good) = case.server.first_delivered(&postgres, "first").await;
    let Ok(SnapToken::Position { source, timeline, place, commit_time }) = good.parse() else {
        panic!("'{good}' is no token of a position")
    };
    let of_position = |source, timeline, lsn| {
        SnapToken::Position { source, timeline, place: Place::at(Lsn(lsn)), commit_time }.to_string()
    };
    let ancient = SnapToken::Transaction { source, id: TokenId([7; 16]), xid: Xid8(3), floor: Lsn(16) }.to_string();
    let writer = postgres.sql().await;
    writer.run("BEGIN").await;
    let running = writer.value("SELECT tuplewatch.snap_token()").await;
    let too_old = of_position(source, timeline, 16);

    let (long_tenant, long_token) = ("a".repeat(513), "A".repeat(TEXT_BYTES_MAX + 1));
    for (what, tenant, token) in [
        ("no tenant", "", ""),
        ("a tenant id with a space", "a b", ""),
        ("a tenant id that is too long", &long_tenant, ""),
        ("a tenant that does not exist", "nobody", ""),
        ("a token that is not base64", "t1", "%%%"),
        ("half a token", "t1", &good[..32]),
        ("a token that is too long", "t1", &long_token),
        ("a token of another database", "t1", &of_position(SourceId([7; 8]), timeline, place.position.lsn.0)),
        ("a token of another timeline", "t1", &of_position(source, TimelineId([7; 8]), place.position.lsn.0)),
        ("a token of the future", "t1", &of_position(source, timeline, u64::MAX)),
        ("a token that is too old", "t1", &too_old),
        ("a transaction that is too old", "t1", &ancient),
        ("an id that nothing is known of", "t1", &SnapToken::Xid(Xid8(3)).to_string()),
        ("a transaction that is still running", "t1", &running),
    ] {
        case.record_now(what, Grpc { tenant, token }).await;
    }
    let path = "/v1/tenants/t1/watch";
    let body = |token: &str| format!(r#"{{"snap_token": "{token}"}}"#);
    for (what, request) in [
        ("a tenant that does not exist", Post { path: "/v1/tenants/nobody/watch", body: "{}" }),
        ("a token that is not base64", Post { path, body: &body("%%%") }),
        ("a token that is too old", Post { path, body: &body(&too_old) }),
        ("a name that is unknown", Post { path, body: r#"{"snaptoken": ""}"# }),
        ("a tenant that does not exist", Get { path: "/v1/tenants/nobody/watch", last_event_id: "" }),
        ("a token that is too old", Get { path, last_event_id: &too_old }),
        ("a transaction that is still running", Get { path, last_event_id: &running }),
        ("a stream that has ended", Get { path, last_event_id: "ended" }),
    ] {
        case.record_now(what, request).await;
    }

    let requests = [grpc("t1"), Post { path, body: "{}" }, Get { path, last_event_id: "" }];
    let mut answers = Vec::new();
    for request in &requests {
        answers.push(case.ask(request).await);
    }
    case.recording.ask("SIGTERM");
    case.server.terminate().await;
    for (request, answer) in requests.iter().zip(answers) {
        case.record_answer(request, answer).await;
    }
    case.recording.compare("refusals");
}
