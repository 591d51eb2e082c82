//! The section `authn`: the credentials of callers, and the requests that need none.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;

use super::choice::AuthnMethod;
use super::database_uri::HIDDEN;
use super::effective::{Setting, yaml_string};
use super::parse::{Allowed, RawValue, boolean, choice, list};
use super::reader::Reader;
use super::yaml_file;
use crate::yaml::{Section, Value};

/// The credentials of callers, and the requests that need none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Authn {
    /// The credentials that callers must present; `None` lets everybody in.
    pub credentials: Option<Credentials>,
    /// The requests that need no credentials.
    pub exempt: Exempt,
}

/// The credentials that callers present as `authorization: Bearer …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Credentials {
    /// One of these keys.
    Preshared(Vec<PresharedKey>),
    Oidc(Oidc),
}

/// The requests that need no credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exempt {
    /// `grpc.health.v1`, `/healthz` and `/readyz`. The probes of a platform usually have no credentials.
    pub health: bool,
    /// Server reflection, which reveals only the published protocol.
    pub reflection: bool,
    /// `/metrics`, which names tables and reveals how busy they are, but has no row values and no tenants.
    pub metrics: bool,
}

/// A key, and the tenants that it gives access to. `Debug` hides the key.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct PresharedKey {
    key: String,
    /// `None` gives access to all tenants.
    pub tenants: Option<Vec<String>>,
}

impl PresharedKey {
    /// The key itself, for comparisons.
    pub(crate) fn expose(&self) -> &str {
        &self.key
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.to_yaml())
    }
}

impl Setting for PresharedKey {
    const SECRET: bool = true;

    fn to_yaml(&self) -> String {
        match &self.tenants {
            None => yaml_string(HIDDEN),
            Some(tenants) => format!("{{key: {}, tenants: {}}}", yaml_string(HIDDEN), tenants.to_yaml()),
        }
    }
}

/// JWTs of an OpenID Connect issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Oidc {
    /// The issuer whose tokens are accepted. Its keys are found through its discovery document.
    pub issuer: SecureUrl,
    /// The value that the claim `aud` of a token must contain.
    pub audience: String,
    /// The claim that lists the tenants of a caller; `None` gives every caller access to all tenants.
    pub tenants_claim: Option<String>,
}

/// The URL of a trusted server: https, or http on this machine.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct SecureUrl(String);

impl SecureUrl {
    /// Parses a URL without user and fragment, which the URLs of issuers and keys do not need. `None` if the text is
    /// not a secure URL.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let uri: http::Uri = text.parse().ok()?;
        let host = uri.host()?.trim_matches(['[', ']']);
        let is_loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
        let is_secure = match uri.scheme_str()? {
            "https" => true,
            "http" => is_loopback,
            _ => false,
        };
        (is_secure && !text.contains(['@', '#'])).then(|| Self(text.to_owned()))
    }

    /// The URL as it was configured.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl Setting for Option<SecureUrl> {
    fn to_yaml(&self) -> String {
        yaml_string(self.as_ref().map_or("", SecureUrl::as_str))
    }
}

impl fmt::Display for SecureUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for SecureUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A setting of the other method is refused, because its author expects it to have an effect.
const OTHER_METHOD: &str = "authn.method selects the other method";

impl Authn {
    pub(super) fn read(read: &mut Reader) -> Self {
        let enabled = read.get("authn.enabled", false, boolean);
        let method = read.get("authn.method", AuthnMethod::Preshared, choice);
        let exempt = Exempt {
            health: read.get("authn.exempt.health", true, boolean),
            reflection: read.get("authn.exempt.reflection", false, boolean),
            metrics: read.get("authn.exempt.metrics", false, boolean),
        };
        let keys = read.get("authn.preshared.keys", Vec::new(), preshared_keys);
        let issuer = read.get("authn.oidc.issuer", None, issuer);
        let audience = read.get("authn.oidc.audience", String::new(), printable);
        let tenants_claim = read.get("authn.oidc.tenants_claim", String::new(), printable);
        let credentials = match method {
            _ if !enabled => None,
            AuthnMethod::Preshared => {
                if keys.is_empty() {
                    read.refuse(
                        &["authn.enabled", "authn.preshared.keys"],
                        "at least one key is needed, or every request would be refused",
                    );
                }
                if issuer.is_some() {
                    read.refuse(&["authn.method", "authn.oidc.issuer"], OTHER_METHOD);
                }
                Some(Credentials::Preshared(keys))
            }
            AuthnMethod::Oidc => {
                if issuer.is_none() {
                    read.refuse(&["authn.method", "authn.oidc.issuer"], "the method oidc needs an issuer");
                }
                if audience.is_empty() {
                    let rule = "without an audience, tokens that were issued for other services would be accepted";
                    read.refuse(&["authn.method", "authn.oidc.audience"], rule);
                }
                if !keys.is_empty() {
                    read.refuse(&["authn.method", "authn.preshared.keys"], OTHER_METHOD);
                }
                let tenants_claim = Some(tenants_claim).filter(|claim| !claim.is_empty());
                issuer.map(|issuer| Credentials::Oidc(Oidc { issuer, audience, tenants_claim }))
            }
        };
        Self { credentials, exempt }
    }
}

/// Reads a list of keys: bare, or `{key: …, tenants: […]}`. In the environment and in flags it is the list in brackets
/// as in a file, or bare keys separated by commas.
fn preshared_keys(raw: &RawValue<'_>) -> Result<Vec<PresharedKey>, Allowed> {
    let keys = match raw {
        RawValue::Text(text) if text.trim_start().starts_with('[') => {
            let value = yaml_file::parse_value(text).ok_or("a list as in [a, {key: b, tenants: [t1]}]")?;
            list(preshared_key)(&RawValue::from(&value))?
        }
        _ => list(preshared_key)(raw)?,
    };
    let mut seen = HashSet::new();
    if keys.iter().all(|key| seen.insert(key.expose())) {
        Ok(keys)
    } else {
        Err("a list in which no key comes twice".to_owned())
    }
}

fn preshared_key(raw: &RawValue<'_>) -> Result<PresharedKey, Allowed> {
    let key = match raw {
        RawValue::Text(text) => key(text).map(|key| PresharedKey { key, tenants: None }),
        RawValue::Section(section) => key_and_tenants(section),
        _ => None,
    };
    let allowed = "1 to 4096 visible ASCII characters, in quotes where they are digits only, or {key: …, tenants: […]}";
    key.ok_or_else(|| allowed.to_owned())
}

fn key_and_tenants(section: &Section) -> Option<PresharedKey> {
    let Value::Text(text) = section.get("key")? else { return None };
    let tenants = match section.get("tenants") {
        Some(value) => Some(tenants(value)?),
        None => None,
    };
    let known = 1 + usize::from(tenants.is_some());
    (section.len() == known).then_some(PresharedKey { key: key(text)?, tenants })
}

/// Any text that fits into a header.
fn key(text: &str) -> Option<String> {
    ((1..=4096).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| text.to_owned())
}

fn tenants(value: &Value) -> Option<Vec<String>> {
    let Value::List(items) = value else { return None };
    let tenant = |item: &Value| match item {
        Value::Text(text) if !text.is_empty() => Some(text.clone()),
        _ => None,
    };
    // An empty list could be meant for no tenant or for all tenants.
    items.iter().map(tenant).collect::<Option<Vec<_>>>().filter(|tenants| !tenants.is_empty())
}

fn issuer(raw: &RawValue<'_>) -> Result<Option<SecureUrl>, Allowed> {
    match raw {
        RawValue::Text("") => Some(None),
        RawValue::Text(text) if !text.contains('?') => SecureUrl::parse(text).map(Some),
        _ => None,
    }
    .ok_or_else(|| "an https URL without query (http only on this machine)".to_owned())
}

fn printable(raw: &RawValue<'_>) -> Result<String, Allowed> {
    match raw {
        RawValue::Text(text) if !text.chars().any(char::is_control) => Ok((*text).to_owned()),
        _ => Err("a text; put it in quotes".to_owned()),
    }
}
