//! The clients that Permify's users have, as their registries give them.

use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::within;
use std::path::Path;
use tokio::process::Command;

/// Installs the client, which is done once, and gives the directory of its packages.
async fn install(client: &Path) -> String {
    // May take as long as the network does.
    let installed = Command::new(client.join("install")).kill_on_drop(true).output().await.unwrap();
    let said = String::from_utf8_lossy(&installed.stderr);
    assert!(installed.status.success(), "{} failed: {said}", client.join("install").display());
    String::from_utf8(installed.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn permifys_client_for_node_works_unchanged() {
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/node");
    let packages = install(&client).await;
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut program = Command::new("node");
    program.env("NODE_PATH", packages).arg(client.join("permify.cjs")).arg(server.address().to_string());
    let output = within("the client's program ends", program.kill_on_drop(true).output()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
