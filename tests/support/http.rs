//! HTTP clients: requests, streams of lines, and a model of a browser's `EventSource`.

use super::server::Server;
use super::wait::within;
use reqwest::header::HeaderMap;
use reqwest::{Method, RequestBuilder, Response};
use serde_json::Value as Json;
use std::time::Duration;

impl Server {
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.http_address())
    }

    /// Sends a request. Returns the HTTP status and the JSON body of the answer.
    pub(crate) async fn ask(&self, method: Method, path: &str, body: impl Into<reqwest::Body>) -> (u16, Json) {
        let request = reqwest::Client::new().request(method, self.url(path)).body(body);
        let response = within("an answer", request.send()).await.unwrap();
        let status = response.status().as_u16();
        let body = within("the rest of the answer", response.bytes()).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap_or_else(|error| panic!("{error}: {body:?}")))
    }

    /// Posts `{}` with this `authorization` header, if it is not empty.
    pub(crate) async fn post_as(&self, authorization: &str, path: &str) -> Response {
        within("an answer", authorized(reqwest::Client::new().post(self.url(path)).body("{}"), authorization).send())
            .await
            .unwrap()
    }

    /// Opens a stream of lines. Its start is fixed on return.
    pub(crate) async fn lines(&self, path: &str, body: Json) -> Lines {
        let request = reqwest::Client::new().post(self.url(path)).body(body.to_string());
        Lines::of(within("the stream starts", request.send()).await.unwrap())
    }
}

fn authorized(request: RequestBuilder, authorization: &str) -> RequestBuilder {
    if authorization.is_empty() { request } else { request.header("authorization", authorization) }
}

/// Code and reason of an error.
pub(crate) fn reason(error: &Json) -> (u64, &str) {
    let (code, reason) = (error["code"].as_u64(), error["details"][0]["reason"].as_str());
    (code.unwrap_or_else(|| panic!("{error}")), reason.unwrap_or_default())
}

/// A body that is read line by line.
struct Body {
    response: Response,
    rest: Vec<u8>,
}

impl Body {
    /// The next line without its end; `None` if the body ends or breaks off.
    async fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                return Some(String::from_utf8(line).unwrap().trim_end_matches('\n').to_owned());
            }
            self.rest.extend_from_slice(&self.response.chunk().await.ok()??);
        }
    }
}

/// A stream of JSON lines.
pub(crate) struct Lines {
    pub(crate) headers: HeaderMap,
    body: Body,
}

impl Lines {
    pub(crate) fn of(response: Response) -> Self {
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "application/x-ndjson");
        Self { headers: response.headers().clone(), body: Body { response, rest: Vec::new() } }
    }

    pub(crate) async fn next(&mut self) -> Option<Json> {
        let line = within("the next line", self.body.line()).await?;
        Some(serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}")))
    }
}

/// What a page learns from its `EventSource`.
#[derive(Debug, PartialEq)]
pub(crate) enum Seen {
    Open,
    Message {
        id: String,
        data: Json,
    },
    /// An event from the server with the name `error`.
    Error(Json),
    /// It will not reconnect, because of this HTTP status.
    Closed(u16),
}

/// A reader that behaves like the `EventSource` of the HTML standard (section 9.2).
pub(crate) struct EventSource {
    url: String,
    authorization: String,
    last_event_id: String,
    body: Option<Body>,
}

/// Browsers wait for some seconds before they reconnect.
const RECONNECTION_TIME: Duration = Duration::from_millis(100);

impl EventSource {
    pub(crate) fn new(url: String) -> Self {
        Self { url, authorization: String::new(), last_event_id: String::new(), body: None }
    }

    /// With an `authorization` header, as a proxy adds it.
    pub(crate) fn authorized(self, authorization: &str) -> Self {
        Self { authorization: authorization.to_owned(), ..self }
    }

    /// Reads the id at the beginning of the stream, which no page sees.
    pub(crate) async fn has_id(&mut self) {
        let body = self.body.as_mut().expect("an open stream");
        while self.last_event_id.is_empty() {
            let line = within("the id of the start", body.line()).await.expect("the stream does not end");
            line.strip_prefix("id: ").unwrap_or_default().clone_into(&mut self.last_event_id);
        }
    }

    /// The next thing that the page sees.
    pub(crate) async fn next(&mut self) -> Seen {
        within("the next event", self.wait()).await
    }

    async fn wait(&mut self) -> Seen {
        loop {
            if self.body.is_none() {
                match self.connect().await {
                    Some(seen) => return seen,
                    None => {
                        tokio::time::sleep(RECONNECTION_TIME).await;
                        continue;
                    }
                }
            }
            match self.event().await {
                Some(seen) => return seen,
                // An incomplete event is dropped.
                None => self.body = None,
            }
        }
    }

    async fn connect(&mut self) -> Option<Seen> {
        let request = reqwest::Client::new().get(&self.url).header("accept", "text/event-stream");
        let mut request = authorized(request, &self.authorization);
        if !self.last_event_id.is_empty() {
            request = request.header("last-event-id", &self.last_event_id);
        }
        let response = request.send().await.ok()?;
        let is_stream = response.headers().get("content-type").is_some_and(|kind| kind == "text/event-stream");
        if response.status() != 200 || !is_stream {
            return Some(Seen::Closed(response.status().as_u16()));
        }
        self.body = Some(Body { response, rest: Vec::new() });
        Some(Seen::Open)
    }

    /// The next event that is dispatched; `None` if the stream ends.
    async fn event(&mut self) -> Option<Seen> {
        let body = self.body.as_mut()?;
        let (mut data, mut kind, mut id) = (Vec::new(), String::new(), self.last_event_id.clone());
        loop {
            let line = body.line().await?;
            if line.is_empty() {
                self.last_event_id = id.clone();
                if data.is_empty() {
                    kind.clear();
                    continue;
                }
                let data = serde_json::from_str(&data.join("\n")).unwrap();
                return Some(match kind.as_str() {
                    "" => Seen::Message { id, data },
                    "error" => Seen::Error(data),
                    other => panic!("an event called {other}"),
                });
            }
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
            match field {
                "data" => data.push(value),
                "event" => kind = value,
                "id" => id = value,
                // A comment or an unknown field.
                _ => {}
            }
        }
    }
}
