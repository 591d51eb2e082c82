//! `docker/systemd/tuplewatch.service`.

use super::{Recipe, assignments, database_that_is_set_up, leaves_time_to_stop, read};
use crate::scenarios::cli::process::run;
use std::collections::BTreeMap;

/// The settings of a unit in order. One may occur several times.
struct Unit(Vec<(String, String)>);

impl Unit {
    fn read() -> Self {
        let text = read("docker/systemd/tuplewatch.service");
        let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with(['#', '[']));
        Self(lines.map(|line| line.split_once('=').unwrap()).map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    fn one(&self, name: &str) -> &str {
        let mut all = self.0.iter().filter(|(given, _)| given == name);
        let (_, value) = all.next().unwrap_or_else(|| panic!("no {name}"));
        assert!(all.next().is_none(), "{name} comes twice");
        value
    }

    /// `file` is the edited environment file.
    fn recipe(&self, file: &str) -> Recipe {
        let mut words = self.one("ExecStart").split(' ').map(str::to_owned);
        assert_eq!(words.next().unwrap(), "/usr/local/bin/tuplewatch");
        let (name, value) = self.one("Environment").split_once('=').unwrap();
        let state = "/var/lib";
        let mut environment = BTreeMap::from([(name.to_owned(), value.replace("%S", state))]);
        assert!(environment[name].starts_with(&format!("{state}/{}/", self.one("StateDirectory"))));
        environment.extend(assignments(file));
        Recipe { arguments: words.collect(), environment }
    }
}

#[tokio::test]
async fn the_systemd_unit_delivers_a_tuple() {
    let unit = Unit::read();
    assert!(unit.one("EnvironmentFile").ends_with("/tuplewatch.env"));
    let (database, passwords) = database_that_is_set_up().await;
    let file = read("docker/systemd/tuplewatch.env").replace("change-me", &passwords["TUPLEWATCH_PASSWORD"]);
    let node = unit.recipe(&file).serves(&database).await;
    node.delivers(&database, "d1").await;
    leaves_time_to_stop(unit.one("TimeoutStopSec"));
    node.stops("TERM").await;

    // systemd does not restart it after this exit code.
    let volume = tempfile::tempdir().unwrap();
    let wrong = unit.recipe("TUPLEWATCH_DATABASE_URI=x");
    let ran = run(wrong.command(&database, volume.path())).await;
    assert_eq!(ran.code, Some(unit.one("RestartPreventExitStatus").parse().unwrap()), "{ran:?}");
}
