//! Changes as lines of text.
//!
//! Into a pipe or a file, a line says everything by itself, whatever stands around it: it is for `grep` and `cut`, and stays as it
//! is. On a terminal lines are read together, so that what repeats is left out: the day is a line of its own where it changes, and
//! of the changes of one message only the first has the time.
//!
//! ```text
//! 2026-03-01T12:31:07.123456Z + document:1#viewer@user:ada        2026-03-01 (UTC)
//! 2026-03-01T12:31:07.123456Z - document:2#viewer@user:ada        12:31:07.123 + document:1#viewer        @user:ada
//!                                                                             - document:2#viewer        @user:ada
//! ```

use super::super::terminal::{self, Style, harmless};
use super::json::any_to_json;
use crate::api::grpc::proto::data_change::{Operation, Type};
use crate::api::grpc::proto::{self, DataChange, DataChanges};
use crate::model::snap_token::SnapToken;
use serde_json::Value as Json;

pub(super) struct Lines {
    style: Style,
    layout: Layout,
}

enum Layout {
    /// Every line by itself.
    Whole,
    /// For who reads along: the day that was said last, and where subjects begin.
    Terminal { day: String, column: usize },
}

/// Subjects begin at this column, or a later one from the first change on that needs it, but not beyond the last: what is longer
/// stands out by itself.
const COLUMN_MIN: usize = 24;
const COLUMN_MAX: usize = 48;
/// The width of `12:31:07.123`.
const TIME_WIDTH: usize = 12;

impl Lines {
    pub(super) fn to_stdout() -> Self {
        Self::new(Style::of_stdout(), terminal::stdout_is_terminal())
    }

    fn new(style: Style, is_terminal: bool) -> Self {
        let layout =
            if is_terminal { Layout::Terminal { day: String::new(), column: COLUMN_MIN } } else { Layout::Whole };
        Self { style, layout }
    }

    /// The lines of a message.
    pub(super) fn message(&mut self, changes: &DataChanges) -> String {
        let time = match changes.snap_token.parse() {
            Ok(SnapToken::Position { commit_time, .. }) => commit_time.to_string(),
            _ => String::new(),
        };
        let mut text = String::new();
        for (nth, change) in changes.tuple_changes.iter().enumerate() {
            self.add(&mut text, &time, nth == 0, change);
        }
        text
    }

    fn add(&mut self, text: &mut String, time: &str, is_first: bool, change: &DataChange) {
        let (left, right) = sides(change);
        let (time, left) = match &mut self.layout {
            Layout::Whole => (time.to_owned(), left),
            Layout::Terminal { day, column } => {
                let (date, time) = time.split_once('T').unwrap_or_default();
                if is_first && date != day {
                    date.clone_into(day);
                    text.push_str(&self.style.faint(&format!("{date} (UTC)")));
                    text.push('\n');
                }
                let time = if is_first { time.get(..TIME_WIDTH).unwrap_or_default() } else { "" };
                *column = (*column).max(left.chars().count()).min(COLUMN_MAX);
                (format!("{time:TIME_WIDTH$}"), format!("{left:width$}", width = *column))
            }
        };
        let what = match change.operation() {
            Operation::Create => self.style.created(&format!("+ {left}{right}")),
            Operation::Delete => self.style.deleted(&format!("- {left}{right}")),
            Operation::Unspecified => self.style.warning(&format!("? {left}{right}")),
        };
        text.push_str(&format!("{} {what}\n", self.style.faint(&time)));
    }
}

/// What changed, and what it is now or was: `document:1#viewer` and `@user:ada`.
fn sides(change: &DataChange) -> (String, String) {
    let entity = |entity: Option<&proto::Entity>| {
        entity.map_or_else(String::new, |entity| format!("{}:{}", entity.r#type, entity.id))
    };
    let (left, right) = match &change.r#type {
        Some(Type::Tuple(tuple)) => {
            let subject = tuple.subject.clone().unwrap_or_default();
            let relation = if subject.relation.is_empty() { String::new() } else { format!("#{}", subject.relation) };
            let left = format!("{}#{}", entity(tuple.entity.as_ref()), tuple.relation);
            (left, format!("@{}:{}{relation}", subject.r#type, subject.id))
        }
        Some(Type::Attribute(attribute)) => {
            let value = attribute.value.as_ref().map_or(Json::Null, any_to_json);
            let data = value.get("data").unwrap_or(&Json::Null);
            let left = format!("{}${}", entity(attribute.entity.as_ref()), attribute.attribute);
            (left, format!(" = {data}"))
        }
        None => ("an empty change".to_owned(), String::new()),
    };
    (harmless(&left).into_owned(), harmless(&right).into_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::model::change::{Attribute, AttributeValue, Fact, Operation, Tuple, encode};
    use crate::model::lsn::{CommitTime, Lsn, Position};
    use prost::Message as _;

    fn change(operation: Operation, fact: &Fact<'_>) -> DataChange {
        let mut bytes = Vec::new();
        encode(operation, fact, &mut bytes);
        let response =
            proto::WatchResponse::decode(&*crate::api::encode::base_v1::response("t", &bytes).unwrap()).unwrap();
        response.changes.unwrap().tuple_changes.remove(0)
    }

    fn tuple(operation: Operation, entity_id: &str) -> DataChange {
        let tuple = Tuple {
            entity_type: "doc",
            entity_id,
            relation: "viewer",
            subject_type: "team",
            subject_id: "a",
            subject_relation: "member",
        };
        change(operation, &Fact::Tuple(tuple))
    }

    pub(in super::super) fn viewer() -> DataChange {
        tuple(Operation::Create, "1")
    }

    pub(in super::super) fn scores() -> DataChange {
        let value = AttributeValue::DoubleArray(vec![1.5, f64::INFINITY]);
        let attribute = Attribute { entity_type: "doc", entity_id: "1", attribute: "scores", value };
        change(Operation::Create, &Fact::Attribute(attribute))
    }

    const DAY_MICROS: i64 = 86_400_000_000;

    fn message(commit_micros: i64, tuple_changes: Vec<DataChange>) -> DataChanges {
        let position = Position::at(Lsn(1));
        let commit_time = CommitTime(commit_micros);
        let token = SnapToken::Position { source: [1; 8], timeline: [2; 8], position, commit_time };
        DataChanges { snap_token: token.to_string(), tuple_changes }
    }

    #[test]
    fn a_line_in_a_file_is_complete() {
        let message = message(1, vec![viewer(), scores(), tuple(Operation::Delete, "1")]);
        let plain = "2000-01-01T00:00:00.000001Z + doc:1#viewer@team:a#member\n\
                     2000-01-01T00:00:00.000001Z + doc:1$scores = [1.5,\"Infinity\"]\n\
                     2000-01-01T00:00:00.000001Z - doc:1#viewer@team:a#member\n";
        assert_eq!(Lines::new(Style::PLAIN, false).message(&message), plain);
        let colored = Lines::new(Style::COLORED, false).message(&message);
        assert_eq!(anstream::adapter::strip_str(&colored).to_string(), plain);
        assert!(colored.contains("\x1b[32m+ doc:1#viewer@team:a#member\x1b[0m\n"), "{colored:?}");
        assert!(colored.contains("\x1b[31m- doc:1#viewer@team:a#member\x1b[0m\n"), "{colored:?}");
    }

    #[test]
    fn repeated_columns_are_left_out_on_a_terminal() {
        let mut lines = Lines::new(Style::PLAIN, true);
        let first = lines.message(&message(1, vec![viewer(), scores()]));
        assert_eq!(
            first,
            "2000-01-01 (UTC)\n\
             00:00:00.000 + doc:1#viewer            @team:a#member\n             \
             + doc:1$scores             = [1.5,\"Infinity\"]\n"
        );
        let wide = "a".repeat(20);
        let second = lines.message(&message(DAY_MICROS - 1, vec![tuple(Operation::Delete, &wide), viewer()]));
        assert_eq!(
            second,
            format!(
                "23:59:59.999 - doc:{wide}#viewer@team:a#member\n             \
                 + doc:1#viewer                   @team:a#member\n"
            )
        );
        let third = lines.message(&message(DAY_MICROS, vec![viewer()]));
        assert_eq!(third, "2000-01-02 (UTC)\n00:00:00.000 + doc:1#viewer                   @team:a#member\n");
    }

    #[test]
    fn a_token_without_a_time_leaves_its_column_empty() {
        let message = DataChanges { snap_token: "MgMAAAAAAAA=".into(), tuple_changes: vec![viewer()] };
        assert_eq!(Lines::new(Style::PLAIN, false).message(&message), " + doc:1#viewer@team:a#member\n");
        let shown = Lines::new(Style::PLAIN, true).message(&message);
        assert_eq!(shown, "             + doc:1#viewer            @team:a#member\n");
    }
}
