//! Compares the clock of the server with the clock of this machine.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_postgres::Client;

use crate::model::diagnostic::{Diagnostic, Report, Span};

/// NTP keeps clocks within some milliseconds of each other.
const SKEW_MAX: Duration = Duration::from_secs(1);

pub(super) async fn check(client: &Client, report: &mut Report) -> Result<(), tokio_postgres::Error> {
    let asked = SystemTime::now();
    let row = client.query_typed_one("SELECT extract(epoch FROM clock_timestamp())::float8", &[]).await?;
    let answered = SystemTime::now();
    let server = UNIX_EPOCH + Duration::try_from_secs_f64(row.try_get(0)?).unwrap_or_default();
    report.add(compare(asked, server, answered));
    Ok(())
}

/// The server read its clock between `asked` and `answered`. Only a time outside of that interval is skew.
fn compare(asked: SystemTime, server: SystemTime, answered: SystemTime) -> Diagnostic {
    let behind = asked.duration_since(server).unwrap_or_default();
    let ahead = server.duration_since(answered).unwrap_or_default();
    let skew = behind.max(ahead);
    if skew <= SKEW_MAX {
        return Diagnostic::ok("clocks", "the server and this machine agree");
    }
    let direction = if ahead > behind { "ahead of" } else { "behind" };
    Diagnostic::warning("clocks", format!("the server is {} {direction} this machine", Span(skew)))
        .means("Lag and ages are computed from the server's commit times, so they are wrong by as much.")
        .fix(
            "-- synchronize the clocks of both machines (chrony, systemd-timesyncd); on this one: sudo timedatectl \
             set-ntp true",
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::diagnostic::Severity;

    #[test]
    fn a_slow_answer_is_no_clock_skew() {
        let at = |ms: u64| UNIX_EPOCH + Duration::from_millis(1_000_000 + ms);
        for (asked, server, answered, expected) in [
            (0, 0, 0, None),
            (0, 4_000, 9_000, None),
            (0, 10_000, 9_000, None),
            (0, 10_100, 9_000, Some("1.1 s ahead of")),
            (50_000, 20_000, 50_001, Some("30 s behind")),
        ] {
            let diagnostic = compare(at(asked), at(server), at(answered));
            match expected {
                None => assert_eq!(diagnostic.severity, Severity::Ok, "{diagnostic}"),
                Some(text) => {
                    assert!(diagnostic.severity == Severity::Warning && diagnostic.what.contains(text), "{diagnostic}")
                }
            }
        }
    }
}
