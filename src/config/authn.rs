//! Section `authn`: who may make requests.

use std::collections::HashSet;
use std::fmt;
use std::net::IpAddr;

use super::choice::AuthnMethod;
use super::database_uri::HIDDEN;
use super::document;
use super::effective::{Setting, yaml_string};
use super::given::{Allowed, Given, boolean, choice, list};
use super::reader::Reader;
use crate::yaml::{Section, Value};

/// Who may make requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authn {
    /// What callers present; `None` lets everybody in.
    pub credentials: Option<Credentials>,
    /// What needs no credentials.
    pub exempt: Exempt,
}

/// What callers present, as `authorization: Bearer …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Credentials {
    /// One of these keys.
    Preshared(Vec<PresharedKey>),
    /// A JWT.
    Oidc(Oidc),
}

/// What needs no credentials.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exempt {
    /// `grpc.health.v1`, `/healthz` and `/readyz`: probes of a platform usually have none.
    pub health: bool,
    /// Server reflection, which tells no more than the published protocol.
    pub reflection: bool,
    /// `/metrics`, which has no values of rows and no tenants in it, but names tables and tells how busy they are.
    pub metrics: bool,
}

/// A key, and what it is good for. `Debug` shows no key.
#[derive(Clone, PartialEq, Eq)]
pub struct PresharedKey {
    key: String,
    /// `None`: all tenants.
    pub tenants: Option<Vec<String>>,
}

impl PresharedKey {
    /// The key itself, for comparing.
    pub fn expose(&self) -> &str {
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
pub struct Oidc {
    /// Whose tokens, and where its keys are found.
    pub issuer: SecureUrl,
    /// What a token's `aud` must hold.
    pub audience: String,
    /// The claim with the caller's tenants; `None` where every caller may use all of them.
    pub tenants_claim: Option<String>,
}

/// The URL of something that is trusted: https, or http on this machine.
#[derive(Clone, PartialEq, Eq)]
pub struct SecureUrl(String);

impl SecureUrl {
    /// Without user, query and fragment, which the URL of an issuer or of its keys has no use for. `None` for what is no such URL.
    pub fn parse(text: &str) -> Option<Self> {
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

    /// As it was given.
    pub fn as_str(&self) -> &str {
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

/// Whoever gives both believes that both count.
const OTHER_METHOD: &str = "only one method is in force, and this is for the other";

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
                    read.refuse(&["authn.enabled", "authn.preshared.keys"], "without a key nobody could get in");
                }
                if issuer.is_some() {
                    read.refuse(&["authn.method", "authn.oidc.issuer"], OTHER_METHOD);
                }
                Some(Credentials::Preshared(keys))
            }
            AuthnMethod::Oidc => {
                if issuer.is_none() {
                    read.refuse(&["authn.method", "authn.oidc.issuer"], "tokens need an issuer that is trusted");
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

/// A list of keys: bare, or `{key: …, tenants: […]}`. Where only text can be given, the list in brackets as in a file, or bare
/// keys with commas between them.
fn preshared_keys(given: &Given<'_>) -> Result<Vec<PresharedKey>, Allowed> {
    let keys = match given {
        Given::Text(text) if text.trim_start().starts_with('[') => {
            let value = document::parse_value(text).ok_or("a list as in [a, {key: b, tenants: [t1]}]")?;
            list(preshared_key)(&Given::from(&value))?
        }
        _ => list(preshared_key)(given)?,
    };
    let mut seen = HashSet::new();
    if keys.iter().all(|key| seen.insert(key.expose())) {
        Ok(keys)
    } else {
        Err("a list in which no key comes twice".to_owned())
    }
}

fn preshared_key(given: &Given<'_>) -> Result<PresharedKey, Allowed> {
    let key = match given {
        Given::Text(text) => key(text).map(|key| PresharedKey { key, tenants: None }),
        Given::Section(section) => key_and_tenants(section),
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

/// What can be sent in a header.
fn key(text: &str) -> Option<String> {
    ((1..=4096).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())).then(|| text.to_owned())
}

fn tenants(value: &Value) -> Option<Vec<String>> {
    let Value::List(items) = value else { return None };
    let tenant = |item: &Value| match item {
        Value::Text(text) if !text.is_empty() => Some(text.clone()),
        _ => None,
    };
    // An empty list could be meant for none or for all.
    items.iter().map(tenant).collect::<Option<Vec<_>>>().filter(|tenants| !tenants.is_empty())
}

fn issuer(given: &Given<'_>) -> Result<Option<SecureUrl>, Allowed> {
    match given {
        Given::Text("") => Some(None),
        Given::Text(text) if !text.contains('?') => SecureUrl::parse(text).map(Some),
        _ => None,
    }
    .ok_or_else(|| "an https URL without query (http only on this machine)".to_owned())
}

fn printable(given: &Given<'_>) -> Result<String, Allowed> {
    match given {
        Given::Text(text) if !text.chars().any(char::is_control) => Ok((*text).to_owned()),
        _ => Err("a text; put it in quotes".to_owned()),
    }
}
