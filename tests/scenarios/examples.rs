//! The clients of `examples/` lose nothing.

use super::cli::process::Process;
use crate::support::foreign;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::sql::Sql;
use crate::support::wait::eventually;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::path::PathBuf;
use tempfile::TempDir;
use tokio::process::Command;
use tuplewatch::model::lsn::{CommitTime, Lsn};
use tuplewatch::model::scope::Place;
use tuplewatch::model::snap_token::SnapToken;
use tuplewatch::model::timeline::{SourceId, TimelineId};

/// An example that follows t1, and runs several times.
struct Example {
    interpreter: PathBuf,
    program: PathBuf,
    packages: String,
    directory: TempDir,
    server: String,
}

impl Example {
    async fn python(server: &Server) -> Self {
        let home = foreign::directory("examples/python");
        Self::new(foreign::python(&home).await, home.join("watch.py"), String::new(), server)
    }

    async fn node(server: &Server) -> Self {
        let home = foreign::directory("examples/node");
        let packages = foreign::node_modules(&home).await;
        Self::new("node".into(), home.join("watch.js"), packages, server)
    }

    fn new(interpreter: PathBuf, program: PathBuf, packages: String, server: &Server) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self { interpreter, program, packages, directory, server: server.address().to_string() }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("index.json")
    }

    fn start(&self) -> Process {
        let mut command = Command::new(&self.interpreter);
        command.arg(&self.program).arg("t1").arg(self.file()).arg(&self.server).env("NODE_PATH", &self.packages);
        command.env_remove("TUPLEWATCH_TOKEN").kill_on_drop(true);
        Process::start(command)
    }

    /// Its saved index, without empty entries.
    fn saved(&self) -> BTreeMap<String, Vec<String>> {
        let Ok(text) = std::fs::read(self.file()) else { return BTreeMap::new() };
        let saved: Json = serde_json::from_slice(&text).expect("never half of a file");
        let mut index: BTreeMap<String, Vec<String>> = serde_json::from_value(saved["subjects"].clone()).unwrap();
        index.retain(|_, subjects| !subjects.is_empty());
        index
    }

    /// Changes the token in its file.
    fn save_token(&self, token: String) {
        let mut saved: Json = serde_json::from_slice(&std::fs::read(self.file()).unwrap()).unwrap();
        saved["token"] = token.into();
        std::fs::write(self.file(), saved.to_string()).unwrap();
    }

    /// Waits until its saved index equals the table.
    async fn catches_up(&self, sql: &Sql) {
        let rows = sql
            .rows(
                "SELECT entity_type || ':' || entity_id || '#' || relation, subject_type || ':' || subject_id
                   FROM tuplewatch.relation_tuples WHERE tenant_id = 't1' ORDER BY 1, 2",
            )
            .await;
        let mut table: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for row in rows {
            let [key, subject] = <[String; 2]>::try_from(row).unwrap();
            table.entry(key).or_default().push(subject);
        }
        eventually("the example equals the table", async || self.saved() == table).await;
    }
}

fn is_now(id: &str, subjects: &str) -> String {
    format!("document:{id}#viewer = {subjects}").trim_end().to_owned()
}

fn lines(process: &Process) -> Vec<String> {
    process.printed().iter().map(|line| line.trim_end().to_owned()).collect()
}

async fn follows(example: Example, server: &mut Server, sql: &Sql) {
    // It begins with the present state, and continues with changes.
    let mut process = example.start();
    process.prints(1).await;
    sql.insert("t1", "c").await;
    sql.run("INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'a', 'viewer', 'team', 't', 'member')")
        .await;
    sql.run("DELETE FROM tuplewatch.relation_tuples WHERE subject_relation = 'member'").await;
    sql.run("DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'b'").await;
    process.prints(5).await;
    let expected = [
        "read anew: 2 tuples".to_owned(),
        is_now("c", "user:u"),
        is_now("a", "team:t#member user:u"),
        is_now("a", "user:u"),
        is_now("b", ""),
    ];
    assert_eq!(lines(&process), expected);
    example.catches_up(sql).await;

    // It is killed, and so is the server: the changes from that time arrive once, and nothing else does.
    process.kill_9().await;
    sql.insert("t1", "d").await;
    server.kill_and_restart().await;
    sql.insert("t1", "e").await;
    let mut process = example.start();
    process.prints(2).await;
    server.kill_and_restart().await;
    sql.insert("t1", "f").await;
    process.prints(3).await;
    // An orderly stop of the server.
    server.terminate().await;
    server.ended().await;
    process.until_logged("UNAVAILABLE").await;
    sql.insert("t1", "g").await;
    server.start().await;
    server.serving().await;
    sql.insert("t1", "h").await;
    process.prints(5).await;
    assert_eq!(lines(&process), ["d", "e", "f", "g", "h"].map(|id| is_now(id, "user:u")));

    // A gap.
    sql.run("TRUNCATE tuplewatch.relation_tuples").await;
    sql.insert("t1", "i").await;
    process.until_logged("ABORTED").await;
    example.catches_up(sql).await;
    let printed = process.prints(6).await;
    assert!(printed[5].starts_with("read anew: "), "{printed:?}");
    sql.insert("t1", "j").await;
    example.catches_up(sql).await;

    // Its file is of another database.
    process.kill_9().await;
    example.save_token("AQ".to_owned());
    example.start().until_logged("INVALID_ARGUMENT").await;
    let (source, timeline, place) = (SourceId([1; 8]), TimelineId([1; 8]), Place::at(Lsn(1)));
    let foreign = SnapToken::Position { source, timeline, place, commit_time: CommitTime(1) };
    example.save_token(foreign.to_string());
    sql.run("DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'i'").await;
    let process = example.start();
    process.until_logged("FAILED_PRECONDITION").await;
    example.catches_up(sql).await;
    process.prints(1).await;
    assert_eq!(lines(&process), ["read anew: 1 tuples"]);
}

async fn server() -> (Postgres, Server, Sql) {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.insert("t1", "a").await;
    sql.insert("t1", "b").await;
    (postgres, server, sql)
}

#[tokio::test]
async fn the_python_example_loses_nothing() {
    let (_postgres, mut server, sql) = server().await;
    follows(Example::python(&server).await, &mut server, &sql).await;
}

#[tokio::test]
async fn the_node_example_loses_nothing() {
    let (_postgres, mut server, sql) = server().await;
    follows(Example::node(&server).await, &mut server, &sql).await;
}
