//! Certificates of the server and of its clients, valid and invalid ones, with `watch` and with clients of HTTP.

use super::cli::process::{Process, program};
use crate::support::http::Lines;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::{eventually, within};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::{ClientConfig, RootCertStore};
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

/// A certificate authority.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new(directory: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(directory.join(format!("{name}.pem")), issuer.pem()).unwrap();
        Self { issuer }
    }

    /// Writes `NAME.pem` and `NAME.key`, for this machine.
    fn sign(&self, directory: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) {
        let mut params = CertificateParams::new(["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(directory.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(directory.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

fn expired(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2021, 1, 1);
}

/// All the certificates of these tests.
fn certificates() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (ours, others) = (Authority::new(directory.path(), "ours"), Authority::new(directory.path(), "others"));
    ours.sign(directory.path(), "server", |_| {});
    ours.sign(directory.path(), "expired", expired);
    ours.sign(directory.path(), "client", |_| {});
    others.sign(directory.path(), "stranger", |_| {});
    directory
}

/// All certificates, and a server that has one of them for gRPC.
async fn serve(postgres: &Postgres, certificate: &str, client_ca: bool) -> (TempDir, Server) {
    let directory = certificates();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (cert, key) = (path(&format!("{certificate}.pem")), path(&format!("{certificate}.key")));
    let authority = path("ours.pem");
    let mut flags = vec![
        ("--server-grpc-tls-enabled", "true"),
        ("--server-grpc-tls-cert", cert.as_str()),
        ("--server-grpc-tls-key", key.as_str()),
    ];
    if client_ca {
        flags.push(("--server-grpc-tls-client-ca", authority.as_str()));
    }
    let mut server = Server::prepare(postgres, &flags).await;
    server.start().await;
    (directory, server)
}

/// `watch`, with certificates of the directory.
fn watch(directory: &TempDir, server: &Server, scheme: &str, flags: &[&str]) -> Process {
    let mut command = program(directory.path());
    let url = format!("{scheme}://localhost:{}", server.address().port());
    command.args(["watch", "--tenant", "t1", "--server", &url]).args(flags);
    Process::start(command)
}

/// The watch receives changes.
async fn gets_in(postgres: &Postgres, process: Process) {
    let sql = postgres.sql().await;
    let mut n = 0;
    // Only its output shows that it has started, so rows are inserted until it prints one.
    let prints = async || {
        n += 1;
        sql.insert("t1", &format!("{}-{n}", process.id())).await;
        !process.printed().is_empty()
    };
    eventually("it prints", prints).await;
}

#[tokio::test]
async fn watch_verifies_the_certificate_of_the_server() {
    let postgres = Postgres::start().await;
    let (directory, server) = serve(&postgres, "server", false).await;
    gets_in(&postgres, watch(&directory, &server, "https", &["--ca-cert", "ours.pem"])).await;
    for (scheme, flags, expected) in [
        ("https", &["--ca-cert", "others.pem"][..], "no trusted authority issued the server's certificate"),
        ("https", &[], "Name the file with the certificate of the authority that issued the server's in --ca-cert"),
        ("http", &[], "it does not speak gRPC without TLS: write https://"),
    ] {
        let mut process = watch(&directory, &server, scheme, flags);
        assert_eq!(process.ended().await.code(), Some(1), "it does not heal");
        process.until_logged(expected).await;
        assert_eq!(process.printed(), [""; 0]);
    }
}

#[tokio::test]
async fn an_expired_certificate_is_named() {
    let postgres = Postgres::start().await;
    let (directory, server) = serve(&postgres, "expired", false).await;
    let mut process = watch(&directory, &server, "https", &["--ca-cert", "ours.pem"]);
    assert_eq!(process.ended().await.code(), Some(1));
    process.until_logged("the server's certificate has expired").await;
}

#[tokio::test]
async fn a_client_ca_makes_client_certificates_mandatory() {
    let postgres = Postgres::start().await;
    let (directory, server) = serve(&postgres, "server", true).await;
    let with = |name: &str| {
        let (cert, key) = (format!("{name}.pem"), format!("{name}.key"));
        watch(&directory, &server, "https", &["--ca-cert", "ours.pem", "--client-cert", &cert, "--client-key", &key])
    };
    gets_in(&postgres, with("client")).await;
    // The alert may arrive after the end of the connection. The watch retries until it arrives.
    for mut process in
        [watch(&directory, &server, "https", &["--ca-cert", "ours.pem"]), with("stranger"), with("expired")]
    {
        postgres.sql().await.insert("t1", &process.id().to_string()).await;
        assert_eq!(process.ended().await.code(), Some(1));
        process.until_logged("it asks for a certificate that it trusts: see --client-cert").await;
        assert_eq!(process.printed(), [""; 0]);
    }
    // Nobody else is held up by them.
    gets_in(&postgres, with("client")).await;
}

#[tokio::test]
async fn unusable_tls_files_are_named_at_the_start() {
    let postgres = Postgres::start().await;
    let (directory, mut server) = serve(&postgres, "server", true).await;
    server.terminate().await;
    server.ended().await;
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (key, authority) = (path("server.key"), path("ours.pem"));
    for (flag, name, expected) in [
        ("--server-grpc-tls-cert", "nowhere.pem", "nowhere.pem (server.grpc.tls.cert): No such file"),
        ("--server-grpc-tls-cert", "server.key", "server.key (server.grpc.tls.cert) holds no certificate"),
        ("--server-grpc-tls-cert", "client.pem", "of server.grpc.tls cannot be used"),
        ("--server-grpc-tls-key", "ours.pem", "ours.pem (server.grpc.tls.key) holds no private key"),
        ("--server-grpc-tls-client-ca", "server.key", "(server.grpc.tls.client_ca) holds no certificate"),
    ] {
        server.set(flag, &path(name));
        server.refuses_to_start(expected).await;
        server.set("--server-grpc-tls-cert", &path("server.pem"));
        server.set("--server-grpc-tls-key", &key);
        server.set("--server-grpc-tls-client-ca", &authority);
    }
    server.start().await;
}

/// A client of HTTP that trusts this authority alone.
fn https(directory: &TempDir, authority: &str) -> Client<HttpsConnector<HttpConnector>, String> {
    let mut roots = RootCertStore::empty();
    let pem = std::fs::read(directory.path().join(authority)).unwrap();
    roots.add(CertificateDer::from_pem_slice(&pem).unwrap()).unwrap();
    // Named explicitly, because rustls cannot choose between two implementations.
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = HttpsConnectorBuilder::new().with_tls_config(config).https_only().enable_http1().build();
    Client::builder(TokioExecutor::new()).build(connector)
}

#[tokio::test]
async fn http_has_a_certificate_of_its_own() {
    let postgres = Postgres::start().await;
    let directory = certificates();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let (cert, key) = (path("server.pem"), path("server.key"));
    let flags = [
        ("--server-http-tls-enabled", "true"),
        ("--server-http-tls-cert", cert.as_str()),
        ("--server-http-tls-key", key.as_str()),
    ];
    // gRPC, which has no certificate, reports that it serves.
    let mut server = Server::serve(&postgres, &flags).await;
    let sql = postgres.sql().await;
    let url = |path: &str| format!("https://{}{path}", server.http_address());
    let ours = https(&directory, "ours.pem");
    let health = within("an answer", ours.get(url("/healthz").parse().unwrap())).await.unwrap();
    assert_eq!(health.status(), 200);
    let request = http::Request::post(url("/v1/tenants/t1/watch")).body("{}".to_owned()).unwrap();
    let answer = within("the stream starts", ours.request(request)).await.unwrap();
    let mut lines = Lines::of(answer.map(reqwest::Body::wrap).into());
    let mut expect = async |id: &str| {
        sql.insert("t1", id).await;
        let line = lines.next().await.unwrap();
        assert_eq!(line["result"]["changes"]["data_changes"][0]["tuple"]["entity"]["id"], id, "{line}");
    };
    expect("a").await;

    let strict = https(&directory, "others.pem");
    let error = within("a refusal", strict.get(url("/healthz").parse().unwrap())).await.unwrap_err();
    assert!(format!("{error:?}").contains("UnknownIssuer"), "{error:?}");
    let plain = reqwest::get(server.url("/healthz"));
    assert!(within("a refusal", plain).await.is_err(), "an answer in plain text");
    // Nobody else is held up by them.
    expect("b").await;

    server.terminate().await;
    server.ended().await;
    server.set("--server-http-tls-key", &path("ours.pem"));
    server.refuses_to_start("ours.pem (server.http.tls.key) holds no private key").await;
}
