//! The meaning of a failed connection or statement: whether a retry can help, and the remedy.
//!
//! **Transient**: the server may answer differently later, without a repair. **Definite**: something has to be repaired
//! first. In doubt a failure is transient, because retrying with backoff does less harm than giving up.
//!
//! The SQLSTATE determines the meaning of a server's error. If one SQLSTATE has several meanings, the function in
//! PostgreSQL's source that raised the error distinguishes them (the field `R` of ErrorResponse). Its name is not
//! translated, and is the same in all supported versions. The text is never read: it is in the server's language, which
//! no session can choose before it has logged on, and afterwards only a superuser can (`lc_messages`).

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use fallible_iterator::FallibleIterator as _;
use pgwire_replication::PgWireError;
use postgres_protocol::message::backend::ErrorResponseBody;
use tokio_postgres::error::{DbError, SqlState};

use super::pins::Sessions;
use super::wire;
use crate::decode::pgoutput;

/// A failure to connect, or the end of a connection.
#[derive(Debug)]
pub(crate) struct ConnectError {
    /// One attempt for each address; never empty.
    attempts: Vec<Attempt>,
}

/// The failure at one address.
#[derive(Debug)]
pub(super) struct Attempt {
    /// Host, port, database and user.
    pub(super) endpoint: String,
    pub(super) failure: Failure,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("the host name cannot be resolved: {0}")]
    Resolve(#[source] io::Error),
    #[error(transparent)]
    Dial(io::Error),
    #[error("no answer within {0:?} (connect_timeout)")]
    TimedOut(Duration),
    #[error(transparent)]
    Tls(#[from] wire::Error),
    /// The connection broke, or the peer is not PostgreSQL.
    #[error("{}", lost_at_log_on(.0))]
    Lost(#[source] io::Error),
    /// A valid message of the protocol, at a point where it is not allowed.
    #[error("the log-on failed: the server sent something unexpected {when}")]
    Unexpected { when: &'static str },
    /// The server requires an unsupported kind of authentication.
    #[error("the server asks for {0}, which tuplewatch does not support")]
    Method(String),
    #[error("the password is not UTF-8, and cannot be used for scram-sha-256")]
    PasswordIsNoText,
    /// The server does not know the password.
    #[error("the server does not prove that it knows the password: {0}")]
    Impostor(#[source] PgWireError),
    /// The server refused the log-on.
    #[error("{0}")]
    Refused(Refusal),
    #[error("it is a standby")]
    InRecovery,
    #[error(transparent)]
    Sql(#[from] SqlError),
    #[error(transparent)]
    Replication(WalsenderError),
}

fn lost_at_log_on(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "the connection was closed before the log-on was done".to_owned(),
        _ => format!("the log-on failed: {error}"),
    }
}

/// An ErrorResponse of the server, read without a driver.
#[derive(Debug)]
pub(crate) struct Refusal {
    code: SqlState,
    message: String,
    hint: Option<String>,
    /// The function in PostgreSQL's source that raised the error.
    routine: String,
    /// Whether the session is for replication.
    is_stream: bool,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_from_pooler() {
            f.write_str("something that is not PostgreSQL, most likely a connection pooler such as PgBouncer, says: ")?;
        }
        say(f, &self.code, &self.message)
    }
}

/// Writes `permission denied for table t (SQLSTATE 42501)`, after the reason if the server ended the session.
fn say(f: &mut fmt::Formatter<'_>, code: &SqlState, message: &str) -> fmt::Result {
    if let Some(why) = ending(code) {
        write!(f, "{why}: ")?;
    }
    write!(f, "{message} (SQLSTATE {})", code.code())
}

impl Refusal {
    pub(super) fn read(error: &ErrorResponseBody, sessions: Sessions) -> io::Result<Self> {
        let (mut code, mut message, mut hint, mut routine) = (String::new(), String::new(), None, String::new());
        let mut fields = error.fields();
        while let Some(field) = fields.next()? {
            let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'C' => code = value,
                b'M' => message = value,
                b'H' => hint = Some(value),
                b'R' => routine = value,
                _ => {}
            }
        }
        let (code, is_stream) = (SqlState::from_code(&code), sessions == Sessions::Stream);
        Ok(Self { code, message, hint, routine, is_stream })
    }

    fn remedy(&self) -> Option<&'static str> {
        Some(match (&self.code, self.routine.as_str()) {
            (&SqlState::INVALID_PASSWORD, _) => {
                "Check user and password in database.uri, PGPASSWORD or the password file"
            }
            (&SqlState::INVALID_AUTHORIZATION_SPECIFICATION, "ClientAuthentication") => {
                "Add a line for this user, database and address to the server's pg_hba.conf and reload it; if it has one for \
                 TLS alone (hostssl), set sslmode=require in database.uri"
            }
            (&SqlState::INVALID_AUTHORIZATION_SPECIFICATION, "InitializeSessionUserId") => {
                "Check the user in database.uri: the role must exist, and may log on (ALTER ROLE … LOGIN)"
            }
            (&SqlState::INVALID_AUTHORIZATION_SPECIFICATION, _) => {
                "Check the user in database.uri, and the server's pg_hba.conf"
            }
            (&SqlState::INVALID_CATALOG_NAME, _) => "Create the database, or correct its name in database.uri",
            (&SqlState::INSUFFICIENT_PRIVILEGE, "CheckMyDatabase") => {
                "Let the owner of the database grant it: GRANT CONNECT ON DATABASE … TO the user in database.uri"
            }
            (&SqlState::INSUFFICIENT_PRIVILEGE, _) if self.is_stream => {
                "Let a superuser grant it: ALTER ROLE … REPLICATION, of the user in database.uri"
            }
            (
                &SqlState::INSUFFICIENT_PRIVILEGE | &SqlState::UNDEFINED_OBJECT | &SqlState::INVALID_PARAMETER_VALUE,
                _,
            ) => "Check the options in database.uri: the role may not set one, or has it wrong",
            (&SqlState::TOO_MANY_CONNECTIONS, "InitializeSessionUserId") => {
                "The role has a limit of its own: close other sessions of it, or raise it (ALTER ROLE … CONNECTION LIMIT 20; \
                 tuplewatch takes database.max_connections and one)"
            }
            (&SqlState::TOO_MANY_CONNECTIONS, "CheckMyDatabase") => {
                "The database has a limit of its own: close other sessions, or raise it (ALTER DATABASE … CONNECTION LIMIT 100)"
            }
            (&SqlState::TOO_MANY_CONNECTIONS, "InitPostgres") => {
                "The rest is reserved for superusers: close other sessions, or raise max_connections and restart the server"
            }
            (&SqlState::TOO_MANY_CONNECTIONS, _) if self.is_stream => {
                "No walsender is free: stop another reader, or raise max_wal_senders and restart the server"
            }
            (&SqlState::TOO_MANY_CONNECTIONS, _) => {
                "Close other sessions, or raise max_connections and restart the server"
            }
            (&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, _) => {
                "Let it accept connections again: ALTER DATABASE … ALLOW_CONNECTIONS true, by a superuser in another database; or \
                 name another database in database.uri"
            }
            (&SqlState::CANNOT_CONNECT_NOW, _) => STARTING,
            _ => return None,
        })
    }

    fn is_definite(&self) -> bool {
        is_definite(&self.code, Some(&self.routine))
    }

    /// PgBouncer knows some parameters of the startup message, and refuses all others, which PostgreSQL would treat as
    /// settings. It names the parameter, with the SQLSTATE of a protocol violation, as other poolers do. No pooler
    /// names a routine.
    fn is_from_pooler(&self) -> bool {
        self.code == SqlState::PROTOCOL_VIOLATION && self.routine.is_empty()
    }
}

impl ConnectError {
    pub(super) const fn new(attempts: Vec<Attempt>) -> Self {
        Self { attempts }
    }

    /// Whether retrying is pointless until somebody repairs something.
    ///
    /// With several hosts, this requires one definite failure, and that all other hosts are standbys: an unreachable
    /// host may be the primary.
    pub(crate) fn is_definite(&self) -> bool {
        let mut others = self.attempts.iter().filter(|attempt| !attempt.failure.is_definite());
        others.clone().count() < self.attempts.len()
            && others.all(|attempt| matches!(attempt.failure, Failure::InRecovery))
    }

    /// Describes the failure at each address.
    pub(crate) fn cause(&self) -> String {
        let describe = |attempt: &Attempt| format!("{}: {}", attempt.endpoint, attempt.failure);
        self.attempts.iter().map(describe).collect::<Vec<_>>().join("; nor at ")
    }

    /// The remedy, if it is known.
    pub(crate) fn remedy(&self) -> Option<String> {
        let mut remedies: Vec<String> = self.attempts.iter().filter_map(|attempt| attempt.failure.remedy()).collect();
        remedies.dedup();
        (!remedies.is_empty()).then(|| remedies.join(". "))
    }

    /// Whether a limit on connections, of the server, the database or the role, is reached at a server.
    pub(crate) fn is_limit(&self) -> bool {
        self.attempts.iter().any(|attempt| attempt.failure.sqlstate() == Some(&SqlState::TOO_MANY_CONNECTIONS))
    }

    /// The SQLSTATE with which the server, or the last of several, refused.
    pub(crate) fn sqlstate(&self) -> Option<&SqlState> {
        self.attempts.iter().rev().find_map(|attempt| attempt.failure.sqlstate())
    }
}

impl std::error::Error for ConnectError {}

impl fmt::Display for ConnectError {
    /// `cannot use PostgreSQL at db1:5432 (database app, user ada): cause. Remedy.`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("cannot use PostgreSQL at ")?;
        for (n, Attempt { endpoint, failure }) in self.attempts.iter().enumerate() {
            write!(f, "{}{endpoint}: {failure}", if n == 0 { "" } else { "; nor at " })?;
            if let Some(remedy) = failure.remedy() {
                write!(f, ". {remedy}")?;
            }
        }
        Ok(())
    }
}

/// A failed statement. Its message contains the server's message, which the driver's message omits.
#[derive(Debug)]
pub(crate) struct SqlError(tokio_postgres::Error);

impl From<tokio_postgres::Error> for SqlError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self(error)
    }
}

/// There is no source, because the message contains all causes.
impl std::error::Error for SqlError {}

impl fmt::Display for SqlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(refusal) = self.refusal() {
            return say(f, refusal.code(), refusal.message());
        }
        if self.0.is_closed() {
            return f.write_str("the connection to PostgreSQL was closed");
        }
        // The driver's own words add nothing to the cause.
        let Some(cause) = std::error::Error::source(&self.0) else { return write!(f, "{}", self.0) };
        write!(f, "{cause}")?;
        let mut next = cause.source();
        while let Some(cause) = next {
            write!(f, ": {cause}")?;
            next = cause.source();
        }
        Ok(())
    }
}

impl SqlError {
    /// The server's error. `None` if the connection failed.
    pub(crate) fn refusal(&self) -> Option<&DbError> {
        self.0.as_db_error()
    }

    pub(crate) fn sqlstate(&self) -> Option<&SqlState> {
        self.0.code()
    }

    fn is_definite(&self) -> bool {
        self.refusal().is_some_and(|refusal| is_definite(refusal.code(), refusal.routine()))
    }
}

/// The reason why an SQL connection has ended.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum SessionEnd {
    #[error("the SQL connection was closed")]
    Closed,
    #[error(transparent)]
    Failed(Arc<SqlError>),
    /// This process closed it.
    #[error("the SQL connection was closed by tuplewatch")]
    GivenUp,
}

/// A failure of a replication connection, or of a command on it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WalsenderError {
    #[error("{0}")]
    Refused(Box<Refusal>),
    /// The stream has ended, for example because the server shuts down.
    #[error("the server ended the stream")]
    Ended,
    /// The connection broke, or the peer is not PostgreSQL.
    #[error("{}", lost(.0))]
    Lost(#[from] io::Error),
    #[error("the replication connection was lost: {0}")]
    Protocol(#[from] PgWireError),
    #[error("the replication connection was lost: {0}")]
    Pgoutput(#[from] pgoutput::Error),
    #[error("the answer to IDENTIFY_SYSTEM does not say which server this is")]
    NoIdentity,
    #[error("the answer to TIMELINE_HISTORY contains no history")]
    NoHistory,
    #[error("no further command is possible: the stream has started")]
    Started,
}

fn lost(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            "the replication connection was closed".to_owned()
        }
        _ => format!("the replication connection was lost: {error}"),
    }
}

impl WalsenderError {
    pub(super) fn refused(error: &ErrorResponseBody) -> Self {
        Refusal::read(error, Sessions::Stream).map_or_else(Self::Lost, |refusal| Self::Refused(Box::new(refusal)))
    }

    fn refusal(&self) -> Option<&Refusal> {
        match self {
            Self::Refused(refusal) => Some(refusal),
            _ => None,
        }
    }

    /// The SQLSTATE with which the server refused.
    pub(crate) fn sqlstate(&self) -> Option<&SqlState> {
        self.refusal().map(|refusal| &refusal.code)
    }

    /// Whether the publication does not exist at the WAL position that the slot reads.
    pub(crate) fn is_missing_publication(&self) -> bool {
        // A missing slot has the same SQLSTATE.
        self.refusal().is_some_and(|refusal| {
            refusal.code == SqlState::UNDEFINED_OBJECT && refusal.routine == "get_publication_oid"
        })
    }

    /// Whether retrying is pointless until somebody repairs something.
    pub(crate) fn is_definite(&self) -> bool {
        self.refusal().is_some_and(Refusal::is_definite)
    }
}

/// The functions that fail with object_not_in_prerequisite_state on a server that is not promoted yet.
const NOT_IN_RECOVERY: [&str; 4] =
    ["pg_current_wal_flush_lsn", "pg_current_wal_insert_lsn", "pg_current_wal_lsn", "pg_walfile_name"];

/// Decides by class (the first two characters) if the whole class is of one kind: PostgreSQL documentation, appendix A.
fn is_definite(code: &SqlState, routine: Option<&str>) -> bool {
    match *code {
        // A WAL file that the slot needs was removed.
        SqlState::DATABASE_DROPPED | SqlState::UNDEFINED_FILE => true,
        // A wrong wal_level, or an invalidated slot.
        SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE => {
            !routine.is_some_and(|routine| NOT_IN_RECOVERY.contains(&routine))
        }
        // feature_not_supported, invalid values (of an option), authorization, unknown database, unknown or forbidden objects.
        _ => ["0A", "22", "28", "3D", "42"].iter().any(|class| code.code().starts_with(class)),
    }
}

impl Failure {
    fn is_definite(&self) -> bool {
        match self {
            Self::Resolve(_)
            | Self::Dial(_)
            | Self::TimedOut(_)
            | Self::InRecovery
            | Self::Lost(_)
            | Self::Unexpected { .. } => false,
            // Only the cause distinguishes a failed handshake from a closed connection.
            Self::Tls(wire::Error::Handshake(error)) => {
                error.get_ref().is_some_and(|cause| cause.is::<rustls::Error>())
            }
            Self::Tls(_) | Self::Method(_) | Self::PasswordIsNoText | Self::Impostor(_) => true,
            Self::Refused(refusal) => refusal.is_from_pooler() || refusal.is_definite(),
            Self::Replication(error) => error.is_definite(),
            Self::Sql(error) => error.is_definite(),
        }
    }

    fn sqlstate(&self) -> Option<&SqlState> {
        match self {
            Self::Refused(refusal) => Some(&refusal.code),
            Self::Sql(error) => error.sqlstate(),
            Self::Replication(error) => error.sqlstate(),
            _ => None,
        }
    }

    fn remedy(&self) -> Option<String> {
        let remedy = match self {
            Self::Resolve(_) | Self::Tls(wire::Error::HostName(_)) => "Check the host in database.uri",
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
            Self::Lost(_) | Self::Unexpected { .. } => {
                "Check that PostgreSQL listens at this address; its log may say more"
            }
            Self::Method(_) => "Let its pg_hba.conf ask for scram-sha-256 or cert",
            Self::PasswordIsNoText => "Give the role a password of text: ALTER ROLE … PASSWORD",
            Self::Impostor(_) => "Check that the address leads to the right server",
            Self::Refused(refusal) if refusal.is_from_pooler() => POOLER,
            Self::Refused(refusal) => match refusal.remedy() {
                None => return refusal.hint.clone(),
                Some(remedy) => remedy,
            },
            Self::InRecovery => "Changes are read from the primary: name it in database.uri, or all hosts with commas",
            Self::Sql(_) | Self::Replication(_) => session_remedy(self.sqlstate()?)?,
        };
        Some(remedy.to_owned())
    }
}

const POOLER: &str = "tuplewatch needs a direct connection, as poolers do not pass on replication and the settings of a session: \
     point database.uri at PostgreSQL itself";
const STARTING: &str = "It is starting or stopping, or is a standby that accepts no queries: wait";

/// The remedy for errors of statements and of replication commands.
fn session_remedy(code: &SqlState) -> Option<&'static str> {
    Some(match *code {
        SqlState::INSUFFICIENT_PRIVILEGE
        | SqlState::UNDEFINED_OBJECT
        | SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE
        | SqlState::UNDEFINED_FILE => {
            "tuplewatch serve checks this when it starts: it names what is missing, and the statement that repairs it"
        }
        // Replication commands are not SQL. A pooler that mistook a replication session for an ordinary one passes them
        // on as SQL.
        SqlState::SYNTAX_ERROR | SqlState::PROTOCOL_VIOLATION => POOLER,
        SqlState::TOO_MANY_CONNECTIONS => {
            "All connections are taken: end some, or raise the limit that tuplewatch doctor names (of the role, the database or \
             the server)"
        }
        SqlState::CANNOT_CONNECT_NOW => STARTING,
        _ => return None,
    })
}

/// The reason why the server ended a session.
fn ending(code: &SqlState) -> Option<&'static str> {
    Some(match *code {
        SqlState::ADMIN_SHUTDOWN => {
            "PostgreSQL ended the session: it shuts down, or somebody ended the session (pg_terminate_backend)"
        }
        SqlState::CRASH_SHUTDOWN => "PostgreSQL ended the session: another of its processes crashed, and it restarts",
        SqlState::DATABASE_DROPPED => "PostgreSQL ended the session: the database was dropped",
        SqlState::IDLE_SESSION_TIMEOUT => {
            "PostgreSQL ended the session as idle (idle_session_timeout), though tuplewatch sets that to 0 for itself"
        }
        SqlState::IDLE_IN_TRANSACTION_SESSION_TIMEOUT => {
            "PostgreSQL ended the session as idle in a transaction (idle_in_transaction_session_timeout)"
        }
        // The driver has no name for transaction_timeout.
        _ if code.code() == "25P04" => {
            "PostgreSQL ended the session for the length of a transaction (transaction_timeout)"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(code: &str, message: &str, routine: &str) -> Refusal {
        Refusal {
            code: SqlState::from_code(code),
            message: message.to_owned(),
            hint: None,
            routine: routine.to_owned(),
            is_stream: false,
        }
    }

    #[test]
    fn sqlstate_and_routine_decide_in_any_language() {
        let check = |code: &str, message: &str, routine: &str, expected: bool| {
            assert_eq!(refusal(code, message, routine).is_definite(), expected, "{code} {message}");
        };
        check("42501", "permission denied for table t", "aclcheck_error", true);
        check(
            "58P01",
            "requested WAL segment 000000010000000000000001 has already been removed",
            "WalSndSegmentOpen",
            true,
        );
        check("57P04", "terminating connection because of crash of another server process", "", true);
        check("53300", "sorry, too many clients already", "InitProcess", false);
        check("57P01", "terminating connection due to administrator command", "ProcessInterrupts", false);
        check("55006", "replication slot \"s\" is active for PID 7", "ReplicationSlotAcquire", false);
        // One SQLSTATE for two cases: a slot that recovery invalidated, and a server that is not promoted yet.
        check("55000", "can no longer get changes from replication slot after recovery", "CreateDecodingContext", true);
        check("55000", "recovery is in progress", "pg_current_wal_insert_lsn", false);
        check("55000", "Wiederherstellung läuft", "pg_current_wal_insert_lsn", false);
    }

    #[test]
    fn a_missing_publication_is_distinguished_from_a_missing_slot() {
        let check = |routine: &str, expected: bool| {
            let error = WalsenderError::Refused(Box::new(refusal("42704", "…", routine)));
            assert_eq!(error.is_missing_publication(), expected, "{routine}");
        };
        check("get_publication_oid", true);
        check("ReplicationSlotAcquire", false);
    }

    #[test]
    fn a_refusal_has_its_sqlstate_and_why_a_session_ended() {
        assert_eq!(refusal("42601", "syntax error", "x").to_string(), "syntax error (SQLSTATE 42601)");
        let ended = refusal("25P04", "transaction timeout", "ProcessInterrupts").to_string();
        assert!(ended.starts_with("PostgreSQL ended the session") && ended.ends_with("(SQLSTATE 25P04)"), "{ended}");
        assert!(refusal("08P01", "unsupported startup parameter", "").to_string().contains("pooler"));
    }
}
