//! The publication changes at run time, and the stream does not show it: a table is removed and added again, a row filter hides rows, a
//! partition goes. PostgreSQL then sends less than is written. So each of these is noticed, is a gap for every subscriber, and is an error
//! for as long as rows are hidden.

use crate::support::interruption::{Interruption, Lasting, Remedy, side_by_side};
use crate::support::postgres::{Postgres, major};
use crate::support::sql::Sql;

const SCHEMA_CHANGED: &[&str] = &["SCHEMA_CHANGED"];

/// Runs the cases on one cluster, each with a publication, a slot and a tenant of its own.
async fn on_one_cluster(cases: &[Interruption]) {
    let postgres = Postgres::start().await;
    let mut runs = Vec::new();
    for case in cases {
        let server = case.prepare(&postgres).await;
        runs.push((*case, postgres.sql().await, server));
    }
    side_by_side(runs).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_temporary_change_of_the_publication_is_a_gap() {
    let mut cases = vec![
        Interruption {
            name: "recreated",
            fault: &["BEGIN; DROP PUBLICATION $NAME; \
                      CREATE PUBLICATION $NAME FOR TABLE tuplewatch.relation_tuples, tuplewatch.attributes; COMMIT"],
            reasons: SCHEMA_CHANGED,
            detail: "the publication was dropped and created again",
            lasts: None,
        },
        Interruption {
            name: "readded",
            fault: &[
                "ALTER PUBLICATION $NAME DROP TABLE tuplewatch.relation_tuples",
                "INSERT INTO tuplewatch.relation_tuples VALUES ('$NAME', 'document', 'lost', 'viewer', 'user', 'u')",
                "ALTER PUBLICATION $NAME ADD TABLE tuplewatch.relation_tuples",
            ],
            reasons: SCHEMA_CHANGED,
            detail: "table tuplewatch.relation_tuples was taken out of the publication and added again",
            lasts: None,
        },
        Interruption {
            name: "reduced_for_a_while",
            fault: &[
                "ALTER PUBLICATION $NAME SET (publish = 'insert')",
                "DELETE FROM tuplewatch.relation_tuples WHERE tenant_id = '$NAME'",
                "ALTER PUBLICATION $NAME SET (publish = 'insert, update, delete, truncate')",
            ],
            reasons: SCHEMA_CHANGED,
            detail: "the publication was altered",
            lasts: None,
        },
    ];
    if major() >= 15 {
        cases.push(Interruption {
            name: "filtered_for_a_while",
            fault: &[
                "ALTER PUBLICATION $NAME SET TABLE tuplewatch.relation_tuples WHERE (tenant_id <> '$NAME'), \
                 tuplewatch.attributes",
                "INSERT INTO tuplewatch.relation_tuples VALUES ('$NAME', 'document', 'lost', 'viewer', 'user', 'u')",
                "ALTER PUBLICATION $NAME SET TABLE tuplewatch.relation_tuples, tuplewatch.attributes",
            ],
            reasons: SCHEMA_CHANGED,
            detail: "table tuplewatch.relation_tuples was taken out of the publication and added again, or is in it in \
                     another way",
            lasts: None,
        });
    }
    on_one_cluster(&cases).await;
}

/// A new process would refuse all of these, and so does the running one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_incomplete_publication_is_an_error_until_it_is_repaired() {
    const AFRESH: Remedy = Remedy::Sql(&["BEGIN; ALTER PUBLICATION $NAME DROP TABLE tuplewatch.relation_tuples; \
                                          ALTER PUBLICATION $NAME ADD TABLE tuplewatch.relation_tuples; COMMIT"]);
    const WRITTEN: &str =
        "INSERT INTO tuplewatch.relation_tuples VALUES ('$NAME', 'document', 'lost', 'viewer', 'user', 'u')";
    let recreated = Interruption {
        name: "recreated_after_a_write",
        fault: &[
            "DROP PUBLICATION $NAME",
            WRITTEN,
            "CREATE PUBLICATION $NAME FOR TABLE tuplewatch.relation_tuples, tuplewatch.attributes",
        ],
        reasons: SCHEMA_CHANGED,
        detail: "the publication was dropped and created again",
        lasts: None,
    };
    let mut cases = vec![
        Interruption {
            name: "dropped",
            fault: &["DROP PUBLICATION $NAME"],
            reasons: &["SLOT_MOVED", "SCHEMA_CHANGED"],
            detail: "the publication was dropped and created again",
            lasts: Some(Lasting {
                messages: &["publication dropped: does not exist", "tuplewatch setup --recreate-slot"],
                remedy: Remedy::Setup(&["--recreate-slot"]),
            }),
        },
        Interruption {
            name: "removed",
            fault: &["ALTER PUBLICATION $NAME DROP TABLE tuplewatch.relation_tuples", WRITTEN],
            reasons: SCHEMA_CHANGED,
            detail: "table tuplewatch.relation_tuples was taken out of the publication and added again",
            lasts: Some(Lasting {
                messages: &[
                    "table tuplewatch.relation_tuples: is not in publication removed",
                    "ALTER PUBLICATION \\\"removed\\\" ADD TABLE \\\"tuplewatch\\\".\\\"relation_tuples\\\"",
                ],
                remedy: Remedy::Setup(&[]),
            }),
        },
        Interruption {
            name: "reduced",
            fault: &[
                "ALTER PUBLICATION $NAME SET (publish = 'insert, truncate')",
                "DELETE FROM tuplewatch.relation_tuples WHERE tenant_id = '$NAME'",
            ],
            reasons: SCHEMA_CHANGED,
            detail: "the publication was altered",
            lasts: Some(Lasting {
                messages: &["does not publish update, delete", "SET (publish = 'insert, update, delete, truncate')"],
                remedy: Remedy::Sql(&["ALTER PUBLICATION $NAME SET (publish = 'insert, update, delete, truncate')"]),
            }),
        },
        // Up to 17 the slot cannot be read past the row. 18 skips it silently.
        match major() {
            18.. => recreated,
            _ => Interruption {
                reasons: &["SLOT_MOVED", "SCHEMA_CHANGED"],
                lasts: Some(Lasting {
                    messages: &["tuplewatch setup --recreate-slot"],
                    remedy: Remedy::Setup(&["--recreate-slot"]),
                }),
                ..recreated
            },
        },
    ];
    if major() >= 15 {
        cases.push(Interruption {
            name: "filtered",
            fault: &[
                "ALTER PUBLICATION $NAME SET TABLE tuplewatch.relation_tuples WHERE (tenant_id <> '$NAME'), \
                 tuplewatch.attributes",
                WRITTEN,
            ],
            reasons: SCHEMA_CHANGED,
            detail: "table tuplewatch.relation_tuples was taken out of the publication and added again, or is in it in \
                     another way",
            lasts: Some(Lasting { messages: &["has a row filter in the publication", "DROP TABLE"], remedy: AFRESH }),
        });
    }
    let others = on_one_cluster(&cases);
    if major() < 15 {
        return others.await;
    }
    // On its own cluster, because PostgreSQL then refuses every UPDATE and DELETE.
    let hidden = [Interruption {
        name: "columns_hidden",
        fault: &["ALTER PUBLICATION $NAME SET TABLE tuplewatch.attributes, tuplewatch.relation_tuples \
                  (tenant_id, entity_type, entity_id, relation, subject_type, subject_id)"],
        reasons: SCHEMA_CHANGED,
        detail: "table tuplewatch.relation_tuples was taken out of the publication and added again, or is in it in another way",
        lasts: Some(Lasting {
            messages: &["column subject_relation is not in the column list of the publication", "DROP TABLE"],
            remedy: AFRESH,
        }),
    }];
    tokio::join!(others, on_one_cluster(&hidden));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_identity_without_mapped_columns_is_an_error() {
    let detail = "the replica identity of table tuplewatch.relation_tuples changed";
    on_one_cluster(&[Interruption {
        name: "narrowed",
        fault: &[
            "CREATE UNIQUE INDEX narrow ON tuplewatch.relation_tuples (tenant_id, entity_id)",
            "ALTER TABLE tuplewatch.relation_tuples REPLICA IDENTITY USING INDEX narrow",
        ],
        reasons: SCHEMA_CHANGED,
        detail,
        lasts: Some(Lasting {
            messages: &["old rows lack column", "REPLICA IDENTITY FULL"],
            remedy: Remedy::Sql(&["ALTER TABLE tuplewatch.relation_tuples REPLICA IDENTITY FULL"]),
        }),
    }])
    .await;
}

/// Makes `relation_tuples` partitioned by type, before `setup` would make it an ordinary table.
pub(super) async fn create_partitioned(sql: &Sql) {
    sql.run(
        "CREATE SCHEMA tuplewatch; \
         CREATE TABLE tuplewatch.relation_tuples (tenant_id text, entity_type text, entity_id text, relation text, \
             subject_type text, subject_id text, subject_relation text NOT NULL DEFAULT '', PRIMARY KEY (tenant_id, \
             entity_type, entity_id, relation, subject_type, subject_id, subject_relation)) \
             PARTITION BY LIST (entity_type); \
         CREATE TABLE tuplewatch.documents PARTITION OF tuplewatch.relation_tuples FOR VALUES IN ('document'); \
         CREATE TABLE tuplewatch.folders PARTITION OF tuplewatch.relation_tuples FOR VALUES IN ('folder')",
    )
    .await;
}

/// PostgreSQL sends the truncation of a partitioned table, and not that of its partitions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_removed_with_their_partition_are_a_gap() {
    let postgres = Postgres::start().await;
    create_partitioned(&postgres.sql().await).await;
    const FOLDER: &str =
        "INSERT INTO tuplewatch.relation_tuples VALUES ('$NAME', 'folder', 'f', 'viewer', 'user', 'u')";
    for case in [
        Interruption {
            name: "truncated",
            fault: &[FOLDER, "TRUNCATE tuplewatch.folders"],
            reasons: SCHEMA_CHANGED,
            detail: "the storage of a partition (TRUNCATE, or a rewrite) of table tuplewatch.relation_tuples changed",
            lasts: None,
        },
        Interruption {
            name: "attached",
            fault: &[
                "CREATE TABLE tuplewatch.teams (LIKE tuplewatch.relation_tuples INCLUDING ALL)",
                "INSERT INTO tuplewatch.teams VALUES ('$NAME', 'team', 't', 'member', 'user', 'u')",
                "ALTER TABLE tuplewatch.relation_tuples ATTACH PARTITION tuplewatch.teams FOR VALUES IN ('team')",
            ],
            reasons: SCHEMA_CHANGED,
            detail: "the set of partitions of table tuplewatch.relation_tuples changed",
            lasts: None,
        },
        Interruption {
            name: "detached",
            fault: &[FOLDER, "ALTER TABLE tuplewatch.relation_tuples DETACH PARTITION tuplewatch.folders"],
            reasons: SCHEMA_CHANGED,
            detail: "the set of partitions of table tuplewatch.relation_tuples changed",
            lasts: None,
        },
    ] {
        let server = case.prepare(&postgres).await;
        case.check(postgres.sql().await, server).await;
    }
}
