//! A session that has been logged on, handed to the replication driver.
//!
//! The driver opens its connection itself and takes no stream. So it is led to a socket of ours on the loopback interface, behind
//! which the session is. That costs a copy in memory; it gives both connections one way to log on, one idea of trust, and the same
//! settings. The socket takes one connection, the driver's, who says a secret in its startup message; it is closed by then.

use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::BytesMut;
use rustls::crypto::ring;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader, copy, copy_buf, split};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use super::logon::LoggedOn;
use super::wire::Wire;

/// Longest wait for the driver, and for anybody else who connects, to say who it is.
const STARTUP_MAX: Duration = Duration::from_secs(10);
/// Longest startup message.
const STARTUP_BYTES_MAX: u32 = 4096;
/// Once the driver has gone: the server has this long to take its farewell.
const FAREWELL_MAX: Duration = Duration::from_secs(2);
/// Read at a time: half of what the driver does.
const CHUNK: usize = 64 << 10;

/// Where the driver finds its session.
pub(super) struct Relay {
    pub(super) port: u16,
    /// What it has to say as its `application_name`.
    pub(super) secret: String,
}

impl Relay {
    /// The session ends with the driver's connection, and the other way round.
    pub(super) async fn to(session: LoggedOn) -> io::Result<Self> {
        let mut noise = [0; 16];
        ring::default_provider().secure_random.fill(&mut noise).map_err(|_| io::Error::other("no randomness"))?;
        let secret = noise.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let expected = secret.clone();
        tokio::spawn(async move {
            let driver = match timeout(STARTUP_MAX, accept(listener, &expected)).await {
                Ok(Ok(driver)) => driver,
                Ok(Err(error)) => return tracing::debug!(%error, "the replication driver could not be let in"),
                // It has been given up.
                Err(_) => return,
            };
            let (server, accepted) = session.into_parts();
            if let Err(error) = pass_on(driver, server, &accepted).await {
                tracing::debug!(%error, "the replication connection ended");
            }
        });
        Ok(Self { port, secret })
    }
}

/// The driver, and none of those who do not know the secret.
async fn accept(listener: TcpListener, secret: &str) -> io::Result<TcpStream> {
    loop {
        let (mut stream, _) = listener.accept().await?;
        if startup(&mut stream)
            .await
            .is_ok_and(|text| text.split(|byte| *byte == 0).any(|word| word == secret.as_bytes()))
        {
            stream.set_nodelay(true)?;
            return Ok(stream);
        }
    }
}

/// A startup message: its length, and pairs of names and values, each with a zero byte behind it.
async fn startup(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let read = async {
        let length = stream.read_u32().await?;
        let rest =
            length.checked_sub(4).filter(|_| length <= STARTUP_BYTES_MAX).and_then(|rest| usize::try_from(rest).ok());
        let mut text = vec![0; rest.ok_or(io::ErrorKind::InvalidData)?];
        stream.read_exact(&mut text).await?;
        Ok(text)
    };
    timeout(Duration::from_secs(1), read).await.map_err(|_| io::ErrorKind::TimedOut)?
}

async fn pass_on(driver: TcpStream, server: Wire, accepted: &BytesMut) -> io::Result<()> {
    let (from_driver, mut to_driver) = driver.into_split();
    let (from_server, mut to_server) = split(server);
    to_driver.write_all(accepted).await?;
    let mut from_server = BufReader::with_capacity(CHUNK, from_server);
    let mut from_driver = from_driver;
    tokio::select! {
        ended = copy_buf(&mut from_server, &mut to_driver) => return ended.map(drop),
        // Flushes: what the driver says is small, and TLS would keep it.
        ended = copy(&mut from_driver, &mut to_server) => ended.map(drop)?,
    }
    to_server.shutdown().await?;
    // The rest is for nobody. But a connection that is closed with something unread is reset, and what we sent may be lost.
    let _ = timeout(FAREWELL_MAX, copy(&mut from_server, &mut tokio::io::sink())).await;
    Ok(())
}
