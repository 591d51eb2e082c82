//! Checks that a replication connection can be made. `serve` needs one, and a connection pooler in between does not
//! provide it.

use std::time::Duration;
use tokio::time::timeout;
use tokio_postgres::error::SqlState;

use super::unusable;
use crate::model::diagnostic::Report;
use crate::postgres::connection::{ConnectError, Connection};

const SUBJECT: &str = "replication connection";
/// The limit for the log-on and one command together.
const ANSWER_MAX: Duration = Duration::from_secs(10);

pub(super) async fn check(connection: &Connection, report: &mut Report) {
    let endpoint = connection.endpoint();
    let identified = async {
        let mut walsender = endpoint.replicate(endpoint.application_name()).await?;
        let identity = walsender.identify().await.map_err(|error| endpoint.replication_error(error))?;
        walsender.close().await;
        Ok::<_, ConnectError>(identity)
    };
    match timeout(ANSWER_MAX, identified).await {
        Ok(Ok(_)) => report.ok(SUBJECT, "can be made"),
        Ok(Err(error)) => {
            // The requirements already report these, with the remedy.
            let is_of_requirement =
                matches!(error.sqlstate(), Some(&(SqlState::INSUFFICIENT_PRIVILEGE | SqlState::TOO_MANY_CONNECTIONS)));
            let is_known = is_of_requirement && report.has_errors();
            if !is_known {
                report.add(unusable(SUBJECT, &error));
            }
        }
        Err(_) => {
            let what = format!("there was no answer within {} s", ANSWER_MAX.as_secs());
            let fix = "-- a connection pooler in between may not pass it on: point database.uri at PostgreSQL itself";
            report.error(SUBJECT, what, fix);
        }
    }
}
