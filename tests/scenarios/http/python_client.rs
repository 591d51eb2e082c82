//! Permify's own client for Python, unchanged, from its registry.

use crate::support::foreign;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::within;
use serde_json::{Value as Json, json};
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// A run of `client.py`.
struct Client {
    lines: Lines<BufReader<ChildStdout>>,
    process: Child,
}

impl Client {
    async fn start(server: &Server, arguments: &[&str]) -> Self {
        let directory = foreign::directory("tests/clients/python");
        let mut command = Command::new(foreign::python(&directory).await);
        command.arg(directory.join("client.py")).arg(server.http_address().to_string()).args(arguments);
        let mut process = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        Self { lines: BufReader::new(process.stdout.take().unwrap()).lines(), process }
    }

    async fn answer(&mut self) -> Json {
        let line = within("a line of the client", self.lines.next_line()).await.unwrap();
        let line = line.unwrap_or_else(|| panic!("the client ended: see what it wrote to the standard error"));
        serde_json::from_str(&line).unwrap()
    }

    async fn ends(mut self) {
        assert!(within("the client ends", self.process.wait()).await.unwrap().success());
    }
}

#[tokio::test]
async fn permifys_python_client_watches() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut client = Client::start(&server, &["watch", "t1", "", "2"]).await;
    assert_eq!(client.answer().await, json!({"status": 200}));
    sql.insert("t1", "a").await;
    sql.insert("t1", "b").await;
    let first = client.answer().await;
    assert_eq!(first["changes"], super::created("a"));
    assert_eq!(client.answer().await["changes"], super::created("b"));
    client.ends().await;

    // It resumes with its token, and stays until the end.
    let mut client = Client::start(&server, &["watch", "t1", first["snap_token"].as_str().unwrap(), "2"]).await;
    assert_eq!(client.answer().await, json!({"status": 200}));
    assert_eq!(client.answer().await["changes"], super::created("b"));
    server.terminate().await;
    assert!(client.answer().await["error"].as_str().unwrap().contains("shutting down"));
    client.ends().await;
}

#[tokio::test]
async fn permifys_python_client_writes_reads_and_deletes() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut watch = server.lines("/v1/tenants/t1/watch", json!({})).await;
    let mut client = Client::start(&server, &["data", "t1"]).await;
    assert_eq!(client.answer().await, json!({"written": true}));
    let read = client.answer().await;
    let tuple = &super::created("1")[0]["tuple"];
    assert_eq!(read["tuples"], json!([tuple]));
    let value = json!({"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true});
    let attribute = json!({"entity": {"type": "document", "id": "1"}, "attribute": "public", "value": value});
    assert_eq!(read["attributes"], json!([attribute]));
    assert_eq!(client.answer().await, json!({"left": 0}));
    assert_eq!(client.answer().await, json!({"refused": "ERROR_CODE_TENANT_NOT_FOUND"}));
    client.ends().await;

    for operation in ["OPERATION_CREATE", "OPERATION_DELETE"] {
        let line = watch.next().await.unwrap();
        let changes = line["result"]["changes"]["data_changes"].as_array().unwrap();
        assert_eq!(changes.len(), 2, "{line}");
        assert!(changes.iter().all(|change| change["operation"] == operation), "{line}");
    }
}
