//! Tests of the routes, with services that echo their requests.

use super::*;
use crate::access::authn::Authenticator;
use crate::access::authn::Caller;
use crate::api::grpc::proto;
use crate::config::Config;
use crate::config::Exempt;
use axum::body::{Body, Bytes};
use axum::http::{Request, StatusCode};
use proptest::prelude::*;
use serde_json::{Value as Json, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tonic::{Response as Answer, Status};
use tower::ServiceExt as _;

/// A service that answers with its request. If the tenant has the name of a gRPC code, it fails with that code.
struct Echo;

fn refused(tenant: &str) -> Result<(), Status> {
    match tenant {
        "missing" => Err(Status::not_found("ERROR_CODE_TENANT_NOT_FOUND")),
        "busy" => Err(Status::resource_exhausted("later")),
        _ => Ok(()),
    }
}

#[tonic::async_trait]
impl Data for Echo {
    async fn write(
        &self,
        request: tonic::Request<proto::DataWriteRequest>,
    ) -> Result<Answer<proto::DataWriteResponse>, Status> {
        let caller = request.extensions().get::<Caller>().is_some();
        let authorization = request.metadata().get("authorization").map(|value| value.to_str().unwrap().to_owned());
        let request = request.into_inner();
        refused(&request.tenant_id)?;
        let echo = json!([request.tenant_id, request.tuples.len(), authorization, caller]);
        Ok(Answer::new(proto::DataWriteResponse { snap_token: echo.to_string() }))
    }

    async fn write_relationships(
        &self,
        request: tonic::Request<proto::RelationshipWriteRequest>,
    ) -> Result<Answer<proto::RelationshipWriteResponse>, Status> {
        Ok(Answer::new(proto::RelationshipWriteResponse { snap_token: request.into_inner().tenant_id }))
    }

    async fn read_relationships(
        &self,
        request: tonic::Request<proto::RelationshipReadRequest>,
    ) -> Result<Answer<proto::RelationshipReadResponse>, Status> {
        let continuous_token = request.into_inner().continuous_token;
        Ok(Answer::new(proto::RelationshipReadResponse { tuples: vec![proto::Tuple::default()], continuous_token }))
    }

    async fn read_attributes(
        &self,
        request: tonic::Request<proto::AttributeReadRequest>,
    ) -> Result<Answer<proto::AttributeReadResponse>, Status> {
        let continuous_token = request.into_inner().continuous_token;
        Ok(Answer::new(proto::AttributeReadResponse { attributes: vec![], continuous_token }))
    }

    async fn delete(
        &self,
        request: tonic::Request<proto::DataDeleteRequest>,
    ) -> Result<Answer<proto::DataDeleteResponse>, Status> {
        Ok(Answer::new(proto::DataDeleteResponse { snap_token: request.into_inner().tenant_id }))
    }

    async fn delete_relationships(
        &self,
        request: tonic::Request<proto::RelationshipDeleteRequest>,
    ) -> Result<Answer<proto::RelationshipDeleteResponse>, Status> {
        Ok(Answer::new(proto::RelationshipDeleteResponse { snap_token: request.into_inner().tenant_id }))
    }

    async fn run_bundle(
        &self,
        _: tonic::Request<proto::BundleRunRequest>,
    ) -> Result<Answer<proto::BundleRunResponse>, Status> {
        Err(Status::unimplemented("bundles are not here"))
    }
}

#[tonic::async_trait]
impl Tenancy for Echo {
    async fn create(
        &self,
        request: tonic::Request<proto::TenantCreateRequest>,
    ) -> Result<Answer<proto::TenantCreateResponse>, Status> {
        let proto::TenantCreateRequest { id, name } = request.into_inner();
        Ok(Answer::new(proto::TenantCreateResponse { tenant: Some(proto::Tenant { id, name, created_at: None }) }))
    }

    async fn delete(
        &self,
        request: tonic::Request<proto::TenantDeleteRequest>,
    ) -> Result<Answer<proto::TenantDeleteResponse>, Status> {
        Ok(Answer::new(proto::TenantDeleteResponse { tenant_id: request.into_inner().id }))
    }

    async fn list(
        &self,
        request: tonic::Request<proto::TenantListRequest>,
    ) -> Result<Answer<proto::TenantListResponse>, Status> {
        let continuous_token = request.into_inner().continuous_token;
        Ok(Answer::new(proto::TenantListResponse { tenants: vec![], continuous_token }))
    }
}

/// A process that is not ready.
struct Stalled;

impl Probes for Stalled {
    type NotReady = &'static str;

    fn ready(&self) -> Result<(), &'static str> {
        Err("the \"slot\" is away")
    }

    fn metrics(&self) -> String {
        "up 1\n".to_owned()
    }
}

/// Returns the gateway without Watch. Watch cannot be replaced by an echo, and tests/scenarios/http.rs covers it.
fn router(overrides: &[(&str, &str)]) -> Router {
    let overrides: Vec<_> = overrides.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let config = Config::load(None, [], &overrides).unwrap().server.http.unwrap();
    Gateway::over(&config, probes::routes(Stalled), open())
        .with_data(Arc::new(Echo))
        .with_tenancy(Arc::new(Echo))
        .into_router()
}

async fn send(router: Router, request: Request<Body>) -> (StatusCode, axum::http::HeaderMap, Bytes) {
    let (parts, body) = router.oneshot(request).await.unwrap().into_parts();
    (parts.status, parts.headers, axum::body::to_bytes(body, usize::MAX).await.unwrap())
}

async fn ask(method: &str, path: &str, body: impl Into<Body>) -> (u16, Json) {
    let request = Request::builder().method(method).uri(path).body(body.into()).unwrap();
    let (status, headers, body) = send(router(&[]), request).await;
    assert_eq!(headers[CONTENT_TYPE], "application/json", "{method} {path}");
    (status.as_u16(), serde_json::from_slice(&body).unwrap())
}

#[tokio::test]
async fn every_route_leads_to_its_method() {
    for (method, path, body, expected) in [
        ("POST", "/v1/tenants/t%31/data/write", json!({"tuples": [{}]}), json!({"snap_token": "[\"t1\",1,null,true]"})),
        ("POST", "/v1/tenants/t1/data/delete", json!({"tenant_id": "t1"}), json!({"snap_token": "t1"})),
        ("POST", "/v1/tenants/t1/relationships/write", json!({}), json!({"snap_token": "t1"})),
        ("POST", "/v1/tenants/t1/relationships/delete", json!({}), json!({"snap_token": "t1"})),
        (
            "POST",
            "/v1/tenants/t1/data/relationships/read",
            json!({"continuousToken": "c"}),
            json!({"tuples": [{"relation": ""}], "continuous_token": "c"}),
        ),
        (
            "POST",
            "/v1/tenants/t1/data/attributes/read?",
            json!({"continuous_token": "c"}),
            json!({"attributes": [], "continuous_token": "c"}),
        ),
        ("POST", "/v1/tenants/create", json!({"id": "t", "name": "n"}), json!({"tenant": {"id": "t", "name": "n"}})),
        ("POST", "/v1/tenants/list", json!({"page_size": 1}), json!({"tenants": [], "continuous_token": ""})),
        ("DELETE", "/v1/tenants/t1", Json::Null, json!({"tenant_id": "t1"})),
        ("GET", "/healthz", Json::Null, json!({"status": "ALIVE"})),
    ] {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        assert_eq!(ask(method, path, body).await, (200, expected), "{method} {path}");
    }
}

#[tokio::test]
async fn the_caller_and_its_credentials_reach_the_service() {
    let request = Request::post("/v1/tenants/t1/data/write").header("authorization", "Bearer key");
    let request = request.extension(Caller::default()).body(Body::empty()).unwrap();
    let (status, _, body) = send(router(&[]), request).await;
    assert_eq!(
        (status, body.as_ref()),
        (StatusCode::OK, br#"{"snap_token":"[\"t1\",0,\"Bearer key\",true]"}"#.as_slice())
    );
}

#[tokio::test]
async fn all_errors_have_the_same_form() {
    let write = "/v1/tenants/t1/data/write";
    for (method, path, body, http, code, message) in [
        ("POST", "/v1/tenants/missing/data/write", "{}", 404, 5, "ERROR_CODE_TENANT_NOT_FOUND"),
        ("POST", "/v1/tenants/busy/data/write", "{}", 429, 8, "later"),
        ("POST", "/v1/tenants/t1/data/run-bundle", "{}", 501, 12, "bundles are not here"),
        ("POST", write, "{", 400, 3, "the body is no DataWriteRequest: EOF while parsing an object at line 1 column 1"),
        ("POST", "/v1/tenants/%ff/data/write", "{}", 400, 3, "Invalid UTF-8 in `tenant_id`"),
        (
            "POST",
            "/v1/tenants/t1/data/write?tuples=1",
            "{}",
            400,
            3,
            "POST takes no query parameters, and there is `tuples`: put it into the JSON of the body",
        ),
        (
            "DELETE",
            "/v1/tenants/t1?force",
            "",
            400,
            3,
            "DELETE takes no query parameters, and there is `force`: put it into the JSON of the body",
        ),
        (
            "DELETE",
            "/v1/tenants/t1",
            r#"{"id": "t2"}"#,
            400,
            3,
            "`id` has one value in the path or the query, and another one elsewhere",
        ),
        ("GET", write, "", 405, 12, "this path is not served by GET: see Allow"),
        ("POST", "/v1/nowhere", "{}", 404, 5, "nothing is served at /v1/nowhere"),
        ("GET", "/", "", 404, 5, "nothing is served at /"),
        ("POST", "/v1/tenants/t1/data/write/", "{}", 404, 5, "nothing is served at /v1/tenants/t1/data/write/"),
        (
            "POST",
            "/v1/tenants//data/write",
            r#"{"tenant_id": "t1"}"#,
            400,
            3,
            "`tenant_id` has one value in the path or the query, and another one elsewhere",
        ),
    ] {
        let expected = json!({"code": code, "message": message, "details": []});
        assert_eq!(ask(method, path, body).await, (http, expected), "{method} {path}");
    }
    for (method, path, allow) in
        [("GET", write, "POST"), ("PUT", "/v1/tenants/t1", "DELETE"), ("POST", "/healthz", "GET,HEAD")]
    {
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let (status, headers, _) = send(router(&[]), request).await;
        assert_eq!((status.as_u16(), headers["allow"].to_str().unwrap()), (405, allow), "{method} {path}");
    }
    let (status, body) = ask("POST", write, vec![b' '; (4 << 20) + 1]).await;
    assert_eq!((status, &body["code"]), (413, &json!(8)), "{body}");
    let (status, _) = ask("POST", write, vec![b' '; 4 << 20]).await;
    assert_eq!(status, 200);
}

#[tokio::test]
async fn pages_of_allowed_origins_may_call() {
    const ORIGINS: &str = "server.http.cors_allowed_origins";
    let here = "https://a.example";
    for (origins, allowed) in
        [("", None), ("https://b.example", None), ("https://b.example,https://a.example", Some(here)), ("*", Some("*"))]
    {
        let router = router(&[(ORIGINS, origins)]);
        let preflight = Request::options("/v1/tenants/t1/data/write")
            .header("origin", here)
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "authorization,content-type,last-event-id");
        let (_, headers, _) = send(router.clone(), preflight.body(Body::empty()).unwrap()).await;
        let header =
            |headers: &axum::http::HeaderMap, name| headers.get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(header(&headers, "access-control-allow-origin").as_deref(), allowed, "{origins}");
        if allowed.is_some() {
            assert_eq!(header(&headers, "access-control-allow-methods").as_deref(), Some("GET,POST,DELETE"));
            let headers = header(&headers, "access-control-allow-headers");
            assert_eq!(headers.as_deref(), Some("authorization,content-type,last-event-id"));
        }
        // The page must be able to read errors as well.
        let request = Request::post("/v1/tenants/missing/data/write").header("origin", here);
        let (status, headers, _) = send(router, request.body(Body::empty()).unwrap()).await;
        // Pages of other origins are refused earlier.
        assert_eq!(status, if allowed.is_some() { StatusCode::NOT_FOUND } else { StatusCode::FORBIDDEN });
        assert_eq!(header(&headers, "access-control-allow-origin").as_deref(), allowed, "{origins}");
    }
}

/// An admission that accepts everyone.
fn open() -> Admission {
    Admission::new(Authenticator::Open, Exempt { health: true, reflection: true, metrics: true }, None)
}

/// Sends these bytes to the gateway, and returns its answer up to the end of the connection. The clock is paused, and
/// jumps to the next timeout when there is nothing else to do.
async fn exchange(sent: &[u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (_stop, stopped) = tokio::sync::watch::channel(false);
    let server = tokio::spawn(listener::connect(listener.accept().await.unwrap().0, None, router(&[]), stopped));
    client.write_all(sent).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    let _ = server.await.unwrap();
    answer
}

#[tokio::test(start_paused = true)]
async fn silent_and_slow_connections_are_closed() {
    assert_eq!(exchange(b"").await, "");
    assert_eq!(exchange(b"GET /healthz HT").await, "");
    let idle = exchange(b"GET /healthz HTTP/1.1\r\nhost: t\r\n\r\n").await;
    assert!(idle.starts_with("HTTP/1.1 200 OK\r\n"), "{idle}");
    let slow = exchange(b"POST /v1/tenants/t1/data/write HTTP/1.1\r\nhost: t\r\ncontent-length: 9\r\n\r\n{").await;
    assert!(slow.starts_with("HTTP/1.1 408 Request Timeout\r\n") && slow.contains("\"code\":4"), "{slow}");
}

#[tokio::test]
async fn probes_and_metrics_are_served() {
    for (path, status, kind, body) in [
        ("/healthz", 200, "application/json", r#"{"status":"ALIVE"}"#),
        ("/readyz", 503, "application/json", r#"{"reason":"the \"slot\" is away","status":"NOT_READY"}"#),
        ("/metrics", 200, "text/plain; version=0.0.4", "up 1\n"),
    ] {
        let request = Request::get(path).body(Body::empty()).unwrap();
        let (code, headers, text) = send(router(&[]), request).await;
        assert_eq!((code.as_u16(), headers[CONTENT_TYPE].to_str().unwrap()), (status, kind), "{path}");
        assert_eq!(text, body, "{path}");
    }
}

/// Arbitrary JSON in the shape of a request.
fn any_json() -> impl Strategy<Value = Json> {
    let names = prop::sample::select(vec![
        "tenant_id",
        "tenantId",
        "id",
        "name",
        "metadata",
        "tuples",
        "attributes",
        "tuple_filter",
        "filter",
        "entity",
        "type",
        "ids",
        "relation",
        "subject",
        "attribute",
        "value",
        "@type",
        "data",
        "page_size",
        "continuous_token",
        "arguments",
        "snap_token",
    ]);
    let texts = prop::sample::select(vec![
        "type.googleapis.com/base.v1.StringValue",
        "type.googleapis.com/base.v1.DoubleArrayValue",
        "type.googleapis.com/google.protobuf.Any",
        "type.googleapis.com/google.protobuf.Timestamp",
        "type.googleapis.com/base.v1.DataWriteRequest",
        "NaN",
        "1e999",
        "OPERATION_CREATE",
    ]);
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        ".{0,8}".prop_map(Json::from),
        texts.prop_map(Json::from),
    ];
    leaf.prop_recursive(6, 64, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
            prop::collection::vec((names.clone(), inner), 0..6)
                .prop_map(|entries| entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()),
        ]
    })
}

const ROUTES: [&str; 10] = [
    "/v1/tenants/t1/data/write",
    "/v1/tenants/t1/data/delete",
    "/v1/tenants/t1/data/relationships/read",
    "/v1/tenants/t1/data/attributes/read",
    "/v1/tenants/t1/data/run-bundle",
    "/v1/tenants/t1/relationships/write",
    "/v1/tenants/t1/relationships/delete",
    "/v1/tenants/create",
    "/v1/tenants/list",
    "/v1/tenants/%2F",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn no_request_causes_an_internal_error(
        route in prop::sample::select(ROUTES.to_vec()),
        method in prop::sample::select(vec!["GET", "POST", "DELETE", "PUT", "OPTIONS"]),
        body in prop_oneof![
            8 => any_json().prop_map(|json| json.to_string().into_bytes()),
            1 => prop::collection::vec(any::<u8>(), 0..64),
        ],
    ) {
        let request = Request::builder().method(if route.len() < 20 { method } else { "POST" }).uri(route);
        let request = request.body(Body::from(body)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (status, _, body) = runtime.block_on(send(router(&[]), request));
        prop_assert!([200, 400, 405, 501].contains(&status.as_u16()), "{status}");
        prop_assert!(status.as_u16() == 501 || serde_json::from_slice::<Json>(&body).is_ok());
    }
}
