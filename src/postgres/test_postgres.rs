//! Real PostgreSQL for the tests of this room.

use std::path::PathBuf;
use std::process::{ChildStdin, Command, Stdio};
use std::sync::OnceLock;

use crate::decode::mapping::{Mapping, Spec};
use crate::dev_postgres::{Cluster, ClusterOptions, Installation};
use crate::model::diagnostic::CommandLine;
use crate::postgres::connection::{Connection, Endpoints};

/// A directory that is deleted with this value. It is not created here, so that PostgreSQL's user can reach it whatever
/// our umask is.
pub(crate) struct Place(pub(crate) PathBuf);

impl Place {
    pub(crate) fn new() -> Self {
        let name = format!("tuplewatch-replication-{}-{:08x}", std::process::id(), fastrand::u32(..));
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Returns a cluster that is not started.
pub(crate) async fn cluster(data_dir: PathBuf, settings: &[(&str, &str)]) -> Cluster {
    let mut all = vec![("fsync".to_owned(), "off".to_owned())];
    all.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    let options = ClusterOptions { data_dir, port: None, settings: all };
    Cluster::create_or_open(Installation::find(None).unwrap(), options).await.unwrap()
}

/// One cluster for all tests of this process that do not restart it.
struct Shared {
    cluster: Cluster,
    /// Statics are never dropped. However this process ends, its end closes the pipe, and a shell at the other end
    /// stops and deletes the cluster.
    _reaper: ChildStdin,
}

#[expect(clippy::zombie_processes, reason = "the reaper outlives this process")]
fn shared() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(|| {
        // Each test has a runtime that ends with the test.
        let started = std::thread::spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let place = std::mem::ManuallyDrop::new(Place::new());
                let settings =
                    [("max_replication_slots", "100"), ("max_wal_senders", "50"), ("max_connections", "200")];
                let mut cluster = cluster(place.0.clone(), &settings).await;
                cluster.start().await.unwrap();
                cluster
            })
        });
        let cluster = started.join().unwrap();
        let pid_file = std::fs::read_to_string(cluster.data_dir().join("pgdata/postmaster.pid")).unwrap();
        let script = "trap '' INT; read -r _; kill -QUIT \"$1\"; while kill -0 \"$1\" 2>/dev/null; do sleep 0.1; done; \
                      rm -rf \"$2\"";
        let mut reaper = Command::new("sh")
            .args(["-c", script, "reaper", pid_file.lines().next().unwrap()])
            .arg(cluster.data_dir())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Shared { cluster, _reaper: reaper.stdin.take().unwrap() }
    })
}

/// A separate database in the shared cluster.
pub(crate) struct Database {
    pub(crate) name: String,
    pub(crate) connection: Connection,
}

impl Database {
    pub(crate) async fn new() -> Self {
        let cluster = &tokio::task::spawn_blocking(shared).await.unwrap().cluster;
        let name = format!("t{:08x}", fastrand::u32(..));
        let admin = connect(&cluster.uri("postgres")).await;
        admin.client.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        Self { connection: connect(&cluster.uri(&name)).await, name }
    }

    /// Connects as another user, whom the cluster trusts.
    pub(crate) async fn connect_as(&self, user: &str) -> Connection {
        let uri = shared().cluster.uri(&self.name).replace("postgres@", &format!("{user}@"));
        connect(&uri).await
    }

    pub(crate) async fn execute(&self, sql: &str) {
        self.connection.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    pub(crate) async fn major(&self) -> i32 {
        let sql = "SELECT current_setting('server_version_num')::int4 / 10000";
        self.connection.client.query_typed_one(sql, &[]).await.unwrap().get(0)
    }
}

/// Connects like an ordinary client: the statements of tests name tables without a schema, which tuplewatch's own
/// sessions could not resolve.
pub(crate) async fn connect(uri: &str) -> Connection {
    let connection = Endpoints::parse(uri).unwrap().connect("tests").await.unwrap_or_else(|error| panic!("{error}"));
    connection.client.batch_execute("SET search_path = public").await.unwrap();
    connection
}

/// The preset `tuples`.
pub(crate) fn tuples() -> Mapping {
    mapping(
        r#"{"tenants": {"table": "tuplewatch.tenants", "id": "id"}, "tables": [
            {"table": "tuplewatch.relation_tuples", "tenant": "tenant_id", "tuple": {
                "entity_type": "entity_type", "entity_id": "entity_id", "relation": "relation",
                "subject_type": "subject_type", "subject_id": "subject_id", "subject_relation": "subject_relation"}},
            {"table": "tuplewatch.attributes", "tenant": "tenant_id", "attribute": {
                "entity_type": "entity_type", "entity_id": "entity_id", "attribute": "attribute", "value": "value"}}]}"#,
    )
}

/// One table with columns tenant, id and owner.
pub(crate) fn one_table(table: &str) -> Mapping {
    let spec = serde_json::json!({"tables": [{"table": table, "tenant": "tenant", "tuple": {
        "entity_type": {"constant": "document"}, "entity_id": "id", "relation": {"constant": "owner"},
        "subject_type": {"constant": "user"}, "subject_id": "owner"}}]});
    mapping(&spec.to_string())
}

pub(crate) fn mapping(json: &str) -> Mapping {
    let spec: Spec = serde_json::from_str(json).unwrap();
    Mapping::new(spec).unwrap()
}

/// Commands without options.
pub(crate) fn plain() -> &'static CommandLine {
    static PLAIN: OnceLock<CommandLine> = OnceLock::new();
    PLAIN.get_or_init(CommandLine::default)
}
