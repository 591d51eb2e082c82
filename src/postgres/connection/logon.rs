//! The log-on of both kinds of connections.
//!
//! Each driver would log on in its own way, with other settings, another form of the password, and other errors. So
//! neither driver logs on. This module sends the startup message with our [pins](super::pins), authenticates, and sets
//! the settings that the startup message cannot contain. Then a [`Walsender`] takes over. tokio-postgres insists on
//! logging on itself, so it receives a session that the server has already accepted:
//!
//! ```text
//!   server ◀── startup, password, SET … ── log_on()                         LoggedOn
//!          ──▶ AuthenticationOk, ParameterStatus …, ReadyForQuery ──▶ kept ──▶ the driver reads these first
//!          ◀──────────────── everything else ──────────────────────────────▶ driver
//! ```
//!
//! The driver still sends a startup message, and [`Disguised`] drops it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use fallible_iterator::FallibleIterator as _;
use pgwire_replication::auth::ScramClient;
use postgres_protocol::authentication::md5_hash;
use postgres_protocol::message::backend::{ErrorResponseBody, Message};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::Walsender;
use super::failure::{Failure, Refusal};
use super::password::Password;
use super::peer::{Peer, parse};
use super::pins::Sessions;
use super::wire::Wire;

const SCRAM: &str = "SCRAM-SHA-256";
/// The message AuthenticationOk.
const AUTHENTICATION_OK: &[u8] = b"R\0\0\0\x08\0\0\0\0";

/// The user that logs on, and the kind of session.
pub(super) struct LogOn<'a> {
    pub(super) user: &'a str,
    pub(super) password: &'a Password,
    pub(super) database: &'a str,
    pub(super) application_name: &'a str,
    /// The options of `database.uri`.
    pub(super) options: Option<&'a str>,
    pub(super) sessions: Sessions,
}

/// A session that the server has accepted.
pub(super) struct LoggedOn {
    peer: Peer,
    /// The messages from AuthenticationOk to ReadyForQuery.
    accepted: BytesMut,
}

/// An accepted session, for a driver that still logs on.
pub(super) struct Disguised {
    wire: Wire,
    /// The bytes that the driver reads first.
    accepted: BytesMut,
    /// The part of the driver's startup message that was written so far. `None` once the message is complete.
    startup: Option<BytesMut>,
}

impl LogOn<'_> {
    pub(super) async fn log_on(&self, wire: Wire) -> Result<LoggedOn, Failure> {
        let mut peer = Peer::new(wire);
        peer.send(|out| frontend::startup_message(self.parameters(), out)).await.map_err(Failure::Lost)?;
        self.authenticate(&mut peer).await?;
        let (accepted, late_pins) = self.begin(&mut peer).await?;
        self.run(&mut peer, &late_pins).await?;
        Ok(LoggedOn { peer, accepted })
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
            match self.receive(peer).await? {
                Message::AuthenticationOk => return Ok(()),
                Message::AuthenticationCleartextPassword => {
                    peer.send(|out| frontend::password_message(self.password.bytes(), out))
                        .await
                        .map_err(Failure::Lost)?;
                }
                Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(self.user.as_bytes(), self.password.bytes(), body.salt());
                    peer.send(|out| frontend::password_message(hash.as_bytes(), out)).await.map_err(Failure::Lost)?;
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
                _ => return Err(Failure::Unexpected { when: "during authentication" }),
            }
        }
    }

    async fn scram(&self, peer: &mut Peer) -> Result<(), Failure> {
        let password = self.password.prepared().ok_or(Failure::PasswordIsNoText)?;
        let client = ScramClient::new(self.user);
        peer.send(|out| frontend::sasl_initial_response(SCRAM, client.client_first.as_bytes(), out))
            .await
            .map_err(Failure::Lost)?;
        let Message::AuthenticationSaslContinue(first) = self.receive(peer).await? else {
            return Err(Failure::Unexpected { when: "during SCRAM" });
        };
        let first = String::from_utf8_lossy(first.data()).into_owned();
        let (last, messages, salted) = client.client_final(&password, &first).map_err(Failure::Impostor)?;
        peer.send(|out| frontend::sasl_response(last.as_bytes(), out)).await.map_err(Failure::Lost)?;
        let Message::AuthenticationSaslFinal(proof) = self.receive(peer).await? else {
            return Err(Failure::Unexpected { when: "at the end of SCRAM" });
        };
        let proof = String::from_utf8_lossy(proof.data()).into_owned();
        ScramClient::verify_server_final(&proof, &salted, &messages).map_err(Failure::Impostor)
    }

    /// Receives the next message. Fails if the server refuses the session.
    async fn receive(&self, peer: &mut Peer) -> Result<Message, Failure> {
        match peer.receive().await.map_err(Failure::Lost)? {
            Message::ErrorResponse(error) => Err(self.refused(&error)),
            message => Ok(message),
        }
    }

    /// Reads until the server is ready. Returns the messages from AuthenticationOk on, and the statements of the late
    /// pins.
    async fn begin(&self, peer: &mut Peer) -> Result<(BytesMut, String), Failure> {
        let mut accepted = BytesMut::from(AUTHENTICATION_OK);
        let (mut major, mut is_superuser) = (0, false);
        loop {
            let bytes = peer.incoming.next().await.map_err(Failure::Lost)?;
            match parse(bytes.clone()).map_err(Failure::Lost)? {
                Message::ParameterStatus(status) => {
                    accepted.extend_from_slice(&bytes);
                    match (status.name().map_err(Failure::Lost)?, status.value().map_err(Failure::Lost)?) {
                        ("server_version", version) => major = leading_number(version),
                        ("is_superuser", value) => is_superuser = value == "on",
                        _ => {}
                    }
                }
                Message::BackendKeyData(_) => accepted.extend_from_slice(&bytes),
                Message::ReadyForQuery(_) => {
                    accepted.extend_from_slice(&bytes);
                    return Ok((accepted, self.sessions.late_pins(major, is_superuser)));
                }
                Message::ErrorResponse(error) => return Err(self.refused(&error)),
                _ => {}
            }
        }
    }

    async fn run(&self, peer: &mut Peer, sql: &str) -> Result<(), Failure> {
        peer.send(|out| frontend::query(sql, out)).await.map_err(Failure::Lost)?;
        while !matches!(self.receive(peer).await?, Message::ReadyForQuery(_)) {}
        Ok(())
    }

    fn refused(&self, error: &ErrorResponseBody) -> Failure {
        Refusal::read(error, self.sessions).map_or_else(Failure::Lost, Failure::Refused)
    }
}

/// Returns 18 for `18beta1` and for `18.1 (Debian 18.1-1)`.
fn leading_number(version: &str) -> u32 {
    let end = version.find(|c: char| !c.is_ascii_digit()).unwrap_or(version.len());
    version.get(..end).and_then(|digits| digits.parse().ok()).unwrap_or_default()
}

impl LoggedOn {
    pub(super) fn into_walsender(mut self) -> Walsender {
        self.peer.trust();
        Walsender::new(self.peer)
    }

    /// Wraps the session for tokio-postgres.
    pub(super) fn disguised(mut self) -> Disguised {
        self.accepted.extend_from_slice(self.peer.incoming.unread());
        Disguised { wire: self.peer.into_wire(), accepted: self.accepted, startup: Some(BytesMut::new()) }
    }
}

impl AsyncRead for Disguised {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.accepted.is_empty() {
            return Pin::new(&mut self.wire).poll_read(cx, out);
        }
        let length = self.accepted.len().min(out.remaining());
        out.put_slice(&self.accepted.split_to(length));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Disguised {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let Some(startup) = &mut self.startup else { return Pin::new(&mut self.wire).poll_write(cx, bytes) };
        // The driver sends nothing after it, because it waits for an answer. The first four bytes are the length.
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
