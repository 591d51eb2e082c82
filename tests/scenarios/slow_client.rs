//! A client that reads one stream of a connection, and leaves others unread.
//!
//! Clients built on h2 (tonic's among them) charge every unread DATA frame of less than 256 bytes against a budget of half the
//! connection's window, and close the connection when it is used up. So an unread stream must be sent few, larger frames.

use crate::support::postgres::Postgres;
use crate::support::raw_watch::{Connection, RawStream, Windows, changes, decimal, entity_id, is_too_many_frames};
use crate::support::server::Server;
use crate::support::wait::within;

/// Small ones, so that all comes soon. The unread streams may hold less than half of the connection's window: with more, h2 has no
/// half left to give back for what is read, and nothing comes any more.
const WINDOWS: Windows = Windows { stream: 30 << 10, connection: 128 << 10 };
/// Messages of some 120 bytes: the budget of 64 KiB is spent after 240 of them, and a stream's window is full after 256.
const TRANSACTIONS: u64 = 600;

/// The numbers that have come so far, which must be all from 1 on, in order.
struct Read {
    stream: RawStream,
    last: u64,
}

impl Read {
    async fn up_to(&mut self, last: u64) {
        while self.last < last {
            let read = self.stream.read(|message| {
                changes(message, |change| {
                    let number = decimal(entity_id(change));
                    assert_eq!(number, self.last + 1, "each once, in order");
                    self.last = number;
                });
            });
            if let Err(error) = within("the next frame", read).await {
                let why = if is_too_many_frames(&error) { "too many small frames are unread" } else { "it failed" };
                panic!("the connection ended after {} messages, {why}: {error}", self.last);
            }
        }
    }
}

#[tokio::test]
async fn unread_streams_do_not_end_their_connection() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let connection = Connection::open(server.address(), WINDOWS).await;
    let unread = [connection.watch("t1", "").await, connection.watch("t1", "").await];
    let mut read = Read { stream: connection.watch("t1", "").await, last: 0 };
    for number in 1..=TRANSACTIONS {
        sql.insert("t1", &number.to_string()).await;
        // Only then the next: else they would be joined on their way.
        read.up_to(number).await;
    }
    for stream in unread {
        Read { stream, last: 0 }.up_to(TRANSACTIONS).await;
    }
}
