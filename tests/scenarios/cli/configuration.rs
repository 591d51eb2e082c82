//! Flags, environment and file: every mistake ends with 2, and names the correction.

use super::process::{program, run, tuplewatch};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

/// A configuration from all three sources, in `server.yaml`.
#[derive(Default)]
struct Given<'a> {
    file: Option<&'a [u8]>,
    environment: &'a [(&'a str, &'a str)],
    flags: &'a [&'a str],
}

impl Given<'_> {
    async fn refused(&self, subcommand: &str, expected: &[&str]) {
        let directory = tempfile::tempdir().unwrap();
        let mut command = program(directory.path());
        command.arg(subcommand);
        if let Some(contents) = self.file {
            std::fs::write(directory.path().join("server.yaml"), contents).unwrap();
            command.args(["--config", "server.yaml"]);
        }
        run({
            command.args(self.flags).envs(self.environment.iter().copied());
            command
        })
        .await
        .misused(expected);
        // Not even a directory was created.
        let left = std::fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(left, usize::from(self.file.is_some()), "nothing is created");
    }
}

/// Checks one mistake with its complete message. `serve` would start without it.
async fn check_file(contents: impl AsRef<[u8]>, expected: &str) {
    let file = Some(contents.as_ref());
    let message = format!("tuplewatch: the configuration has an error:\n  - {expected}");
    Given { file, flags: &["--database-uri", "postgres://u@h/d"], ..Given::default() }
        .refused("serve", &[&message])
        .await;
}

#[tokio::test]
async fn each_mistake_in_a_file_is_named() {
    for (contents, expected) in [
        ("server: {hosts: localhost}", "`server.hosts` in file server.yaml: unknown; did you mean `server.host`?\n"),
        ("sever: {host: localhost}", "`sever` in file server.yaml: unknown; did you mean `server`?\n"),
        ("database: {url: x}", "`database.url` in file server.yaml: unknown; did you mean `database.uri`?\n"),
        ("quite: other", "`quite` in file server.yaml: unknown\n"),
        (
            "server: {grpc: {port: high}}",
            "`server.grpc.port` in file server.yaml is \"high\": must be a whole number from 0 to 65535\n",
        ),
        (
            "server: {grpc: {port: 65536}}",
            "`server.grpc.port` in file server.yaml is 65536: must be a whole number from 0 to 65535\n",
        ),
        (
            "server: {grpc: {tls: {enabled: maybe}}}",
            "`server.grpc.tls.enabled` in file server.yaml is \"maybe\": must be true or false\n",
        ),
        (
            "changelog: {retention: {age: 10}}",
            "`changelog.retention.age` in file server.yaml is 10: must be a duration with its unit such as 500ms, 10s or \
             1m30s, from 1m to 8760h\n",
        ),
        (
            "changelog: {retention: {age: 1s}}",
            "`changelog.retention.age` in file server.yaml is \"1s\": must be a duration with its unit such as 500ms, 10s \
             or 1m30s, from 1m to 8760h\n",
        ),
        (
            "changelog: {retention: {size: 10GG}}",
            "`changelog.retention.size` in file server.yaml is \"10GG\": must be a size such as 512KiB, 10GB or a number \
             of bytes, from 64MiB to 1PiB\n",
        ),
        (
            "logger: {level: loud}",
            "`logger.level` in file server.yaml is \"loud\": must be one of trace, debug, info, warn, error\n",
        ),
        (
            "server: {grpc: {tls: {enabled: true, key: k.pem}}}",
            "`server.grpc.tls.enabled` in file server.yaml and `server.grpc.tls.cert` (not set): TLS needs this file when \
             it is enabled\n",
        ),
        (
            "mapping: {preset: tuples, file: m.yaml}",
            "`mapping.preset` in file server.yaml and `mapping.file` in file server.yaml: set one of the two, not both\n",
        ),
        ("server: 5", "`server` in file server.yaml is a section: it takes keys below it, not a value\n"),
        (
            "server.host: localhost",
            "`server.host` in file server.yaml: keys are nested, not dotted: write each part on its own line below its \
             parent\n",
        ),
        ("- server", "file server.yaml: must hold sections such as `server:` at its top level\n"),
        // The messages of the parser are not ours, but they must name the place.
        ("server: {host: localhost", "file server.yaml: "),
        ("server:\n\thost: localhost\n", "file server.yaml: "),
        ("logger: {level: info}\nlogger: {level: info}\n", "file server.yaml: "),
    ] {
        check_file(contents, expected).await;
    }
    check_file(b"logger:\n  level: \xff\n", "file server.yaml: line 2: is not valid UTF-8\n").await;
    let deep = format!("{}a", "[".repeat(100_000));
    check_file(deep, "file server.yaml: ").await;
    let bomb = format!(
        "a0: &a0 [x]\n{}",
        (1..60).map(|n| format!("a{n}: &a{n} [{}]\n", format!("*a{},", n - 1).repeat(9))).collect::<String>()
    );
    check_file(bomb, "file server.yaml: line ").await;
    check_file(vec![b'#'; 20 << 20], "file server.yaml: larger than ").await;
}

#[tokio::test]
async fn each_mistake_in_the_environment_is_named() {
    for (name, value, expected) in [
        ("TUPLEWATCH_SERVER__GRPC__PROT", "1", ": unknown; did you mean TUPLEWATCH_SERVER__GRPC__PORT?\n"),
        ("TUPLEWATCH_DATABASE_URI", "postgres://u@h/d", ": unknown; did you mean TUPLEWATCH_DATABASE__URI?\n"),
        ("TUPLEWATCH_LOG", "info", ": unknown\n"),
        ("TUPLEWATCH_SERVER__GRPC__PORT", "", " is \"\": must be a whole number from 0 to 65535\n"),
        ("TUPLEWATCH_SERVICE__WATCH__ENABLED", "yes", " is \"yes\": must be true or false\n"),
        ("TUPLEWATCH_SERVICE__WATCH__SUBSCRIBERS_MAX", "0", " is \"0\": must be a whole number from 1 to 1000000\n"),
    ] {
        let message = format!("the configuration has an error:\n  - environment variable {name}{expected}");
        let environment = &[("TUPLEWATCH_DATABASE__URI", "postgres://u@h/d"), (name, value)];
        Given { environment, ..Given::default() }.refused("serve", &[&message]).await;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = program(directory.path());
    command.arg("config").env("TUPLEWATCH_DATABASE__URI", OsStr::from_bytes(b"hush\xff"));
    let ran = run(command).await;
    assert!(!ran.err.contains("hush"), "{ran:?}");
    ran.misused(&["environment variable TUPLEWATCH_DATABASE__URI: is not valid UTF-8\n"]);

    let environment = &[("TUPLEWATCH_CONFIG", "nowhere.yaml")];
    let expected = "cannot read file nowhere.yaml: No such file or directory";
    Given { environment, ..Given::default() }.refused("serve", &[expected]).await;
}

#[tokio::test]
async fn each_mistake_in_a_flag_is_named() {
    for (flags, expected) in [
        (&["--server-grpc-prot", "1"][..], "a similar argument exists: '--server-grpc-port'"),
        (&["--server-grpc-port"], "a value is required for '--server-grpc-port <VALUE>'"),
        (&["--server-grpc-port", "1", "--server-grpc-port", "2"], "cannot be used multiple times"),
        (&["surplus"], "unexpected argument 'surplus'"),
        (&["--reset-log=true"], "unexpected value 'true' for '--reset-log'"),
        (&["--server-grpc-port", "x"], "flag --server-grpc-port is \"x\": must be a whole number from 0 to 65535\n"),
        (
            &["--server-host", "localhost:3478"],
            "flag --server-host is \"localhost:3478\": must be an IP address or a DNS name, without a port\n",
        ),
        (&["--config", "nowhere.yaml"], "cannot read file nowhere.yaml: No such file or directory"),
        (&["--config", "/"], "cannot read file /: "),
        (&["--database-uri", ""], "`database.uri` is required: set it in the configuration file, "),
    ] {
        Given { flags, ..Given::default() }.refused("serve", &[expected]).await;
    }
    for (arguments, expected) in [
        (&[][..], "Usage: tuplewatch [OPTIONS] <COMMAND>"),
        (&["sevre"], "a similar subcommand exists: 'serve'"),
        (&["watch"], "--tenant <TENANT>"),
        (&["watch", "--tenant", "t1", "--output", "xml"], "[possible values: text, json]"),
        (&["watch", "--tenant", "t1", "--server", "localhost:3478"], "write http://host:port"),
        (&["watch", "--tenant", "t1", "--server", "ftp://localhost"], "write http://host:port"),
        (&["watch", "--tenant", "t1", "--server", "not a server"], "write http://host:port"),
        (&["token"], "<TOKEN>"),
        (&["dev", "--pg-port", "65536"], "65536 is not in 1..=65535"),
        (&["dev", "--pg-port", "0"], "0 is not in 1..=65535"),
        (&["dev", "--logger-level", "loud"], "flag --logger-level is \"loud\""),
        (&["dev", "--database-uri", "postgres://u@h/d"], "--database-uri"),
    ] {
        tuplewatch(arguments).await.misused(&[expected]);
    }
}

#[tokio::test]
async fn a_missing_database_uri_is_reported_with_every_way_to_set_it() {
    for subcommand in ["serve", "setup", "teardown"] {
        let expected = "`database.uri` is required: set it in the configuration file, with the environment variable \
                    TUPLEWATCH_DATABASE__URI, or with the flag --database-uri\n";
        Given::default().refused(subcommand, &[expected]).await;
    }
}

/// The message names the mistake and no secret.
#[tokio::test]
async fn an_invalid_uri_is_a_usage_error_without_secrets() {
    for (uri, expected) in [
        ("mysql://u:hush@h/d", "it is neither a URI (postgres://user:password@host:5432/database) nor"),
        ("hush", "it is neither a URI (postgres://user:password@host:5432/database) nor"),
        ("postgres://u:hush@h:port/d", "the value of 'port' is not a number from 1 to 65535"),
        ("postgres://u:hush%zz@h/d", "write % itself as %25"),
        ("host=h password='hush user=u", "the value of 'password' has a quote that is not closed"),
        ("postgres://u:hush@h/d?sslmode=maybe", "the value of 'sslmode' is not one of disable, "),
        ("postgres://u:hush@h/d?foo=bar", "parameter 'foo' is unknown"),
        ("postgres://:hush@h/d", "it names no user: write postgres://USER@…, or set PGUSER"),
    ] {
        for subcommand in ["serve", "setup", "teardown"] {
            let ran = tuplewatch(&[subcommand, "--database-uri", uri]).await;
            assert!(!ran.err.contains("hush"), "{ran:?}");
            ran.misused(&["database.uri", expected]);
        }
    }
}

/// Every key, from each source, with all mistakes reported at once.
#[tokio::test]
async fn every_key_refuses_an_invalid_value() {
    let printed = tuplewatch(&["config"]).await.succeeded();
    let keys: Vec<String> = settings(&printed).into_iter().map(|(key, _)| key).collect();
    assert!(keys.len() > 20, "{keys:?}");

    let mut yaml = printed;
    for (_, value) in settings(&yaml.clone()) {
        yaml = yaml.replace(&format!(": {value} # default"), ": [1]");
    }
    let named: Vec<String> =
        keys.iter().map(|key| format!("`{key}` in file server.yaml is a list: must be ")).collect();
    refused_all(&Given { file: Some(yaml.as_bytes()), ..Given::default() }, &named).await;

    // Any path, text or schema is valid as such, and a URI is checked only when it is used.
    let free = [
        "database.uri",
        "mapping.schema",
        "mapping.file",
        "changelog.path",
        "authn.preshared.keys",
        "authn.oidc.audience",
        "authn.oidc.tenants_claim",
    ];
    let strict = |key: &&String| !key.contains(".tls.") || key.ends_with(".enabled");
    let keys: Vec<&String> = keys.iter().filter(strict).filter(|key| !free.contains(&key.as_str())).collect();
    const WRONG: &str = "?, !";

    let variable = |key: &&String| format!("TUPLEWATCH_{}", key.to_uppercase().replace('.', "__"));
    let variables: Vec<String> = keys.iter().map(variable).collect();
    let environment: Vec<(&str, &str)> = variables.iter().map(|name| (name.as_str(), WRONG)).collect();
    let named: Vec<String> =
        variables.iter().map(|name| format!("environment variable {name} is \"{WRONG}\": must be ")).collect();
    refused_all(&Given { environment: &environment, ..Given::default() }, &named).await;

    let flags: Vec<String> = keys.iter().map(|key| format!("--{}", key.replace(['.', '_'], "-"))).collect();
    let named: Vec<String> = flags.iter().map(|name| format!("flag {name} is \"{WRONG}\": must be ")).collect();
    let flags: Vec<&str> = flags.iter().flat_map(|name| [name.as_str(), WRONG]).collect();
    refused_all(&Given { flags: &flags, ..Given::default() }, &named).await;
}

async fn refused_all(given: &Given<'_>, named: &[String]) {
    let mut expected: Vec<&str> = named.iter().map(String::as_str).collect();
    let headline = format!("the configuration has {} errors:\n", named.len());
    expected.push(&headline);
    given.refused("config", &expected).await;
}

#[tokio::test]
async fn the_printed_configuration_loads_again_without_secrets() {
    let directory = tempfile::tempdir().unwrap();
    let yaml = "server: {grpc: {port: 1}}\nchangelog: {path: 'a b: #', retention: {age: 90m}}\nlogger: {level: warn}\n";
    std::fs::write(directory.path().join("first.yaml"), yaml).unwrap();
    let config = async |file: &str, flags: &[&str], environment: &[(&str, &str)]| {
        let mut command = program(directory.path());
        command.args(["config", "--config", file]).args(flags).envs(environment.iter().copied());
        run(command).await.succeeded()
    };
    let uri = "postgres://ada:hush@h/d?password=hush";
    let environment = [("TUPLEWATCH_SERVER__GRPC__PORT", "2"), ("TUPLEWATCH_LOGGER__LEVEL", "error")];
    let first = config("first.yaml", &["--server-grpc-port", "3", "--database-uri", uri], &environment).await;
    assert!(!first.contains("hush"), "{first}");
    for line in [
        "    port: 3 # flag --server-grpc-port\n",
        "  level: error # environment variable TUPLEWATCH_LOGGER__LEVEL\n",
        "  path: \"a b: #\" # file first.yaml\n",
        "    age: 1h30m # file first.yaml\n",
        "  uri: \"postgres://ada:***@h/d?password=***\" # flag --database-uri\n",
        "  slot: tuplewatch # default\n",
    ] {
        assert!(first.contains(line), "no {line} in\n{first}");
    }

    std::fs::write(directory.path().join("again.yaml"), &first).unwrap();
    let again = config("again.yaml", &[], &[]).await;
    assert_eq!(settings(&again), settings(&first));
    assert!(!again.contains("# default") && !again.contains("# flag"), "{again}");
}

/// Dotted keys and their values, from the output of `config`.
fn settings(printed: &str) -> Vec<(String, String)> {
    let mut sections: Vec<&str> = Vec::new();
    let mut settings = Vec::new();
    for line in printed.lines() {
        let text = line.trim_start();
        sections.truncate((line.len() - text.len()) / 2);
        match text.split_once(": ") {
            Some((key, rest)) => {
                let (value, _origin) = rest.rsplit_once(" # ").unwrap();
                settings.push(([&sections[..], &[key]].concat().join("."), value.to_owned()));
            }
            None => sections.push(text.trim_end_matches(':')),
        }
    }
    settings
}
