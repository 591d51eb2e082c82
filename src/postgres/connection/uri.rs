//! The parser of `database.uri`.
//!
//! There are two forms, as in libpq: a URI, `postgres://user:password@host:port,host:port/database?name=value&…`, and
//! pairs, `host=… user=…`. Both become the same list of named values, and only that list is interpreted. An unknown
//! parameter is refused: if one of the two drivers ignored it silently, their connections would differ.
//!
//! No message repeats a value. A typing error in the punctuation can turn a part of the password into a port or a name,
//! so every value may be secret.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::passfile::Passfile;
use super::password::Password;
use super::wire::{SslMode, Tls};
use super::{Endpoints, HOSTS_MAX, Host, Keepalive, Place};

const DEFAULT_PORT: u16 = 5432;
/// Long enough for a handshake across continents with a lost packet or two, and short enough to try the next host soon.
const DEFAULT_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A mistake in `database.uri`. The messages name the part and never repeat a value, because any value may contain the
/// password.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UriError {
    #[error(
        "it is neither a URI (postgres://user:password@host:5432/database) nor a list of pairs (host=… user=… dbname=…)"
    )]
    Form,
    #[error(
        "{part} has a % that is not followed by two hexadecimal digits, or bytes that are no text: write % itself as %25"
    )]
    Escape { part: String },
    #[error("{part} has a quote that is not closed")]
    Quote { part: String },
    #[error(
        "a parameter has no value or a name that cannot be one: if a password contains one of ?, &, /, @, : or a space, write %3F, %26, %2F, %40, %3A or %20 (in a list of pairs, put it in single quotes)"
    )]
    Punctuation,
    #[error("parameter '{0}' is unknown: remove it, or correct its name")]
    Unknown(String),
    #[error("parameter '{name}' cannot be honoured: {why}")]
    Unsupported { name: &'static str, why: &'static str },
    #[error("the value of '{name}' is not {expected}")]
    Value { name: &'static str, expected: &'static str },
    #[error("there are {hosts} hosts and {given} values of '{name}': give one for each host")]
    Count { name: &'static str, given: usize, hosts: usize },
    #[error("it names no user: write postgres://USER@…, or set PGUSER")]
    NoUser,
    #[error("'{given}' needs '{missing}' beside it")]
    Alone { given: &'static str, missing: &'static str },
    #[error(
        "it is a URL of JDBC: write postgres://USER:PASSWORD@HOST:5432/DATABASE, without 'jdbc:', and libpq's parameters instead of the Java driver's"
    )]
    Jdbc,
    #[error("it names a driver of another library (postgresql+DRIVER://): write postgres:// in its place")]
    ForeignDriver,
}

/// Reads an environment variable: `std::env::var`, or a table in tests.
pub(super) type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Values by name. A later value replaces an earlier one, as in libpq.
struct Given(BTreeMap<String, String>);

pub(super) fn parse(text: &str, environment: Environment<'_>) -> Result<Endpoints, UriError> {
    let text = text.trim();
    if text.starts_with("jdbc:") {
        return Err(UriError::Jdbc);
    }
    if ["postgresql+", "postgres+"].iter().any(|scheme| text.starts_with(scheme)) {
        return Err(UriError::ForeignDriver);
    }
    let rest = ["postgres://", "postgresql://"].iter().find_map(|scheme| text.strip_prefix(scheme));
    let mut given = match rest {
        Some(rest) => from_uri(rest)?,
        None => from_pairs(text)?,
    };
    let endpoints = given.endpoints(environment)?;
    given.ignore_harmless()?;
    match given.0.into_iter().next() {
        // An @ in the value suggests that the ? belongs to the password, and the name as well.
        Some((_, value)) if value.contains('@') => Err(UriError::Punctuation),
        Some((name, _)) => Err(UriError::Unknown(name)),
        None => Ok(endpoints),
    }
}

/// `[user[:password]@][host][:port][,…][/database][?name=value&…]`
fn from_uri(text: &str) -> Result<Given, UriError> {
    let mut given = Given(BTreeMap::new());
    let (location, query) = text.split_once('?').unwrap_or((text, ""));
    let (authority, database) = location.split_once('/').unwrap_or((location, ""));
    // The / belongs to the password, so the host would be the user's name. A database with an @ in its name is written
    // with %40.
    if database.contains('@') {
        return Err(UriError::Punctuation);
    }
    // Split at the last @, because passwords may contain an @, but hosts cannot.
    let (user_info, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
    let (user, password) = user_info.split_once(':').unwrap_or((user_info, ""));
    given.add("user", decode("the user", user)?);
    given.add("password", decode("the password", password)?);
    given.add("dbname", decode("the database", database)?);

    let mut names = Vec::new();
    let mut ports = Vec::new();
    for host in hosts.split(',') {
        let (name, port) = split_port(host)?;
        names.push(decode("a host", name)?);
        ports.push(port);
    }
    given.add("host", if names.iter().all(String::is_empty) { String::new() } else { names.join(",") });
    given.add("port", if ports.iter().all(|port| port.is_empty()) { String::new() } else { ports.join(",") });

    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').ok_or(UriError::Punctuation)?;
        let name = decode("the name of a parameter", name)?;
        let value = decode("the value of a parameter", value)?;
        match (name.as_str(), value.as_str()) {
            // The JDBC driver's spelling, which libpq accepts as well.
            ("ssl", "true") => given.add("sslmode", "require".to_owned()),
            _ => given.set(&name, value)?,
        }
    }
    Ok(given)
}

/// Splits host and port. An IPv6 address is in brackets, which separate its colons from the port's.
fn split_port(host: &str) -> Result<(&str, &str), UriError> {
    if let Some(inside) = host.strip_prefix('[') {
        let (address, behind) = inside.split_once(']').ok_or(UriError::Punctuation)?;
        return match behind.strip_prefix(':') {
            Some(port) => Ok((address, port)),
            None if behind.is_empty() => Ok((address, "")),
            None => Err(UriError::Punctuation),
        };
    }
    Ok(host.split_once(':').unwrap_or((host, "")))
}

/// Parses `name = value …`. A value is bare or in single quotes. In both, a backslash escapes the next character.
fn from_pairs(text: &str) -> Result<Given, UriError> {
    let mut given = Given(BTreeMap::new());
    let mut rest = text;
    if rest.is_empty() || !rest.contains('=') {
        return Err(UriError::Form);
    }
    while !rest.is_empty() {
        let (name, tail) = rest.split_once('=').ok_or(UriError::Punctuation)?;
        let name = name.trim_end();
        let (value, tail) = pair_value(name, tail.trim_start())?;
        given.set(name, value)?;
        rest = tail.trim_start();
    }
    Ok(given)
}

fn pair_value<'a>(name: &str, text: &'a str) -> Result<(String, &'a str), UriError> {
    let (quoted, text) = text.strip_prefix('\'').map_or((false, text), |inside| (true, inside));
    let mut value = String::new();
    let mut characters = text.chars();
    loop {
        match characters.next() {
            Some('\\') => value.extend(characters.next()),
            Some('\'') if quoted => return Ok((value, characters.as_str())),
            Some(c) if !quoted && c.is_whitespace() => return Ok((value, characters.as_str())),
            Some(c) => value.push(c),
            None if quoted => {
                let part = if is_name(name) { format!("the value of '{name}'") } else { "a value".to_owned() };
                return Err(UriError::Quote { part });
            }
            None => return Ok((value, "")),
        }
    }
}

fn decode(part: &str, text: &str) -> Result<String, UriError> {
    let refused = || UriError::Escape { part: part.to_owned() };
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit =
            || bytes.next().and_then(|byte| char::from(byte).to_digit(16)).and_then(|d| u8::try_from(d).ok());
        let (high, low) = (digit().ok_or_else(refused)?, digit().ok_or_else(refused)?);
        decoded.push(high << 4 | low);
    }
    // The protocol ends strings with a zero byte, so they cannot contain one.
    match String::from_utf8(decoded) {
        Ok(text) if !text.contains('\0') => Ok(text),
        _ => Err(refused()),
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

impl Given {
    /// Adds a value. An empty value is ignored, as in libpq.
    fn add(&mut self, name: &str, value: String) {
        if !value.is_empty() {
            self.0.insert(name.to_owned(), value);
        }
    }

    /// Adds a value with a name from the text.
    fn set(&mut self, name: &str, value: String) -> Result<(), UriError> {
        if !is_name(name) {
            return Err(UriError::Punctuation);
        }
        self.0.insert(name.to_owned(), value);
        Ok(())
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name).filter(|value| !value.is_empty())
    }

    fn number(&mut self, name: &'static str) -> Result<Option<u64>, UriError> {
        let expected = "a whole number";
        self.take(name).map(|text| text.trim().parse().map_err(|_| UriError::Value { name, expected })).transpose()
    }

    fn endpoints(&mut self, environment: Environment<'_>) -> Result<Endpoints, UriError> {
        let user = self
            .take("user")
            .or_else(|| ["PGUSER", "USER", "LOGNAME"].iter().find_map(|name| environment(name)))
            .ok_or(UriError::NoUser)?;
        let hosts = self.hosts()?;
        let tls = self.tls(environment)?;
        let passfile = self
            .take("passfile")
            .or_else(|| environment("PGPASSFILE"))
            .map(PathBuf::from)
            .or_else(|| environment("HOME").map(|home| PathBuf::from(home).join(".pgpass")));
        self.target_session_attrs()?;
        let given_name = self.take("application_name");
        let fallback_name = self.take("fallback_application_name");
        // libpq waits without limit for 0. tuplewatch always has a limit.
        let connect_timeout = self.number("connect_timeout")?.filter(|seconds| *seconds > 0);
        Ok(Endpoints {
            database: self.take("dbname").unwrap_or_else(|| user.clone()),
            user,
            password: Password::new(self.take("password").or_else(|| environment("PGPASSWORD")).unwrap_or_default()),
            passfile: passfile.map(Passfile::new),
            hosts,
            tls,
            connect_timeout: connect_timeout.map_or(DEFAULT_CONNECT_TIMEOUT, Duration::from_secs),
            application_name: given_name.or(fallback_name),
            options: self.take("options"),
            keepalive: self.keepalive()?,
            timeline: Arc::default(),
        })
    }

    fn hosts(&mut self) -> Result<Vec<Host>, UriError> {
        let list = |text: Option<String>| -> Vec<String> {
            text.map(|text| text.split(',').map(|item| item.trim().to_owned()).collect()).unwrap_or_default()
        };
        let names = list(self.take("host"));
        let addresses = list(self.take("hostaddr"));
        let ports = list(self.take("port"));
        let count = names.len().max(addresses.len()).max(1);
        if count > HOSTS_MAX {
            return Err(UriError::Value { name: "host", expected: "a list of at most 16 hosts" });
        }
        for (name, values, one_for_all) in
            [("host", &names, false), ("hostaddr", &addresses, false), ("port", &ports, true)]
        {
            let given = values.len();
            if given != 0 && given != count && !(one_for_all && given == 1) {
                return Err(UriError::Count { name, given, hosts: count });
            }
        }
        let item = |list: &[String], n: usize| list.get(n).filter(|text| !text.is_empty()).cloned();
        (0..count)
            .map(|n| {
                let port = item(&ports, if ports.len() == 1 { 0 } else { n });
                Ok(Host { place: place(item(&names, n), item(&addresses, n))?, port: port_number(port)? })
            })
            .collect()
    }

    fn tls(&mut self, environment: Environment<'_>) -> Result<Tls, UriError> {
        let given_root = self.take("sslrootcert");
        let mut mode = match self.take("sslmode").as_deref() {
            None | Some("prefer") => SslMode::Prefer,
            Some("disable") => SslMode::Disable,
            Some("require") => SslMode::Require,
            Some("verify-ca") => SslMode::VerifyCa,
            Some("verify-full") => SslMode::VerifyFull,
            Some("allow") => {
                let why = "'allow' tries without TLS first, and does not show which it chose: choose disable, prefer or require";
                return Err(UriError::Unsupported { name: "sslmode", why });
            }
            Some(_) => {
                let expected = "one of disable, prefer, require, verify-ca and verify-full";
                return Err(UriError::Value { name: "sslmode", expected });
            }
        };
        // As in libpq, a named root certificate makes `require` verify it.
        if mode == SslMode::Require && given_root.is_some() {
            mode = SslMode::VerifyCa;
        }
        let root_cert = match given_root.as_deref() {
            // Mozilla's roots.
            Some("system") => None,
            Some(path) => Some(PathBuf::from(path)),
            None => environment("HOME")
                .map(|home| PathBuf::from(home).join(".postgresql/root.crt"))
                .filter(|path| mode.verifies() && path.exists()),
        };
        let identity = match (self.take("sslcert"), self.take("sslkey")) {
            (Some(cert), Some(key)) => Some((PathBuf::from(cert), PathBuf::from(key))),
            (Some(_), None) => return Err(UriError::Alone { given: "sslcert", missing: "sslkey" }),
            (None, Some(_)) => return Err(UriError::Alone { given: "sslkey", missing: "sslcert" }),
            (None, None) => None,
        };
        Ok(Tls { mode, root_cert, identity })
    }

    fn target_session_attrs(&mut self) -> Result<(), UriError> {
        match self.take("target_session_attrs").as_deref() {
            None | Some("primary" | "read-write") => Ok(()),
            Some(_) => Err(UriError::Unsupported {
                name: "target_session_attrs",
                why: "changes can only be read from the primary: write primary, or leave it out",
            }),
        }
    }

    fn keepalive(&mut self) -> Result<Keepalive, UriError> {
        let defaults = Keepalive::default();
        let enabled = self.number("keepalives")?.is_none_or(|value| value != 0);
        // In libpq, 0 means the system's default, which is two hours on most systems. Here it means our default.
        let seconds =
            |value: Option<u64>, default| value.filter(|seconds| *seconds > 0).map_or(default, Duration::from_secs);
        let idle = seconds(self.number("keepalives_idle")?, defaults.idle);
        let interval = seconds(self.number("keepalives_interval")?, defaults.interval);
        let libpq = self.number("keepalives_count")?;
        let rust = self.number("keepalives_retries")?;
        let retries = libpq.or(rust).and_then(|count| u32::try_from(count).ok()).filter(|count| *count > 0);
        let user_timeout = self.number("tcp_user_timeout")?.filter(|millis| *millis > 0).map(Duration::from_millis);
        Ok(Keepalive { enabled, idle, interval, retries: retries.unwrap_or(defaults.retries), user_timeout })
    }

    /// Accepts parameters that ask for the built-in behavior, and refuses all other values of these parameters.
    fn ignore_harmless(&mut self) -> Result<(), UriError> {
        const NO_GSS: &str = "there is no GSSAPI encryption: use TLS";
        const NO_BINDING: &str = "there is no channel binding: use sslmode=verify-full";
        const HARMLESS: [(&str, &[&str], &str); 10] = [
            ("gssencmode", &["disable", "prefer"], NO_GSS),
            ("channel_binding", &["disable", "prefer"], NO_BINDING),
            ("sslnegotiation", &["postgres"], "only the negotiation of PostgreSQL itself is there: write postgres"),
            ("sslsni", &["1"], "the host name is always sent"),
            ("sslcompression", &["0"], "TLS compression is not safe"),
            ("ssl_min_protocol_version", &["TLSv1", "TLSv1.1", "TLSv1.2"], "TLS 1.2 and 1.3 are always allowed"),
            ("ssl_max_protocol_version", &["TLSv1.3"], "TLS 1.2 and 1.3 are always allowed"),
            ("load_balance_hosts", &["disable"], "hosts are tried in order, since one of them is the primary"),
            ("client_encoding", &["UTF8", "utf8", "UTF-8", "utf-8", "auto"], "text is always UTF-8"),
            ("replication", &["false", "off", "no", "0"], "tuplewatch opens replication connections itself"),
        ];
        for (name, harmless, why) in HARMLESS {
            if let Some(value) = self.take(name)
                && !harmless.contains(&value.as_str())
            {
                return Err(UriError::Unsupported { name, why });
            }
        }
        for (name, why) in [
            ("sslpassword", "keys with a passphrase cannot be read: remove it from the key"),
            ("sslcrl", "revocation lists are not read"),
            ("sslcrldir", "revocation lists are not read"),
            ("krbsrvname", "there is no Kerberos authentication: use a password or a client certificate"),
            ("gsslib", "there is no Kerberos authentication: use a password or a client certificate"),
            ("service", "service files are not read: write the parameters out"),
            ("require_auth", "the server chooses among password, SCRAM and client certificate"),
            ("requirepeer", "the owner of a socket is not checked"),
        ] {
            if self.take(name).is_some() {
                return Err(UriError::Unsupported { name, why });
            }
        }
        // A name without a value asks for nothing.
        self.0.retain(|_, value| !value.is_empty());
        Ok(())
    }
}

fn place(name: Option<String>, address: Option<String>) -> Result<Place, UriError> {
    let expected = "an IP address";
    let address =
        address.map(|text| text.parse().map_err(|_| UriError::Value { name: "hostaddr", expected })).transpose()?;
    match (name, address) {
        (Some(name), None) if name.starts_with('/') => Ok(Place::Socket { dir: name }),
        (Some(name), None) if name.starts_with('@') => {
            Err(UriError::Unsupported { name: "host", why: "abstract sockets are not supported: name a directory" })
        }
        (Some(name), address) if !name.contains(['/', '@', ' ']) => Ok(Place::Tcp { name, address }),
        (Some(_), _) => Err(UriError::Value { name: "host", expected: "a name, an address or a directory" }),
        (None, Some(address)) => Ok(Place::Tcp { name: IpAddr::to_string(&address), address: Some(address) }),
        // libpq uses the directory of its build, which is unknown here.
        (None, None) => Ok(Place::Tcp { name: "localhost".to_owned(), address: None }),
    }
}

fn port_number(text: Option<String>) -> Result<u16, UriError> {
    let Some(text) = text else { return Ok(DEFAULT_PORT) };
    let expected = "a number from 1 to 65535";
    text.parse().ok().filter(|port| *port > 0).ok_or(UriError::Value { name: "port", expected })
}
