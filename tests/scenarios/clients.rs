//! Permify's own clients, from their registries.

use crate::support::foreign;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::within;
use tokio::process::Command;

#[tokio::test]
async fn permifys_client_for_node_works_unchanged() {
    let client = foreign::directory("tests/clients/node");
    let packages = foreign::node_modules(&client).await;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut program = Command::new("node");
    program.env("NODE_PATH", packages).arg(client.join("permify.cjs")).arg(server.address().to_string());
    let output = within("the client's program ends", program.kill_on_drop(true).output()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
