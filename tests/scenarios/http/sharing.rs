//! What many HTTP streams of one tenant share: each message is JSON once, for all of them.

use crate::support::http::{EventSource, Seen};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::wait::eventually;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

/// A transaction of this many tuples.
async fn insert_many(sql: &Sql, tuples: u32) {
    sql.run(&format!(
        "INSERT INTO tuplewatch.relation_tuples \
         (tenant_id, entity_type, entity_id, relation, subject_type, subject_id) \
         SELECT 't1', 'document', n, 'viewer', 'user', 'u' FROM generate_series(1, {tuples}) n"
    ))
    .await;
}

async fn lines_made(server: &Server) -> f64 {
    server.scrape().await.get("tuplewatch_envelopes_made_total", &[("form", "base_v1_json")])
}

async fn messages_sent(server: &Server) -> f64 {
    server.scrape().await.get("tuplewatch_messages_sent_total", &[("protocol", "http")])
}

#[tokio::test]
async fn each_message_is_made_once_for_twenty_event_sources() {
    const SOURCES: usize = 20;
    const TUPLES: u32 = 3_000;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[("--service-watch-message-size-max", "32KiB")]).await;
    let mut sources = Vec::new();
    for _ in 0..SOURCES {
        let mut source = EventSource::new(server.url("/v1/tenants/t1/watch"));
        assert_eq!(source.next().await, Seen::Open);
        sources.push(source);
    }
    insert_many(&postgres.sql().await, TUPLES).await;
    let mut messages = 0;
    for source in &mut sources {
        let mut changes = 0;
        while changes < TUPLES as usize {
            let Seen::Message { data, .. } = source.next().await else { panic!("a message") };
            changes += data["changes"]["data_changes"].as_array().unwrap().len();
            messages += 1;
        }
    }
    let each = messages / SOURCES;
    assert!(each > 2, "it comes in several messages");
    assert_eq!((lines_made(&server).await, messages_sent(&server).await), (each as f64, messages as f64));
}

async fn stuck(server: &Server) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    // Little of what is sent stays on our side.
    socket.set_recv_buffer_size(4 << 10).unwrap();
    let mut stream = socket.connect(server.http_address()).await.unwrap();
    stream.write_all(b"GET /v1/tenants/t1/watch HTTP/1.1\r\nhost: t\r\n\r\n").await.unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).await.unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    stream
}

/// A hundred clients that do not read hold one message of 1 MiB, and not a hundred.
#[tokio::test]
async fn clients_that_do_not_read_hold_one_message_together() {
    // Nearly one message, which is some 3 MB of JSON.
    hold_together(16_000).await;
}

/// The same with a transaction of many messages, which is too large for memory, so that each stream reads it from the change log.
#[tokio::test]
async fn clients_that_do_not_read_share_messages_from_the_log() {
    hold_together(100_000).await;
}

async fn hold_together(tuples: u32) {
    const CLIENTS: usize = 100;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(stuck(&server).await);
    }
    let before_kib = server.memory_kib("VmRSS");
    insert_many(&sql, tuples).await;
    eventually("all have begun to take it", async || messages_sent(&server).await >= CLIENTS as f64).await;
    assert_eq!(lines_made(&server).await, messages_sent(&server).await / CLIENTS as f64);
    // One line for each client would take more than 256 MiB. A transaction of that size takes some memory by itself.
    let grown_kib = server.memory_kib("VmRSS").saturating_sub(before_kib);
    assert!(grown_kib < 64 << 10, "{grown_kib} KiB more");
}
