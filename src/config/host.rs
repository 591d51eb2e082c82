//! The address to listen on.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};

/// An IP address or a DNS name, without a port and without brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host(String);

impl Host {
    /// Every IPv4 address of the machine.
    pub(super) fn any_ipv4() -> Self {
        Self("0.0.0.0".to_owned())
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let bracketed = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let valid = match bracketed {
            Some(inside) => inside.parse::<Ipv6Addr>().is_ok(),
            None => text.parse::<IpAddr>().is_ok() || is_dns_name(text),
        };
        valid.then(|| Self(bracketed.unwrap_or(text).to_owned()))
    }

    /// Without brackets: `(host.as_str(), port)` is a socket address for IPv6, too.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// RFC 1123, section 2.1. A last label of digits only would be a mistyped IPv4 address.
fn is_dns_name(text: &str) -> bool {
    let is_label = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last_is_numeric = text.rsplit('.').next().is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit()));
    text.len() <= 253 && text.split('.').all(is_label) && !last_is_numeric
}

#[cfg(test)]
mod tests {
    use super::Host;

    #[test]
    fn addresses_and_names_are_accepted_and_mistakes_refused() {
        for (text, expected) in [
            ("0.0.0.0", Some("0.0.0.0")),
            ("::", Some("::")),
            ("[::1]", Some("::1")),
            ("localhost", Some("localhost")),
            ("watch-1.example.org", Some("watch-1.example.org")),
            ("", None),
            ("1.2.3", None),
            ("300.1.1.1", None),
            ("[127.0.0.1]", None),
            ("localhost:3478", None),
            ("-a.example", None),
            ("a..example", None),
            ("a b", None),
        ] {
            let host = Host::parse(text);
            assert_eq!(host.as_ref().map(Host::as_str), expected, "{text:?}");
        }
        assert_eq!(Host::parse(&"a".repeat(64)), None);
    }
}
