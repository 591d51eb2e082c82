//! Around a router, as on HTTP.

use super::*;
use crate::config::Config;
use axum::Router;
use axum::body::Body;
use axum::extract::Extension;
use axum::routing::get;
use http::StatusCode;
use tower::ServiceExt as _;

/// As these keys are set, and with this limit.
async fn router(authn: &[(&str, &str)], rate_limit: u32) -> Router {
    let settings: Vec<_> = authn.iter().map(|(key, value)| (format!("authn.{key}"), (*value).to_owned())).collect();
    let config = Config::load(None, [], &settings).unwrap();
    let (authenticator, _) = Authenticator::new(config.authn.credentials.as_ref()).unwrap();
    let admission = Admission::new(authenticator, config.authn.exempt, NonZeroU32::new(rate_limit));
    let whoami = async |Extension(caller): Extension<Caller>| {
        ["t1", "t2"].map(|tenant| if caller.may_use(tenant) { tenant } else { "-" }).join(" ")
    };
    Router::new().route("/", get(whoami)).route("/healthz", get(whoami)).route("/metrics", get(whoami)).layer(
        admission.layer(|error| {
            let status = match error {
                Error::Credentials(_) => StatusCode::UNAUTHORIZED,
                Error::Rate { .. } => StatusCode::TOO_MANY_REQUESTS,
            };
            Response::builder().status(status).body(Body::from(error.to_string())).unwrap()
        }),
    )
}

async fn ask(router: &Router, path: &str, authorization: &str) -> (u16, String) {
    let mut request = Request::get(path);
    if !authorization.is_empty() {
        request = request.header("authorization", authorization);
    }
    let response = router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let body = axum::body::to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

#[tokio::test]
async fn a_valid_key_is_admitted() {
    let keys = [("enabled", "true"), ("preshared.keys", "[everything, {key: only-t1, tenants: [t1]}]")];
    let router = router(&keys, 0).await;
    for (path, authorization, status, says) in [
        ("/", "Bearer everything", 200, "t1 t2"),
        ("/", "bearer only-t1", 200, "t1 -"),
        ("/", "", 401, "ERROR_CODE_MISSING_BEARER_TOKEN"),
        ("/", "Basic everything", 401, "ERROR_CODE_MISSING_BEARER_TOKEN"),
        ("/", "Bearer everythin", 401, "ERROR_CODE_UNAUTHENTICATED"),
        ("/", "Bearer Everything", 401, "ERROR_CODE_UNAUTHENTICATED"),
        ("/nowhere", "", 401, "ERROR_CODE_MISSING_BEARER_TOKEN"),
        ("/nowhere", "Bearer everything", 404, ""),
        ("/healthz", "", 200, "t1 t2"),
        ("/healthz/", "", 401, "ERROR_CODE_MISSING_BEARER_TOKEN"),
    ] {
        let (found, said) = ask(&router, path, authorization).await;
        assert_eq!((found, said.split(": ").next()), (status, Some(says)), "{path} {authorization}");
        assert_eq!(said.contains("Authorization: Bearer"), status == 401, "{said}");
    }
}

#[tokio::test]
async fn health_is_exempt_if_configured() {
    let keys = [("enabled", "true"), ("preshared.keys", "k"), ("exempt.health", "false")];
    let router = router(&keys, 0).await;
    assert_eq!(ask(&router, "/healthz", "").await.0, 401);
    assert_eq!(ask(&router, "/healthz", "Bearer k").await.0, 200);
}

#[tokio::test]
async fn metrics_are_exempt_if_configured() {
    for (exempt, status) in [("false", 401), ("true", 200)] {
        let keys = [("enabled", "true"), ("preshared.keys", "k"), ("exempt.metrics", exempt)];
        let router = router(&keys, 1).await;
        for _ in 0..20 {
            // However many there are.
            assert_eq!(ask(&router, "/metrics", "Bearer k").await.0, 200);
            assert_eq!(ask(&router, "/metrics", "").await.0, status);
        }
    }
}

#[tokio::test]
async fn every_caller_is_admitted_without_authentication() {
    let router = router(&[], 0).await;
    for authorization in ["", "Bearer whatever"] {
        assert_eq!(ask(&router, "/", authorization).await, (200, "t1 t2".to_owned()));
    }
}

#[tokio::test]
async fn the_limit_counts_callers_only() {
    let keys = [("enabled", "true"), ("preshared.keys", "k")];
    let router = router(&keys, 1).await;
    for _ in 0..100 {
        assert_eq!(ask(&router, "/", "Bearer wrong").await.0, 401);
        assert_eq!(ask(&router, "/healthz", "").await.0, 200);
    }
    // The limit was not used up.
    assert_eq!(ask(&router, "/", "Bearer k").await.0, 200);
    let says = loop {
        match ask(&router, "/", "Bearer k").await {
            (429, says) => break says,
            (status, says) => assert_eq!(status, 200, "{says}"),
        }
    };
    assert!(says.starts_with("more than 1 requests a second, which is the limit (server.rate_limit)"), "{says}");
    assert_eq!(ask(&router, "/healthz", "").await.0, 200);
}

#[test]
fn the_retry_delay_is_never_zero() {
    let one = NonZeroU32::MIN;
    let limiter = RateLimiter::direct(Quota::per_second(one));
    let limit = Limit { per_second: one, limiter };
    let refused = std::iter::repeat_with(|| limit.check()).find_map(Result::err).unwrap();
    let Error::Rate { retry_after, .. } = refused else { panic!("{refused:?}") };
    assert!((1..=1000).contains(&retry_after.as_millis()), "{retry_after:?}");
}
