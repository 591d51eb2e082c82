//! Directories without the log of this node are refused and left unchanged, and the right log continues.

use super::prerequisites::serve;
use super::process::{Process, run, tuplewatch};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::stream::{Stream, reason};
use crate::support::wait::{eventually, within};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tonic::transport::Endpoint;
use tonic::{Code, Status};

fn created(id: &str) -> Change {
    Change::create(Change::viewer(id))
}

/// All files below a directory.
fn files(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.insert(path.clone(), std::fs::read(path).unwrap());
        }
    }
    found
}

/// A `serve` that streams.
struct Node {
    process: Process,
    endpoint: Endpoint,
}

impl Node {
    async fn start(uri: &str, directory: &Path, flags: &[&str]) -> Self {
        let mut command = serve(uri, directory);
        command.args(flags);
        let mut process = Process::start(command);
        process.reaches("streaming").await;
        let endpoint = Endpoint::from_shared(format!("http://{}", process.listens("gRPC").await)).unwrap();
        Self { process, endpoint }
    }

    async fn watch(&self, token: &str) -> Result<Stream, Status> {
        within("the stream starts or is refused", Stream::open(&self.endpoint, "t1", token)).await
    }

    async fn stop(mut self) {
        self.process.signal("TERM");
        assert_eq!(self.process.ended().await.code(), Some(0));
    }
}

#[tokio::test]
async fn a_directory_without_its_own_log_is_refused_and_unchanged() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    sql.run("CREATE DATABASE another").await;
    let another = postgres.uri_of("another");
    tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded();
    tuplewatch(&["setup", "--database-uri", &another, "--replication-slot", "another"]).await.succeeded();
    let directory = tempfile::tempdir().unwrap();
    let node = Node::start(&uri, directory.path(), &[]).await;
    let mut stream = node.watch("").await.unwrap();
    sql.insert("t1", "first").await;
    let token = stream.expect(created("first")).await.token;

    // The log is in use.
    for flags in [&[][..], &["--reset-log"]] {
        let mut command = serve(&uri, directory.path());
        command.args(flags);
        run(command).await.failed(&[
            "the change log at log is in use by another process: stop that one, or set changelog.path to another directory",
        ]);
        sql.insert("t1", "still").await;
        stream.expect(created("still")).await;
        sql.run("DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'still'").await;
        stream.next().await;
    }
    node.stop().await;

    // The log of another database.
    let before = files(directory.path());
    let mut command = serve(&another, directory.path());
    command.args(["--replication-slot", "another"]);
    run(command).await.failed(&[
        "the change log belongs to another database",
        "point database.uri at the right one, set changelog.path to another directory, or start the log anew with --reset-log",
    ]);
    // Opening it may tidy up, but removes no data.
    assert!(before.keys().all(|path| path.exists() || path.to_string_lossy().contains("/data/")), "{before:?}");
    sql.insert("t1", "second").await;
    let node = Node::start(&uri, directory.path(), &[]).await;
    let messages = node.watch(&token).await.unwrap().up_to(&created("second")).await;
    assert_eq!(messages.len(), 5, "twice 'still' and its end, and the second");
    node.stop().await;

    // A directory with other files.
    let photographs = tempfile::tempdir().unwrap();
    std::fs::create_dir(photographs.path().join("log")).unwrap();
    std::fs::write(photographs.path().join("log/cat.jpeg"), "miaow").unwrap();
    let before = files(photographs.path());
    for flags in [&[][..], &["--reset-log"]] {
        let mut command = serve(&uri, photographs.path());
        command.args(flags);
        run(command).await.failed(&[
            "log is not empty and holds no change log of tuplewatch: set changelog.path to an empty or new directory",
        ]);
        assert_eq!(files(photographs.path()), before);
    }
    let slots = "SELECT string_agg(slot_name, ',' ORDER BY slot_name) FROM pg_replication_slots";
    assert_eq!(sql.value(slots).await, "another,tuplewatch", "all slots are there");
}

#[tokio::test]
async fn a_damaged_log_is_refused_or_repaired() {
    let postgres = Postgres::start().await;
    let (sql, uri) = (postgres.sql().await, postgres.uri());
    tuplewatch(&["setup", "--database-uri", &uri]).await.succeeded();
    let directory = tempfile::tempdir().unwrap();
    let node = Node::start(&uri, directory.path(), &[]).await;
    let mut stream = node.watch("").await.unwrap();
    sql.insert("t1", "first").await;
    let token = stream.expect(created("first")).await.token;
    sql.insert("t1", "second").await;
    stream.expect(created("second")).await;
    node.stop().await;
    let whole = files(directory.path());
    let log = directory.path().join("log");
    let restore = || {
        let _ = std::fs::remove_dir_all(&log);
        for (path, contents) in &whole {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, contents).unwrap();
        }
    };

    let marker = log.join("tuplewatch-log.json");
    let remedy = "start it anew with --reset-log (its history is lost, and subscribers re-read their state)";
    for (contents, expected) in [("", remedy), ("{\"format\": \"one\"}", remedy), ("\0\0\0\0", remedy)] {
        restore();
        std::fs::write(&marker, contents).unwrap();
        run(serve(&uri, directory.path())).await.failed(&["the change log at log is damaged", expected]);
    }
    restore();
    let mut other: serde_json::Value = serde_json::from_slice(&std::fs::read(&marker).unwrap()).unwrap();
    other["format"] = 99.into();
    std::fs::write(&marker, other.to_string()).unwrap();
    run(serve(&uri, directory.path())).await.failed(&["has format 99, and this version", "--reset-log"]);
    restore();
    std::fs::remove_dir_all(log.join("data")).unwrap();
    run(serve(&uri, directory.path())).await.failed(&["its directory data is missing", remedy]);

    restore();
    std::fs::remove_file(&marker).unwrap();
    run(serve(&uri, directory.path())).await.failed(&["is not empty and holds no change log of tuplewatch"]);

    // Every file of the embedded database: deleted, emptied, or partly overwritten.
    for path in whole.keys().filter(|path| **path != marker) {
        for what in ["deleted", "emptied", "overwritten"] {
            restore();
            let mut contents = whole[path].clone();
            if contents.is_empty() && what != "deleted" {
                continue;
            }
            if what == "emptied" {
                contents.clear();
            } else {
                let middle = contents.len() / 2;
                contents[middle..].iter_mut().take(64).for_each(|byte| *byte = !*byte);
            }
            std::fs::write(path, contents).unwrap();
            if what == "deleted" {
                std::fs::remove_file(path).unwrap();
            }
            check_damaged(&uri, directory.path(), &token, &format!("{} {what}", path.display())).await;
        }
    }

    // Every directory of it: deleted with its contents.
    let directories: BTreeSet<&Path> =
        whole.keys().filter_map(|path| path.parent()).filter(|path| **path != log).collect();
    for path in directories {
        restore();
        std::fs::remove_dir_all(path).unwrap();
        check_damaged(&uri, directory.path(), &token, &format!("{} deleted", path.display())).await;
    }

    // The printed remedy works.
    restore();
    std::fs::write(&marker, "").unwrap();
    let node = Node::start(&uri, directory.path(), &["--reset-log"]).await;
    let status = node.watch(&token).await.err().unwrap();
    assert_eq!(reason(&status), (Code::OutOfRange, "SNAP_TOKEN_TOO_OLD".into()));
    let mut stream = node.watch("").await.unwrap();
    sql.insert("t1", "third").await;
    stream.expect(created("third")).await;
    node.stop().await;
}

/// The log is refused; or it starts, and either has everything or reports that it has not.
async fn check_damaged(uri: &str, directory: &Path, token: &str, what: &str) {
    let mut process = Process::start(serve(uri, directory));
    let has_logged = |process: &Process, text: &str| process.logged().iter().any(|line| line.contains(text));
    eventually("it starts or ends", async || has_logged(&process, "streaming") || !process.is_running()).await;
    if !process.is_running() {
        assert_eq!(process.ended().await.code(), Some(1), "{what}");
        eventually(&format!("the remedy is logged: {what}"), async || has_logged(&process, "--reset-log")).await;
        assert!(!has_logged(&process, "panicked"), "{what}");
        return;
    }
    let endpoint = Endpoint::from_shared(format!("http://{}", process.listens("gRPC").await)).unwrap();
    match within("the stream starts or is refused", Stream::open(&endpoint, "t1", token)).await {
        Ok(mut stream) => match within("a change or the end", stream.try_next()).await {
            Ok(message) => assert_eq!(message.changes, [created("second")], "{what}"),
            Err(status) => assert!([Code::Aborted, Code::Internal].contains(&status.code()), "{what}: {status:?}"),
        },
        Err(status) => {
            assert!([Code::OutOfRange, Code::Aborted, Code::Internal].contains(&status.code()), "{what}: {status:?}");
        }
    }
    process.signal("TERM");
    assert!(process.ended().await.code().is_some_and(|code| code <= 1), "{what}");
    assert!(!has_logged(&process, "panicked"), "{what}");
}
