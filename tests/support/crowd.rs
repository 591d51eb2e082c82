//! Connections of somebody else, until the server has none left.

use super::sql::Sql;

/// Closed when dropped.
#[derive(Default)]
pub(crate) struct Crowd(Vec<Sql>);

impl Crowd {
    /// Opens as many connections as the server allows; how many the crowd has. Connections that end, or that fail to log on, may be
    /// counted for a moment longer, in no view of PostgreSQL, and leave room only afterwards. So a caller that wants all repeats this
    /// until it has them.
    pub(crate) async fn grow(&mut self, uri: &str) -> usize {
        while let Ok(sql) = Sql::try_connect(uri).await {
            self.0.push(sql);
        }
        self.0.len()
    }

    pub(crate) fn leave(&mut self) {
        self.0.clear();
    }
}
