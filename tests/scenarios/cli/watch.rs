//! `watch` and `token`.

use super::process::{Process, program, signal, tuplewatch};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::{eventually, within};
use serde_json::{Value as Json, json};
use std::process::Stdio;
use tokio::net::TcpListener;
use tuplewatch::model::snap_token::SnapToken;

/// `watch` of a server, in the background.
pub(crate) fn watch(server: &str, flags: &[&str]) -> Process {
    let mut command = program(&std::env::temp_dir());
    command.args(["watch", "--server", server]).args(flags);
    Process::start(command)
}

fn url(server: &Server) -> String {
    server.endpoint().uri().to_string()
}

#[tokio::test]
async fn each_change_is_printed_on_a_line() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    sql.insert("t1", "before").await;
    let (text, lines) =
        (watch(&url(&server), &["--tenant", "t1"]), watch(&url(&server), &["--tenant", "t1", "--output", "json"]));
    for process in [&text, &lines] {
        process.until_logged(&format!("watching tenant t1 on {} from now; Ctrl-C ends", url(&server))).await;
    }
    sql.run(
        "BEGIN; INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'doc', '1', 'viewer', 'team', 'a', 'member');
         INSERT INTO tuplewatch.attributes VALUES ('t1', 'doc', '1', 'public',
             '{\"@type\": \"type.googleapis.com/base.v1.BooleanValue\", \"data\": true}');
         DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'before'; COMMIT",
    )
    .await;
    sql.insert("t1", "last").await;
    let is_last = |line: &String| line.contains("last");
    crate::support::wait::eventually("all is printed", async || {
        text.printed().iter().any(is_last) && lines.printed().iter().any(is_last)
    })
    .await;

    let printed = text.printed();
    let shown: Vec<&str> = printed.iter().map(|line| line.split_once(' ').unwrap().1).collect();
    assert_eq!(
        shown,
        [
            "+ doc:1#viewer@team:a#member",
            "+ doc:1$public = true",
            "- document:before#viewer@user:u",
            "+ document:last#viewer@user:u"
        ]
    );
    let printed: Vec<Json> = lines.printed().iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [transaction, last] = &printed[..] else { panic!("{printed:?}") };
    let subject = |kind: &str, id: &str, relation: &str| json!({"type": kind, "id": id, "relation": relation});
    assert_eq!(
        transaction["changes"]["tuple_changes"],
        json!([
            { "operation": "OPERATION_CREATE", "tuple": {
                "entity": {"type": "doc", "id": "1"}, "relation": "viewer", "subject": subject("team", "a", "member") } },
            { "operation": "OPERATION_CREATE", "attribute": {
                "entity": {"type": "doc", "id": "1"}, "attribute": "public",
                "value": {"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true} } },
            { "operation": "OPERATION_DELETE", "tuple": {
                "entity": {"type": "document", "id": "before"}, "relation": "viewer", "subject": subject("user", "u", "") } },
        ])
    );
    assert_eq!(last["changes"]["tuple_changes"].as_array().unwrap().len(), 1);

    // A printed token resumes with the rest.
    let token = transaction["changes"]["snap_token"].as_str().unwrap();
    let resumed = watch(&url(&server), &["--tenant", "t1", "--snap-token", token]);
    assert!(resumed.prints(1).await[0].ends_with(" + document:last#viewer@user:u"));
    resumed.until_logged(&format!(" from token …{}; Ctrl-C ends", &token[token.len() - 10..])).await;
    for mut process in [resumed, text, lines] {
        process.signal("INT");
        assert_eq!(process.ended().await.code(), Some(0));
        process.until_logged("to resume from here:").await;
        assert_eq!(process.logged().len(), 3, "where it began, and how to go on");
    }
}

/// The last line of a watch is a command that works.
#[tokio::test]
async fn watch_ends_with_the_command_that_resumes_it() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let start = || {
        let mut command = program(&std::env::temp_dir());
        // Cargo sets this variable, and the printed command would then call cargo.
        command.env_remove("CARGO_PKG_NAME").args(["watch", "--tenant", "t1", "--server", &url(&server)]);
        Process::start(command)
    };
    let last_words = async |mut process: Process| {
        process.signal("INT");
        process.ended().await;
        process.until_logged("--snap-token").await;
        process.logged().last().unwrap().trim().to_owned()
    };
    let watch = start();
    watch.until_logged("watching tenant t1").await;
    // Nothing was delivered yet, so the command resumes from the start.
    let before_all = last_words(watch).await;
    let watch = start();
    watch.until_logged("watching tenant t1").await;
    sql.insert("t1", "a").await;
    watch.prints(1).await;
    let after_a = last_words(watch).await;
    sql.insert("t1", "b").await;
    for (command, ids) in [(before_all, &["a", "b"][..]), (after_a, &["b"])] {
        let mut shell = tokio::process::Command::new("sh");
        shell.args(["-c", &format!("exec {command}")]).kill_on_drop(true);
        let printed = Process::start(shell).prints(ids.len()).await;
        let shown: Vec<&str> = printed.iter().map(|line| line.split_once(" + ").unwrap().1).collect();
        assert_eq!(shown, ids.iter().map(|id| format!("document:{id}#viewer@user:u")).collect::<Vec<_>>());
    }
}

/// `watch | head`: it ends when its reader ends.
#[tokio::test]
async fn watch_ends_when_its_output_is_closed() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut command = program(&std::env::temp_dir());
    command.args(["watch", "--tenant", "t1", "--server", &url(&server)]);
    let mut watch = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    drop(watch.stdout.take());
    let mut n = 0;
    eventually("it ends", async || {
        sql.insert("t1", &format!("nobody-reads-{n}")).await;
        n += 1;
        watch.try_wait().unwrap().is_some()
    })
    .await;
    assert_eq!(watch.wait().await.unwrap().code(), Some(0));
}

/// A reader that has stopped does not delay the end of a watch, and a reader that continues gets complete lines.
#[tokio::test]
async fn watch_ends_on_a_signal_while_nobody_reads_its_output() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    for is_read_again in [false, true] {
        let mut command = program(&std::env::temp_dir());
        command.args(["watch", "--tenant", "t1", "--output", "json", "--server", &url(&server)]);
        let (out, writer) = std::io::pipe().unwrap();
        // If it is not read again, both outputs share a pipe, so that its last line has no reader either.
        let same = || (out.try_clone().unwrap(), writer.try_clone().unwrap());
        let (err, err_writer) = if is_read_again { std::io::pipe().unwrap() } else { same() };
        let mut watch = command.stdout(writer).stderr(err_writer).spawn().unwrap();
        drop(command);
        let holds = |out: &std::io::PipeReader| rustix::io::ioctl_fionread(out).unwrap();
        eventually("it begins", async || holds(&err) > 0).await;
        // One message, larger than a pipe.
        sql.insert_large("t1", 1..=200).await;
        sql.run("DELETE FROM tuplewatch.attributes").await;
        eventually("the pipe fills up", async || holds(&out) > 1 << 15).await;
        signal(watch.id().unwrap(), "TERM");
        if is_read_again {
            let read = tokio::task::spawn_blocking(move || std::io::read_to_string(out));
            let printed = within("all of it", read).await.unwrap().unwrap();
            let is_whole = |line: &str| serde_json::from_str::<Json>(line).is_ok();
            assert!(printed.lines().all(is_whole) && printed.ends_with('\n'), "{printed}");
        }
        assert_eq!(within("it ends", watch.wait()).await.unwrap().code(), Some(0));
    }
}

#[tokio::test]
async fn watch_ends_on_a_refusal_and_waits_for_an_absent_server() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[]).await;
    let address = url(&server);
    for (flags, expected) in [
        (&["--tenant", "nobody"][..], "tenant 'nobody' does not exist"),
        (&["--tenant", ""], "the tenant id is empty"),
        (&["--tenant", "t1", "--snap-token", "garbage"], "pass it back exactly as it was received"),
        (&["--tenant", "t1", "--snap-token", "?"], "the snap token is not base64"),
    ] {
        let refused = ["watch", "--server", &address];
        tuplewatch(&[&refused[..], flags].concat()).await.failed(&["tuplewatch: the server refused", expected]);
    }

    // A server that is away for a while.
    server.kill_9().await;
    let mut patient = watch(&address, &["--tenant", "t1"]);
    patient.until_logged(": Connection refused; reconnecting in 0.1 s, then at least every 5 s").await;
    patient.until_logged(&address.trim_end_matches('/')["http://".len()..]).await;
    server.start().await;
    patient.until_logged("watching tenant t1 on ").await;
    assert_eq!(patient.logged().len(), 2, "once, however often it was tried");

    // From here on nothing is lost, although nothing was delivered yet.
    let sql = postgres.sql().await;
    server.kill_9().await;
    patient.until_logged("; reconnecting").await;
    sql.insert("t1", "a").await;
    server.start().await;
    patient.until_logged("connected again, resuming after token …").await;
    assert!(patient.prints(1).await[0].ends_with("+ document:a#viewer@user:u"));
    sql.run("TRUNCATE tuplewatch.relation_tuples").await;
    patient.until_logged("GAP: the history of tenant t1 is not continuous").await;
    patient.until_logged(". Changes are missing here; resuming after token …").await;
    assert!(!patient.logged().iter().any(|line| line.contains("next_snap_token")), "that is for programs");
    sql.insert("t1", "b").await;
    assert!(patient.prints(2).await[1].ends_with("+ document:b#viewer@user:u"));
    patient.signal("INT");
    assert_eq!(patient.ended().await.code(), Some(0));
}

/// A listener of another program, with this answer.
async fn foreign(answer: &'static [u8]) -> u16 {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = connection.read(&mut request).await;
            let _ = connection.write_all(answer).await;
            // Stay open until the other end has read it.
            while connection.read(&mut request).await.is_ok_and(|read| read > 0) {}
        }
    });
    port
}

/// Whether the text contains no phrase of a library.
fn is_plain(printed: &str) -> bool {
    let raw =
        ["transport error", "h2 protocol error", "status:", "http2 error", "os error", "tcp connect error", "rustls"];
    !raw.iter().any(|text| printed.contains(text))
}

#[tokio::test]
async fn watch_ends_on_a_lasting_connection_error() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let tls_to_plain = format!("https://{}", server.address());
    let http1 = format!("http://127.0.0.1:{}", foreign(b"HTTP/1.1 400 Bad Request\r\n\r\n").await);
    // A fatal alert, as a TLS server sends it after plain text.
    let tls = format!("http://127.0.0.1:{}", foreign(b"\x15\x03\x03\x00\x02\x02\x0a").await);
    for (address, expected) in [
        (&http1, "it does not speak gRPC without TLS: write https://"),
        (&tls, "it does not speak gRPC without TLS: write https://"),
        (&tls_to_plain, "it does not speak TLS: write http://"),
    ] {
        let ran = tuplewatch(&["watch", "--tenant", "t1", "--server", address]).await;
        assert!(is_plain(&ran.err), "{ran:?}");
        ran.failed(&[&format!("tuplewatch: cannot watch {address}: {expected}")]);
        // With a single attempt, the connection may be closed before the answer with the cause.
        let ran = tuplewatch(&["health", "--server", address]).await;
        assert!(is_plain(&ran.err), "{ran:?}");
        ran.failed(&[&format!("tuplewatch: cannot reach {address}: ")]);
    }
    for address in ["http://127.0.0.1:99999", "127.0.0.1:3478", "http://h:1/path", "ftp://h:1"] {
        tuplewatch(&["watch", "--tenant", "t1", "--server", address]).await.misused(&["write http://host:port"]);
        tuplewatch(&["health", "--server", address]).await.misused(&["write http://host:port"]);
    }
    tuplewatch(&["watch", "--tenant", "a b", "--server", &url(&server)])
        .await
        .failed(&["the server refused: the tenant id must be"]);
}

#[tokio::test]
async fn watch_ends_if_disabled_and_waits_for_a_free_place() {
    let postgres = Postgres::start().await;
    let mut server = Server::serve(&postgres, &[("--service-watch-subscribers-max", "1")]).await;
    let address = url(&server);
    let stream = server.watch("t1", "").await;
    let waiting = watch(&address, &["--tenant", "t1"]);
    waiting.until_logged("its limit of open streams (service.watch.subscribers_max); reconnecting in 1 s").await;
    drop(stream);
    waiting.until_logged("watching tenant t1 on ").await;

    server.terminate().await;
    server.ended().await;
    waiting.until_logged("; reconnecting in ").await;
    server.set("--service-watch-enabled", "false");
    server.start().await;
    let mut waiting = waiting;
    assert_eq!(waiting.ended().await.code(), Some(1));
    waiting.until_logged("the server refused: Watch is disabled in this server's configuration").await;
    assert!(waiting.logged().iter().all(|line| is_plain(line)));
}

#[tokio::test]
async fn the_token_command_explains_tokens() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let sql = postgres.sql().await;
    let mut stream = server.watch("t1", "").await;
    sql.insert("t1", "a").await;
    let position = stream.expect(Change::create(Change::viewer("a"))).await.token;
    let SnapToken::Position { place, commit_time, .. } = position.parse().unwrap() else { panic!() };
    let printed = tuplewatch(&["token", &position]).await.succeeded();
    for line in [
        "kind:        position\n".to_owned(),
        format!("includes:    everything that committed before {}\n", place.position.lsn),
        format!("commit time: {commit_time} (of the last transaction in it)\n"),
    ] {
        assert!(printed.contains(&line), "no {line} in\n{printed}");
    }
    let source = printed.lines().find(|line| line.starts_with("source:")).unwrap().to_owned();

    let mut rows = sql.rows("SELECT tuplewatch.snap_token(), pg_current_xact_id()::text").await.remove(0);
    let (xid, transaction) = (rows.remove(1), rows.remove(0));
    let printed = tuplewatch(&["token", &transaction]).await.succeeded();
    for line in [
        "kind:        transaction\n".to_owned(),
        format!("includes:    everything up to and with transaction {xid}\n"),
        format!("{source}\n"),
    ] {
        assert!(printed.contains(&line), "no {line} in\n{printed}");
    }

    let mut changed = position.clone();
    changed.replace_range(20..21, if position.as_bytes()[20] == b'A' { "B" } else { "A" });
    let (cut, doubled, long) = (&position[..40], position.repeat(2), "A".repeat(100_000));
    for (garbage, expected) in [
        ("", "damaged, cut short, or of an unknown version"),
        (cut, "damaged, cut short, or of an unknown version"),
        (&changed, "damaged, cut short, or of an unknown version"),
        (&doubled, "damaged, cut short, or of an unknown version"),
        (&long, "longer than 65536 bytes"),
        ("größer", "is not base64"),
        ("a b", "is not base64"),
    ] {
        tuplewatch(&["token", garbage]).await.misused(&[expected]);
    }
}
