//! `tuplewatch token`: explains one, without a server.

use super::{examples, say};
use crate::model::snap_token::SnapToken;
use std::fmt::Write as _;

#[derive(Debug, clap::Args)]
#[command(after_help = examples::TOKEN)]
pub(super) struct TokenArgs {
    /// The token, as it was received
    token: SnapToken,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

pub(super) fn run(args: &TokenArgs) {
    say(&explain(&args.token));
}

fn explain(token: &SnapToken) -> String {
    let source = token.source().map(|source| hex(&source)).unwrap_or_default();
    match token {
        SnapToken::Position { timeline, position, commit_time, .. } => {
            let place = match position.steps {
                0 => format!("everything that committed before {}", position.lsn),
                steps => format!(
                    "everything that committed before {}, and the first {steps} row steps of the transaction there",
                    position.lsn
                ),
            };
            let time = if commit_time.0 == 0 { "unknown".to_owned() } else { commit_time.to_string() };
            format!(
                "kind:        position\nincludes:    {place}\ncommit time: {time} (of the last transaction in it)\n\
                 source:      {source}\ntimeline:    {}",
                hex(timeline)
            )
        }
        SnapToken::Transaction { id, xid, floor, .. } => format!(
            "kind:        transaction\nincludes:    everything up to and with transaction {xid}\n\
             committed:   not before {floor}\nsource:      {source}\nid:          {}",
            hex(&id.0)
        ),
        SnapToken::Xid(xid) => {
            format!(
                "kind:        Permify's, of a transaction\nincludes:    everything up to and with transaction {xid}"
            )
        }
        SnapToken::Snapshot { xid, snapshot } => format!(
            "kind:        Permify's, of a snapshot\nincludes:    transaction {xid}, and what it saw\nsnapshot:    {snapshot}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::lsn::CommitLsn;
    use crate::model::lsn::{CommitTime, Lsn, Position};

    #[test]
    fn tokens_of_every_kind_are_explained() {
        let position = Position::inside(CommitLsn(Lsn(0x16_0000_0000)), 4);
        let token = SnapToken::Position { source: [1; 8], timeline: [2; 8], position, commit_time: CommitTime(1) };
        let text = explain(&token.to_string().parse().unwrap());
        assert!(text.contains("before 16/0, and the first 4 row steps"), "{text}");
        assert!(text.contains("2000-01-01T00:00:00.000001Z"), "{text}");
        let text = explain(&"MgMAAAAAAAA=".parse().unwrap());
        assert!(text.contains("up to and with transaction 818"), "{text}");
    }
}
