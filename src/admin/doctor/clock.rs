//! Whether the clocks of this machine and of the server agree.

use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio_postgres::Client;

use crate::model::diagnostic::{Diagnostic, Report, Span};

/// Clocks that are kept by NTP agree within some milliseconds.
const SKEW_MAX: Duration = Duration::from_secs(1);

pub(super) async fn check(client: &Client, report: &mut Report) -> Result<(), tokio_postgres::Error> {
    let asked = SystemTime::now();
    let row = client.query_typed_one("SELECT extract(epoch FROM clock_timestamp())::float8", &[]).await?;
    let answered = SystemTime::now();
    let server = UNIX_EPOCH + Duration::try_from_secs_f64(row.try_get(0)?).unwrap_or_default();
    report.add(compare(asked, server, answered));
    Ok(())
}

/// The server looked at its clock between the two times. Only what is outside is skew.
fn compare(asked: SystemTime, server: SystemTime, answered: SystemTime) -> Diagnostic {
    let behind = asked.duration_since(server).unwrap_or_default();
    let ahead = server.duration_since(answered).unwrap_or_default();
    let skew = behind.max(ahead);
    if skew <= SKEW_MAX {
        return Diagnostic::ok("clocks", "the server's and this machine's agree");
    }
    let direction = if ahead > behind { "ahead of" } else { "behind" };
    Diagnostic::warning("clocks", format!("the server's is {} {direction} this machine's", Span(skew)))
        .means("Commit times are the server's: what is computed from them here (lag, ages) is off by as much.")
        .fix("-- have both machines keep time (chrony, systemd-timesyncd); this one: sudo timedatectl set-ntp true")
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
