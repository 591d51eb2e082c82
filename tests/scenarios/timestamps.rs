//! Commit timestamps can be equal, or contradict the commit order. No change is lost because of that.

use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::reference::{self, Transaction};
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::stream::changes;
use std::collections::HashSet;

/// The number of transactions in a round, and of rounds until ties and inversions occur. One round is nearly always enough.
const ROUND: usize = 8_000;
const ROUNDS_MAX: usize = 10;
const WRITERS: usize = 16;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_and_inverted_commit_timestamps_lose_nothing() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    reference::begin(&sql).await;
    let mut stream = server.watch("t1", "").await;
    let mut received = Vec::new();
    for round in 1..=ROUNDS_MAX {
        let writers: Vec<_> = (0..WRITERS).map(|writer| tokio::spawn(write(postgres.uri(), round, writer))).collect();
        for writer in writers {
            writer.await.unwrap();
        }
        let end = format!("end{round}");
        sql.insert("t1", &end).await;
        received.extend(changes(&stream.up_to(&Change::create(Change::viewer(&end))).await));

        let transactions = reference::read(&sql).await;
        assert_eq!(received, reference::of_tenant(&transactions, "t1"));
        assert_eq!(received.len(), round * (ROUND + 1));
        let (ties, inversions) = ties_and_inversions(&transactions);
        eprintln!("{} transactions, {ties} equal timestamps, {inversions} inverted", transactions.len());
        if ties > 0 && inversions > 0 {
            return;
        }
    }
    panic!("no equal and inverted commit timestamps in {ROUNDS_MAX} rounds: nothing was shown");
}

async fn write(uri: String, round: usize, writer: usize) {
    let sql = Sql::connect(&uri).await;
    for n in 0..ROUND / WRITERS {
        sql.insert("t1", &format!("{round}.{writer}.{n}")).await;
    }
}

/// The number of repeated timestamps, and of those before their predecessor.
fn ties_and_inversions(transactions: &[Transaction]) -> (usize, usize) {
    let times: Vec<i64> = transactions.iter().map(|transaction| transaction.commit_time).collect();
    let distinct: HashSet<i64> = times.iter().copied().collect();
    (times.len() - distinct.len(), times.windows(2).filter(|pair| pair[1] < pair[0]).count())
}
