//! Pages: keyset pagination over the primary key. What is written meanwhile moves nothing: a row that is there throughout
//! comes exactly once.

use super::Error;
use super::filter::{Query, text};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use futures_util::TryStreamExt as _;
use std::fmt;
use std::str::FromStr;
use tokio_postgres::Client;

/// A page ends early rather than being larger than this, in bytes of its rows' texts. As protobuf they take up to 2.7 times as
/// much (an array of zeros as doubles), and gRPC clients refuse messages above 4 MiB. A single larger row goes alone.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// The primary key of a row, without the tenant. As text it is opaque, and the token with which clients go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key<const COLUMNS: usize>([String; COLUMNS]);

/// Rows, and where the next page begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page<T, const COLUMNS: usize> {
    /// The rows.
    pub items: Vec<T>,
    /// The last of them, where others follow.
    pub next: Option<Key<COLUMNS>>,
}

/// The text is no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not the continuous_token of an earlier page of the same method")]
pub struct ParseKeyError;

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
        // PostgreSQL's text cannot hold a NUL.
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

/// Of these key columns and others; without conditions yet.
pub(super) fn select<const COLUMNS: usize>(columns: [&str; COLUMNS], others: &str, table: &str) -> String {
    format!("SELECT {}{others} FROM {table}", columns.join(", "))
}

/// Adds to a query with conditions what makes it one page's.
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
    // One more, to know whether there is one.
    query.push(&format!(" ORDER BY {columns} LIMIT {}", page_size + 1));
}

/// Reads the page of a narrowed query. All its columns are text, and the first ones are the key.
pub(super) async fn read<T, const COLUMNS: usize>(
    client: &Client,
    query: &Query<'_>,
    page_size: usize,
    make: &(impl Fn(&[&str]) -> Result<T, String> + Sync),
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
        page.items.push(make(&texts).map_err(Error::Unreadable)?);
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
    fn no_key_has_a_value_that_postgresql_cannot_hold() {
        let nul = Key(["a".to_owned(), "\0".to_owned(), String::new()]);
        assert_eq!(nul.to_string().parse::<Key<3>>(), Err(ParseKeyError));
    }
}
