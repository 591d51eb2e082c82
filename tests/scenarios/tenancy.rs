//! `base.v1.Tenancy`: the creation and deletion of tenants and their data.

use crate::support::api::{Api, fields, fresh, refusal};
use crate::support::change::Change;
use crate::support::postgres::Postgres;
use crate::support::server::Server;
use crate::support::wait::within;
use tonic::Code;
use tuplewatch::api::grpc::proto::{TenantCreateRequest, TenantListRequest};

#[tokio::test]
async fn tenants_are_created_listed_and_deleted() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let sql = postgres.sql().await;
    let tenant = api.create_tenant("t2").await.unwrap();
    assert_eq!((tenant.id.as_str(), tenant.name.as_str()), ("t2", "the name of t2"));
    let created_at = tenant.created_at.unwrap();
    let micros = created_at.seconds * 1_000_000 + i64::from(created_at.nanos) / 1_000;
    let stored = "SELECT (extract(epoch FROM created_at) * 1000000)::bigint FROM tuplewatch.tenants WHERE id = 't2'";
    assert_eq!(micros.to_string(), sql.value(stored).await);

    let exists = (Code::AlreadyExists, "ERROR_CODE_UNIQUE_CONSTRAINT".to_owned());
    assert_eq!(refusal(api.create_tenant("t2").await), exists);
    let unknown = (Code::NotFound, "ERROR_CODE_TENANT_NOT_FOUND".to_owned());
    assert_eq!(refusal(api.delete_tenant("t3").await), unknown);
    for id in ["", "a b", "**", "a\0", &"a".repeat(129)] {
        assert_eq!(fields(api.create_tenant(id).await), ["id"]);
        assert_eq!(fields(api.delete_tenant(id).await), ["id"]);
    }
    for name in ["\0", &"x".repeat(513)] {
        let request = TenantCreateRequest { id: "t4".into(), name: name.into() };
        assert_eq!(fields(api.tenancy.create(request).await), ["name"]);
    }

    for n in 0..60 {
        api.create_tenant(&format!("n{n:02}")).await.unwrap();
    }
    let mut expected: Vec<String> = (0..60).map(|n| format!("n{n:02}")).collect();
    expected.extend(["t1".to_owned(), "t2".to_owned()]);
    for page_size in [0, 1, 7, 61, 62, 1000] {
        assert_eq!(api.tenants(page_size).await, expected, "{page_size}");
    }
    let first = api.tenancy.list(TenantListRequest::default()).await.unwrap().into_inner();
    assert_eq!(first.tenants.len(), 50);
    let request = TenantListRequest { page_size: 0, continuous_token: "W10".into() };
    let invalid = (Code::InvalidArgument, "ERROR_CODE_INVALID_CONTINUOUS_TOKEN".to_owned());
    assert_eq!(refusal(api.tenancy.list(request).await), invalid);
    // A creation time that a timestamp cannot represent.
    sql.run("UPDATE tuplewatch.tenants SET created_at = 'infinity' WHERE id = 'n00'").await;
    assert_eq!(api.tenants(0).await, expected);
}

#[tokio::test]
async fn only_its_watchers_see_the_deletes_of_a_deleted_tenant() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let sql = postgres.sql().await;
    api.create_tenant("t2").await.unwrap();
    let (mut mine, mut others) = (server.watch("t2", "").await, server.watch("t1", "").await);
    for tenant in ["t1", "t2"] {
        api.write(tenant, &["document:a#viewer@user:u", "document:b#viewer@user:u"]).await;
        sql.run(&format!(
            "INSERT INTO tuplewatch.attributes VALUES ('{tenant}', 'document', 'a', 'size',
                 '{{\"@type\": \"type.googleapis.com/base.v1.IntegerValue\", \"data\": 7}}')"
        ))
        .await;
    }
    assert_eq!(api.delete_tenant("t2").await.unwrap(), "t2");
    mine.next().await;
    mine.next().await;
    let deleted = mine.next().await.changes;
    assert_eq!(
        deleted,
        [
            Change::delete(Change::viewer("a")),
            Change::delete(Change::viewer("b")),
            Change::delete("document:a$size=IntegerValue:7"),
        ]
    );
    others.next().await;
    others.next().await;
    others.expect_silence().await;
    assert!(sql.facts("t2").await.is_empty());
    assert_eq!(sql.facts("t1").await.len(), 3);
    let unknown = (Code::NotFound, "ERROR_CODE_TENANT_NOT_FOUND".to_owned());
    assert_eq!(refusal(api.try_read(fresh("t2", "")).await), unknown);
    // A new tenant of the same name is empty.
    api.create_tenant("t2").await.unwrap();
    assert!(api.try_read(fresh("t2", "")).await.unwrap().tuples.is_empty());
}

/// In either order, a deleted tenant leaves no rows to the next tenant of its name.
#[tokio::test]
async fn no_write_survives_the_deletion_of_its_tenant() {
    let postgres = Postgres::start().await;
    let server = Server::serve(&postgres, &[]).await;
    let mut api = Api::of(&server).await;
    let (sql, other) = (postgres.sql().await, postgres.sql().await);
    let writer = api.clone();
    let start = |tuple: &'static str| {
        let mut api = writer.clone();
        tokio::spawn(async move { api.try_write("t2", &[tuple]).await })
    };
    let delete = |api: &Api| {
        let mut api = api.clone();
        tokio::spawn(async move { api.delete_tenant("t2").await })
    };

    // The write is first, and waits for a row of another transaction. The deletion waits for the write.
    api.create_tenant("t2").await.unwrap();
    other.run("BEGIN").await;
    other.insert("t2", "a").await;
    let write = start("document:a#viewer@user:u");
    sql.until_waiting(1).await;
    let deletion = delete(&api);
    sql.until_waiting(2).await;
    other.run("ROLLBACK").await;
    within("the write", write).await.unwrap().unwrap();
    within("the deletion", deletion).await.unwrap().unwrap();
    assert!(sql.facts("t2").await.is_empty());

    // The deletion is first, and waits for a row that another transaction deletes. The write waits for the deletion.
    api.create_tenant("t2").await.unwrap();
    api.write("t2", &["document:a#viewer@user:u"]).await;
    other.run("BEGIN; DELETE FROM tuplewatch.relation_tuples").await;
    let deletion = delete(&api);
    sql.until_waiting(1).await;
    let write = start("document:b#viewer@user:u");
    sql.until_waiting(2).await;
    other.run("COMMIT").await;
    within("the deletion", deletion).await.unwrap().unwrap();
    let unknown = (Code::NotFound, "ERROR_CODE_TENANT_NOT_FOUND".to_owned());
    assert_eq!(refusal(within("the write", write).await.unwrap()), unknown);
    assert!(sql.facts("t2").await.is_empty());
}
