//! Keyset pagination over the primary key. Concurrent writes move no rows between pages: a row that exists throughout
//! appears exactly once.

use super::filter::{Query, text};
use super::{Error, Unreadable};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use futures_util::TryStreamExt as _;
use std::fmt;
use std::str::FromStr;
use tokio_postgres::Client;

/// The largest page, in bytes of the texts of its rows. A page ends early instead of exceeding it, but a single larger
/// row gets a page of its own. As protobuf the rows take up to 2.7 times as much (an array of zeros as doubles), and
/// gRPC clients refuse messages above 4 MiB.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// The primary key of a row, without the tenant. Its text form is the opaque token with which clients request the next
/// page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Key<const COLUMNS: usize>([String; COLUMNS]);

/// One page of rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Page<T, const COLUMNS: usize> {
    pub items: Vec<T>,
    /// The key of the last row, if more rows follow.
    pub next: Option<Key<COLUMNS>>,
}

/// The text is not a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not the continuous_token of an earlier page of the same method")]
pub(crate) struct ParseKeyError;

impl<const COLUMNS: usize> fmt::Display for Key<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let json = serde_json::json!(self.0.as_slice()).to_string();
        f.write_str(&BASE64.encode(json))
    }
}

impl<const COLUMNS: usize> FromStr for Key<COLUMNS> {
    type Err = ParseKeyError;

    fn from_str(token: &str) -> Result<Self, ParseKeyError> {
        let json = BASE64.decode(token).map_err(|_| ParseKeyError)?;
        let columns: Vec<String> = serde_json::from_slice(&json).map_err(|_| ParseKeyError)?;
        // PostgreSQL's text type cannot contain a NUL.
        let fits = columns.iter().all(|column| !column.contains('\0'));
        columns.try_into().ok().filter(|_| fits).map(Self).ok_or(ParseKeyError)
    }
}

impl<const COLUMNS: usize> Key<COLUMNS> {
    pub(super) fn columns(&self) -> [&str; COLUMNS] {
        self.0.each_ref().map(String::as_str)
    }

    fn of(row: &[&str]) -> Option<Self> {
        let columns: &[&str; COLUMNS] = row.first_chunk()?;
        Some(Self(columns.map(str::to_owned)))
    }
}

/// Selects the key columns and `others`, without conditions.
pub(super) fn select<const COLUMNS: usize>(columns: [&str; COLUMNS], others: &str, table: &str) -> String {
    format!("SELECT {}{others} FROM {table}", columns.join(", "))
}

/// Restricts a query to one page.
pub(super) fn narrow<'q, const COLUMNS: usize>(
    query: &mut Query<'q>,
    columns: [&str; COLUMNS],
    after: Option<&'q [&'q str; COLUMNS]>,
    page_size: usize,
) {
    let columns = columns.join(", ");
    if let Some(key) = after {
        let places: Vec<String> = key.iter().map(|column| query.bind(text(column))).collect();
        query.push(&format!(" AND ({columns}) > ({})", places.join(", ")));
    }
    // One row more, to know whether more rows follow.
    query.push(&format!(" ORDER BY {columns} LIMIT {}", page_size + 1));
}

/// Reads the page of a narrowed query. All its columns must be text, and the first ones the key.
pub(super) async fn read<T, const COLUMNS: usize>(
    client: &Client,
    query: &Query<'_>,
    page_size: usize,
    make: &(impl Fn(&[&str]) -> Result<T, Unreadable> + Sync),
) -> Result<Page<T, COLUMNS>, Error> {
    let rows = client.query_typed_raw(query.sql(), query.parameters().iter().cloned()).await?;
    let mut rows = std::pin::pin!(rows);
    let mut page = Page { items: Vec::new(), next: None };
    let (mut bytes, mut last) = (0, None);
    while let Some(row) = rows.try_next().await? {
        let texts = (0..row.len()).map(|n| row.try_get(n)).collect::<Result<Vec<&str>, _>>()?;
        bytes += texts.iter().map(|text| text.len()).sum::<usize>();
        if page.items.len() == page_size || (bytes > PAGE_BYTES_MAX && !page.items.is_empty()) {
            page.next = last;
            break;
        }
        page.items.push(make(&texts)?);
        last = Key::of(&texts);
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_read_back(columns in proptest::array::uniform3("[^\0]{0,20}")) {
            let key = Key(columns);
            prop_assert_eq!(key.to_string().parse(), Ok(key.clone()));
            prop_assert_eq!(key.to_string().parse::<Key<6>>(), Err(ParseKeyError));
        }

        #[test]
        fn other_texts_are_refused(token in ".*", bytes in proptest::collection::vec(any::<u8>(), 0..50)) {
            prop_assert_eq!(token.parse::<Key<3>>(), Err(ParseKeyError));
            prop_assert_eq!(BASE64.encode(bytes).parse::<Key<3>>(), Err(ParseKeyError));
        }
    }

    #[test]
    fn a_key_contains_no_nul() {
        let nul = Key(["a".to_owned(), "\0".to_owned(), String::new()]);
        assert_eq!(nul.to_string().parse::<Key<3>>(), Err(ParseKeyError));
    }
}
