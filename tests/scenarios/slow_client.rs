//! A client that reads one stream of a connection, and leaves others unread.
//!
//! Clients built on h2 (tonic's among them) charge every unread DATA frame of less than 256 bytes against a budget of half the
//! connection's window, and close the connection when it is used up. So an unread stream must be sent few, larger frames.

use crate::support::postgres::Postgres;
use crate::support::raw_watch::{Connection, RawStream, Windows, changes, decimal, entity_id, is_too_many_frames};
use crate::support::server::Server;
use crate::support::wait::within;

/// Small windows for a fast test. The unread streams must use less than half of the connection's window. Otherwise h2 has no half left to
/// return for read data, and the connection stalls.
const WINDOWS: Windows = Windows { stream: 30 << 10, connection: 128 << 10 };
/// Messages of about 120 bytes: the budget of 64 KiB is used up after 240 of them, and the window of a stream after 256.
const TRANSACTIONS: u64 = 600;

/// Reads numbers, which must be complete from 1 on and in order.
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
        // One after the other, or they would be sent in one frame.
        read.up_to(number).await;
    }
    for stream in unread {
        Read { stream, last: 0 }.up_to(TRANSACTIONS).await;
    }
}
