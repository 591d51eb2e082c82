//! The threads that serve gRPC, each with a runtime of its own.
//!
//! A connection stays on one thread. So what is published wakes all its streams, and then it, in one turn of one runtime, and it
//! writes once ([`crate::hub::Bell`]). On a runtime of several threads the first stream that is woken has its connection
//! written by another thread while the next ones are still being woken.

use super::Error;
use crate::connections::Place;
use crate::thread;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// Half of the processors, as the other half has the stream from PostgreSQL to go on with.
fn count() -> usize {
    std::thread::available_parallelism().map_or(1, |all| all.get() / 2).max(1)
}

/// What a client of HTTP/2 says first, and how long it may take. Nothing else ends a connection that says nothing at all, as pings
/// begin behind it. (With TLS it is the first bytes of the handshake, which has a time of its own.)
const PREFACE_BYTES: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
const PREFACE_MAX: Duration = Duration::from_secs(10);
/// Accepted connections that wait for their thread.
const HANDED_OVER_MAX: usize = 64;

/// Threads that serve until they have ended by themselves, or this is dropped.
pub(super) struct Threads {
    threads: Vec<Thread>,
    ended: JoinSet<Result<(), Error>>,
}

struct Thread {
    connections: mpsc::Sender<Connection>,
    open: Arc<AtomicUsize>,
}

impl Threads {
    /// Starts them; each runs what `serve` makes of its connections.
    ///
    /// # Errors
    /// Where the operating system has no more threads.
    pub(super) fn start<F>(serve: impl Fn(mpsc::Receiver<Connection>) -> F) -> io::Result<Self>
    where
        F: Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
    {
        let (mut threads, mut ended) = (Vec::new(), JoinSet::new());
        for n in 0..count() {
            let (connections, received) = mpsc::channel(HANDED_OVER_MAX);
            let served = thread::run(format!("grpc-{n}"), serve(received))?;
            threads.push(Thread { connections, open: Arc::default() });
            ended.spawn(async { Ok(served.await?) });
        }
        Ok(Self { threads, ended })
    }

    /// Hands a connection to the thread that has the fewest.
    ///
    /// # Errors
    /// Where that one is gone.
    pub(super) async fn serve(&self, stream: TcpStream, place: Place) -> io::Result<()> {
        let Some(thread) = self.threads.iter().min_by_key(|thread| thread.open.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        thread.open.fetch_add(1, Ordering::Relaxed);
        let held = Held { open: thread.open.clone(), _place: place };
        // The runtime that accepted it gives it up; that of the thread takes it on.
        let connection = Connection { stream: stream.into_std()?, held };
        thread.connections.send(connection).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    /// Waits until one has ended; `None` where none is left.
    ///
    /// Cancel safe.
    pub(super) async fn ended(&mut self) -> Option<Result<(), Error>> {
        let ended = self.ended.join_next().await?;
        Some(ended.unwrap_or_else(|error| Err(Error::Threads(io::Error::other(error)))))
    }
}

/// A connection on its way to a thread.
pub(super) struct Connection {
    stream: std::net::TcpStream,
    held: Held,
}

impl Connection {
    /// The connection as one of the runtime that this runs in.
    pub(super) fn adopt(self) -> io::Result<Adopted> {
        let stream = TcpStream::from_std(self.stream)?;
        let opening = Some(Opening { received: 0, deadline: Box::pin(tokio::time::sleep(PREFACE_MAX)) });
        Ok(Adopted { stream, opening, _held: self.held })
    }
}

/// What a connection counts for, while it lasts.
struct Held {
    open: Arc<AtomicUsize>,
    _place: Place,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that is served.
pub(super) struct Adopted {
    stream: TcpStream,
    /// Until it has said something.
    opening: Option<Opening>,
    _held: Held,
}

struct Opening {
    received: usize,
    deadline: Pin<Box<Sleep>>,
}

impl Connected for Adopted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Adopted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let had = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if let Some(opening) = &mut self.opening {
            opening.received += buffer.filled().len() - had;
            if opening.received >= PREFACE_BYTES {
                self.opening = None;
            } else if read.is_pending() && opening.deadline.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
        }
        read
    }
}

impl AsyncWrite for Adopted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
