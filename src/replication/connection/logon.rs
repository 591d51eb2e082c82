//! Logging on, for both drivers.
//!
//! tokio-postgres and pgwire-replication would each do it in their own way: with other settings, another form of the same
//! password and other errors. So neither does. This sends the startup message with our [pins](super::pins), proves who we are,
//! sets what the startup message could not, and hands the driver a session that the server has already accepted:
//!
//! ```text
//!   server ◀── startup, password, SET … ── log_on()                         LoggedOn
//!          ──▶ AuthenticationOk, ParameterStatus …, ReadyForQuery ──▶ kept ──▶ the driver reads these first
//!          ◀──────────────── everything else ──────────────────────────────▶ driver
//! ```
//!
//! The driver sends a startup message all the same. [`LoggedOn`] swallows it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut as _, BytesMut};
use fallible_iterator::FallibleIterator as _;
use pgwire_replication::auth::ScramClient;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::message::backend::Message;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

use super::failure::{Failure, Refusal};
use super::password::Password;
use super::pins::Sessions;
use super::wire::Wire;

/// Most bytes of a message before the session begins. Real ones have some hundred.
const MESSAGE_MAX: usize = 64 << 10;
const SCRAM: &str = "SCRAM-SHA-256";
/// The message of which AuthenticationOk consists.
const AUTHENTICATION_OK: &[u8] = b"R\0\0\0\x08\0\0\0\0";

/// Who logs on, for what.
pub(super) struct LogOn<'a> {
    pub(super) user: &'a str,
    pub(super) password: &'a Password,
    pub(super) database: &'a str,
    pub(super) application_name: &'a str,
    /// Of the URI.
    pub(super) options: Option<&'a str>,
    pub(super) sessions: Sessions,
}

/// A session that the server has accepted, for a driver that is yet to log on.
pub(super) struct LoggedOn {
    wire: Wire,
    /// From AuthenticationOk to ReadyForQuery, for the driver.
    accepted: BytesMut,
    /// What the driver has written of its own startup message. None once that is whole.
    startup: Option<BytesMut>,
}

impl LogOn<'_> {
    pub(super) async fn log_on(&self, wire: Wire) -> Result<LoggedOn, Failure> {
        let mut peer = Peer { wire, sessions: self.sessions };
        peer.send(|out| frontend::startup_message(self.parameters(), out)).await?;
        self.authenticate(&mut peer).await?;
        let (accepted, late_pins) = peer.begin().await?;
        peer.run(&late_pins).await?;
        Ok(LoggedOn { wire: peer.wire, accepted, startup: Some(BytesMut::new()) })
    }

    fn parameters(&self) -> Vec<(&str, &str)> {
        let mut parameters = vec![
            ("user", self.user),
            ("database", self.database),
            ("application_name", self.application_name),
            ("client_encoding", "UTF8"),
        ];
        if self.sessions == Sessions::Stream {
            parameters.push(("replication", "database"));
        }
        parameters.extend(self.options.map(|options| ("options", options)));
        for (name, value) in self.sessions.pins() {
            parameters.push((name, value));
        }
        parameters
    }

    async fn authenticate(&self, peer: &mut Peer) -> Result<(), Failure> {
        loop {
            match peer.receive().await? {
                Message::AuthenticationOk => return Ok(()),
                Message::AuthenticationCleartextPassword => {
                    peer.send(|out| frontend::password_message(self.password.bytes(), out)).await?;
                }
                Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(self.user.as_bytes(), self.password.bytes(), body.salt());
                    peer.send(|out| frontend::password_message(hash.as_bytes(), out)).await?;
                }
                Message::AuthenticationSasl(body) => {
                    let offered: Vec<_> =
                        body.mechanisms().map(|name| Ok(name.to_owned())).collect().map_err(Failure::Lost)?;
                    if !offered.iter().any(|name| name == SCRAM) {
                        return Err(Failure::Method(offered.join(" or ")));
                    }
                    self.scram(peer).await?;
                }
                Message::AuthenticationGss | Message::AuthenticationKerberosV5 => {
                    return Err(Failure::Method("Kerberos (GSSAPI)".to_owned()));
                }
                Message::AuthenticationSspi => return Err(Failure::Method("SSPI".to_owned())),
                Message::NoticeResponse(_) => {}
                _ => return Err(unexpected("during authentication")),
            }
        }
    }

    async fn scram(&self, peer: &mut Peer) -> Result<(), Failure> {
        let password = self.password.prepared().ok_or(Failure::PasswordIsNoText)?;
        let untrue = |error: pgwire_replication::PgWireError| Failure::Impostor(error.to_string());
        let client = ScramClient::new(self.user);
        peer.send(|out| frontend::sasl_initial_response(SCRAM, client.client_first.as_bytes(), out)).await?;
        let Message::AuthenticationSaslContinue(first) = peer.receive().await? else {
            return Err(unexpected("in the middle of SCRAM"));
        };
        let first = String::from_utf8_lossy(first.data()).into_owned();
        let (last, messages, salted) = client.client_final(&password, &first).map_err(untrue)?;
        peer.send(|out| frontend::sasl_response(last.as_bytes(), out)).await?;
        let Message::AuthenticationSaslFinal(proof) = peer.receive().await? else {
            return Err(unexpected("at the end of SCRAM"));
        };
        let proof = String::from_utf8_lossy(proof.data()).into_owned();
        ScramClient::verify_server_final(&proof, &salted, &messages).map_err(untrue)
    }
}

fn unexpected(when: &str) -> Failure {
    Failure::Lost(io::Error::new(io::ErrorKind::InvalidData, format!("it sent something unexpected {when}")))
}

/// The server, before there is a session.
struct Peer {
    wire: Wire,
    sessions: Sessions,
}

impl Peer {
    async fn send(&mut self, message: impl FnOnce(&mut BytesMut) -> io::Result<()>) -> Result<(), Failure> {
        let mut out = BytesMut::new();
        // Fails for text with a zero byte in it.
        message(&mut out).map_err(Failure::Lost)?;
        self.wire.write_all(&out).await.map_err(Failure::Lost)?;
        self.wire.flush().await.map_err(Failure::Lost)
    }

    /// The next message, unless the server refuses.
    async fn receive(&mut self) -> Result<Message, Failure> {
        self.receive_whole().await.map(|(_, message)| message)
    }

    /// With its bytes. A byte says what it is, four how long the rest is, these four included.
    async fn receive_whole(&mut self) -> Result<(BytesMut, Message), Failure> {
        let tag = self.wire.read_u8().await.map_err(Failure::Lost)?;
        let length = self.wire.read_u32().await.map_err(Failure::Lost)?;
        let body_length = usize::try_from(length).ok().and_then(|length| length.checked_sub(4));
        let Some(body_length) = body_length.filter(|length| *length <= MESSAGE_MAX) else {
            return Err(unexpected("that is not of PostgreSQL's protocol"));
        };
        let mut body = vec![0; body_length];
        self.wire.read_exact(&mut body).await.map_err(Failure::Lost)?;
        let mut whole = BytesMut::with_capacity(5 + body_length);
        whole.put_u8(tag);
        whole.put_u32(length);
        whole.put_slice(&body);
        match Message::parse(&mut whole.clone()).map_err(Failure::Lost)? {
            Some(Message::ErrorResponse(error)) => {
                Err(Failure::Refused(Refusal::read(&error, self.sessions).map_err(Failure::Lost)?))
            }
            Some(message) => Ok((whole, message)),
            None => Err(unexpected("that is not whole")),
        }
    }

    /// Reads until the server is ready. Returns the messages from AuthenticationOk on, and the statements of the late pins.
    async fn begin(&mut self) -> Result<(BytesMut, String), Failure> {
        let mut accepted = BytesMut::from(AUTHENTICATION_OK);
        let (mut major, mut is_superuser) = (0, false);
        loop {
            let (whole, message) = self.receive_whole().await?;
            match message {
                Message::ParameterStatus(status) => {
                    accepted.extend_from_slice(&whole);
                    match (status.name().map_err(Failure::Lost)?, status.value().map_err(Failure::Lost)?) {
                        ("server_version", version) => major = leading_number(version),
                        ("is_superuser", value) => is_superuser = value == "on",
                        _ => {}
                    }
                }
                Message::BackendKeyData(_) => accepted.extend_from_slice(&whole),
                Message::ReadyForQuery(_) => {
                    accepted.extend_from_slice(&whole);
                    return Ok((accepted, self.sessions.late_pins(major, is_superuser)));
                }
                _ => {}
            }
        }
    }

    async fn run(&mut self, sql: &str) -> Result<(), Failure> {
        self.send(|out| frontend::query(sql, out)).await?;
        while !matches!(self.receive().await?, Message::ReadyForQuery(_)) {}
        Ok(())
    }
}

/// 18 in `18beta1` and in `18.1 (Debian 18.1-1)`.
fn leading_number(version: &str) -> u32 {
    let end = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version.get(..end).and_then(|digits| digits.parse().ok()).unwrap_or_default()
}

impl LoggedOn {
    /// The server, and what a driver has to read first.
    pub(super) fn into_parts(self) -> (Wire, BytesMut) {
        (self.wire, self.accepted)
    }
}

impl AsyncRead for LoggedOn {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.accepted.is_empty() {
            return Pin::new(&mut self.wire).poll_read(cx, out);
        }
        let length = self.accepted.len().min(out.remaining());
        out.put_slice(&self.accepted.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for LoggedOn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(startup) = &mut self.startup else { return Pin::new(&mut self.wire).poll_write(cx, bytes) };
        // It comes alone: the driver waits for an answer. Its first four bytes are its length.
        startup.extend_from_slice(bytes);
        let is_whole = startup.first_chunk().is_some_and(|length| {
            usize::try_from(u32::from_be_bytes(*length)).is_ok_and(|length| startup.len() >= length)
        });
        if is_whole {
            self.startup = None;
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(cx)
    }
}
