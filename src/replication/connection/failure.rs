//! What it means that a connection failed: whether it is worth trying again, and what to do.
//!
//! **Transient**: the server may answer differently in a while, without anybody doing anything. **Definite**: somebody has
//! to change something first. In doubt a failure is transient: trying again with backoff does less harm than giving up.

use std::fmt;
use std::io;
use std::time::Duration;

use pgwire_replication::PgWireError;

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
    InRecovery,
    Sql(tokio_postgres::Error),
    /// Also of the TLS upgrade, which both connections take from this driver.
    Replication(PgWireError),
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
        let mut remedies: Vec<&str> = self.attempts.iter().filter_map(|attempt| attempt.failure.remedy()).collect();
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

/// The SQLSTATE of a server's error; the replication driver has it inside its text.
pub fn sqlstate(error: &PgWireError) -> Option<&str> {
    let PgWireError::Server(text) = error else { return None };
    let (_, behind) = text.rsplit_once("(SQLSTATE ")?;
    behind.strip_suffix(')').filter(|code| code.len() == 5)
}

/// Whether trying a replication connection again is pointless until somebody changes something.
pub fn is_definite(error: &PgWireError) -> bool {
    match error {
        PgWireError::Server(text) => sqlstate(error).is_some_and(|code| is_definite_code(code, text)),
        // A handshake that the peer broke off is told from one that failed by its cause alone.
        PgWireError::Tls(text) => {
            !(text.starts_with("TLS handshake failed") && (text.contains("os error") || text.contains("handshake eof")))
        }
        PgWireError::Auth(_) | PgWireError::MessageTooLarge { .. } => true,
        _ => false,
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

impl Failure {
    fn is_definite(&self) -> bool {
        match self {
            Self::Resolve(_) | Self::Dial(_) | Self::TimedOut(_) | Self::InRecovery => false,
            Self::Replication(error) => is_definite(error),
            Self::Sql(error) => match error.as_db_error() {
                Some(refusal) => is_definite_code(refusal.code().code(), refusal.message()),
                // Neither refused nor broken off: the driver cannot do what the server asks for.
                None => !(error.is_closed() || has_io_error(error)),
            },
        }
    }

    fn sqlstate(&self) -> Option<&str> {
        match self {
            Self::Sql(error) => error.code().map(tokio_postgres::error::SqlState::code),
            Self::Replication(error) => sqlstate(error),
            _ => None,
        }
    }

    fn what(&self) -> String {
        match self {
            Self::Resolve(error) => format!("the host name cannot be resolved: {error}"),
            Self::Dial(error) => error.to_string(),
            Self::TimedOut(limit) => format!("no answer within {limit:?} (connect_timeout)"),
            Self::InRecovery => "it is a standby".to_owned(),
            Self::Sql(error) => describe(error),
            Self::Replication(PgWireError::Server(text) | PgWireError::Tls(text) | PgWireError::Auth(text)) => {
                text.clone()
            }
            Self::Replication(error) => error.to_string(),
        }
    }

    fn remedy(&self) -> Option<&'static str> {
        let what = self.what();
        match self {
            Self::Resolve(_) => Some("Check the host in database.uri"),
            Self::Dial(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Some("Nothing listens there: check host and port in database.uri, and that PostgreSQL is running")
            }
            Self::Dial(error) if error.kind() == io::ErrorKind::NotFound => Some(
                "There is no such socket: check directory and port in database.uri, and that PostgreSQL is running",
            ),
            Self::Dial(_) => Some("Check host and port in database.uri, and that PostgreSQL is running"),
            Self::TimedOut(_) => Some("A firewall may be in between, or the server overloaded"),
            Self::InRecovery => {
                Some("Changes are read from the primary: name it in database.uri, or all hosts with commas")
            }
            Self::Replication(PgWireError::Tls(_)) => tls_remedy(&what),
            Self::Replication(PgWireError::Auth(_)) => Some(AUTHENTICATION_METHODS),
            Self::Replication(PgWireError::MessageTooLarge { .. }) => None,
            Self::Sql(_) | Self::Replication(_) => match self.sqlstate() {
                Some(code) => code_remedy(code, &what),
                None => self.is_definite().then_some(AUTHENTICATION_METHODS),
            },
        }
    }
}

const POOLER: &str = "The address leads to a connection pooler, which cannot pass replication on: point database.uri at PostgreSQL itself";

const AUTHENTICATION_METHODS: &str =
    "The server asks for something that tuplewatch cannot give: let its pg_hba.conf ask for scram-sha-256 or cert";

fn code_remedy(code: &str, message: &str) -> Option<&'static str> {
    Some(match code {
        "28P01" => "Check user and password in database.uri, PGPASSWORD or the password file",
        "28000" if message.contains("no encryption") => {
            "The server may want TLS: set sslmode=require in database.uri, or else add a line to its pg_hba.conf and reload it"
        }
        "28000" if message.contains("pg_hba.conf") => "Add a line to the server's pg_hba.conf and reload it",
        "28000" => "Check the user in database.uri, and the server's pg_hba.conf",
        "3D000" => "Create the database, or correct its name in database.uri",
        "42501" if message.contains("permission denied for database") => {
            "Let the owner of the database grant it: GRANT CONNECT ON DATABASE … TO the user in database.uri"
        }
        "42501" => {
            "tuplewatch serve checks this when it starts: it names the privilege and the statement that grants it"
        }
        "53300" => {
            "All connections are taken: end some, or raise the limit that tuplewatch doctor names (of the role, the database or \
             the server)"
        }
        "57P03" => "It is starting or stopping, or is a standby that takes no queries: wait",
        // What only PostgreSQL itself understands: a connection that replicates, and its commands.
        "08P01" if message.contains("startup parameter") => POOLER,
        "42601" if message.contains("IDENTIFY_SYSTEM") => POOLER,
        "42704" | "55000" | "58P01" => {
            "tuplewatch serve checks this when it starts: it says what is missing and how to get it back"
        }
        _ => return None,
    })
}

fn tls_remedy(message: &str) -> Option<&'static str> {
    Some(if message.contains("does not support TLS") {
        "Turn on ssl on the server, or set sslmode=prefer or disable in database.uri"
    } else if message.contains("NotValidForName") || message.contains("not valid for name") {
        "The certificate is for another host name (verify-ca compares it too): write host=NAME hostaddr=ADDRESS with a name that is in it"
    } else if message.contains("UnknownIssuer") {
        "Name the certificate of the authority that issued the server's in sslrootcert"
    } else if message.contains("CaUsedAsEndEntity") {
        "The server's certificate is itself a certificate of an authority: let the server have one that is issued by it (CA:FALSE)"
    } else if message.contains("Expired") || message.contains("expired") {
        "Renew the server's certificate"
    } else if message.contains("TLS config error") {
        "Check sslrootcert, sslcert and sslkey in database.uri"
    } else {
        return None;
    })
}

fn has_io_error(error: &tokio_postgres::Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.is::<io::Error>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The error in words: the driver's own leave out what the server said.
pub fn describe(error: &tokio_postgres::Error) -> String {
    if let Some(refusal) = error.as_db_error() {
        return format!("{} (SQLSTATE {})", refusal.message(), refusal.code().code());
    }
    let mut text = error.to_string();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}
