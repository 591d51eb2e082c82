//! `tuplewatch token`: explains a snap token, without a server.

use super::{examples, say};
use crate::model::scope::Place;
use crate::model::snap_token::SnapToken;
use std::fmt::Write as _;

#[derive(Debug, clap::Args)]
#[command(after_help = examples::TOKEN)]
pub(super) struct TokenArgs {
    /// The token as it was received
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
    let source = token.source().map(|source| hex(&source.0)).unwrap_or_default();
    match token {
        SnapToken::Position { timeline, place, commit_time, .. } => {
            let before = format!("everything that committed before {}", place.position.lsn);
            let place = match (&place.within, place.position.steps) {
                (None, 0) => before,
                (None, steps) => format!("{before}, and the first {steps} row steps of the transaction there"),
                (Some((tenant, Place::WHOLE)), _) => {
                    format!("{before}, and of the transaction there the tenants up to '{tenant}'")
                }
                (Some((tenant, steps)), _) => format!(
                    "{before}, and of the transaction there the tenants before '{tenant}', and the first {steps} row steps of \
                     '{tenant}'"
                ),
            };
            let time = if commit_time.0 == 0 { "unknown".to_owned() } else { commit_time.to_string() };
            format!(
                "kind:        position\nincludes:    {place}\ncommit time: {time} (of the last transaction in it)\n\
                 source:      {source}\ntimeline:    {}",
                hex(&timeline.0)
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
            "kind:        Permify's, of a snapshot\nincludes:    transaction {xid}, and everything visible to its snapshot\nsnapshot:    {snapshot}"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::change::TenantId;
    use crate::model::lsn::{CommitLsn, CommitTime, Lsn, Position};
    use crate::model::timeline::{SourceId, TimelineId};

    #[test]
    fn tokens_of_every_kind_are_explained() {
        let position = Position::inside(CommitLsn(Lsn(0x16_0000_0000)), 4);
        let explain_place = |place| {
            let (source, timeline) = (SourceId([1; 8]), TimelineId([2; 8]));
            let token = SnapToken::Position { source, timeline, place, commit_time: CommitTime(1) };
            explain(&token.to_string().parse().unwrap())
        };
        let text = explain_place(Place::inside(position, TenantId::new("t1").unwrap(), 9));
        assert!(
            text.contains("before 16/0, and of the transaction there the tenants before 't1', and the first 9 row"),
            "{text}"
        );
        let text = explain_place(position.into());
        assert!(text.contains("before 16/0, and the first 4 row steps"), "{text}");
        assert!(text.contains("2000-01-01T00:00:00.000001Z"), "{text}");
        let text = explain(&"MgMAAAAAAAA=".parse().unwrap());
        assert!(text.contains("up to and with transaction 818"), "{text}");
    }
}
