//! Self-made certificates. Both connections to PostgreSQL and the clients of the command line accept those that psql and curl accept. A
//! refusal says how to make a valid one.

use super::cli::process::{program, run, tuplewatch};
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::eventually;
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair};
use std::path::Path;

/// A certificate that signs itself, and its key.
struct Certificate {
    pem: String,
    key: String,
}

/// Creates one for these names, with this common name.
fn certificate(names: &[&str], common_name: &str, is_authority: bool) -> Certificate {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    if is_authority {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    }
    let key = KeyPair::generate().unwrap();
    Certificate { pem: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
}

/// Made by `openssl x509 -req` without extensions, for localhost, until 2126.
const VERSION_1: &str = include_str!("certificates/version_1.pem");
const VERSION_1_KEY: &str = include_str!("certificates/version_1.key");

/// A host, a mode, and the expected complaint; empty if it works.
type Use = (&'static str, &'static str, &'static str);

/// All certificates, each with four uses.
fn cases() -> Vec<(&'static str, Certificate, [Use; 4])> {
    const OTHER: &str = "the server's certificate is not valid for";
    let v1 = Certificate { pem: VERSION_1.to_owned(), key: VERSION_1_KEY.to_owned() };
    vec![
        (
            "an authority that is its own server, as `openssl req -x509` makes it",
            certificate(&["localhost"], "localhost", true),
            [
                ("localhost", "verify-full", ""),
                ("127.0.0.1", "verify-full", OTHER),
                ("127.0.0.1", "verify-ca", ""),
                ("localhost", "verify-ca", ""),
            ],
        ),
        (
            "an address among its names",
            certificate(&["127.0.0.1"], "db", false),
            [
                ("127.0.0.1", "verify-full", ""),
                ("localhost", "verify-full", OTHER),
                ("localhost", "verify-ca", ""),
                ("127.0.0.1", "verify-ca", ""),
            ],
        ),
        (
            "only a common name",
            certificate(&[], "localhost", true),
            [
                ("localhost", "verify-full", ""),
                ("127.0.0.1", "verify-full", OTHER),
                ("127.0.0.1", "verify-ca", ""),
                ("localhost", "verify-ca", ""),
            ],
        ),
        (
            "X.509 version 1",
            v1,
            [
                ("localhost", "verify-full", "X.509 version 1"),
                ("127.0.0.1", "verify-full", "X.509 version 1"),
                ("localhost", "verify-ca", "openssl x509 -req -in server.csr"),
                ("localhost", "require&dbname=postgres", ""),
            ],
        ),
    ]
}

/// The complaints of doctor about either connection.
async fn complaint(uri: &str) -> String {
    let ran = tuplewatch(&["doctor", "--json", "--database-uri", uri, "--changelog-path", "log"]).await;
    let diagnosis: serde_json::Value =
        serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
    let diagnostics = diagnosis["diagnostics"].as_array().unwrap();
    let about = |subject: &str| {
        diagnostics.iter().find(|diagnostic| diagnostic["subject"] == subject && diagnostic["severity"] != "ok")
    };
    let complaints = ["connection", "replication connection"].into_iter().filter_map(about);
    complaints.map(|diagnostic| format!("{} {}", diagnostic["what"], diagnostic["fix"])).collect()
}

#[tokio::test]
async fn both_connections_accept_the_certificates_that_psql_accepts() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root.crt");
    let uri = |host: &str, parameters: &str| {
        let root = root.display();
        format!("{}?sslmode={parameters}", postgres.uri().replace("127.0.0.1", host))
            + &if parameters.starts_with("verify") { format!("&sslrootcert={root}") } else { String::new() }
    };
    for (what, certificate, uses) in cases() {
        postgres.put_file("server.crt", &certificate.pem);
        postgres.put_file("server.key", &certificate.key);
        sql.run("ALTER SYSTEM SET ssl = on").await;
        sql.run("SELECT pg_reload_conf()").await;
        std::fs::write(&root, &certificate.pem).unwrap();
        // The new certificate is loaded when the first use has its expected result.
        let (host, mode, expected) = uses[0];
        let is_new = async || {
            let complaint = complaint(&uri(host, mode)).await;
            if expected.is_empty() { complaint.is_empty() } else { complaint.contains(expected) }
        };
        eventually(what, is_new).await;
        for (host, mode, expected) in uses {
            let complaint = complaint(&uri(host, mode)).await;
            assert!(
                complaint.contains(expected) && complaint.is_empty() == expected.is_empty(),
                "{what}, {host}, {mode}: {complaint}"
            );
        }
    }
    // The same subject, and another key.
    std::fs::write(&root, certificate(&["localhost"], "localhost", true).pem).unwrap();
    let last = certificate(&["localhost"], "localhost", true);
    postgres.put_file("server.crt", &last.pem);
    postgres.put_file("server.key", &last.key);
    sql.run("SELECT pg_reload_conf()").await;
    let refused =
        async || complaint(&uri("localhost", "verify-ca")).await.contains("is marked as an authority (CA:TRUE)");
    eventually("a stranger is refused", refused).await;
    let complaint = complaint(&uri("localhost", "verify-ca")).await;
    assert!(complaint.contains("name a copy of exactly this certificate in sslrootcert"), "{complaint}");
    assert!(complaint.contains("openssl req -new") && complaint.contains("openssl x509 -req"), "{complaint}");
}

async fn health(directory: &Path, url: &str, ca_cert: &str) -> super::cli::process::Ran {
    let mut command = program(directory);
    command.args(["health", "--alive", "--server", url, "--ca-cert", ca_cert]);
    run(command).await
}

#[tokio::test]
async fn the_command_line_trusts_the_same_certificates() {
    let postgres = Postgres::start().await;
    for (what, certificate, _) in cases() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(path("server.pem"), &certificate.pem).unwrap();
        std::fs::write(path("server.key"), &certificate.key).unwrap();
        let flags = [
            ("--server-grpc-tls-enabled", "true"),
            ("--server-grpc-tls-cert", &path("server.pem")),
            ("--server-grpc-tls-key", &path("server.key")),
        ];
        let mut server = Server::prepare(&postgres, &flags).await;
        if what.starts_with("X.509") {
            // The server refuses to serve with it.
            server.refuses_to_start("server.grpc.tls").await;
            continue;
        }
        server.start().await;
        let host = if what.starts_with("an address") { "127.0.0.1" } else { "localhost" };
        let url = |host: &str| format!("https://{host}:{}", server.address().port());
        let ran = health(directory.path(), &url(host), "server.pem").await;
        assert_eq!((ran.code, ran.out.as_str()), (Some(0), "alive\n"), "{what}: {ran:?}");
        let elsewhere = if host == "localhost" { "127.0.0.1" } else { "localhost" };
        let ran = health(directory.path(), &url(elsewhere), "server.pem").await;
        ran.failed(&["is not valid for", "openssl req -new", "openssl x509 -req"]);
        std::fs::write(path("other.pem"), self::certificate(&[host], "other", true).pem).unwrap();
        let ran = health(directory.path(), &url(host), "other.pem").await;
        assert_eq!(ran.code, Some(1), "{what}");
        assert!(ran.err.contains("--ca-cert"), "{what}: {ran:?}");
    }
}
