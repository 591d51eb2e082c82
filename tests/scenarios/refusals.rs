//! Refusals of a server, or of a pooler in front of it. The message names the cause and the remedy.

use super::cli::prerequisites::serve;
use super::cli::process::{Process, run, tuplewatch};
use crate::support::crowd::Crowd;
use crate::support::postgres::Postgres;
use crate::support::wait::eventually;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

/// `serve` ends with these messages.
async fn is_refused(uri: &str, expected: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let ran = run(serve(uri, directory.path())).await;
    for driver in ["db error", "error connecting to server", "server error:", "io error:", "tls error:"] {
        assert!(!ran.err.contains(driver), "words of a driver: {}", ran.err);
    }
    ran.failed(expected);
}

/// `serve` logs these messages and keeps trying.
async fn is_put_off(uri: &str, expected: &[&str]) {
    let directory = tempfile::tempdir().unwrap();
    let process = Process::start(serve(uri, directory.path()));
    for text in expected {
        process.until_logged(text).await;
    }
}

/// An ErrorResponse of PgBouncer: severity, SQLSTATE and text, and nothing else.
fn error_response(sqlstate: &str, text: &str) -> Vec<u8> {
    let fields = format!("SFATAL\0VFATAL\0C{sqlstate}\0M{text}\0\0");
    let length = u32::try_from(fields.len() + 4).unwrap();
    [b"E", &length.to_be_bytes()[..], fields.as_bytes()].concat()
}

/// Stands in for PgBouncer (1.18 to 1.24), which knows these parameters of a startup message and refuses the first other one by its
/// name with SQLSTATE 08P01, before it asks for a password. With the real one, the suite would need one more package.
async fn pooler(known: &'static [&'static str]) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            loop {
                let length = client.read_u32().await.unwrap();
                let mut message = vec![0; usize::try_from(length).unwrap() - 4];
                client.read_exact(&mut message).await.unwrap();
                // A request for TLS.
                if length == 8 {
                    client.write_all(b"N").await.unwrap();
                    continue;
                }
                let text = String::from_utf8(message.split_off(4)).unwrap();
                let mut names = text.split('\0').step_by(2).filter(|name| !name.is_empty());
                let unknown = names.find(|name| !known.iter().any(|known| known.eq_ignore_ascii_case(name)));
                let text = format!("unsupported startup parameter: {}", unknown.unwrap());
                client.write_all(&error_response("08P01", &text)).await.unwrap();
                break;
            }
        }
    });
    port
}

#[tokio::test]
async fn a_connection_pooler_in_between_is_recognized() {
    const KNOWN: &[&str] = &[
        "user",
        "database",
        "application_name",
        "client_encoding",
        "options",
        "datestyle",
        "timezone",
        "standard_conforming_strings",
        "intervalstyle",
    ];
    let port = pooler(KNOWN).await;
    let uri = format!("postgres://u:secret@127.0.0.1:{port}/app");
    is_refused(
        &uri,
        &[
            "most likely a connection pooler such as PgBouncer, says: unsupported startup parameter: bytea_output",
            "tuplewatch needs a direct connection",
            "point database.uri at PostgreSQL itself",
        ],
    )
    .await;
    let ran = tuplewatch(&["setup", "--database-uri", &uri]).await;
    ran.failed(&["most likely a connection pooler", "needs a direct connection"]);
    // Another program that listens.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let _ = client.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let expected =
        ["it sent something that is not of PostgreSQL's protocol", "Check that PostgreSQL listens at this address"];
    is_put_off(&format!("postgres://u@127.0.0.1:{port}/app?sslmode=disable"), &expected).await;
}

#[tokio::test]
async fn a_uri_in_another_form_is_refused_with_its_correction() {
    for (uri, expected) in [
        ("jdbc:postgresql://h:5432/db?user=u&password=secret", "without 'jdbc:'"),
        ("postgresql+psycopg2://u:secret@h/db", "write postgres:// in its place"),
        ("postgres://u:12/secret@h/db", "write %3F, %26, %2F, %40"),
        ("postgres://u:12?secret@h/db", "write %3F, %26, %2F, %40"),
        ("postgres://u:a@b/secret@h/db", "write %3F, %26, %2F, %40"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let ran = run(serve(uri, directory.path())).await;
        assert!(!ran.err.contains("secret"), "{ran:?}");
        assert!(ran.err.contains(expected) && ran.code != Some(0), "{uri}: {ran:?}");
    }
}

/// The causes are recognized without the texts of the server, whatever its language.
#[tokio::test]
async fn each_refusal_of_the_server_names_a_remedy() {
    let settings = [("max_connections", "12"), ("superuser_reserved_connections", "2"), ("max_wal_senders", "1")];
    let postgres = Postgres::with(&settings).await;
    let sql = postgres.sql().await;
    tuplewatch(&["setup", "--database-uri", &postgres.uri()]).await.succeeded();
    // Each by itself, because a database cannot be created inside a transaction.
    for statement in [
        "CREATE DATABASE closed ALLOW_CONNECTIONS false",
        "CREATE DATABASE filled CONNECTION LIMIT 0",
        "CREATE DATABASE barred",
        "REVOKE CONNECT ON DATABASE barred FROM PUBLIC",
        "CREATE ROLE app LOGIN",
        "CREATE ROLE few LOGIN CONNECTION LIMIT 0",
        "CREATE ROLE nologin NOLOGIN",
    ] {
        sql.run(statement).await;
    }
    let uri = |user: &str, database: &str| postgres.uri_of(database).replace("postgres@", &format!("{user}@"));
    is_refused(&uri("postgres", "closed"), &["SQLSTATE 55000", "ALTER DATABASE … ALLOW_CONNECTIONS true"]).await;
    is_refused(&uri("app", "barred"), &["SQLSTATE 42501", "GRANT CONNECT ON DATABASE"]).await;
    is_refused(&uri("nologin", "postgres"), &["SQLSTATE 28000", "ALTER ROLE … LOGIN"]).await;
    is_refused(&uri("nobody", "postgres"), &["SQLSTATE 28000", "Check the user in database.uri"]).await;
    is_refused(&uri("app", "nowhere"), &["SQLSTATE 3D000", "Create the database"]).await;
    is_put_off(&uri("few", "postgres"), &["SQLSTATE 53300", "ALTER ROLE … CONNECTION LIMIT"]).await;
    is_put_off(&uri("app", "filled"), &["SQLSTATE 53300", "ALTER DATABASE … CONNECTION LIMIT"]).await;
    let options = format!("{}?options=-c%20nonsense=1", uri("app", "postgres"));
    is_refused(&options, &["SQLSTATE 42704", "Check the options in database.uri"]).await;
    let options = format!("{}?options=-c%20lc_messages=C", uri("app", "postgres"));
    is_refused(&options, &["SQLSTATE 42501", "Check the options in database.uri"]).await;

    let mut crowd = Crowd::default();
    // The test itself has one connection more.
    let app = uri("app", "postgres");
    eventually("the ordinary connections are taken", async || crowd.grow(&app).await == 12 - 2 - 1).await;
    is_put_off(&uri("app", "postgres"), &["SQLSTATE 53300", "reserved for superusers", "raise max_connections"]).await;
    eventually("the reserved connections are taken", async || crowd.grow(&postgres.uri()).await == 12 - 1).await;
    is_put_off(&postgres.uri(), &["SQLSTATE 53300", "Close other sessions, or raise max_connections"]).await;
}

/// The cause is logged exactly, and not as a shutdown.
#[tokio::test]
async fn the_end_of_a_session_is_logged_with_its_cause() {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    tuplewatch(&["setup", "--database-uri", &postgres.uri()]).await.succeeded();
    let directory = tempfile::tempdir().unwrap();
    let mut process = Process::start(serve(&postgres.uri(), directory.path()));
    process.reaches("streaming").await;
    let end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE application_name LIKE 'tuplewatch %' AND backend_type = 'client backend'";
    // A statement that was running gets the cause instead. So this is repeated until an idle session is ended.
    let expected = "it shuts down, or somebody ended the session (pg_terminate_backend): ";
    let is_said = async || {
        sql.run(end).await;
        process.logged().iter().any(|line| line.contains(expected) && line.contains("SQLSTATE 57P01"))
    };
    eventually("the cause is logged", is_said).await;
}
