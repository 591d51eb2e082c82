//! Reports long transactions, which delay three things until they end. The server keeps all WAL since the start of a
//! transaction that has written, because the slot's `restart_lsn` does not pass it. The creation of a slot waits for
//! all such transactions. The gap of a table ends only after the transactions that have locked it.

use std::time::Duration;
use tokio_postgres::Client;

use super::Expectation;
use crate::model::diagnostic::{Diagnostic, Report, Span};
use crate::postgres::catalog::{Catalog, identifier};
use crate::postgres::transactions::{self, Locks, NAMED_MAX, Transaction, Watched};

const KEEPS_WAL: &str = "For the slot the server keeps all WAL since it began, and a new slot waits for its end.";
const KEEPS_TABLE: &str = "A gap of a table that it has locked ends only after it, and setup cannot add such a table. The \
     server keeps all WAL since it began.";

pub(super) async fn check(
    client: &Client,
    expected: &Expectation<'_>,
    long: Duration,
    report: &mut Report,
) -> Result<(), tokio_postgres::Error> {
    let role: String = client.query_typed_one("SELECT current_user::text", &[]).await?.try_get(0)?;
    let catalog = Catalog::read(client, expected.publication, expected.mapping).await?;
    let open = transactions::open(client, &Watched::of(&catalog.tables), Locks::Writing, None).await?;
    let before = report.count();
    let known = open.iter().filter_map(|transaction| Some((transaction, transaction.open()?)));
    for (transaction, open) in known.filter(|(_, open)| *open >= long).take(NAMED_MAX) {
        report.add(diagnostic(transaction, open));
    }
    let hidden = open.iter().filter(|transaction| transaction.open().is_none()).count();
    if hidden > 0 {
        let what = format!("{hidden} are open, but role {role} may not see since when");
        let fix = format!("GRANT pg_read_all_stats TO {};  -- at once, no reload; by a superuser", identifier(&role));
        report.add(Diagnostic::ok("transactions", what).fix(fix));
    } else if report.is_fine_since(before) {
        report.ok("transactions", format!("no writing transaction has been open for {}", Span(long)));
    }
    Ok(())
}

fn diagnostic(transaction: &Transaction, open: Duration) -> Diagnostic {
    let (locked, meaning) = match transaction.tables.as_slice() {
        [] => (String::new(), KEEPS_WAL),
        tables => (format!(", has locked {}", tables.join(", ")), KEEPS_TABLE),
    };
    let what = format!("has been open for {}{locked} ({})", Span(open), transaction.details);
    Diagnostic::warning(transaction.subject(), what).means(meaning).fix(transaction.ending())
}
