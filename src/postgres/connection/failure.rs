//! What it means that a connection failed: whether it is worth trying again, and what to do.
//!
//! **Transient**: the server may answer differently in a while, without anybody doing anything. **Definite**: somebody has
//! to change something first. In doubt a failure is transient: trying again with backoff does less harm than giving up.
//!
//! A refusal is told by its SQLSTATE and, where one SQLSTATE has several causes, by the function of PostgreSQL that raised it:
//! the text is in the language of the server, which nobody can choose before having logged on.

use std::fmt;
use std::io;
use std::time::Duration;

use fallible_iterator::FallibleIterator as _;
use postgres_protocol::message::backend::ErrorResponseBody;

use super::pins::Sessions;
use super::wire;

/// No connection could be made, or one ended.
#[derive(Debug)]
pub struct ConnectError {
    /// One for each address that was tried; never empty.
    attempts: Vec<Attempt>,
}

/// What happened at one address.
#[derive(Debug)]
pub(super) struct Attempt {
    /// Host, port, database and user.
    pub(super) endpoint: String,
    pub(super) failure: Failure,
}

#[derive(Debug)]
pub(super) enum Failure {
    Resolve(io::Error),
    Dial(io::Error),
    TimedOut(Duration),
    Tls(wire::Error),
    /// The connection broke, or something that is no PostgreSQL answered.
    Lost(io::Error),
    /// The server asks for another way to log on.
    Method(String),
    /// SCRAM cannot be done with it.
    PasswordIsNoText,
    /// The server does not know the password either.
    Impostor(String),
    /// By the server, before there was a session.
    Refused(Refusal),
    InRecovery,
    Sql(tokio_postgres::Error),
    Replication(WalsenderError),
}

/// What the server said.
#[derive(Debug, Default)]
pub struct Refusal {
    /// SQLSTATE.
    code: String,
    message: String,
    hint: Option<String>,
    /// The function in PostgreSQL's source. It is in no language, and the same in all versions that are supported.
    routine: String,
    /// Whether the session would have replicated.
    is_stream: bool,
}

impl Refusal {
    pub(super) fn read(error: &ErrorResponseBody, sessions: Sessions) -> io::Result<Self> {
        let mut refusal = Self { is_stream: sessions == Sessions::Stream, ..Self::default() };
        let mut fields = error.fields();
        while let Some(field) = fields.next()? {
            let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'C' => refusal.code = value,
                b'M' => refusal.message = value,
                b'H' => refusal.hint = Some(value),
                b'R' => refusal.routine = value,
                _ => {}
            }
        }
        Ok(refusal)
    }

    fn remedy(&self) -> Option<&'static str> {
        Some(match (self.code.as_str(), self.routine.as_str()) {
            ("28P01", _) => "Check user and password in database.uri, PGPASSWORD or the password file",
            ("28000", "ClientAuthentication") => {
                "Add a line for this user, database and address to the server's pg_hba.conf and reload it; where it has one for \
                 TLS alone (hostssl), set sslmode=require in database.uri"
            }
            ("28000", "InitializeSessionUserId") => {
                "Check the user in database.uri: the role must exist, and may log on (ALTER ROLE … LOGIN)"
            }
            ("28000", _) => "Check the user in database.uri, and the server's pg_hba.conf",
            ("3D000", _) => "Create the database, or correct its name in database.uri",
            ("42501", "CheckMyDatabase") => {
                "Let the owner of the database grant it: GRANT CONNECT ON DATABASE … TO the user in database.uri"
            }
            ("42501", _) if self.is_stream => {
                "Let a superuser grant it: ALTER ROLE … REPLICATION, of the user in database.uri"
            }
            ("42501" | "42704" | "22023", _) => {
                "Check the options in database.uri: the role may not set one, or has it wrong"
            }
            ("53300", "InitializeSessionUserId") => {
                "The role has a limit of its own: close other sessions of it, or raise it (ALTER ROLE … CONNECTION LIMIT 20; \
                 tuplewatch takes database.max_connections and one)"
            }
            ("53300", "CheckMyDatabase") => {
                "The database has a limit of its own: close other sessions, or raise it (ALTER DATABASE … CONNECTION LIMIT 100)"
            }
            ("53300", "InitPostgres") => {
                "The rest is reserved for superusers: close other sessions, or raise max_connections and restart the server"
            }
            ("53300", _) if self.is_stream => {
                "No walsender is free: stop another reader, or raise max_wal_senders and restart the server"
            }
            ("53300", _) => "Close other sessions, or raise max_connections and restart the server",
            ("55000", _) => {
                "Have it take connections again: ALTER DATABASE … ALLOW_CONNECTIONS true, by a superuser in another database; or \
                 name another database in database.uri"
            }
            ("57P03", _) => "It is starting or stopping, or is a standby that takes no queries: wait",
            _ => return None,
        })
    }

    /// PgBouncer knows some parameters of the startup message and refuses all others, which PostgreSQL would take for settings.
    /// It names the one, and uses the SQLSTATE of a violation of the protocol, as other poolers do. None tells a routine.
    fn is_poolers(&self) -> bool {
        self.code == "08P01" && self.routine.is_empty()
    }
}

impl ConnectError {
    pub(super) const fn new(attempts: Vec<Attempt>) -> Self {
        Self { attempts }
    }

    /// Whether trying again is pointless until somebody changes something.
    ///
    /// With several hosts: whether at least one says so, and each other one is a standby. A host that is out of reach may be
    /// the primary that would have taken us.
    pub fn is_definite(&self) -> bool {
        let mut others = self.attempts.iter().filter(|attempt| !attempt.failure.is_definite());
        others.clone().count() < self.attempts.len()
            && others.all(|attempt| matches!(attempt.failure, Failure::InRecovery))
    }

    /// What happened at each address.
    pub fn cause(&self) -> String {
        let told = |attempt: &Attempt| format!("{}: {}", attempt.endpoint, attempt.failure.what());
        self.attempts.iter().map(told).collect::<Vec<_>>().join("; nor at ")
    }

    /// What to do, where that is known.
    pub fn remedy(&self) -> Option<String> {
        let mut remedies: Vec<String> = self.attempts.iter().filter_map(|attempt| attempt.failure.remedy()).collect();
        remedies.dedup();
        (!remedies.is_empty()).then(|| remedies.join(". "))
    }

    /// Whether a server has as many connections as it, the database or the role may have.
    pub fn is_limit(&self) -> bool {
        // too_many_connections
        self.attempts.iter().any(|attempt| attempt.failure.sqlstate() == Some("53300"))
    }

    /// The SQLSTATE with which the server (the last of several) refused.
    pub fn sqlstate(&self) -> Option<&str> {
        self.attempts.iter().rev().find_map(|attempt| attempt.failure.sqlstate())
    }
}

impl std::error::Error for ConnectError {}

impl fmt::Display for ConnectError {
    /// `cannot use PostgreSQL at db1:5432 (database app, user ada): what happened. What to do.`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot use PostgreSQL at ")?;
        for (n, Attempt { endpoint, failure }) in self.attempts.iter().enumerate() {
            write!(f, "{}{endpoint}: {}", if n == 0 { "" } else { "; nor at " }, failure.what())?;
            if let Some(remedy) = failure.remedy() {
                write!(f, ". {remedy}")?;
            }
        }
        Ok(())
    }
}

/// Why a replication connection is of no more use, or what a command was refused with.
#[derive(Debug)]
pub enum WalsenderError {
    /// The server says so.
    Refused(Refusal),
    /// The stream came to its end, as when the server shuts down.
    Ended,
    /// The connection broke, or something that is not PostgreSQL answers.
    Lost(io::Error),
}

impl From<io::Error> for WalsenderError {
    fn from(error: io::Error) -> Self {
        Self::Lost(error)
    }
}

impl WalsenderError {
    pub(super) fn unexpected(what: impl fmt::Display) -> Self {
        Self::Lost(io::Error::new(io::ErrorKind::InvalidData, what.to_string()))
    }

    pub(super) fn refused(error: &postgres_protocol::message::backend::ErrorResponseBody) -> Self {
        Refusal::read(error, Sessions::Stream).map_or_else(Self::Lost, Self::Refused)
    }
}

impl std::error::Error for WalsenderError {}

impl WalsenderError {
    /// The SQLSTATE with which the server refused.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Refused(refusal) => Some(&refusal.code),
            Self::Ended | Self::Lost(_) => None,
        }
    }

    /// The function of PostgreSQL's source that refused.
    pub fn routine(&self) -> Option<&str> {
        match self {
            Self::Refused(refusal) => Some(&refusal.routine),
            Self::Ended | Self::Lost(_) => None,
        }
    }

    /// Whether trying again is pointless until somebody changes something.
    pub fn is_definite(&self) -> bool {
        matches!(self, Self::Refused(refusal) if is_definite_code(&refusal.code, &refusal.message))
    }
}

impl fmt::Display for WalsenderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(refusal) => match ending(&refusal.code) {
                Some(why) => write!(f, "{why}: {}", said(refusal)),
                None => f.write_str(&said(refusal)),
            },
            Self::Ended => f.write_str("the server ended the stream"),
            Self::Lost(error) => match error.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
                    f.write_str("the replication connection was closed")
                }
                _ => write!(f, "the replication connection was lost: {error}"),
            },
        }
    }
}

/// By class (the first two characters) where the whole class is of one kind: PostgreSQL documentation, appendix A.
fn is_definite_code(code: &str, message: &str) -> bool {
    match code {
        // database_dropped; undefined_file: WAL that the slot needs has been removed.
        "57P04" | "58P01" => true,
        // object_not_in_prerequisite_state: wal_level, an invalidated slot. But also a server that is not yet promoted.
        "55000" => !message.contains("recovery"),
        // feature_not_supported, invalid values (of an option), authorization, unknown database, unknown or forbidden objects.
        _ => ["0A", "22", "28", "3D", "42"].iter().any(|class| code.starts_with(class)),
    }
}

impl From<wire::Error> for Failure {
    fn from(error: wire::Error) -> Self {
        Self::Tls(error)
    }
}

impl Failure {
    fn is_definite(&self) -> bool {
        match self {
            Self::Resolve(_) | Self::Dial(_) | Self::TimedOut(_) | Self::InRecovery | Self::Lost(_) => false,
            // A handshake that the peer broke off is told from one that failed by its cause alone.
            Self::Tls(wire::Error::Handshake(error)) => {
                error.get_ref().is_some_and(|cause| cause.is::<rustls::Error>())
            }
            Self::Tls(_) | Self::Method(_) | Self::PasswordIsNoText | Self::Impostor(_) => true,
            Self::Refused(refusal) => refusal.is_poolers() || is_definite_code(&refusal.code, &refusal.message),
            Self::Replication(error) => error.is_definite(),
            Self::Sql(error) => {
                error.as_db_error().is_some_and(|refusal| is_definite_code(refusal.code().code(), refusal.message()))
            }
        }
    }

    fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Refused(refusal) => Some(&refusal.code),
            Self::Sql(error) => error.code().map(tokio_postgres::error::SqlState::code),
            Self::Replication(error) => error.sqlstate(),
            _ => None,
        }
    }

    fn what(&self) -> String {
        match self {
            Self::Resolve(error) => format!("the host name cannot be resolved: {error}"),
            Self::Dial(error) => error.to_string(),
            Self::TimedOut(limit) => format!("no answer within {limit:?} (connect_timeout)"),
            Self::Tls(wire::Error::NotOffered) => "the server does not do TLS".to_owned(),
            Self::Tls(wire::Error::File(what)) => what.clone(),
            Self::Tls(wire::Error::Refused(refused)) => refused.to_string(),
            Self::Tls(wire::Error::Handshake(error)) => format!("the TLS handshake failed: {error}"),
            Self::Lost(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                "the connection was closed before the log-on was done".to_owned()
            }
            Self::Lost(error) => format!("the log-on failed: {error}"),
            Self::Method(method) => format!("the server asks for {method}, which tuplewatch cannot do"),
            Self::PasswordIsNoText => "the password is not UTF-8, and cannot be used for scram-sha-256".to_owned(),
            Self::Impostor(what) => format!("the server does not prove that it knows the password: {what}"),
            Self::Refused(refusal) if refusal.is_poolers() => {
                format!(
                    "something that is not PostgreSQL, most likely a connection pooler such as PgBouncer, says: {}",
                    said(refusal)
                )
            }
            Self::Refused(refusal) => said(refusal),
            Self::InRecovery => "it is a standby".to_owned(),
            Self::Sql(error) => describe(error),
            Self::Replication(error) => error.to_string(),
        }
    }

    fn remedy(&self) -> Option<String> {
        let remedy = match self {
            Self::Resolve(_) => "Check the host in database.uri",
            Self::Dial(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                "Nothing listens there: check host and port in database.uri, and that PostgreSQL is running"
            }
            Self::Dial(error) if error.kind() == io::ErrorKind::NotFound => {
                "There is no such socket: check directory and port in database.uri, and that PostgreSQL is running"
            }
            Self::Dial(_) => "Check host and port in database.uri, and that PostgreSQL is running",
            Self::TimedOut(_) => "A firewall may be in between, or the server overloaded",
            Self::Tls(wire::Error::NotOffered) => {
                "Turn on ssl on the server, or set sslmode=prefer or disable in database.uri"
            }
            Self::Tls(wire::Error::File(_)) => "Check sslrootcert, sslcert and sslkey in database.uri",
            Self::Tls(wire::Error::Refused(refused)) => return Some(refused.remedy("sslrootcert in database.uri")),
            Self::Tls(wire::Error::Handshake(_)) => return None,
            Self::Lost(_) => "Check that PostgreSQL listens at this address; its log may say more",
            Self::Method(_) => "Let its pg_hba.conf ask for scram-sha-256 or cert",
            Self::PasswordIsNoText => "Give the role a password of text: ALTER ROLE … PASSWORD",
            Self::Impostor(_) => "Check that the address leads to the right server",
            Self::Refused(refusal) if refusal.is_poolers() => POOLER,
            Self::Refused(refusal) => match &refusal.hint {
                Some(hint) if refusal.remedy().is_none() => return Some(hint.clone()),
                _ => refusal.remedy()?,
            },
            Self::InRecovery => "Changes are read from the primary: name it in database.uri, or all hosts with commas",
            Self::Sql(_) | Self::Replication(_) => session_remedy(self.sqlstate()?)?,
        };
        Some(remedy.to_owned())
    }
}

fn said(refusal: &Refusal) -> String {
    format!("{} (SQLSTATE {})", refusal.message, refusal.code)
}

const POOLER: &str = "tuplewatch needs a direct connection, as poolers do not pass on replication and the settings of a session: \
     point database.uri at PostgreSQL itself";

/// For errors of statements and of replication commands.
fn session_remedy(code: &str) -> Option<&'static str> {
    Some(match code {
        "42501" | "42704" | "55000" | "58P01" => {
            "tuplewatch serve checks this when it starts: it names what is missing, and the statement that repairs it"
        }
        // Replication commands are no SQL. A pooler that took a replicating session for an ordinary one passes them on as such.
        "42601" | "08P01" => POOLER,
        "53300" => {
            "All connections are taken: end some, or raise the limit that tuplewatch doctor names (of the role, the database or \
             the server)"
        }
        "57P03" => "It is starting or stopping, or is a standby that takes no queries: wait",
        _ => return None,
    })
}

/// Why the server ended a session of ours.
fn ending(code: &str) -> Option<&'static str> {
    Some(match code {
        "57P01" => "PostgreSQL ended the session: it shuts down, or somebody ended the session (pg_terminate_backend)",
        "57P02" => "PostgreSQL ended the session: another of its processes crashed, and it restarts",
        "57P04" => "PostgreSQL ended the session: the database was dropped",
        "57P05" => {
            "PostgreSQL ended the session as idle (idle_session_timeout), though tuplewatch sets that to 0 for itself"
        }
        "25P03" => "PostgreSQL ended the session as idle in a transaction (idle_in_transaction_session_timeout)",
        "25P04" => "PostgreSQL ended the session for the length of a transaction (transaction_timeout)",
        _ => return None,
    })
}

/// The error in words: the driver's own leave out what the server said.
pub fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(refusal) = error.as_db_error() {
        let code = refusal.code().code();
        let said = format!("{} (SQLSTATE {code})", refusal.message());
        return ending(code).map_or_else(|| said.clone(), |why| format!("{why}: {said}"));
    }
    if error.is_closed() {
        return "the connection to PostgreSQL was closed".to_owned();
    }
    let mut causes = Vec::new();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        causes.push(error.to_string());
        cause = error.source();
    }
    // The driver's own word for where it happened says nothing that its cause does not.
    if causes.is_empty() { error.to_string() } else { causes.join(": ") }
}
