//! The metrics of a server.

use super::server::Server;
use super::wait::within;
use std::collections::BTreeMap;

/// One reading of all series.
#[derive(Debug)]
pub(crate) struct Scrape {
    pub(crate) text: String,
    series: Vec<Series>,
}

#[derive(Debug)]
struct Series {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

impl Series {
    /// Parses a line of the text format. No label here contains a quote or a comma.
    fn parse(line: &str) -> Self {
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) =
            series.split_once('{').map_or((series, ""), |(name, rest)| (name, rest.trim_end_matches('}')));
        let labels = labels.split(',').filter_map(|label| label.split_once('='));
        Self {
            name: name.to_owned(),
            labels: labels.map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned())).collect(),
            value: value.parse().unwrap(),
        }
    }
}

impl Scrape {
    fn parse(text: String) -> Self {
        let series = text.lines().filter(|line| !line.starts_with('#')).map(Series::parse).collect();
        Self { text, series }
    }

    /// The sum of all series of this name with these labels. Fails if there is none.
    pub(crate) fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).unwrap_or_else(|| panic!("no {name} {labels:?} in\n{}", self.text))
    }

    /// The same, or zero: some label values appear only with their first event.
    pub(crate) fn count(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.find(name, labels).unwrap_or_default()
    }

    pub(crate) fn find(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let has = |series: &&Series| {
            let fits = |(label, value): &(&str, &str)| series.labels.get(*label).is_some_and(|own| own == value);
            series.name == name && labels.iter().all(fits)
        };
        self.series.iter().filter(has).map(|series| series.value).reduce(|sum, value| sum + value)
    }
}

impl Server {
    pub(crate) async fn scrape(&self) -> Scrape {
        let response = within("a scrape", reqwest::get(self.url("/metrics"))).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/plain; version=0.0.4");
        Scrape::parse(within("the rest of it", response.text()).await.unwrap())
    }
}
