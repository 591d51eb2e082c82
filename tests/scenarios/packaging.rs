//! The files in `docker/`, without a container engine. Their commands and environments run against a PostgreSQL with the settings and
//! roles of the same files.
//!
//! Only addresses (a free port), directories (temporary ones), and the program (the one under test) differ. A flag, a key or a variable
//! that the program does not know fails the test of the file that contains it.

mod compose;
mod image;
mod kubernetes;
mod systemd;

use super::cli::process::{Process, Ran, program, run};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::sql::Sql;
use crate::support::stream::Stream;
use crate::support::wait::{eventually, within};
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;
use tokio::process::Command;
use tonic::transport::Endpoint;
use tuplewatch::config::Config;

type Environment = BTreeMap<String, String>;

/// A path in the repository.
fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn yaml(text: &str) -> Json {
    tuplewatch::yaml::from_str(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// A list of arguments as texts, including its numbers and booleans.
fn texts(list: &Json) -> Vec<String> {
    list.as_array().unwrap_or_else(|| panic!("{list} is no list")).iter().map(text).collect()
}

fn text(value: &Json) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn environment(map: &Json) -> Environment {
    let map = map.as_object().unwrap_or_else(|| panic!("{map} is no map"));
    map.iter().map(|(name, value)| (name.clone(), text(value))).collect()
}

/// Lines of `NAME=value`.
fn assignments(text: &str) -> Environment {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_once('=').unwrap()).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// This time for a stop must be longer than the program needs at most.
fn leaves_time_to_stop(given: &str) {
    let given = humantime::parse_duration(given).unwrap();
    let taken = Config::load(None, [], &[]).unwrap().shutdown.grace_period + Duration::from_secs(5);
    assert!(given > taken, "{given:?} is killed before {taken:?} are over");
}

/// A PostgreSQL with the database `app` after `docker/postgres/roles.sql`, in which every role but the superuser needs a password.
struct Database {
    postgres: Postgres,
}

const ROLES: &str = "docker/postgres/roles.sql";

impl Database {
    /// `passwords`: the variables that the script reads.
    async fn start(settings: &[(&str, &str)], passwords: &Environment) -> Self {
        let postgres = Postgres::with(settings).await;
        postgres.sql().await.run("CREATE DATABASE app").await;
        let database = Self { postgres };
        database.sql().await.run(&as_psql_would(&read(ROLES), passwords)).await;
        // The rules of the image. Logical replication connects to a database, and is not what pg_hba.conf calls replication.
        let rules = "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n";
        std::fs::write(database.postgres.pgdata().join("pg_hba.conf"), rules).unwrap();
        database.sql().await.run("SELECT pg_reload_conf()").await;
        let stranger = database.uri().replace("postgres@", "tuplewatch@");
        eventually("passwords are asked for", async || Sql::try_connect(&stranger).await.is_err()).await;
        database
    }

    fn uri(&self) -> String {
        self.postgres.uri_of("app")
    }

    /// As the superuser.
    async fn sql(&self) -> Sql {
        Sql::connect(&self.uri()).await
    }

    /// Host and port.
    fn address(&self) -> String {
        let uri = self.uri();
        uri.split(['@', '/']).find(|part| part.contains(':') && !part.ends_with(':')).unwrap().to_owned()
    }
}

/// Interprets `\getenv` and `:'name'`, the only features of psql that the script uses.
fn as_psql_would(script: &str, environment: &Environment) -> String {
    let mut script = script.to_owned();
    let commands: Vec<String> = script.lines().filter(|line| line.starts_with('\\')).map(str::to_owned).collect();
    for command in commands {
        let [name, variable] = command.strip_prefix("\\getenv ").unwrap().split(' ').collect::<Vec<_>>()[..] else {
            panic!("{command}");
        };
        let literal = format!("'{}'", environment[variable].replace('\'', "''"));
        script = script.replace(&command, "").replace(&format!(":'{name}'"), &literal);
    }
    assert!(!script.contains(":'"), "{script}");
    script
}

/// A command from a file: the arguments of the program, and its environment.
#[derive(Clone, Debug)]
struct Recipe {
    arguments: Vec<String>,
    environment: Environment,
}

impl Recipe {
    /// The command, with a directory in place of the volume.
    fn command(&self, database: &Database, volume: &Path) -> Command {
        let mut command = program(volume);
        for (name, value) in &self.environment {
            assert!(name.starts_with("TUPLEWATCH_") || name == "PGPASSWORD", "nobody reads {name}");
            let value = ["postgres:5432", "127.0.0.1:5432"].iter().fold(value.clone(), |value, there| {
                value.replace(&format!("@{there}/"), &format!("@{}/", database.address()))
            });
            command.env(name, value.replace("/var/lib/tuplewatch", volume.to_str().unwrap()));
        }
        command.args(&self.arguments);
        command
    }

    /// Runs `setup` twice: it creates everything, and then nothing.
    async fn sets_up(&self, database: &Database) {
        let volume = tempfile::tempdir().unwrap();
        let first = run(self.command(database, volume.path())).await.succeeded();
        assert!(first.ends_with("done\n"), "{first}");
        let again = run(self.command(database, volume.path())).await.succeeded();
        assert!(again.contains("nothing to do"), "{again}");
    }

    /// Runs `serve` until it streams.
    async fn serves(&self, database: &Database) -> Node {
        let volume = tempfile::tempdir().unwrap();
        let mut command = self.command(database, volume.path());
        command.args(["--server-host", "127.0.0.1", "--server-grpc-port", "0", "--server-http-port", "0"]);
        // This machine may have less free space.
        command.args(["--changelog-disk-reserve", "16MiB"]);
        let mut process = Process::start(command);
        process.reaches("streaming").await;
        assert!(volume.path().join("log").is_dir(), "the change log is in the volume");
        let (grpc, http) = (process.listens("gRPC").await, process.listens("HTTP").await);
        Node { grpc, http, process, _volume: volume }
    }
}

/// A server that was started with the command of a file.
struct Node {
    grpc: SocketAddr,
    http: SocketAddr,
    process: Process,
    _volume: TempDir,
}

impl Node {
    async fn watch(&self, token: &str) -> Stream {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.grpc)).unwrap();
        within("the stream starts", Stream::open(&endpoint, "t1", token)).await.unwrap()
    }

    /// Writes a tuple, which must be delivered. Returns its token.
    async fn delivers(&self, database: &Database, id: &str) -> String {
        let mut stream = self.watch("").await;
        database.sql().await.insert("t1", id).await;
        stream.expect(Change::created(id)).await.token
    }

    /// Runs a health check with these arguments on our port.
    async fn check_health(&self, arguments: &[String]) -> Ran {
        let volume = tempfile::tempdir().unwrap();
        let mut command = program(volume.path());
        command.args(arguments).args(["--server", &format!("http://{}", self.grpc)]);
        run(command).await
    }

    /// A probe of HTTP succeeds.
    async fn answers(&self, path: &str) {
        let answer = within("an answer", reqwest::get(format!("http://{}{path}", self.http))).await.unwrap();
        assert_eq!(answer.status(), 200, "{path}");
    }

    /// Ends successfully by the signal that a container engine sends.
    async fn stops(mut self, signal: &str) {
        self.process.signal(signal);
        assert_eq!(self.process.ended().await.code(), Some(0));
    }
}

/// Settings of PostgreSQL under which nothing works, before those of a file.
const BARE: [(&str, &str); 4] = [
    ("wal_level", "replica"),
    ("max_replication_slots", "0"),
    ("max_slot_wal_keep_size", "-1"),
    ("track_commit_timestamp", "off"),
];

/// A database after setup.
async fn database_that_is_set_up() -> (Database, Environment) {
    let passwords = assignments(&read("docker/.env.example"));
    let database = Database::start(&[], &passwords).await;
    let setup = Recipe {
        arguments: vec!["setup".to_owned()],
        environment: BTreeMap::from([
            ("TUPLEWATCH_DATABASE__URI".to_owned(), "postgres://tuplewatch_owner@postgres:5432/app".to_owned()),
            ("PGPASSWORD".to_owned(), passwords["TUPLEWATCH_OWNER_PASSWORD"].clone()),
        ]),
    };
    setup.sets_up(&database).await;
    (database, passwords)
}
