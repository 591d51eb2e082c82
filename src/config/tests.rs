//! The sources together, through [`Config::load`].

mod reference;

use std::io::Write;

use tempfile::NamedTempFile;

use super::*;

type Pairs<'a> = &'a [(&'a str, &'a str)];

fn load(yaml: &str, env: Pairs, overrides: Pairs) -> Result<Config, Error> {
    let owned = |pairs: Pairs| -> Vec<(String, String)> {
        let pair = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        pairs.iter().map(pair).collect()
    };
    let mut file = NamedTempFile::with_suffix(".yaml").unwrap();
    file.write_all(yaml.as_bytes()).unwrap();
    Config::load(Some(file.path()), owned(env), &owned(overrides))
}

/// The list of errors without its headline, the file being called `FILE`.
fn errors(yaml: &str, env: Pairs, overrides: Pairs) -> Vec<String> {
    let text = load(yaml, env, overrides).unwrap_err().to_string();
    let (headline, list) = text.split_once('\n').unwrap();
    assert!(headline.starts_with("the configuration has "), "{headline}");
    let list: Vec<String> = list.lines().map(without_file_name).collect();
    assert!(list.iter().all(|line| line.starts_with("  - ")), "{list:?}");
    list.iter().map(|line| line[4..].to_owned()).collect()
}

fn without_file_name(line: &str) -> String {
    let mut pieces = line.split("file /");
    let mut shown = pieces.next().unwrap().to_owned();
    for piece in pieces {
        shown.push_str("FILE");
        shown.push_str(piece.split_once(".yaml").unwrap().1);
    }
    shown
}

/// The rest of the line after `line_start` in the printed YAML.
fn value(config: &Config, line_start: &str) -> String {
    let printed = config.effective().to_string();
    let mut lines = printed.lines().filter_map(|line| line.trim().strip_prefix(line_start));
    let value = lines.next().unwrap_or_else(|| panic!("no {line_start} in\n{printed}"));
    without_file_name(value.trim_start_matches(": "))
}

#[test]
fn nothing_given_yields_the_defaults() {
    let config = Config::load(None, [], &[]).unwrap();
    assert_eq!(config.server.host.as_str(), "0.0.0.0");
    assert_eq!(config.server.grpc.port, 3478);
    assert_eq!(config.server.grpc.tls, None);
    let http = config.server.http.as_ref().unwrap();
    assert_eq!((http.port, &http.tls, http.body_size_max.get()), (3476, &None, 4 << 20));
    assert_eq!(http.cors_allowed_origins, [""; 0]);
    assert_eq!(config.service.watch.message_size_max.get(), 1 << 20);
    assert_eq!(config.changelog.retention.age, Duration::from_secs(86_400));
    assert_eq!(config.mapping.source, MappingSource::Preset(Preset::Tuples));
    assert_eq!(
        config.require_database_uri().unwrap_err().to_string(),
        "the configuration has an error:\
         \n  - `database.uri` is required: set it in the configuration file, \
         with the environment variable TUPLEWATCH_DATABASE__URI, or with the flag --database-uri"
    );
    for yaml in ["", "# nothing\n", "---\n", "server:\nlogger: {}\n", "\u{feff}"] {
        let same = load(yaml, &[], &[]).unwrap();
        assert_eq!(same.effective().to_string(), config.effective().to_string());
    }
}

#[test]
fn later_sources_win() {
    let yaml = "server: {grpc: {port: 1}}";
    let env = ("TUPLEWATCH_SERVER__GRPC__PORT", "2");
    let flag = ("server.grpc.port", "3");
    for (yaml, env, overrides, port, origin) in [
        ("", &[][..], &[][..], 3478, "default"),
        (yaml, &[], &[], 1, "FILE"),
        (yaml, &[env], &[], 2, "environment variable TUPLEWATCH_SERVER__GRPC__PORT"),
        (yaml, &[env], &[flag], 3, "flag --server-grpc-port"),
        ("", &[], &[flag], 3, "flag --server-grpc-port"),
    ] {
        let config = load(yaml, env, overrides).unwrap();
        assert_eq!(config.server.grpc.port, port);
        assert_eq!(value(&config, "port"), format!("{port} # {origin}"));
    }
}

#[test]
fn all_errors_are_reported_at_once() {
    let yaml = "
server:
  hosts: 127.0.0.1
  grpc: {port: 70000, tls: {enabled: true, cert: a.pem}}
logger: {level: [info]}
changelog.path: /data
";
    let env = [
        ("TUPLEWATCH_DATABASE_URI", "postgres://u:secret@h"),
        ("TUPLEWATCH_SERVICE__WATCH__RESOLVE_TIMEOUT", "10"),
        ("UNRELATED", "x"),
    ];
    let overrides = [("database.max_connections", "0")];
    assert_eq!(
        errors(yaml, &env, &overrides),
        [
            "`changelog.path` in FILE: keys are nested, not dotted: \
             write each part on its own line below its parent",
            "`server.grpc.port` in FILE is 70000: must be a whole number from 0 to 65535",
            "`server.grpc.tls.enabled` in FILE and `server.grpc.tls.key` (not given): \
             TLS needs this file when it is enabled",
            "`logger.level` in FILE is a list: must be one of trace, debug, info, warn, error",
            "environment variable TUPLEWATCH_SERVICE__WATCH__RESOLVE_TIMEOUT is \"10\": \
             must be a duration with its unit such as 500ms, 10s or 1m30s, from 0s to 5m",
            "flag --database-max-connections is \"0\": must be a whole number from 5 to 64",
            "`server.hosts` in FILE: unknown; did you mean `server.host`?",
            "environment variable TUPLEWATCH_DATABASE_URI: unknown; \
             did you mean TUPLEWATCH_DATABASE__URI?",
        ]
    );
    let headline = load(yaml, &env, &overrides).unwrap_err().to_string();
    assert!(headline.starts_with("the configuration has 8 errors:\n"));
}

#[test]
fn each_mistake_in_a_file_is_named() {
    for (yaml, expected) in [
        (
            "server: {https: {port: 1, tls: {enabled: true}}}",
            "`server.https` in FILE: unknown; did you mean `server.http`?",
        ),
        (
            "server: {http: {tls: {enabled: true, cert: c.pem}}}",
            "`server.http.tls.enabled` in FILE and `server.http.tls.key` (not given): TLS needs this file when it is enabled",
        ),
        ("server: {http: {tls: {client_ca: c.pem}}}", "`server.http.tls.client_ca` in FILE: unknown"),
        (
            "server: {http: {cors_allowed_origins: 5}}",
            "`server.http.cors_allowed_origins` in FILE is 5: must be a list, as in [a, b], or a text with commas between the items",
        ),
        (
            "server: {http: {cors_allowed_origins: ['*', 'https://a.example/']}}",
            "`server.http.cors_allowed_origins` in FILE is a list: must be a list of which each item is an origin such as \
             https://app.example.com (scheme, host and port only), or *, and item 2 is not",
        ),
        ("grpc: {port: 1}", "`grpc` in FILE: unknown; did you mean `server.grpc`?"),
        ("sever: {host: a}", "`sever` in FILE: unknown; did you mean `server`?"),
        ("\"a\\nb\": 1", "`a\\nb` in FILE: unknown"),
        ("server: 5", "`server` in FILE is a section: it takes keys below it, not a value"),
        ("database: postgres://u:secret@h", "`database` in FILE is a section: it takes keys below it, not a value"),
        (
            "server: {host: {name: x}}",
            "`server.host` in FILE is a section: must be an IP address or a DNS name, without a port",
        ),
        (
            "server: {host: {}}",
            "`server.host` in FILE is a section: must be an IP address or a DNS name, without a port",
        ),
        (
            "server: {host: 'a:1'}",
            "`server.host` in FILE is \"a:1\": must be an IP address or a DNS name, without a port",
        ),
        ("server: {grpc: {port: }}", "`server.grpc.port` in FILE is empty: must be a whole number from 0 to 65535"),
        ("server: {grpc: {port: -1}}", "`server.grpc.port` in FILE is -1: must be a whole number from 0 to 65535"),
        (
            "server: {grpc: {port: 1.5}}",
            "`server.grpc.port` in FILE is a fraction: must be a whole number from 0 to 65535",
        ),
        ("database: {uri: [postgres://u:secret@h]}", "`database.uri` in FILE is a list: must be a PostgreSQL URI"),
        ("database: {uri: 12345}", "`database.uri` in FILE is not valid: must be a PostgreSQL URI; put it in quotes"),
        (
            "replication: {slot: 007}",
            "`replication.slot` in FILE is 7: must be 1 to 63 of the letters a-z, 0-9 and _; put it in quotes",
        ),
        (
            "replication: {slot: My-Slot}",
            "`replication.slot` in FILE is \"My-Slot\": must be 1 to 63 of the letters a-z, 0-9 and _",
        ),
        (
            "replication: {publication: 'a,b'}",
            "`replication.publication` in FILE is \"a,b\": must be 1 to 63 bytes without commas, quotes or white space",
        ),
        ("mapping: {preset: other}", "`mapping.preset` in FILE is \"other\": must be one of tuples, permify"),
        (
            "mapping: {schema: authz}",
            "`mapping.schema` in FILE and `mapping.preset` (not given): only the preset permify is told its schema: the \
             tables of tuples are in schema tuplewatch, and a file names schemas itself",
        ),
        (
            "mapping: {schema: ''}",
            "`mapping.schema` in FILE is \"\": must be the name of a schema, 1 to 63 bytes, not quoted",
        ),
        (
            "mapping: {preset: tuples, file: m.yaml}",
            "`mapping.preset` in FILE and `mapping.file` in FILE: give one of the two, not both",
        ),
        ("changelog: {path: ''}", "`changelog.path` in FILE is \"\": must be a path"),
        (
            "changelog: {retention: {size: 1MiB}}",
            "`changelog.retention.size` in FILE is \"1MiB\": must be a size such as 512KiB, 10GB or a number of bytes, from 64MiB to 1PiB",
        ),
        (
            "changelog: {retention: {age: 366d}}",
            "`changelog.retention.age` in FILE is \"366d\": must be a duration with its unit such as 500ms, 10s or 1m30s, from 1m to 8760h",
        ),
        (
            "changelog: {memory_window: 1MiB}\nservice: {watch: {message_size_max: 2MiB}}",
            "`changelog.memory_window` in FILE and `service.watch.message_size_max` in FILE: the window must hold at least one message of the largest size",
        ),
        ("server: {host: a\n", "FILE: "),
        ("- a", "FILE: must hold sections such as `server:` at its top level"),
        (
            "logger:\n  level: info\n  level: warn\n",
            "FILE: String(\"level\"): duplicated key in mapping at byte 31 line 3 column 10",
        ),
    ] {
        let found = errors(yaml, &[], &[]);
        let matches = |line: &str| line == expected || (expected == "FILE: " && line.starts_with(expected));
        assert!(found.len() == 1 && matches(&found[0]), "{yaml:?}: {found:#?}");
    }
    // An invalid value is not also reported as missing.
    let found = errors("server: {grpc: {tls: {enabled: true, cert: [a], key: b}}}", &[], &[]);
    assert_eq!(found, ["`server.grpc.tls.cert` in FILE is a list: must be a path"]);
}

#[test]
fn the_environment_holds_our_keys_only() {
    let fine = [
        ("PATH", "/bin"),
        ("TUPLEWATCH_CONFIG", "x"),
        ("TUPLEWATCH_PG_BIN", "x"),
        ("TUPLEWATCH_SERVER__GRPC__PORT", "0"),
        ("TUPLEWATCH_DATABASE__MAX_CONNECTIONS", "64"),
        ("TUPLEWATCH_REPLICATION__SLOT", "007"),
        ("TUPLEWATCH_SERVICE__WATCH__BEFORE_VISIBLE", "true"),
        ("TUPLEWATCH_SERVICE__WATCH__RESOLVE_TIMEOUT", "0s"),
        ("TUPLEWATCH_CHANGELOG__DISK_RESERVE", "1000000000"),
        ("TUPLEWATCH_SERVER__GRPC__TLS__CERT", ""),
    ];
    let config = load("", &fine, &[]).unwrap();
    assert_eq!(config.database.max_connections, 64);
    assert_eq!(config.replication.slot, "007");
    assert!(config.service.watch.before_visible);
    assert_eq!(config.changelog.disk_reserve.to_string(), "1GB");

    for (name, value, expected) in [
        ("TUPLEWATCH_", "", ": unknown"),
        ("TUPLEWATCH_LOG", "", ": unknown"),
        ("TUPLEWATCH_SERVER__GRPC__PROT", "1", ": unknown; did you mean TUPLEWATCH_SERVER__GRPC__PORT?"),
        ("TUPLEWATCH_server__host", "a", ": unknown"),
        ("TUPLEWATCH_SERVER__GRPC__PORT", "", " is \"\": must be a whole number from 0 to 65535"),
        ("TUPLEWATCH_SERVICE__WATCH__ENABLED", "yes", " is \"yes\": must be true or false"),
    ] {
        let expected = format!("environment variable {name}{expected}");
        assert_eq!(errors("", &[(name, value)], &[]), [expected]);
    }
    assert_eq!(
        errors("", &[], &[("server.prot", "1"), ("logger.levle", "info")]),
        ["flag --logger-levle: unknown; did you mean --logger-level?", "flag --server-prot: unknown",]
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named_along_with_other_errors() {
    let env = [("TUPLEWATCH_X".to_owned(), String::new())];
    let error = Config::load(Some(Path::new("/nowhere/t.yaml")), env, &[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the configuration has 2 errors:\
         \n  - cannot read file /nowhere/t.yaml: No such file or directory (os error 2)\
         \n  - environment variable TUPLEWATCH_X: unknown"
    );
    let error = Config::load(Some(&std::env::temp_dir()), [], &[]).unwrap_err();
    assert!(error.to_string().contains("cannot read file"), "{error}");
}

#[test]
fn tls_and_mapping_become_what_they_mean() {
    let yaml = "
server: {grpc: {tls: {enabled: true, cert: c.pem, key: k.pem}}}
mapping: {file: m.yaml, on_undecodable: halt}
";
    let config = load(yaml, &[], &[]).unwrap();
    let tls = config.server.grpc.tls.clone().unwrap();
    assert_eq!(tls.cert, Path::new("c.pem"));
    assert_eq!(tls.client_ca, None);
    assert_eq!(config.mapping.source, MappingSource::File("m.yaml".into()));
    assert!(!config.effective().to_string().contains("preset"));
    let config = load("mapping: {preset: permify, schema: Authz}", &[], &[]).unwrap();
    assert_eq!(config.mapping.source, MappingSource::Preset(Preset::Permify));
    assert_eq!(config.mapping.schema, "Authz");
    // Switched off, but ready to be switched on.
    let yaml = "server: {grpc: {tls: {cert: c.pem}}, http: {enabled: false, port: 1}}";
    assert_eq!(load(yaml, &[], &[]).unwrap().server.grpc.tls, None);
    assert_eq!(load(yaml, &[], &[]).unwrap().server.http, None);
}

#[test]
fn lists_come_from_every_source() {
    let (a, b) = ("https://a.example", "http://localhost:8080");
    let yaml = format!("server: {{http: {{cors_allowed_origins: ['{a}', '{b}']}}}}");
    let pair = format!("{a}, {b}");
    let env = ("TUPLEWATCH_SERVER__HTTP__CORS_ALLOWED_ORIGINS", pair.as_str());
    let flag = ("server.http.cors_allowed_origins", "*");
    for (yaml, env, overrides, expected) in [
        (yaml.as_str(), &[][..], &[][..], &[a, b][..]),
        ("", &[env], &[], &[a, b]),
        (&yaml, &[env], &[flag], &["*"]),
        (&yaml, &[(env.0, "")], &[], &[]),
    ] {
        let config = load(yaml, env, overrides).unwrap();
        assert_eq!(config.server.http.as_ref().unwrap().cors_allowed_origins, expected);
        let again = load(&config.effective().to_string(), &[], &[]).unwrap();
        assert_eq!(again.server, config.server);
    }
}

#[test]
fn secrets_are_shown_nowhere() {
    let uri = "postgres://user:secret@host:5432/db?password=secret&sslmode=require";
    let yaml = format!("database: {{uri: \"{uri}\"}}");
    let config = load(&yaml, &[], &[]).unwrap();
    assert_eq!(config.require_database_uri().unwrap().expose(), uri);
    assert_eq!(value(&config, "uri"), "\"postgres://user:***@host:5432/db?password=***&sslmode=require\" # FILE");
    assert!(!format!("{config:?}").contains("secret"));
    assert!(!config.effective().to_string().contains("secret"));

    let yaml = "authn: {enabled: true, preshared: {keys: [secret, {key: secret2, tenants: [t1]}]}}";
    let config = load(yaml, &[], &[]).unwrap();
    assert_eq!(value(&config, "keys"), "[\"***\", {key: \"***\", tenants: [t1]}] # FILE");
    assert!(!format!("{config:?}").contains("secret"));

    let dsn = [("TUPLEWATCH_DATABASE__URI", "host=h password='se cret' user=u")];
    let config = load("", &dsn, &[]).unwrap();
    assert!(value(&config, "uri").starts_with("\"host=h password=*** user=u\" # "));
}

/// The keys as `key` or `key: tenants`.
fn preshared(config: &Config) -> Vec<String> {
    let Some(Credentials::Preshared(keys)) = &config.authn.credentials else { panic!("{:?}", config.authn) };
    let shown = |key: &PresharedKey| match &key.tenants {
        None => key.expose().to_owned(),
        Some(tenants) => format!("{}: {}", key.expose(), tenants.join(" ")),
    };
    keys.iter().map(shown).collect()
}

#[test]
fn preshared_keys_have_one_form_everywhere() {
    let enabled = ("authn.enabled", "true");
    for (list, expected) in [
        ("[a, {key: b, tenants: [t1, t2]}]", &["a", "b: t1 t2"][..]),
        ("[\"1\", {key: \"b,[c]\"}]", &["1", "b,[c]"]),
        ("a, b", &["a", "b"]),
        ("a", &["a"]),
    ] {
        let variable = [("TUPLEWATCH_AUTHN__ENABLED", "true"), ("TUPLEWATCH_AUTHN__PRESHARED__KEYS", list)];
        assert_eq!(preshared(&load("", &variable, &[]).unwrap()), expected, "{list}");
        assert_eq!(preshared(&load("", &[], &[enabled, ("authn.preshared.keys", list)]).unwrap()), expected, "{list}");
        let yaml = if list.starts_with('[') { list.to_owned() } else { format!("\"{list}\"") };
        let yaml = format!("authn: {{enabled: true, preshared: {{keys: {yaml}}}}}");
        assert_eq!(preshared(&load(&yaml, &[], &[]).unwrap()), expected, "{list}");
    }
    let config = load("authn: {preshared: {keys: [a]}}", &[], &[]).unwrap();
    assert_eq!(config.authn.credentials, None, "ready to be switched on");
}

#[test]
fn mistakes_in_authn_are_named_without_secrets() {
    let list = "a list of which each item is 1 to 4096 visible ASCII characters, in quotes where they are digits only, or \
                {key: …, tenants: […]}, and item";
    for (keys, expected) in [
        ("[hush, 7]", format!("a list: must be {list} 2 is not")),
        ("[\"hu sh\"]", format!("a list: must be {list} 1 is not")),
        ("[\"\"]", format!("a list: must be {list} 1 is not")),
        ("[{key: hush, tenants: []}]", format!("a list: must be {list} 1 is not")),
        ("[{key: hush, tenants: t1}]", format!("a list: must be {list} 1 is not")),
        ("[{key: hush, tenant: [t1]}]", format!("a list: must be {list} 1 is not")),
        ("[{tenants: [t1]}]", format!("a list: must be {list} 1 is not")),
        ("[hush, {key: hush, tenants: [t1]}]", "a list: must be a list in which no key comes twice".to_owned()),
        ("\"[hush\"", "not valid: must be a list as in [a, {key: b, tenants: [t1]}]".to_owned()),
        ("\"hush,,b\"", format!("not valid: must be {list} 2 is not")),
    ] {
        let yaml = format!("authn: {{enabled: true, preshared: {{keys: {keys}}}}}");
        let found = errors(&yaml, &[], &[]);
        assert_eq!(found, [format!("`authn.preshared.keys` in FILE is {expected}")], "{keys}");
    }
    let url = "an https URL without query (http only on this machine)";
    for (authn, expected) in [
        (
            "enabled: true",
            vec!["`authn.enabled` in FILE and `authn.preshared.keys` (not given): without a key nobody could get in".to_owned()],
        ),
        (
            "enabled: true, method: oidc",
            vec![
                "`authn.method` in FILE and `authn.oidc.issuer` (not given): tokens need an issuer that is trusted".to_owned(),
                "`authn.method` in FILE and `authn.oidc.audience` (not given): without an audience, tokens that were issued \
                 for other services would be accepted"
                    .to_owned(),
            ],
        ),
        (
            "enabled: true, method: oidc, preshared: {keys: [hush]}, oidc: {issuer: 'https://i', audience: a}",
            vec![
                "`authn.method` in FILE and `authn.preshared.keys` in FILE: only one method is in force, and this is for the \
                 other"
                    .to_owned(),
            ],
        ),
        (
            "enabled: true, preshared: {keys: [hush]}, oidc: {issuer: 'https://i'}",
            vec![
                "`authn.method` (not given) and `authn.oidc.issuer` in FILE: only one method is in force, and this is for \
                 the other"
                    .to_owned(),
            ],
        ),
        ("oidc: {issuer: 'http://i.example'}", vec![format!("`authn.oidc.issuer` in FILE is \"http://i.example\": must be {url}")]),
        ("oidc: {issuer: 'https://i/?a'}", vec![format!("`authn.oidc.issuer` in FILE is \"https://i/?a\": must be {url}")]),
        ("oidc: {issuer: i.example}", vec![format!("`authn.oidc.issuer` in FILE is \"i.example\": must be {url}")]),
    ] {
        assert_eq!(errors(&format!("authn: {{{authn}}}"), &[], &[]), expected, "{authn}");
    }
    for (issuer, is_good) in [
        ("https://i.example", true),
        ("https://i.example:8443/realms/r/", true),
        ("http://localhost:8080", true),
        ("http://127.0.0.1", true),
        ("http://[::1]:80/", true),
        ("http://127.0.0.1.example", false),
        ("https://u:hush@i.example", false),
        ("https://i.example/#f", false),
        ("ftp://localhost", false),
        ("/path", false),
    ] {
        assert_eq!(SecureUrl::parse(issuer).is_some(), is_good, "{issuer}");
    }
}

#[test]
fn a_printed_configuration_loads_again() {
    let yaml = r#"
server:
  host: "::1"
  grpc: { port: 0, tls: { enabled: true, cert: "a b.pem", key: 'C:\k"', client_ca: "1" } }
  http: { port: 1, tls: { enabled: true, cert: c, key: k }, cors_allowed_origins: ["*", "http://[::1]:80"], body_size_max: 1KiB, ready_lag_max: 0s }
logger: { level: trace, format: json }
authn: { enabled: true, method: oidc, exempt: { health: false, reflection: true, metrics: true },
         oidc: { issuer: "https://i.example/r", audience: "a b", tenants_claim: "https://t.example/tenants" } }
service: { watch: { enabled: false, message_size_max: 4MiB, resolve_timeout: 1m30s } }
database: { uri: "postgres://u@h/db", max_connections: 5, max_data_per_write: 7 }
replication: { slot: "123", publication: "é#", failover: off, acknowledgement_delay: { age: 5m }, warn: { retained_wal: 0, lag: 2h } }
mapping: { file: "~" }
snap_token: { format: native }
changelog: { path: "./d: #x", retention: { age: 1d, size: 1TB }, memory_window: 4194305 }
shutdown: { grace_period: 0s }
"#;
    for yaml in ["", yaml] {
        let config = load(yaml, &[], &[]).unwrap();
        let printed = config.effective().to_string();
        let again = load(&printed, &[], &[]).unwrap_or_else(|error| panic!("{error}\n{printed}"));
        assert_eq!(again.server, config.server);
        assert_eq!(again.logger, config.logger);
        assert_eq!(again.authn, config.authn);
        assert_eq!(again.service, config.service);
        assert_eq!(again.database, config.database);
        assert_eq!(again.replication, config.replication);
        assert_eq!(again.snap_token, config.snap_token);
        assert_eq!(again.changelog, config.changelog);
        assert_eq!(again.shutdown, config.shutdown);
    }
}

#[test]
fn the_printed_form_is_nested_and_in_the_order_of_the_document() {
    let printed = Config::load(None, [], &[("logger.format".into(), "json".into())]).unwrap().effective().to_string();
    assert_eq!(
        printed,
        r#"server:
  host: 0.0.0.0 # default
  rate_limit: 10000 # default
  grpc:
    port: 3478 # default
    tls:
      enabled: false # default
      cert: "" # default
      key: "" # default
      client_ca: "" # default
  http:
    enabled: true # default
    port: 3476 # default
    tls:
      enabled: false # default
      cert: "" # default
      key: "" # default
    cors_allowed_origins: [] # default
    body_size_max: 4MiB # default
    ready_lag_max: 30s # default
logger:
  level: info # default
  format: json # flag --logger-format
authn:
  enabled: false # default
  method: preshared # default
  exempt:
    health: true # default
    reflection: false # default
    metrics: false # default
  preshared:
    keys: [] # default
  oidc:
    issuer: "" # default
    audience: "" # default
    tenants_claim: "" # default
service:
  watch:
    enabled: true # default
    before_visible: false # default
    message_size_max: 1MiB # default
    resolve_timeout: 10s # default
    subscribers_max: 10000 # default
database:
  uri: "" # default
  max_connections: 12 # default
  max_data_per_write: 1000 # default
replication:
  slot: tuplewatch # default
  publication: tuplewatch # default
  failover: auto # default
  acknowledgement_delay:
    age: 0s # default
    size: 1GiB # default
  warn:
    retained_wal: 1GiB # default
    safe_wal_size: 256MiB # default
    lag: 1m # default
mapping:
  preset: tuples # default
  schema: public # default
  file: "" # default
  on_undecodable: gap # default
snap_token:
  format: auto # default
changelog:
  path: ./tuplewatch-data # default
  retention:
    age: 24h # default
    size: 10GiB # default
  disk_reserve: 1GiB # default
  memory_window: 64MiB # default
shutdown:
  grace_period: 10s # default
"#
    );
}
