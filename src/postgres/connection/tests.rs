//! Tests of the URI by tables, and of connections to real PostgreSQL.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use tokio_postgres::error::SqlState;

use super::Event;
use super::wire::SslMode;
use super::*;
use crate::dev_postgres::{Cluster, StopMode};
use crate::model::lsn::Lsn;
use crate::postgres::test_postgres::{Place, cluster};

fn environment(name: &str) -> Option<String> {
    match name {
        "PGUSER" => Some("env".to_owned()),
        "HOME" => Some("/nowhere".to_owned()),
        _ => None,
    }
}

fn parse(uri: &str) -> Result<Endpoints, UriError> {
    Endpoints::parse_in(uri, &environment)
}

#[test]
fn a_uri_gives_hosts_database_and_user() {
    let check = |uri: &str, expected: &str| assert_eq!(parse(uri).unwrap().to_string(), expected, "{uri}");
    check("postgres://u@h/db", "h:5432 (database db, user u)");
    check("postgresql://u:p@h:1234/db", "h:1234 (database db, user u)");
    check("postgres://h", "h:5432 (database env, user env)");
    check("postgres://u@h", "h:5432 (database u, user u)");
    check("postgres://", "localhost:5432 (database env, user env)");
    check("postgres:///db", "localhost:5432 (database db, user env)");
    check("postgres://:77/db", "localhost:77 (database db, user env)");
    check("postgres://u@h1:1,h2,h3:3/db", "h1:1,h2:5432,h3:3 (database db, user u)");
    check("postgres://u@[::1]:7,[fe80::2]/db", "[::1]:7,[fe80::2]:5432 (database db, user u)");
    check("postgres://u@%2Frun%2Fpg:7/db", "/run/pg:7 (database db, user u)");
    check("postgres://u@/db?host=/run/pg", "/run/pg:5432 (database db, user u)");
    check("postgres://a%40b:p%3A@h/d%2Fb", "h:5432 (database d/b, user a@b)");
    check("postgres://u:p@ss@h/db", "h:5432 (database db, user u)");
    check("postgres://h/db?user=a@b&port=9", "h:9 (database db, user a@b)");
    check("postgres://u@h/db?dbname=other", "h:5432 (database other, user u)");
    check("host=h user=u dbname=db port=1", "h:1 (database db, user u)");
    check("  host = h  user = 'a b' dbname='it\\'s' ", "h:5432 (database it's, user a b)");
    check("host=h1,h2 port=9 user=u", "h1:9,h2:9 (database u, user u)");
    check("host=h1,h2 port=8,9 user=u", "h1:8,h2:9 (database u, user u)");
    check("hostaddr=10.0.0.1 user=u", "10.0.0.1:5432 (database u, user u)");
    check("host=name hostaddr=10.0.0.1 user=u", "name:5432 (database u, user u)");
    check(r"user=a\ b password=x", "localhost:5432 (database a b, user a b)");
    check("user=u password='' dbname=db host=''", "localhost:5432 (database db, user u)");
    check("postgres://u:p#ss@h/a%40b", "h:5432 (database a@b, user u)");
}

#[test]
fn a_password_is_found_and_never_printed() {
    let check = |uri: &str, expected: &str| {
        let endpoints = parse(uri).unwrap();
        assert_eq!(endpoints.password.bytes(), expected.as_bytes(), "{uri}");
        assert!(expected.is_empty() || !format!("{endpoints:?} {endpoints}").contains(expected), "{endpoints:?}");
    };
    check("postgres://u:secret@h/db", "secret");
    check("postgres://u:s%3Ae%40c%2Fr%3Fe%20t%25@h/db", "s:e@c/r?e t%");
    check("postgres://u:sec:r@et@h/db", "sec:r@et");
    check("postgres://u:@h/db", "");
    check("postgres://u@h/db?password=secret", "secret");
    check(r"user=u password='it\'s \\ secret'", r"it's \ secret");
    check(r"user=u password=a\'b", "a'b");
    let from_environment = Endpoints::parse_in("postgres://u@h", &|name| (name == "PGPASSWORD").then(|| "env".into()));
    assert_eq!(from_environment.unwrap().password.bytes(), b"env");
}

#[test]
fn tls_and_other_parameters_are_read() {
    let tls = |uri: &str| parse(uri).unwrap().tls;
    let mode = |uri: &str| tls(uri).mode;
    assert_eq!(mode("postgres://h"), SslMode::Prefer);
    assert_eq!(mode("postgres://h?sslmode=disable"), SslMode::Disable);
    assert_eq!(mode("postgres://h?sslmode=require"), SslMode::Require);
    assert_eq!(mode("postgres://h?ssl=true"), SslMode::Require);
    assert_eq!(mode("postgres://h?sslmode=require&sslrootcert=/ca"), SslMode::VerifyCa);
    assert_eq!(mode("postgres://h?sslmode=verify-ca"), SslMode::VerifyCa);
    assert_eq!(mode("postgres://h?sslmode=verify-full"), SslMode::VerifyFull);
    assert_eq!(tls("postgres://h?sslmode=verify-full&sslrootcert=system").root_cert, None);
    let files = tls("postgres://h?sslmode=verify-full&sslrootcert=%2Fca&sslcert=/c&sslkey=/k");
    assert_eq!(files.root_cert.as_deref(), Some(Path::new("/ca")));
    assert_eq!(files.identity, Some(("/c".into(), "/k".into())));

    let all = "host=h connect_timeout=3 application_name=mine target_session_attrs=read-write keepalives=1 \
               keepalives_idle=5 keepalives_interval=6 keepalives_count=7 tcp_user_timeout=8000 passfile=/p \
               options='-c geqo=off' gssencmode=prefer channel_binding=disable sslsni=1 load_balance_hosts=disable";
    let endpoints = parse(all).unwrap();
    assert_eq!(endpoints.connect_timeout, Duration::from_secs(3));
    assert_eq!(endpoints.application_name.as_deref(), Some("mine"));
    assert_eq!(endpoints.options.as_deref(), Some("-c geqo=off"));
    let keepalive = Keepalive {
        enabled: true,
        idle: Duration::from_secs(5),
        interval: Duration::from_secs(6),
        retries: 7,
        user_timeout: Some(Duration::from_secs(8)),
    };
    assert_eq!(endpoints.keepalive, keepalive);
    assert!(!parse("host=h keepalives=0").unwrap().keepalive.enabled);
    assert_eq!(parse("host=h connect_timeout=0").unwrap().connect_timeout, Duration::from_secs(10));
}

#[test]
fn a_refused_uri_is_explained_without_secrets() {
    let check = |uri: &str, expected: &str| {
        let message = parse(uri).unwrap_err().to_string();
        assert!(message.contains(expected), "{uri}: {message}");
        assert!(!message.to_lowercase().contains("secret"), "{uri}: {message}");
    };
    check("secret", "neither a URI");
    check("mysql://u:secret@h/db", "neither a URI");
    check("", "neither a URI");
    check("postgres://u:secret", "'port'");
    check("postgres://u:secret%@h", "the password has a %");
    check("postgres://u:secret%zz@h", "the password has a %");
    check("postgres://u:secret%00@h", "the password has a %");
    check("postgres://u:secret%ff@h", "the password has a %");
    check("postgres://u:12?secret@h/db", "%3F");
    check("postgres://u:12?3secret=4@h/db", "%3F");
    for raw in ["12/secret", "/secret", "a@b/secret", "sec/ret@"] {
        check(&format!("postgres://u:{raw}@h/db?x=y"), "%2F");
    }
    check("jdbc:postgresql://h:5432/db?user=u&password=secret", "without 'jdbc:'");
    check("jdbc:postgresql:secret", "without 'jdbc:'");
    check("postgresql+asyncpg://u:secret@h/db", "write postgres://");
    check("postgres+psycopg2://u:secret@h/db", "write postgres://");
    check("postgres://h?sslmoed=require", "parameter 'sslmoed' is unknown");
    check("postgres://h?sslmode=allow", "'allow'");
    check("postgres://h?sslmode=secret", "'sslmode' is not one of");
    check("postgres://h?target_session_attrs=any", "'target_session_attrs'");
    check("postgres://h?target_session_attrs=standby", "'target_session_attrs'");
    check("postgres://h?channel_binding=require", "'channel_binding'");
    check("postgres://h?sslcert=/c", "'sslkey'");
    check("postgres://h?sslkey=/k", "'sslcert'");
    check("postgres://h?hostaddr=secret", "'hostaddr' is not an IP address");
    check("postgres://h?port=0", "'port'");
    check("postgres://h?port=65536", "'port'");
    check("postgres://h?connect_timeout=secret", "'connect_timeout' is not a whole number");
    check("host=h1,h2,h3 port=1,2", "3 hosts and 2 values of 'port'");
    check("host=h1,h2 hostaddr=10.0.0.1", "2 hosts and 1 values of 'hostaddr'");
    check("password='secret host=h", "the value of 'password' has a quote");
    check("password=se cret host=h", "single quotes");
    check("host=h sslpassword=secret", "'sslpassword'");
    check("postgres://u:secret@[::1/db", "a parameter has no value");
    assert_eq!(Endpoints::parse_in("postgres://h", &|_| None).unwrap_err(), UriError::NoUser);
    for accepted in ["host=name hostaddr=10.0.0.1 sslmode=verify-full", "postgres://10.0.0.1?sslmode=verify-full"] {
        assert!(parse(accepted).is_ok(), "{accepted}");
    }
}

/// A server with passwords, TLS and host rules.
struct Guarded {
    cluster: Cluster,
    place: Place,
}

impl Guarded {
    async fn new() -> Self {
        let place = Place::new();
        let files = place.0.join("files");
        std::fs::create_dir_all(&files).unwrap();
        for dir in [&place.0, &files] {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        make_certificates(&files);
        let hba = "host all postgres all trust\nhostssl all tls all scram-sha-256\nhostssl all cert all cert\n\
                   host all scram all scram-sha-256\nhost all md5 all md5\nhost all barred all reject\n\
                   local all all trust\n";
        std::fs::write(files.join("pg_hba.conf"), hba).unwrap();
        let path = |name: &str| files.join(name).to_str().unwrap().to_owned();
        let settings = [
            ("ssl", "on"),
            ("ssl_cert_file", &path("server.crt")),
            ("ssl_key_file", &path("server.key")),
            ("ssl_ca_file", &path("ca.crt")),
            ("hba_file", &path("pg_hba.conf")),
        ];
        let mut cluster = cluster(place.0.join("cluster"), &settings).await;
        let owner = std::fs::metadata(cluster.data_dir().join("pgdata")).unwrap();
        for file in std::fs::read_dir(&files).unwrap() {
            let file = file.unwrap().path();
            chown(&file, Some(owner.uid()), Some(owner.gid())).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        chown(&files, Some(owner.uid()), Some(owner.gid())).unwrap();
        cluster.start().await.unwrap();
        let guarded = Self { cluster, place };
        let sql =
            "CREATE ROLE scram LOGIN REPLICATION PASSWORD 'right'; CREATE ROLE tls LOGIN REPLICATION PASSWORD 'right';
                   CREATE ROLE cert LOGIN REPLICATION; CREATE ROLE barred LOGIN;
                   SET password_encryption = 'md5'; CREATE ROLE md5 LOGIN REPLICATION PASSWORD 'right';";
        guarded.connect("postgres@localhost").await.unwrap().client.batch_execute(sql).await.unwrap();
        guarded
    }

    /// `who` is `user:password@host`. Parameters may follow a `?`.
    fn uri(&self, who: &str) -> String {
        let (who, parameters) = who.split_once('?').unwrap_or((who, ""));
        format!("postgres://{who}:{}/postgres?{parameters}", self.cluster.port())
    }

    async fn connect(&self, who: &str) -> Result<Connection, ConnectError> {
        Endpoints::parse(&self.uri(who)).unwrap().connect("tests").await
    }

    fn file(&self, name: &str) -> String {
        self.place.0.join("files").join(name).display().to_string()
    }

    /// Checks that both connections work, and agree on TLS.
    async fn works(&self, who: &str, tls: bool) {
        let connection = self.connect(who).await.unwrap_or_else(|error| panic!("{who}: {error}"));
        let sql = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()";
        let row = connection.client.query_typed_one(sql, &[]).await.unwrap();
        assert_eq!(row.get::<_, bool>(0), tls, "{who}");
        let mut walsender = connection.endpoint().replicate("tests").await.unwrap();
        let rows = walsender.query(sql).await.unwrap_or_else(|error| panic!("{who}: {error}"));
        assert_eq!(rows[0][0].as_deref(), Some(if tls { "t" } else { "f" }), "{who}");
        assert!(walsender.identify().await.unwrap().wal_end > Lsn(0));
        walsender.close().await;
    }

    async fn fails(&self, who: &str, definite: bool, expected: &str) {
        let error = self.connect(who).await.err().unwrap_or_else(|| panic!("{who} connects"));
        let message = error.to_string();
        assert_eq!(error.is_definite(), definite, "{who}: {message}");
        assert!(message.contains(expected), "{who}: {message}");
        assert!(!message.contains("wrong"), "{who}: {message}");
    }
}

/// Creates an authority, its certificates for localhost and for the user cert, and another authority.
fn make_certificates(dir: &Path) {
    let openssl = |arguments: &str| {
        let output = Command::new("openssl").args(arguments.split(' ')).current_dir(dir).output().unwrap();
        assert!(output.status.success(), "{arguments}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2";
    for authority in ["ca", "other"] {
        openssl(&format!(
            "req -x509 {key} -keyout {authority}.key -out {authority}.crt -subj /CN={authority} \
             -addext basicConstraints=critical,CA:TRUE"
        ));
    }
    std::fs::write(dir.join("server.ext"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    std::fs::write(dir.join("cert.ext"), "basicConstraints=CA:FALSE\n").unwrap();
    for (name, subject) in [("server", "localhost"), ("cert", "cert")] {
        openssl(&format!("req {} -keyout {name}.key -out {name}.csr -subj /CN={subject}", key.replace(" -days 2", "")));
        openssl(&format!(
            "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out {name}.crt -extfile {name}.ext"
        ));
    }
}

#[tokio::test]
async fn logons_work_with_each_password_method_and_tls_mode() {
    let server = Guarded::new().await;
    let port = server.cluster.port();
    let ca = server.file("ca.crt");

    server.works("scram:right@localhost", true).await;
    server.works("scram:right@localhost?sslmode=disable", false).await;
    server.works("scram:right@localhost?sslmode=require", true).await;
    server.works("md5:right@localhost", true).await;
    server.works("tls:right@localhost", true).await;
    server.works(&format!("scram:right@localhost?sslmode=verify-ca&sslrootcert={ca}"), true).await;
    server.works(&format!("scram:right@localhost?sslmode=verify-full&sslrootcert={ca}"), true).await;
    let by_address = format!("scram:right@localhost?sslmode=verify-full&sslrootcert={ca}&hostaddr=127.0.0.1");
    server.works(&by_address, true).await;
    let (certificate, key) = (server.file("cert.crt"), server.file("cert.key"));
    server.works(&format!("cert@localhost?sslmode=require&sslcert={certificate}&sslkey={key}"), true).await;

    server.fails("scram:wrong@localhost", true, "SQLSTATE 28P01").await;
    server.fails("scram@localhost", true, "SQLSTATE 28P01").await;
    server.fails("nobody:wrong@localhost", true, "SQLSTATE 28000").await;
    server.fails("barred@localhost", true, "pg_hba.conf and reload it").await;
    server.fails("tls:right@localhost?sslmode=disable", true, "sslmode=require").await;
    server.fails("cert@localhost?sslmode=require", true, "SQLSTATE 28000").await;
    server.fails("postgres@localhost?dbname=missing", true, "SQLSTATE 3D000").await;
    server.fails("postgres@no-such-host.invalid", false, "cannot be resolved").await;
    let other = server.file("other.crt");
    server.fails(&format!("scram@localhost?sslmode=verify-ca&sslrootcert={other}"), true, "sslrootcert").await;
    server.fails("scram@localhost?sslmode=verify-ca&sslrootcert=/missing", true, "/missing").await;
    let misnamed = format!("scram@elsewhere?sslmode=verify-full&sslrootcert={ca}&hostaddr=127.0.0.1");
    server.fails(&misnamed, true, "not valid for elsewhere: it is for localhost").await;
    server.works(&format!("scram:right@127.0.0.1?sslmode=verify-ca&sslrootcert={ca}"), true).await;

    // The same with a password file.
    let passfile = server.file("passfile");
    std::fs::write(&passfile, format!("localhost:{port}:*:scram:right\n")).unwrap();
    std::fs::set_permissions(&passfile, std::fs::Permissions::from_mode(0o600)).unwrap();
    server.works(&format!("scram@localhost?passfile={passfile}"), true).await;
}

#[tokio::test]
async fn the_first_primary_that_answers_is_chosen() {
    let server = Guarded::new().await;
    let place = Place::new();
    let mut standby = cluster(place.0.clone(), &[]).await;
    standby.start().await.unwrap();
    standby.stop(StopMode::Fast).await.unwrap();
    std::fs::write(standby.data_dir().join("pgdata/standby.signal"), "").unwrap();
    standby.start().await.unwrap();
    let (here, there) = (server.cluster.port(), standby.port());
    // A closed port, and a silent listener.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = silent.local_addr().unwrap().port();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();

    let connect = async |hosts: &str| {
        let uri = format!("postgres://postgres@{hosts}/postgres?connect_timeout=1&application_name=mine");
        Endpoints::parse(&uri).unwrap().connect("tuplewatch-1").await
    };
    let host = |port: u16| format!("127.0.0.1:{port}");
    let connection = connect(&[host(closed), host(there), host(mute), host(here)].join(",")).await.unwrap();
    let sql = "SELECT current_setting('port') || current_setting('application_name')";
    let row = connection.client.query_typed_one(sql, &[]).await.unwrap();
    assert_eq!(row.get::<_, String>(0), format!("{here}tuplewatch-1 mine"));
    assert_eq!(connection.endpoint().to_string(), format!("127.0.0.1:{here} (database postgres, user postgres)"));
    let again = connection.endpoint().connect().await.unwrap();
    assert!(!again.is_closed());

    let check = async |hosts: &str, definite: bool, expected: &str| {
        let error = connect(hosts).await.err().unwrap();
        assert_eq!(error.is_definite(), definite, "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    };
    check(&host(there), false, "it is a standby").await;
    check(&host(closed), false, "Nothing listens there").await;
    let endpoints = Endpoints::parse(&format!("postgres://postgres@{}/postgres", host(there))).unwrap();
    let endpoint = endpoints.resolve(&endpoints.hosts[0], "tests").await.unwrap().remove(0);
    let on_standby = endpoint.start(endpoint.log_on(Sessions::Sql, "tests").await.unwrap()).await.unwrap();
    for call in
        ["pg_current_wal_flush_lsn()", "pg_current_wal_insert_lsn()", "pg_current_wal_lsn()", "pg_walfile_name('0/1')"]
    {
        let error = on_standby.client.batch_execute(&format!("SELECT {call}")).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE), "{call}");
        assert!(!endpoint.sql_error(error).is_definite(), "{call} works once the standby is promoted");
    }
    check(&host(mute), false, "no answer within 1s").await;
    let uri = format!("postgres://postgres@{}/postgres?sslmode=require", host(there));
    let error = Endpoints::parse(&uri).unwrap().connect("tests").await.err().unwrap();
    assert!(error.is_definite() && error.to_string().contains("Turn on ssl"), "{error}");
    let barred = |port| format!("127.0.0.1:{port}/postgres?user=barred&connect_timeout=1&hostaddr=");
    let uris = [(format!("{},", host(there)), true), (format!("{},", host(closed)), false), (String::new(), true)];
    for (before, definite) in uris {
        let uri = format!("postgres://{before}{}", barred(here));
        let error = Endpoints::parse(&uri).unwrap().connect("tests").await.err().unwrap();
        // A standby makes no failure definite, and cannot have the missing role either.
        assert_eq!(error.is_definite(), definite, "{error}");
    }
    drop(silent);
}

#[tokio::test]
async fn unix_sockets_and_ended_connections_are_handled() {
    let mut server = Guarded::new().await;
    let connection = server.connect("postgres@localhost").await.unwrap();
    let dir = server.place.0.join("files");
    let sql = format!("ALTER SYSTEM SET unix_socket_directories = '{}'", dir.display());
    connection.client.batch_execute(&sql).await.unwrap();
    server.cluster.restart(StopMode::Fast).await.unwrap();
    let error = connection.client.batch_execute("SELECT 1").await.unwrap_err();
    assert!(!connection.endpoint().sql_error(error).is_definite());
    assert!(connection.is_closed());

    let encoded = dir.display().to_string().replace('/', "%2F");
    for uri in [
        server.uri(&format!("scram@{encoded}?sslmode=verify-full")),
        format!("host={} port={} user=scram dbname=postgres", dir.display(), server.cluster.port()),
    ] {
        let connection = Endpoints::parse(&uri).unwrap().connect("tests").await.unwrap();
        let mut walsender = connection.endpoint().replicate("tests").await.unwrap();
        assert!(walsender.identify().await.unwrap().wal_end > Lsn(0));
    }
    let missing = Endpoints::parse("postgres://u@%2Fmissing").unwrap().connect("tests").await.err().unwrap();
    assert!(!missing.is_definite() && missing.to_string().contains("no such socket"), "{missing}");
}

#[tokio::test]
async fn a_publication_with_any_name_can_be_replicated() {
    let server = Guarded::new().await;
    let connection = server.connect("postgres@localhost").await.unwrap();
    let sql = "CREATE PUBLICATION \"It's \"\"Mine\"\"\" FOR ALL TABLES; CREATE TABLE public.t (n int)";
    connection.client.batch_execute(sql).await.unwrap();
    let sql = "SELECT pg_create_logical_replication_slot('s', 'pgoutput')";
    connection.client.batch_execute(sql).await.unwrap();
    connection.client.batch_execute("INSERT INTO public.t VALUES (1)").await.unwrap();
    let mut walsender = connection.endpoint().replicate("tests").await.unwrap();
    walsender.start("s", "It's \"Mine\"").await.unwrap();
    let mut events = Vec::new();
    while !events.iter().any(|event| matches!(event, Event::Commit { .. })) {
        walsender.next(&mut events).await.unwrap();
    }
    // After a large transaction, a keepalive message ends the pauses.
    connection.client.batch_execute("INSERT INTO public.t SELECT generate_series(1, 10000)").await.unwrap();
    while !walsender.is_behind() {
        walsender.next(&mut events).await.unwrap();
    }
    while walsender.is_behind() {
        walsender.next(&mut events).await.unwrap();
    }
    let mut walsender = connection.endpoint().replicate("tests").await.unwrap();
    let error = walsender.start("missing", "none").await.unwrap_err();
    let error = connection.endpoint().replication_error(error);
    assert!(error.is_definite() && error.sqlstate() == Some(&SqlState::UNDEFINED_OBJECT), "{error}");
    assert!(error.to_string().contains("tuplewatch serve"), "{error}");
}
