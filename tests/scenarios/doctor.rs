//! `doctor` against servers that are broken on purpose. It names the cause and nothing else, and its fix works unchanged.

mod change_log;
mod connection;
mod server;
mod slot;
mod standbys;
mod tables;

use super::cli::process::{Process, Ran, program, run};
use crate::support::postgres::Postgres;
use crate::support::sql::Sql;
use crate::support::wait::eventually;
use serde::Deserialize;
use std::path::Path;
use tempfile::TempDir;
use tokio::process::Command;
use tuplewatch::dev_postgres::StopMode;
use tuplewatch::model::diagnostic::shell_word;

/// A server, and a node with its own directory and flags.
struct Patient {
    postgres: Postgres,
    directory: TempDir,
    /// Pairs of a flag and its value.
    flags: Vec<(String, String)>,
}

#[derive(Clone, Debug, Deserialize)]
struct Diagnostic {
    severity: String,
    subject: String,
    what: String,
    meaning: Option<String>,
    fix: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Diagnosis {
    server: String,
    diagnostics: Vec<Diagnostic>,
    summary: Summary,
}

#[derive(Debug, Deserialize)]
struct Summary {
    error: usize,
    warning: usize,
    ok: usize,
}

impl Diagnosis {
    fn of_severity(&self, severity: &str) -> Vec<Diagnostic> {
        self.diagnostics.iter().filter(|diagnostic| diagnostic.severity == severity).cloned().collect()
    }

    /// The diagnostics of this severity about this subject.
    fn about(&self, severity: &str, subject: &str) -> Vec<Diagnostic> {
        let mut found = self.of_severity(severity);
        found.retain(|diagnostic| diagnostic.subject == subject);
        found
    }
}

impl Patient {
    /// Before setup.
    fn new(postgres: Postgres) -> Self {
        let uri = postgres.uri();
        let patient = Self { postgres, directory: tempfile::tempdir().unwrap(), flags: Vec::new() };
        patient
            .with("--database-uri", &uri)
            .with("--changelog-path", "log")
            .with("--changelog-disk-reserve", "16MiB")
            .with("--changelog-retention-size", "64MiB")
    }

    /// After setup.
    async fn ready(postgres: Postgres) -> Self {
        let patient = Self::new(postgres);
        patient.run("setup", &[]).await.succeeded();
        patient
    }

    /// After setup and a run of serve, so that it has a change log.
    async fn used(postgres: Postgres) -> Self {
        let patient = Self::ready(postgres).await;
        patient.streams().await;
        patient
    }

    /// Sets a flag.
    fn with(mut self, flag: &str, value: &str) -> Self {
        self.flags.retain(|(given, _)| given != flag);
        self.flags.push((flag.to_owned(), value.to_owned()));
        self
    }

    /// The command for a subcommand, with changed values of some flags.
    fn command(&self, subcommand: &str, changes: &[(&str, &str)]) -> Command {
        let mut command = program(self.directory.path());
        command.arg(subcommand);
        let own = self.flags.iter().map(|(flag, value)| (flag.as_str(), value.as_str()));
        let own = own.filter(|(flag, _)| !changes.iter().any(|(changed, _)| changed == flag));
        command.args(own.chain(changes.iter().copied()).flat_map(|(flag, value)| [flag, value]));
        command
    }

    async fn run(&self, subcommand: &str, further: &[&str]) -> Ran {
        let mut command = self.command(subcommand, &[]);
        command.args(further);
        run(command).await
    }

    /// Starts a node that streams, with changed and further flags.
    async fn serve(&self, changes: &[(&str, &str)], further: &[&str]) -> Process {
        let mut command = self.command("serve", changes);
        command
            .args(["--server-host", "127.0.0.1", "--server-grpc-port", "0", "--server-http-port", "0"])
            .args(further);
        let mut process = Process::start(command);
        process.reaches("streaming").await;
        process
    }

    /// `serve` starts and streams.
    async fn streams(&self) {
        stops(self.serve(&[], &[]).await).await;
    }

    async fn sql(&self) -> Sql {
        self.postgres.sql().await
    }

    async fn doctor(&self, further: &[&str]) -> Diagnosis {
        let ran = self.run("doctor", &[&["--json"], further].concat()).await;
        let diagnosis: Diagnosis = serde_json::from_str(&ran.out).unwrap_or_else(|error| panic!("{error}: {ran:?}"));
        let errors = diagnosis.of_severity("error").len();
        assert_eq!(ran.code, Some(i32::from(errors > 0)), "{ran:?}");
        assert_eq!(ran.err, "");
        let counted = [errors, diagnosis.of_severity("warning").len(), diagnosis.of_severity("ok").len()];
        assert_eq!([diagnosis.summary.error, diagnosis.summary.warning, diagnosis.summary.ok], counted);
        let bad = diagnosis.diagnostics.iter().filter(|diagnostic| diagnostic.severity != "ok");
        assert!(bad.into_iter().all(|diagnostic| diagnostic.fix.is_some()), "{diagnosis:#?}");
        diagnosis
    }

    /// There is exactly one error, and it is this one.
    async fn has(&self, subject: &str, what: &str) -> Diagnostic {
        let diagnosis = self.doctor(&[]).await;
        let errors = diagnosis.of_severity("error");
        let [diagnostic] = errors.as_slice() else { panic!("not one error: {errors:#?}") };
        assert_eq!(diagnostic.subject, subject, "{diagnostic:#?}");
        assert!(diagnostic.what.contains(what), "{diagnostic:#?}");
        diagnostic.clone()
    }

    /// There are no errors.
    async fn is_well(&self) {
        let errors = self.doctor(&[]).await.of_severity("error");
        assert!(errors.is_empty(), "{errors:#?}");
    }

    /// Applies a fix: pastes it into the shell or into psql, and then follows its comment.
    async fn apply(&mut self, diagnostic: &Diagnostic) {
        let fix = diagnostic.fix.as_deref().unwrap();
        if fix.starts_with("tuplewatch ") {
            let script = format!("tuplewatch() {{ {} \"$@\"; }}\n{fix}", shell_word(env!("CARGO_BIN_EXE_tuplewatch")));
            let mut shell = Command::new("sh");
            shell.args(["-euc", &script]).current_dir(self.path());
            run(shell).await.succeeded();
        } else {
            self.sql().await.run(fix).await;
        }
        if fix.contains("then restart PostgreSQL") {
            self.postgres.stop(StopMode::Fast).await;
            self.postgres.start_again().await;
        }
        if fix.contains("then a reload: SELECT pg_reload_conf();") {
            self.reload().await;
        }
    }

    /// Reloads the configuration, and waits until it is in force for new sessions.
    async fn reload(&self) {
        let sql = self.sql().await;
        let before = sql.value("SELECT pg_conf_load_time()").await;
        sql.run("SELECT pg_reload_conf()").await;
        // The postmaster reloads a moment later, and new sessions get the time of the reload from it.
        eventually("the configuration is loaded", async || {
            self.sql().await.value("SELECT pg_conf_load_time()").await != before
        })
        .await;
    }

    /// There is one error. After its fix there is none, and the node streams.
    async fn heals(&mut self, subject: &str, what: &str) {
        let diagnostic = self.has(subject, what).await;
        self.apply(&diagnostic).await;
        self.is_well().await;
        self.streams().await;
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }
}

async fn stops(mut process: Process) {
    process.signal("TERM");
    assert_eq!(process.ended().await.code(), Some(0));
}

#[tokio::test]
async fn a_healthy_node_has_no_errors_even_while_it_serves() {
    let patient = Patient::used(Postgres::start().await).await;
    let diagnosis = patient.doctor(&[]).await;
    assert!(diagnosis.of_severity("error").is_empty(), "{diagnosis:#?}");
    assert!(diagnosis.server.contains("(database postgres, user postgres)"), "{diagnosis:#?}");
    for subject in ["connection", "version", "wal_level", "replication connection", "clocks", "change log"] {
        assert_eq!(diagnosis.about("ok", subject).len(), 1, "{subject}: {diagnosis:#?}");
    }
    assert!(diagnosis.diagnostics.iter().all(|diagnostic| diagnostic.meaning.as_deref() != Some("")));

    let mut process = patient.serve(&[], &[]).await;
    let diagnosis = patient.doctor(&[]).await;
    assert!(diagnosis.of_severity("error").is_empty(), "{diagnosis:#?}");
    let log = diagnosis.about("ok", "change log");
    assert!(log[0].what.ends_with("a tuplewatch has it open"), "{log:?}");
    let slot = diagnosis.about("ok", "replication slot tuplewatch");
    assert!(slot.iter().any(|diagnostic| diagnostic.what.contains("in use by process")), "{slot:?}");
    assert!(process.is_running());
    let printed = process.logged();
    assert!(!printed.iter().any(|line| line.contains("WARN") || line.contains("ERROR")), "{printed:#?}");
    stops(process).await;
}

/// The printed commands have the options of doctor, but no password.
#[tokio::test]
async fn a_fix_works_when_it_is_pasted() {
    let patient = Patient::ready(Postgres::start().await).await;
    let sql = patient.sql().await;
    sql.run("DROP PUBLICATION tuplewatch").await;
    std::fs::write(patient.path().join("my node.yaml"), "replication: {failover: 'off'}").unwrap();
    let uri = patient.postgres.uri();
    let secret = uri.replace("postgres@", "postgres:s3cr3t@");
    let patient = patient.with("--config", "my node.yaml").with("--database-uri", &secret);
    let diagnostic = patient.has("publication tuplewatch", "does not exist").await;
    let fix = diagnostic.fix.clone().unwrap();
    assert!(fix.starts_with("tuplewatch setup --recreate-slot --config 'my node.yaml' "), "{fix}");
    assert!(fix.contains(&format!(" --database-uri {uri} ")) && fix.contains("PGPASSWORD"), "{fix}");
    // Options that setup does not accept are left out.
    assert!(!fix.contains("--changelog"), "{fix}");

    // The same in the refusals of setup and serve.
    for subcommand in ["setup", "serve"] {
        let ran = patient.run(subcommand, &[]).await;
        assert!(!ran.err.contains("s3cr3t") && !ran.out.contains("s3cr3t"), "{ran:?}");
        ran.failed(&["tuplewatch setup --recreate-slot --config 'my node.yaml' ", &uri, "PGPASSWORD"]);
    }
    let mut patient = patient;
    patient.apply(&diagnostic).await;
    patient.is_well().await;
}

#[tokio::test]
async fn the_diagnosis_for_people_is_text() {
    let patient = Patient::ready(Postgres::start().await).await;
    let printed = patient.run("doctor", &[]).await.succeeded();
    assert!(printed.contains("\nok       wal_level ") && !printed.contains('\u{1b}'), "{printed}");
    assert!(printed.lines().last().unwrap().starts_with("0 errors, "), "{printed}");

    patient.sql().await.run("ALTER PUBLICATION tuplewatch DROP TABLE tuplewatch.attributes").await;
    let ran = patient.run("doctor", &[]).await;
    assert_eq!((ran.code, ran.err.as_str()), (Some(1), ""));
    assert!(ran.out.contains("\n         fix: ALTER PUBLICATION \"tuplewatch\" ADD TABLE "), "{}", ran.out);
    assert!(ran.out.trim_end().ends_with("does not work until the errors are repaired"), "{}", ran.out);
    // `serve` refuses with the same words.
    let refused = patient.run("serve", &["--server-grpc-port", "0", "--server-http-port", "0"]).await;
    refused.failed(&[
        "table tuplewatch.attributes: is not in publication tuplewatch",
        "No change of it reaches tuplewatch.",
    ]);

    let directory = tempfile::tempdir().unwrap();
    let mut command = program(directory.path());
    command.arg("doctor");
    run(command).await.misused(&["database.uri"]);
}
