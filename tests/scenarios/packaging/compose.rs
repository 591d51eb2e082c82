//! `docker/compose.yaml`.

use super::image::Image;
use super::{
    BARE, Database, Environment, Recipe, assignments, environment, leaves_time_to_stop, path, read, text, texts, yaml,
};
use crate::support::sql::Sql;
use serde_json::Value as Json;

struct Compose {
    services: Json,
    image: Image,
}

impl Compose {
    /// With the variables of `docker/.env.example`.
    fn read() -> Self {
        let variables = assignments(&read("docker/.env.example"));
        let mut file = yaml(&interpolated(&read("docker/compose.yaml"), &variables));
        Self { services: file["services"].take(), image: Image::read() }
    }

    fn service(&self, name: &str) -> &Json {
        self.services.get(name).unwrap_or_else(|| panic!("no service {name}"))
    }

    /// The command of a service of our image.
    fn recipe(&self, name: &str) -> Recipe {
        let service = self.service(name);
        assert_eq!(service["image"], concat!("tuplewatch:", env!("CARGO_PKG_VERSION")));
        assert!(
            path("docker")
                .join(text(&service["build"]["context"]))
                .join(text(&service["build"]["dockerfile"]))
                .is_file()
        );
        let mut all = self.image.environment();
        all.extend(environment(&service["environment"]));
        let arguments = service.get("command").map_or_else(|| self.image.arguments(), texts);
        Recipe { arguments, environment: all }
    }

    /// `-c name=value` of the command of PostgreSQL.
    fn settings(&self) -> Vec<(String, String)> {
        let command = texts(&self.service("postgres")["command"]);
        assert_eq!(command[0], "postgres");
        let setting = |pair: &[String]| {
            assert_eq!(pair[0], "-c");
            let (name, value) = pair[1].split_once('=').unwrap();
            (name.to_owned(), value.to_owned())
        };
        command[1..].chunks(2).map(setting).collect()
    }

    /// The condition of `of` that `service` waits for before it starts.
    fn waits(&self, service: &str, of: &str) -> String {
        text(&self.service(service)["depends_on"][of]["condition"])
    }
}

/// `${NAME}`, `${NAME:?message}` and `${NAME:-default}`.
fn interpolated(text: &str, variables: &Environment) -> String {
    let mut parts = text.split("${");
    let mut result = parts.next().unwrap().to_owned();
    for part in parts {
        let (expression, rest) = part.split_once('}').unwrap();
        let (name, default) =
            expression.split_once(":-").map_or((expression, None), |(name, value)| (name, Some(value)));
        let name = name.split(":?").next().unwrap();
        let value = variables.get(name).map(String::as_str).or(default);
        result.push_str(value.unwrap_or_else(|| panic!("{name} is not in docker/.env.example")));
        result.push_str(rest);
    }
    result
}

#[tokio::test]
async fn the_compose_file_delivers_a_tuple() {
    let compose = Compose::read();
    assert_eq!(compose.waits("setup", "postgres"), "service_healthy");
    assert_eq!(compose.waits("tuplewatch", "setup"), "service_completed_successfully");

    let settings = compose.settings();
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let server = compose.service("postgres");
    assert_eq!(server["environment"]["POSTGRES_DB"], "app");
    let database = Database::start(&[&BARE, &settings[..]].concat(), &environment(&server["environment"])).await;
    compose.recipe("setup").sets_up(&database).await;
    let node = compose.recipe("tuplewatch").serves(&database).await;
    node.delivers(&database, "d1").await;
    assert_eq!(node.check_health(&compose.image.healthcheck()).await.succeeded(), "alive\n");
    // The log has neither warnings nor errors.
    let complaints = node.process.logged();
    assert!(!complaints.iter().any(|line| line.contains("WARN") || line.contains("ERROR")), "{complaints:?}");
    may_only_read(&database, &compose.recipe("tuplewatch")).await;

    let service = compose.service("tuplewatch");
    assert!(service["volumes"][0].as_str().unwrap().ends_with(&format!(":{}", compose.image.volume())));
    leaves_time_to_stop(&text(&service["stop_grace_period"]));
    node.stops(compose.image.stop_signal()).await;
}

/// The role that serves.
async fn may_only_read(database: &Database, recipe: &Recipe) {
    let uri = recipe.environment["TUPLEWATCH_DATABASE__URI"].replace("postgres:5432", &database.address());
    let uri = uri.replacen('@', &format!(":{}@", recipe.environment["PGPASSWORD"]), 1);
    let sql = Sql::connect(&uri).await;
    assert_eq!(sql.value("SELECT count(*) FROM tuplewatch.relation_tuples").await, "1");
    for statement in ["DELETE FROM tuplewatch.relation_tuples", "CREATE TABLE t ()", "CREATE SCHEMA s"] {
        let refused = sql.batch_execute(statement).await.unwrap_err();
        assert_eq!(refused.code().map(tokio_postgres::error::SqlState::code), Some("42501"), "{statement}: {refused}");
    }
}

#[test]
fn compose_ports_are_local_and_mounted_files_exist() {
    let compose = Compose::read();
    for (name, service) in compose.services.as_object().unwrap() {
        for port in service.get("ports").map(texts).unwrap_or_default() {
            assert!(port.starts_with("127.0.0.1:"), "{name}: {port}");
        }
        let mounts = service.get("volumes").map(texts).unwrap_or_default();
        for source in mounts.iter().filter_map(|mount| mount.strip_prefix("./")?.split(':').next()) {
            let source = format!("docker/{source}");
            assert!(path(&source).exists(), "{name} mounts {source}");
        }
    }
    let ours = texts(&compose.service("tuplewatch")["ports"]);
    let ours = ours.iter().map(|port| port.rsplit(':').next().unwrap().parse().unwrap()).collect();
    assert_eq!(compose.image.ports(), ours);
}
