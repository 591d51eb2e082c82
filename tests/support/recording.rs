//! What a server sends, as a text of lines that is kept in `tests/recorded/`.
//!
//! Bytes are written as they are where they are printable, and otherwise as `\n`, `\\` or `\x00`. `\{9}` says that the byte before it is
//! there nine times. So two lines are equal exactly if their bytes are, but for what is left out on purpose:
//!
//! - A native snap token is opaque: `snap-token` and dots stand for it, as many bytes as it has. Permify's form is the id of a
//!   transaction, and ids depend on what else the cluster did: `xid-1` stands for the first one that comes, `xid-2` for the next.
//! - A transaction that came in several messages is one line, for where it is cut is not promised: the number of its changes, the digest
//!   of their bytes, and the first and the last of them.
//! - The `date` of HTTP, and the comments of an idle event stream, depend on the time.

use super::raw_watch::{changes, field, messages};
use super::wait::within;
use base64::prelude::{BASE64_STANDARD_NO_PAD as BASE64, Engine as _};
use h2::RecvStream;
use http::{HeaderMap, Response, StatusCode};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use std::path::Path;
use tuplewatch::model::snap_token::SnapToken;

/// With this variable recordings are written instead of compared. Its value names what is recorded.
const RECORD: &str = "TUPLEWATCH_RECORD";
/// A stream is read up to the message that holds this, or to its end.
const THE_END: &[u8] = b"the-end";
/// Characters of a native token, and of Permify's eight bytes.
const NATIVE: usize = 60;
const PERMIFY: usize = 12;
/// From so many equal bytes on only their number is written.
const RUN_MIN: usize = 8;
/// Characters of a line that are shown beside the first one that differs.
const SHOWN: usize = 200;

/// Lines of one recording. Those that are not indented say what was asked.
#[derive(Default)]
pub(crate) struct Recording {
    lines: Vec<String>,
    /// Ids of transactions in the order in which they came.
    ids: Vec<u64>,
}

impl Recording {
    /// Says what the next answers are to.
    pub(crate) fn ask(&mut self, asked: &str) {
        self.lines.push(text(asked.as_bytes()));
    }

    /// An answer over gRPC. Returns the lines of its messages and of its end.
    pub(crate) async fn grpc(&mut self, response: Response<RecvStream>) -> Vec<String> {
        self.head(response.status(), response.headers());
        let began = self.lines.len();
        let (messages, trailers) = within("the end of a stream", messages(response.into_body(), is_the_end)).await;
        self.transactions(&messages);
        self.headers(&trailers);
        self.lines[began..].to_vec()
    }

    /// The lines that [`Self::grpc`] would add, with the same names for tokens.
    pub(crate) async fn grpc_again(&self, response: Response<RecvStream>) -> Vec<String> {
        Self { lines: Vec::new(), ids: self.ids.clone() }.grpc(response).await
    }

    /// An answer over HTTP.
    pub(crate) async fn http(&mut self, mut response: reqwest::Response) {
        self.head(response.status(), response.headers());
        let is_event_stream = response.headers().get("content-type").is_some_and(|kind| kind == "text/event-stream");
        let last = if is_event_stream { &b"\n\n"[..] } else { b"\n" };
        let mut body = Vec::new();
        while !(body.ends_with(last) && is_the_end(&body)) {
            let Some(chunk) = within("the end of a body", response.chunk()).await.unwrap() else { break };
            body.extend_from_slice(&chunk);
        }
        let body = String::from_utf8(body).unwrap();
        let events: Vec<&str> = body.split("\n\n").filter(|event| *event != ":").collect();
        for line in events.join("\n\n").split('\n') {
            let line = self.text(line.as_bytes());
            self.lines.push(format!("  |{line}"));
        }
    }

    fn head(&mut self, status: StatusCode, headers: &HeaderMap) {
        self.lines.push(format!("  {}", status.as_u16()));
        self.headers(headers);
    }

    /// In the order of their names. Nothing says in which they come.
    fn headers(&mut self, headers: &HeaderMap) {
        let mut sorted: Vec<_> = headers.iter().filter(|(name, _)| *name != "date").collect();
        sorted.sort_by_key(|(name, _)| name.as_str());
        for (name, value) in sorted {
            let value = if name.as_str().ends_with("-bin") {
                let bytes = BASE64.decode(value).unwrap();
                assert_eq!(BASE64.encode(&bytes), value.to_str().unwrap(), "{name} is written as gRPC recommends");
                self.text(&bytes)
            } else {
                self.text(value.as_bytes())
            };
            self.lines.push(format!("  {name}: {value}"));
        }
    }

    /// A line for each transaction.
    fn transactions(&mut self, messages: &[Vec<u8>]) {
        let (mut begun, mut before): (Vec<&[u8]>, _) = (Vec::new(), None);
        for message in messages {
            let token = token(message);
            let is_inside = match &token {
                SnapToken::Position { place, .. } => place.position.steps > 0,
                // Of the transaction before.
                token => before.as_ref() == Some(token),
            };
            begun.push(message);
            if !is_inside {
                let line = if begun.len() == 1 { format!("  {}", self.text(message)) } else { cut(&begun) };
                self.lines.push(line);
                before = Some(token);
                begun.clear();
            }
        }
        assert!(begun.is_empty(), "a transaction that is not whole");
    }

    /// These bytes as text, without what is left out.
    fn text(&mut self, bytes: &[u8]) -> String {
        text(&self.without_tokens(bytes))
    }

    /// What stands for tokens has the same length, so that every length in a message stays what it is.
    fn without_tokens(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len());
        let mut rest = bytes;
        while let Some((first, behind)) = rest.split_first() {
            // The first byte is the version, and of eight bytes base64 fills up the last group: few places have to be decoded.
            if *first == b'A' && parse(rest, NATIVE).is_some_and(|token| token.source().is_some()) {
                out.extend_from_slice(format!("{:.<NATIVE$}", "snap-token").as_bytes());
                rest = &rest[NATIVE..];
            } else if rest.get(PERMIFY - 1) == Some(&b'=')
                && let Some(SnapToken::Xid(xid)) = parse(rest, PERMIFY)
                && u32::try_from(xid.0).is_ok()
            {
                let n = self.ids.iter().position(|id| *id == xid.0).unwrap_or_else(|| {
                    self.ids.push(xid.0);
                    self.ids.len() - 1
                });
                out.extend_from_slice(format!("{:.<PERMIFY$}", format!("xid-{}", n + 1)).as_bytes());
                rest = &rest[PERMIFY..];
            } else {
                out.push(*first);
                rest = behind;
            }
        }
        out
    }

    /// Compares with the recording of this name, or writes it.
    pub(crate) fn compare(self, name: &str) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/recorded").join(name).with_extension("txt");
        if let Ok(build) = std::env::var(RECORD) {
            let mut recorded = format!("# What {build} sent. `tests/support/recording.rs` says how to read it.\n");
            self.lines.iter().for_each(|line| writeln!(recorded, "{line}").unwrap());
            std::fs::write(path, recorded).unwrap();
            return;
        }
        let recorded = std::fs::read_to_string(&path).unwrap();
        let recorded: Vec<&str> = recorded.lines().collect();
        let sent = [vec![recorded[0].to_owned()], self.lines].concat();
        assert_same(&format!("{name}.txt"), &recorded, &sent);
    }
}

/// Fails at the first line that differs, and says what was asked there.
pub(crate) fn assert_same(what: &str, expected: &[impl AsRef<str>], sent: &[String]) {
    let mut asked = "";
    for n in 0..expected.len().max(sent.len()) {
        let expected = expected.get(n).map_or("(nothing more)", AsRef::as_ref);
        let sent = sent.get(n).map_or("(nothing more)", String::as_str);
        if !expected.starts_with(' ') {
            asked = expected;
        }
        assert!(expected == sent, "{what}, line {}, {asked}: {}", n + 1, difference(expected, sent));
    }
}

/// Where two lines begin to differ.
fn difference(expected: &str, sent: &str) -> String {
    let same = expected.bytes().zip(sent.bytes()).take_while(|(a, b)| a == b).count();
    let shown = |line: &str| line.get(same.saturating_sub(SHOWN)..(same + SHOWN).min(line.len())).unwrap().to_owned();
    format!("they differ at character {same}\n  recorded {}\n  sent     {}", shown(expected), shown(sent))
}

fn is_the_end(bytes: &[u8]) -> bool {
    bytes.windows(THE_END.len()).any(|part| part == THE_END)
}

/// The token that begins here and has so many characters.
fn parse(bytes: &[u8], length: usize) -> Option<SnapToken> {
    std::str::from_utf8(bytes.get(..length)?).ok()?.parse().ok()
}

fn token(message: &[u8]) -> SnapToken {
    std::str::from_utf8(field(field(message, 1), 1)).unwrap().parse().unwrap()
}

/// The line of a transaction that came in several messages.
fn cut(messages: &[&[u8]]) -> String {
    let (mut count, mut digest, mut first, mut last) = (0, Sha256::new(), None, None);
    for message in messages {
        let content = field(message, 1);
        // The token comes first, with one byte for its field and one for its length.
        digest.update(&content[2 + field(content, 1).len()..]);
        changes(message, |change| {
            count += 1;
            first = first.or(Some(change));
            last = Some(change);
        });
    }
    let digest: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let [first, last] = [first, last].map(|change| text(change.unwrap()));
    format!("  {count} changes, SHA-256 {digest}, from {first} to {last}")
}

fn text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for run in bytes.chunk_by(|a, b| a == b) {
        let byte = match run[0] {
            b'\n' => r"\n".to_owned(),
            b'\\' => r"\\".to_owned(),
            printable @ b' '..=b'~' => char::from(printable).to_string(),
            other => format!(r"\x{other:02x}"),
        };
        if run.len() < RUN_MIN {
            text.push_str(&byte.repeat(run.len()));
        } else {
            write!(text, "{byte}\\{{{}}}", run.len()).unwrap();
        }
    }
    text
}
