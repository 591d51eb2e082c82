//! The database URI, which usually contains a password.

use std::fmt;

/// The address of PostgreSQL as it was configured: a URI or a `key=value` string.
///
/// `Display` and `Debug` hide its password. They show only a string that has one of the two forms. Any other string is
/// hidden as a whole, because its password could be anywhere.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct DatabaseUri(String);

/// The replacement for a hidden text.
pub(super) const HIDDEN: &str = "***";

/// Connection parameters whose values are no secrets (PostgreSQL documentation, "Parameter Key Words"). The value of
/// any other parameter is treated as a secret.
const PUBLIC_PARAMETERS: &[&str] = &[
    "application_name",
    "channel_binding",
    "client_encoding",
    "connect_timeout",
    "dbname",
    "fallback_application_name",
    "gssencmode",
    "host",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "keepalives_retries",
    "load_balance_hosts",
    "options",
    "passfile",
    "port",
    "require_auth",
    "ssl_max_protocol_version",
    "ssl_min_protocol_version",
    "sslcert",
    "sslcrl",
    "sslkey",
    "sslmode",
    "sslnegotiation",
    "sslrootcert",
    "sslsni",
    "target_session_attrs",
    "tcp_user_timeout",
    "user",
];

/// Known parameters whose values are hidden.
const SECRET_PARAMETERS: &[&str] = &["password", "sslpassword", "oauth_client_secret"];

impl DatabaseUri {
    pub(super) fn new(text: &str) -> Self {
        Self(text.to_owned())
    }

    /// The URI without its secrets, for another command that gets them from elsewhere. A URI that cannot be parsed is
    /// hidden, as in `Display`.
    pub(super) fn without_password(&self) -> String {
        let shown = self.to_string();
        let mut text = shown.replace(&format!(":{HIDDEN}@"), "@");
        for name in SECRET_PARAMETERS {
            for separated in [format!("{name}={HIDDEN}&"), format!("{name}={HIDDEN} "), format!("{name}={HIDDEN}")] {
                text = text.replace(&separated, "");
            }
        }
        text.trim_end_matches(['?', '&', ' ']).to_owned()
    }

    /// The URI with its password, for a connection.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DatabaseUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let uri =
            ["postgres://", "postgresql://"].iter().find_map(|scheme| Some((*scheme, self.0.strip_prefix(scheme)?)));
        match uri {
            Some((scheme, rest)) => {
                let shown = redact_uri(rest);
                write!(f, "{scheme}{}", shown.as_deref().unwrap_or(HIDDEN))
            }
            None => f.write_str(redact_pairs(&self.0).as_deref().unwrap_or(HIDDEN)),
        }
    }
}

impl fmt::Debug for DatabaseUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUri({self})")
    }
}

/// `[user[:password]@]host[:port][,…][/database][?name=value&…]`
fn redact_uri(text: &str) -> Option<String> {
    let (location, query) = match text.split_once('?') {
        Some((location, query)) => (location, Some(query)),
        None => (text, None),
    };
    let (authority, database) = match location.split_once('/') {
        Some((authority, database)) => (authority, Some(database)),
        None => (location, None),
    };
    let mut shown = String::new();
    let hosts = match authority.rsplit_once('@') {
        Some((user_info, hosts)) => {
            match user_info.split_once(':') {
                Some((user, _password)) => shown.push_str(&format!("{user}:{HIDDEN}@")),
                None => shown.push_str(&format!("{user_info}@")),
            }
            hosts
        }
        None => authority,
    };
    if !hosts.split(',').all(is_host_and_port) {
        return None;
    }
    shown.push_str(hosts);
    if let Some(database) = database {
        // A password that contains a `/` would end up here, together with the `@` behind it.
        if database.contains(['/', '@', ':']) {
            return None;
        }
        shown.push_str(&format!("/{database}"));
    }
    if let Some(query) = query {
        let pairs: Option<Vec<String>> = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| {
                let (name, value) = pair.split_once('=')?;
                Some(format!("{name}={}", redact_parameter(name, value)?))
            })
            .collect();
        shown.push_str(&format!("?{}", pairs?.join("&")));
    }
    Some(shown)
}

/// `name = value …`. A value is bare or in single quotes, with backslash escapes in either form.
fn redact_pairs(text: &str) -> Option<String> {
    let mut shown = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let (name, tail) = rest.split_once('=')?;
        let name = name.trim_end();
        let tail = tail.trim_start();
        let value_end = value_end(tail)?;
        let (value, tail) = tail.split_at_checked(value_end)?;
        shown.push(format!("{name}={}", redact_parameter(name, value)?));
        rest = tail.trim_start();
    }
    Some(shown.join(" "))
}

/// The end of the value at the start of `text`, including its quotes. `None` if a quote stays open.
fn value_end(text: &str) -> Option<usize> {
    let quoted = text.starts_with('\'');
    let mut chars = text.char_indices().skip(usize::from(quoted));
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => {
                chars.next();
            }
            '\'' if quoted => return Some(at + c.len_utf8()),
            c if !quoted && c.is_whitespace() => return Some(at),
            _ => {}
        }
    }
    (!quoted).then_some(text.len())
}

fn redact_parameter<'a>(name: &str, value: &'a str) -> Option<&'a str> {
    if PUBLIC_PARAMETERS.contains(&name) {
        Some(value)
    } else if SECRET_PARAMETERS.contains(&name) {
        Some(HIDDEN)
    } else {
        None
    }
}

/// A name, an address, `[` an IPv6 address `]`, or a percent-encoded socket directory; then possibly a port.
fn is_host_and_port(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, port),
        _ => (text, ""),
    };
    let is_ipv6 = |host: &str| {
        host.strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .is_some_and(|inside| inside.bytes().all(|byte| byte.is_ascii_hexdigit() || b":.%".contains(&byte)))
    };
    let is_name = |host: &str| host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.%".contains(&byte));
    (is_name(host) || is_ipv6(host)) && port.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::DatabaseUri;

    #[test]
    fn passwords_are_hidden_and_the_rest_is_shown() {
        for (text, shown) in [
            ("postgres://u:secret@h:5432/db", "postgres://u:***@h:5432/db"),
            ("postgresql://u:secret@h", "postgresql://u:***@h"),
            ("postgres://u@h/db", "postgres://u@h/db"),
            ("postgres://h1:1,[::1]:2/db", "postgres://h1:1,[::1]:2/db"),
            ("postgres://[::1]/db", "postgres://[::1]/db"),
            ("postgres:///db", "postgres:///db"),
            ("postgres://u:@%2Frun%2Fpg/db", "postgres://u:***@%2Frun%2Fpg/db"),
            ("postgres://u:sec@ret@h/db", "postgres://u:***@h/db"),
            ("postgres://u:sec:ret@h/db", "postgres://u:***@h/db"),
            (
                "postgres://h/db?user=a@b&password=secret&sslmode=require",
                "postgres://h/db?user=a@b&password=***&sslmode=require",
            ),
            ("postgres://h/db?sslpassword=secret", "postgres://h/db?sslpassword=***"),
            // URIs that cannot be parsed.
            ("postgres://u:12/secret@h/db", "postgres://***"),
            ("postgres://u:a@b/secret@h/db", "postgres://***"),
            ("postgres://u:12?secret@h/db", "postgres://***"),
            ("postgres://u:secret", "postgres://***"),
            ("postgres://h/db?%70assword=secret", "postgres://***"),
            ("mysql://u:secret@h/db", "***"),
            ("secret", "***"),
            // Pairs.
            ("host=h password=secret user=u", "host=h password=*** user=u"),
            (r"password = 'se\'cr et'  host = h", "password=*** host=h"),
            (r"password=se\ cret host=h", "password=*** host=h"),
            ("host='/run/p g' dbname=db", "host='/run/p g' dbname=db"),
            ("password=se cret host=h", "***"),
            ("password='secret host=h", "***"),
            ("passwort=secret host=h", "***"),
            ("", ""),
        ] {
            let uri = DatabaseUri::new(text);
            assert_eq!(uri.to_string(), shown, "{text:?}");
            assert_eq!(format!("{uri:?}"), format!("DatabaseUri({shown})"));
            assert_eq!(uri.expose(), text);
        }
    }

    #[test]
    fn passwords_can_be_left_out() {
        for (text, without) in [
            ("postgres://u:secret@h:5432/db", "postgres://u@h:5432/db"),
            ("postgres://u@h/db?sslmode=require", "postgres://u@h/db?sslmode=require"),
            ("postgres://h/db?user=a&password=secret&sslmode=require", "postgres://h/db?user=a&sslmode=require"),
            ("postgres://h/db?user=a&password=secret", "postgres://h/db?user=a"),
            ("postgres://h/db?password=secret", "postgres://h/db"),
            ("host=h password=secret user=u", "host=h user=u"),
            ("host=h user=u password='se cret'", "host=h user=u"),
            // A URI that cannot be parsed.
            ("postgres://u:12/secret@h/db", "postgres://***"),
        ] {
            assert_eq!(DatabaseUri::new(text).without_password(), without, "{text:?}");
        }
    }
}
