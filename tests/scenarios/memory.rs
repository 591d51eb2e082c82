//! Memory stays bounded (hazards 28, 29 and 36 together), and the largest transaction can be resumed in its middle.
//!
//! The server is a separate process, so the kernel's figures are about it alone.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::{Message, Stream};
use crate::support::wait::within;
use crate::support::writer::{TENANTS, add_tenants};
use futures_util::future::join_all;
use std::time::Instant;

const TUPLES: u64 = 1_000_000;
const CONNECTIONS: usize = 20;
const IDLE_PER_CONNECTION: usize = 100;
/// The bounded parts (the window of 64 MiB, the recorder's queue, write buffers, the block cache, buffers of streams) need half of this.
/// With the whole transaction in memory it would be exceeded.
const MEMORY_MAX_KIB: u64 = 256 << 10;
/// The length of ids, so that the tuples are large enough for that.
const LONG: usize = 100;

fn number(change: &Change) -> u64 {
    assert!(change.is_create);
    change.fact.split_once(":n").and_then(|(_, rest)| rest.split_once('-')).unwrap().0.parse().unwrap()
}

/// Reads every tuple from this one on, once and in order. Returns the messages with the number of the last tuple in each.
async fn read_from(stream: &mut Stream, first: u64) -> Vec<(u64, Message)> {
    let mut expected = first;
    let mut kept = Vec::new();
    while expected <= TUPLES {
        let mut message = stream.next().await;
        assert!(message.bytes <= 1 << 20, "a message of {} bytes", message.bytes);
        for change in message.changes.drain(..) {
            assert_eq!(number(&change), expected);
            expected += 1;
        }
        kept.push((expected - 1, message));
    }
    kept
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_stays_bounded_with_a_million_tuples_and_unread_streams() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    add_tenants(&sql).await;
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS {
        let channel = server.channel().await;
        let tenants = (0..IDLE_PER_CONNECTION).map(|n| TENANTS[1 + n % 3]);
        let streams = join_all(tenants.map(|tenant| Stream::open_on(channel.clone(), tenant, "")));
        idle.extend(within("idle streams", streams).await.into_iter().map(Result::unwrap));
    }
    let mut unread = server.watch("t1", "").await;
    let mut reader = server.watch("t1", "").await;
    eprintln!("{} streams are open: VmRSS {} MiB", idle.len() + 2, server.memory_kib("VmRSS") >> 10);

    let began = Instant::now();
    let long = "x".repeat(LONG);
    sql.run(&format!(
        "INSERT INTO tuplewatch.relation_tuples \
         SELECT 't1', 'document', 'n' || lpad(n::text, 7, '0') || '-{long}', 'viewer', 'user', '{long}', '' FROM generate_series(1, {TUPLES}) n"
    ))
    .await;
    let inserted = began.elapsed();
    let messages = read_from(&mut reader, 1).await;
    let most = server.memory_kib("VmHWM");
    eprintln!("inserted in {inserted:?}, delivered after {:?}: VmHWM {} MiB", began.elapsed(), most >> 10);
    assert!(most < MEMORY_MAX_KIB, "{most} KiB");
    let bytes: usize = messages.iter().map(|(_, message)| message.bytes).sum();
    assert!(bytes > 200 << 20, "too little to show anything: {bytes} bytes");

    // The idle streams are alive.
    for tenant in &TENANTS[1..] {
        sql.insert(tenant, "end").await;
    }
    let ends = join_all(idle.iter_mut().map(|stream| stream.expect(Change::created("end"))));
    within("every stream has the last change", ends).await;
    drop(idle);

    // Resume in the middle, in this process and in the next.
    let middle = |part: usize| &messages[messages.len() * part / 4];
    let (last, message) = middle(2);
    read_from(&mut server.watch("t1", &message.token).await, last + 1).await;
    // The unread stream has lost nothing.
    read_from(&mut unread, 1).await;
    let most = server.memory_kib("VmHWM");
    eprintln!("read again from its middle and from its begin: VmHWM {} MiB", most >> 10);
    assert!(most < MEMORY_MAX_KIB, "{most} KiB");

    server.kill_and_restart().await;
    let (last, message) = middle(3);
    read_from(&mut server.watch("t1", &message.token).await, last + 1).await;
    let most = server.memory_kib("VmHWM");
    eprintln!("opened again, and read from three quarters on: VmHWM {} MiB", most >> 10);
    assert!(most < MEMORY_MAX_KIB, "{most} KiB");
}
