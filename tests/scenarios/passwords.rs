//! Passwords beyond ASCII: both connections log on whenever psql does.
//!
//! For SCRAM, PostgreSQL and libpq normalize a password, and use its bytes unchanged if that is not possible. For md5 and password they
//! always use the bytes. The role gets its password as `ALTER ROLE` or psql's `\password` sets it.

use super::cli::process::{Process, program, run};
use crate::support::postgres::Postgres;
use crate::support::sql::Sql;
use crate::support::wait::eventually;
use std::os::unix::fs::PermissionsExt as _;

/// Each with its difficulty.
const PASSWORDS: [(&str, &str); 13] = [
    ("ASCII", "it's \\ :secret"),
    ("becomes a", "pa\u{aa}s"),
    ("a space that is not ASCII", "pass\u{a0}word"),
    ("a soft hyphen is dropped", "pass\u{ad}word"),
    ("two characters that make one letter", "cafe\u{301}"),
    ("one letter", "caf\u{e9}"),
    ("a letter of compatibility", "\u{2168}\u{fb01}"),
    ("nothing is left", "\u{ad}\u{200b}\u{feff}"),
    ("prohibited", "\u{e000}\u{aa}"),
    ("unassigned in Unicode 3.2", "\u{221}\u{aa}"),
    ("prohibited, and normalized to what is not", "\u{340}\u{aa}"),
    ("of both directions", "a\u{627}\u{aa}"),
    ("of both directions once it is normalized", "a\u{2135}"),
];

const METHODS: [&str; 3] = ["scram-sha-256", "md5", "password"];

/// As in a URI.
fn encoded(text: &str) -> String {
    text.bytes().map(|byte| format!("%{byte:02X}")).collect()
}

/// A server with a role for each method.
async fn guarded() -> Postgres {
    let postgres = Postgres::start().await;
    let sql = postgres.sql().await;
    for method in METHODS {
        sql.run(&format!("CREATE ROLE \"{method}\" LOGIN SUPERUSER")).await;
    }
    let before = std::fs::read_to_string(postgres.pgdata().join("pg_hba.conf")).unwrap();
    let lines: String = METHODS.iter().map(|method| format!("host all {method} all {method}\n")).collect();
    postgres.put_file("pg_hba.conf", &(lines + &before));
    sql.run("SELECT pg_reload_conf()").await;
    let without_password = postgres.uri().replace("postgres@", "password@");
    eventually("passwords are asked for", async || Sql::try_connect(&without_password).await.is_err()).await;
    postgres
}

async fn set(postgres: &Postgres, method: &str, literal: &str) {
    let encryption = if method == "md5" { "md5" } else { "scram-sha-256" };
    let set = format!("SET password_encryption = '{encryption}'; ALTER ROLE \"{method}\" PASSWORD {literal}");
    postgres.sql().await.run(&set).await;
}

/// The diagnostics of doctor about the two connections.
async fn finds(uri: &str, passfile: Option<&std::path::Path>) -> (String, String) {
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(directory.path());
    command.args(["doctor", "--json", "--database-uri", uri, "--changelog-path", "log"]);
    if let Some(passfile) = passfile {
        command.env("PGPASSFILE", passfile);
    }
    let ran = run(command).await;
    let diagnosis: serde_json::Value =
        serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
    let about = |subject: &str| {
        let diagnostics = diagnosis["diagnostics"].as_array().unwrap();
        let diagnostic = diagnostics.iter().find(|diagnostic| diagnostic["subject"] == subject);
        diagnostic.map_or_else(String::new, |diagnostic| format!("{}: {}", diagnostic["severity"], diagnostic["what"]))
    };
    (about("connection"), about("replication connection"))
}

fn works((sql, stream): &(String, String)) -> bool {
    sql.starts_with("\"ok\"") && stream.starts_with("\"ok\"")
}

#[tokio::test]
async fn both_connections_log_on_with_every_password_of_postgresql() {
    let postgres = guarded().await;
    for (why, password) in PASSWORDS {
        for method in METHODS {
            set(&postgres, method, &format!("'{}'", password.replace('\'', "''"))).await;
            let uri = |password: &str| postgres.uri().replace("postgres@", &format!("{method}:{}@", encoded(password)));
            let found = finds(&uri(password), None).await;
            assert!(works(&found), "{method}, {why}: {found:?}");
            let found = finds(&uri(&format!("{password}x")), None).await;
            assert!(found.0.contains("SQLSTATE 28P01"), "{method}, {why}: {found:?}");
        }
    }
    // Set in one normalization form, and given in another.
    set(&postgres, "scram-sha-256", "'cafe\u{301}'").await;
    let uri = postgres.uri().replace("postgres@", &format!("scram-sha-256:{}@", encoded("caf\u{e9}")));
    assert!(works(&finds(&uri, None).await));
    let mut command = program(std::path::Path::new("/"));
    command.args(["setup", "--database-uri", &uri]);
    run(command).await.succeeded();
    let directory = tempfile::tempdir().unwrap();
    let mut process = Process::start(super::cli::prerequisites::serve(&uri, directory.path()));
    process.reaches("streaming").await;
}

/// Only a file can contain bytes that are not text. Such bytes in another line do not matter.
#[tokio::test]
async fn a_password_file_may_hold_any_bytes() {
    let postgres = guarded().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(file.path(), b"*:*:*:other:Latin-1 \xe9\n*:*:*:*:caf\xc3\xa9\n").unwrap();
    let uri = |user: &str| postgres.uri().replace("postgres@", &format!("{user}@"));
    for method in METHODS {
        set(&postgres, method, "'caf\u{e9}'").await;
        let found = finds(&uri(method), Some(file.path())).await;
        assert!(works(&found), "{method}: {found:?}");
    }
    std::fs::write(file.path(), b"*:*:*:*:caf\xe9\n").unwrap();
    for method in METHODS {
        let found = finds(&uri(method), Some(file.path())).await;
        let expected = if method == "scram-sha-256" { "the password is not UTF-8" } else { "SQLSTATE 28P01" };
        assert!(found.0.contains(expected), "{method}: {found:?}");
    }
}
