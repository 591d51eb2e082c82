//! Authentication: keys, JWTs of an issuer that comes and goes, and exemptions.

mod http;

use super::cli::process::{Process, program, run};
use crate::support::change::Change;
use crate::support::issuer::{AUDIENCE, Issuer, Key};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::stream::{Stream, reason};
use crate::support::wait::{eventually, within};
use jsonwebtoken::{Algorithm, get_current_timestamp};
use reqwest::Method;
use serde_json::json;
use tonic::{Code, Request, Status};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;

/// Watches t1 with this `authorization` header.
async fn watch(server: &Server, authorization: &str) -> Result<Stream, Status> {
    let channel = server.channel().await;
    within("an answer", Stream::open_as(authorization, channel, "t1", "")).await
}

/// The call is refused with this name and a sentence.
async fn refused(server: &Server, authorization: &str, name: &str, what: &str) {
    let status = watch(server, authorization).await.err().unwrap_or_else(|| panic!("{what} got in"));
    assert!(is_sentence(status.message(), name), "{what}: {status:?}");
    assert_eq!(reason(&status), (Code::Unauthenticated, name.replace("ERROR_CODE_", "")), "{what}");
}

/// Permify's name, and a remedy.
fn is_sentence(message: &str, name: &str) -> bool {
    message
        .strip_prefix(name)
        .is_some_and(|reason| reason.starts_with(": ") && reason.contains(" send ") | reason.contains(" ask "))
}

async fn reflect(server: &Server, authorization: &str) -> Result<(), Status> {
    let list = MessageRequest::ListServices(String::new());
    let list = ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut request = Request::new(tokio_stream::iter([list]));
    if !authorization.is_empty() {
        request.metadata_mut().insert("authorization", authorization.parse().unwrap());
    }
    let mut client = ServerReflectionClient::new(server.channel().await);
    client.server_reflection_info(request).await?.into_inner().message().await.map(drop)
}

const MISSING: &str = "ERROR_CODE_MISSING_BEARER_TOKEN";
const INVALID: &str = "ERROR_CODE_INVALID_BEARER_TOKEN";
const CLAIMS: &str = "ERROR_CODE_INVALID_CLAIMS";

/// A server that accepts the tokens of this issuer.
async fn serve(postgres: &Postgres, issuer: &Issuer, further: &[(&str, &str)]) -> Server {
    let url = issuer.url();
    let flags = [
        ("--authn-enabled", "true"),
        ("--authn-method", "oidc"),
        ("--authn-oidc-issuer", url.as_str()),
        ("--authn-oidc-audience", AUDIENCE),
    ];
    Server::serve(postgres, &[&flags, further].concat()).await
}

#[tokio::test]
async fn a_key_gives_access_to_its_tenants_only() {
    let postgres = Postgres::start().await;
    let keys = "[hush-all, {key: hush-t1, tenants: [t1]}, {key: hush-t2, tenants: [t2, t3]}]";
    let flags = [("--authn-enabled", "true"), ("--authn-preshared-keys", keys)];
    // Its health needs no key.
    let server = Server::serve(&postgres, &flags).await;
    let sql = postgres.sql().await;
    for (id, authorization) in [("a", "Bearer hush-all"), ("b", "bearer hush-all"), ("c", "BEARER  hush-t1")] {
        let mut stream = watch(&server, authorization).await.unwrap();
        sql.insert("t1", id).await;
        stream.expect(Change::create(Change::viewer(id))).await;
    }
    for (authorization, name) in [
        ("", MISSING),
        ("hush-all", MISSING),
        ("Basic hush-all", MISSING),
        ("Bearer ", MISSING),
        ("Bearer hush", "ERROR_CODE_UNAUTHENTICATED"),
        ("Bearer hush-all2", "ERROR_CODE_UNAUTHENTICATED"),
        ("Bearer HUSH-ALL", "ERROR_CODE_UNAUTHENTICATED"),
    ] {
        refused(&server, authorization, name, authorization).await;
    }
    let status = watch(&server, "Bearer hush-t2").await.err().expect("another's tenant");
    assert_eq!(reason(&status), (Code::PermissionDenied, "TENANT_FORBIDDEN".to_owned()));
    assert!(status.message().contains("'t1'"), "{status:?}");
    // The refusal does not reveal whether a foreign tenant exists.
    let channel = server.channel().await;
    let status = Stream::open_as("Bearer hush-t1", channel, "nobody", "").await.err().expect("another's tenant");
    assert_eq!(status.code(), Code::PermissionDenied);

    assert_eq!(reflect(&server, "").await.unwrap_err().code(), Code::Unauthenticated);
    reflect(&server, "Bearer hush-t1").await.unwrap();
    assert!(!server.has_logged("hush"));
}

#[tokio::test]
async fn exemptions_follow_the_configuration() {
    let postgres = Postgres::start().await;
    let flags = [
        ("--authn-enabled", "true"),
        ("--authn-preshared-keys", "hush"),
        ("--authn-exempt-health", "false"),
        ("--authn-exempt-reflection", "true"),
    ];
    let mut server = Server::prepare(&postgres, &flags).await;
    server.start().await;
    assert_eq!(server.health("").await, Err(Code::Unauthenticated));
    assert_eq!(server.ask(Method::GET, "/healthz", "").await.0, 401);
    reflect(&server, "").await.unwrap();
    refused(&server, "", MISSING, "nobody").await;
}

#[tokio::test]
async fn valid_jwts_are_accepted_and_others_refused() {
    let postgres = Postgres::start().await;
    let (ec, rsa) = (Key::ec("ec"), Key::rsa("rsa"));
    let issuer = Issuer::start(&[&ec, &rsa]).await;
    let url = issuer.url();
    let server = serve(&postgres, &issuer, &[]).await;
    let sql = postgres.sql().await;
    let now = get_current_timestamp();
    let good = issuer.claims(&json!({}));
    let several = issuer.claims(&json!({"aud": ["others", AUDIENCE], "nbf": now + 5, "exp": now as f64 + 3600.5}));
    for (what, token) in [
        ("ES256", ec.sign(&good)),
        ("RS256", rsa.sign(&good)),
        ("RS512", rsa.named("rsa", Algorithm::RS512).sign(&good)),
        ("one audience of several, a clock that is a little ahead, and fractions", ec.sign(&several)),
    ] {
        let mut stream = watch(&server, &format!("bearer {token}")).await.unwrap_or_else(|s| panic!("{what}: {s:?}"));
        let id = fastrand::u64(..).to_string();
        sql.insert("t1", &id).await;
        stream.expect(Change::create(Change::viewer(&id))).await;
    }

    let but = |other| rsa.sign(&issuer.claims(&other));
    let stranger = Key::rsa("stranger");
    let damaged = |token: &str, at: usize| {
        let mut parts: Vec<String> = token.split('.').map(str::to_owned).collect();
        let with = if parts[at].starts_with('e') { "f" } else { "e" };
        parts[at].replace_range(..1, with);
        parts.join(".")
    };
    for (what, token, name) in [
        ("expired", but(json!({"exp": now - 1})), INVALID),
        ("expired long ago", but(json!({"exp": 0})), INVALID),
        ("expired before all times", but(json!({"exp": -1.5})), CLAIMS),
        ("never expires", but(json!({"exp": null})), CLAIMS),
        ("expires at some time", but(json!({"exp": "tomorrow"})), CLAIMS),
        ("not yet valid", but(json!({"nbf": now + 3600})), INVALID),
        ("for others", but(json!({"aud": "others"})), "ERROR_CODE_INVALID_AUDIENCE"),
        ("for nobody", but(json!({"aud": null})), CLAIMS),
        ("of another issuer", but(json!({"iss": "https://issuer.example"})), "ERROR_CODE_INVALID_ISSUER"),
        ("of nearly this issuer", but(json!({"iss": format!("{url}/")})), "ERROR_CODE_INVALID_ISSUER"),
        ("of several issuers", but(json!({"iss": [url, "x"]})), "ERROR_CODE_INVALID_ISSUER"),
        ("of no issuer", but(json!({"iss": null})), CLAIMS),
        ("an unknown key", stranger.sign(&good), INVALID),
        ("an unknown key under a known name", stranger.named("rsa", Algorithm::RS256).sign(&good), INVALID),
        ("another key's name", ec.named("rsa", Algorithm::ES256).sign(&good), INVALID),
        ("no signature", rsa.unsigned(&good), INVALID),
        ("HMAC with the public key", rsa.sign_with_public_key(&good), INVALID),
        ("other claims", damaged(&rsa.sign(&good), 1), INVALID),
        ("another signature", damaged(&rsa.sign(&good), 2), INVALID),
        ("half a token", good.to_string().replace('"', ""), INVALID),
        ("two parts", rsa.sign(&good).rsplit_once('.').unwrap().0.to_owned(), INVALID),
        ("dots", "...".to_owned(), INVALID),
    ] {
        refused(&server, &format!("Bearer {token}"), name, what).await;
    }
    refused(&server, "", MISSING, "nothing").await;
    let token = rsa.sign(&good);
    assert!(!server.has_logged(&token) && !server.has_logged(token.rsplit_once('.').unwrap().1));
}

#[tokio::test]
async fn keys_rotate_and_survive_an_outage_of_the_issuer() {
    let postgres = Postgres::start().await;
    let (first, second, third) = (Key::ec("first"), Key::ec("second"), Key::ec("third"));
    let mut issuer = Issuer::start(&[&first]).await;
    issuer.stop().await;
    // The server starts without its issuer, and cannot check tokens yet.
    let server = serve(&postgres, &issuer, &[]).await;
    let bearer = |key: &Key| format!("Bearer {}", key.sign(&issuer.claims(&json!({}))));
    let [first_token, second_token, third_token] = [&first, &second, &third].map(bearer);
    let status = watch(&server, &first_token).await.err().expect("nobody can tell");
    assert_eq!(reason(&status), (Code::Unavailable, "ISSUER_UNREACHABLE".to_owned()));
    server.until_logged("so no token is accepted").await;
    refused(&server, "", MISSING, "nothing").await;

    issuer.start_again().await;
    let is_in = async || watch(&server, &first_token).await.is_ok();
    eventually("the issuer is found by itself", is_in).await;

    // The first token that names a new key makes the server fetch it. Concurrent calls wait for that.
    issuer.publish(&[&first, &second]);
    let all = (0..20).map(|_| watch(&server, &second_token));
    for (n, answer) in futures_util::future::join_all(all).await.into_iter().enumerate() {
        answer.unwrap_or_else(|status| panic!("request {n}: {status:?}"));
    }
    watch(&server, &first_token).await.unwrap();

    // Unknown key names cause a few fetches, not one each.
    let before = issuer.fetches();
    for _ in 0..50 {
        refused(&server, &third_token, INVALID, "an unknown key").await;
    }
    let fetched = issuer.fetches() - before;
    assert!(fetched <= 6, "{fetched} fetches for 50 made-up keys");
    watch(&server, &second_token).await.unwrap();

    // The fetched keys stay valid.
    issuer.stop().await;
    for token in [&first_token, &second_token] {
        watch(&server, token).await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_ends_when_its_token_expires() {
    let postgres = Postgres::start().await;
    let key = Key::ec("key");
    let issuer = Issuer::start(&[&key]).await;
    let server = serve(&postgres, &issuer, &[("--authn-oidc-tenants-claim", "tenants")]).await;
    let sql = postgres.sql().await;
    let bearer = |other| format!("Bearer {}", key.sign(&issuer.claims(&other)));
    let lasting = bearer(json!({"tenants": ["t1", "t2"]}));
    let exp = get_current_timestamp() + 5;
    let mut short = watch(&server, &bearer(json!({"tenants": "t1", "exp": exp}))).await.unwrap();
    let mut long = watch(&server, &lasting).await.unwrap();
    sql.insert("t1", "before").await;
    let last = short.expect(Change::create(Change::viewer("before"))).await.token;
    long.expect(Change::create(Change::viewer("before"))).await;
    let (rest, status) = short.ending().await;
    assert!(get_current_timestamp() >= exp, "not before its time");
    assert!(rest.is_empty(), "{rest:?}");
    assert_eq!(reason(&status), (Code::Unauthenticated, "CREDENTIALS_EXPIRED".to_owned()));
    assert!(status.message().contains("reconnect with new ones and the last snap token"), "{status:?}");

    // A new token resumes with exactly the rest. The other stream is not affected.
    sql.insert("t1", "after").await;
    let mut resumed = Stream::open_as(&lasting, server.channel().await, "t1", &last).await.unwrap();
    for stream in [&mut resumed, &mut long] {
        stream.expect(Change::create(Change::viewer("after"))).await;
    }

    // The claim lists the tenants, and is required.
    let others = watch(&server, &bearer(json!({"tenants": ["t2"]}))).await.err().expect("another's tenant");
    assert_eq!(others.code(), Code::PermissionDenied);
    for claim in [json!({}), json!({"tenants": 1}), json!({"tenants": [1]}), json!({"tenants": {"t1": true}})] {
        refused(&server, &bearer(claim.clone()), CLAIMS, &claim.to_string()).await;
    }
}

#[tokio::test]
async fn the_command_line_presents_a_token() {
    let postgres = Postgres::start().await;
    let flags = [("--authn-enabled", "true"), ("--authn-preshared-keys", "hush, other")];
    let server = Server::serve(&postgres, &flags).await;
    let address = server.endpoint().uri().to_string();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, "hush\n").unwrap();
    let watch = |flags: &[&str], variable: Option<&str>| {
        let mut command = program(directory.path());
        command.args(["watch", "--tenant", "t1", "--server", &address]).args(flags);
        command.envs(variable.map(|token| ("TUPLEWATCH_TOKEN", token)));
        command
    };
    run(watch(&[], None)).await.failed(&[MISSING, "`Authorization: Bearer ...`", "--token-file", "TUPLEWATCH_TOKEN"]);
    run(watch(&[], Some("wrong"))).await.failed(&["ERROR_CODE_UNAUTHENTICATED: the key is unknown to this server"]);
    run(watch(&["--token-file", "nowhere"], None)).await.failed(&["cannot read nowhere"]);
    let garbage = run(watch(&[], Some("hu\nsh"))).await;
    assert!(!garbage.err.contains("sh\n"), "{garbage:?}");
    garbage.failed(&["TUPLEWATCH_TOKEN holds no token"]);

    let sql = postgres.sql().await;
    let watchers = [watch(&[], Some("other")), watch(&["--token-file", "token"], None)].map(Process::start);
    for process in &watchers {
        // Only its output shows that it has started, so rows are inserted until it prints one.
        let mut n = 0;
        let prints = async || {
            n += 1;
            sql.insert("t1", &format!("{}-{n}", process.id())).await;
            !process.printed().is_empty()
        };
        eventually("it prints", prints).await;
        let [begun] = &process.logged()[..] else { panic!("{:?}", process.logged()) };
        assert!(begun.starts_with("watching tenant t1 on "), "{begun}");
    }
}

#[tokio::test]
async fn the_command_line_resumes_with_a_renewed_token() {
    let postgres = Postgres::start().await;
    let key = Key::ec("key");
    let issuer = Issuer::start(&[&key]).await;
    let server = serve(&postgres, &issuer, &[]).await;
    let directory = tempfile::tempdir().unwrap();
    let keep = |other| std::fs::write(directory.path().join("token"), key.sign(&issuer.claims(&other))).unwrap();
    keep(json!({"exp": get_current_timestamp() + 5}));
    let start = || {
        let mut command = program(directory.path());
        command.args(["watch", "--tenant", "t1", "--token-file", "token"]);
        command.args(["--server", &server.endpoint().uri().to_string()]);
        Process::start(command)
    };
    // The token is not renewed in time.
    let mut abandoned = start();
    abandoned.until_logged("the credentials that this stream was opened with have expired").await;
    assert_eq!(abandoned.ended().await.code(), Some(1));

    keep(json!({"exp": get_current_timestamp() + 5}));
    let renewed = start();
    let sql = postgres.sql().await;
    let mut n = 0;
    let prints = async || {
        n += 1;
        sql.insert("t1", &n.to_string()).await;
        !renewed.printed().is_empty()
    };
    eventually("it prints", prints).await;
    keep(json!({}));
    renewed.until_logged("connected again, resuming after token …").await;
    sql.insert("t1", "after").await;
    let is_there = async || renewed.printed().iter().any(|line| line.contains("document:after#"));
    eventually("it prints the later change", is_there).await;
}
