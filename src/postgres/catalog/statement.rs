//! The two statements: one reads everything, and the other a sum that shows whether anything changed.
//!
//! Parameters of both: $1 publication; $2 and $3 schemas and names of the tables; $4 and $5 the mapped columns (number
//! of the table, name); $6 and $7 schema and name of the table of tenants, or nulls.
//!
//! Each statement begins with a comment, which shows its purpose in pg_stat_activity.
//!
//! oids and xids are cast to int8, because JSON would contain them as strings. `int2vector` and its slices begin at
//! index 0. A replica identity contains neither the INCLUDE columns of an index nor a deferrable key.

/// PostgreSQL 15 introduced row filters, column lists and schemas in publications.
const FINE_GRAINED_PUBLICATIONS: i32 = 15_00_00;

/// The mapped tables, the tables below and above them, the mapped columns, and the types on which the text of these
/// columns depends.
///
/// The planner assumes that a recursion is small, and would compare every partition with every row of pg_inherits.
/// OFFSET 0 prevents this, so each table is looked up once, and only if tables can be below it. In PostgreSQL only
/// partitions are below a partitioned table, only inheriting tables below an ordinary one, and nothing below a
/// partition that is not partitioned.
const RELATIONS: &str = "
publication AS (SELECT p.xmin, p.* FROM pg_publication AS p WHERE p.pubname = $1),
wanted AS (
    SELECT w.ordinal, w.schema_name, w.table_name, c.oid, c.relkind, c.relispartition, c.relhassubclass,
           c.relfilenode, n.oid AS namespace, n.xmin AS namespace_version
      FROM unnest($2, $3) WITH ORDINALITY AS w(schema_name, table_name, ordinal)
      LEFT JOIN pg_namespace AS n ON n.nspname = w.schema_name
      LEFT JOIN pg_class AS c ON c.relnamespace = n.oid AND c.relname = w.table_name AND c.relkind IN ('r', 'p')),
tree(ordinal, oid, has_below, parent, attached, attached_by) AS (
    SELECT ordinal, oid, relkind = 'p' OR NOT relispartition, NULL::oid, NULL::xid, NULL::cid
      FROM wanted WHERE oid IS NOT NULL
    UNION ALL
    SELECT t.ordinal, c.oid, c.relkind = 'p' OR NOT c.relispartition, t.oid, below.xmin, below.cmin FROM tree AS t
     CROSS JOIN LATERAL (SELECT i.inhrelid, i.xmin, i.cmin FROM pg_inherits AS i
                          WHERE t.has_below AND i.inhparent = t.oid AND NOT i.inhdetachpending OFFSET 0) AS below
      JOIN pg_class AS c ON c.oid = below.inhrelid),
lineage(ordinal, oid) AS (
    SELECT ordinal, oid FROM wanted WHERE oid IS NOT NULL
    UNION ALL
    SELECT l.ordinal, above.inhparent FROM lineage AS l
      JOIN pg_class AS child ON child.oid = l.oid AND child.relispartition
     CROSS JOIN LATERAL (SELECT i.inhparent FROM pg_inherits AS i
                          WHERE i.inhrelid = l.oid AND NOT i.inhdetachpending OFFSET 0) AS above),
mapped AS (
    SELECT wanted.ordinal, a.attname, a.attnum, a.atttypid, a.attgenerated, a.xmin AS version
      FROM unnest($4, $5) AS named(ordinal, name) JOIN wanted ON wanted.ordinal = named.ordinal
      JOIN pg_attribute AS a ON a.attrelid = wanted.oid AND a.attname = named.name AND a.attnum > 0
                            AND NOT a.attisdropped),
types(ordinal, number, oid) AS (
    SELECT ordinal, attnum, atttypid FROM mapped
    UNION
    SELECT t.ordinal, t.number, below.oid FROM types AS t JOIN pg_type AS y ON y.oid = t.oid
     CROSS JOIN LATERAL (
        SELECT y.typbasetype WHERE y.typbasetype <> 0
        UNION ALL SELECT y.typelem WHERE y.typelem <> 0
        UNION ALL SELECT r.rngsubtype FROM pg_range AS r WHERE y.oid IN (r.rngtypid, r.rngmultitypid)
        UNION ALL SELECT a.atttypid FROM pg_attribute AS a
                   WHERE y.typtype = 'c' AND a.attrelid = y.typrelid AND a.attnum > 0 AND NOT a.attisdropped
     ) AS below(oid)),
tenants AS (
    SELECT c.oid FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
     WHERE n.nspname = $6 AND c.relname = $7)";

/// Returns one json value for [`super::Catalog`].
///
/// A partition was created as one, and not attached later, if the rows of its columns are as old as those of its system
/// columns, command by command: ATTACH updates every column, but nothing updates system columns. (An UPDATE or DELETE
/// that was rolled back leaves its command in `cmin`, and its id in `xmax`.) The partition still has its first file if
/// the file has the number of the table.
pub(super) fn everything(version: i32) -> String {
    let (filter, columns, schemas) = if version >= FINE_GRAINED_PUBLICATIONS {
        (
            "md5(member.prqual::text)",
            "CASE WHEN member.prattrs IS NOT NULL THEN
                (SELECT json_agg(a.attname ORDER BY a.attnum) FROM pg_attribute AS a
                  WHERE a.attrelid = member.prrelid AND a.attnum = ANY (member.prattrs::int2[]))
             END",
            "(SELECT json_agg(json_build_object('schema', s.nspname, 'oid', member.oid::int8,
                                                'version', member.xmin::text::int8) ORDER BY member.oid)
                FROM pg_publication_namespace AS member JOIN pg_namespace AS s ON s.oid = member.pnnspid
               WHERE member.pnpubid = (SELECT oid FROM publication)
                 AND member.pnnspid IN (SELECT c.relnamespace FROM lineage AS l JOIN pg_class AS c ON c.oid = l.oid
                                         WHERE l.ordinal = wanted.ordinal))",
        )
    } else {
        ("NULL", "NULL", "NULL::json")
    };
    format!(
        "-- what is published
WITH RECURSIVE {RELATIONS}
SELECT json_build_object(
    'lsn', {LSN},
    'publication', (SELECT json_build_object(
        'oid', oid::int8, 'version', xmin::text::int8, 'all_tables', puballtables, 'insert', pubinsert,
        'update', pubupdate, 'delete', pubdelete, 'truncate', pubtruncate, 'via_root', pubviaroot,
        'generated', to_json(publication) ->> 'pubgencols') FROM publication),
    'tenants_are_filtered', COALESCE((SELECT row_security_active(oid) FROM tenants), false),
    'tables', (SELECT json_agg(json_build_object(
        'schema', wanted.schema_name, 'name', wanted.table_name, 'oid', wanted.oid::int8, 'kind', wanted.relkind,
        'other_kind', (SELECT c.relkind FROM pg_class AS c WHERE c.relnamespace = wanted.namespace
                          AND c.relname = wanted.table_name AND c.relkind NOT IN ('r', 'p')),
        'file', CASE WHEN wanted.relkind = 'r' THEN wanted.relfilenode::int8 END,
        'is_partition', COALESCE(wanted.relispartition, false),
        'had_children', COALESCE(wanted.relkind = 'r' AND wanted.relhassubclass, false),
        'is_filtered', COALESCE(row_security_active(wanted.oid), false),
        'selectable', COALESCE(has_table_privilege(wanted.oid, 'SELECT'), false),
        'schema_usable', COALESCE(has_schema_privilege(wanted.namespace, 'USAGE'), false),
        'columns', COALESCE((
            SELECT json_agg(json_build_object('name', m.attname, 'number', m.attnum, 'type_oid', m.atttypid::int8,
                    'generated', m.attgenerated, 'version', m.version::text::int8,
                    'types', COALESCE((
                        SELECT json_agg(json_build_object('oid', y.oid::int8, 'schema', n.nspname, 'name', y.typname,
                                'labels', COALESCE((
                                    SELECT json_agg(json_build_object('oid', e.oid::int8, 'label', e.enumlabel,
                                                                      'version', e.xmin::text::int8) ORDER BY e.oid)
                                      FROM pg_enum AS e WHERE e.enumtypid = y.oid), '[]'),
                                'attributes', COALESCE((
                                    SELECT json_agg(json_build_object('number', a.attnum, 'type_oid', a.atttypid::int8)
                                                    ORDER BY a.attnum)
                                      FROM pg_attribute AS a
                                     WHERE y.typtype = 'c' AND a.attrelid = y.typrelid AND a.attnum > 0), '[]')
                               ) ORDER BY y.oid)
                          FROM types AS t JOIN pg_type AS y ON y.oid = t.oid JOIN pg_namespace AS n ON n.oid = y.typnamespace
                         WHERE t.ordinal = m.ordinal AND t.number = m.attnum), '[]')
                   ) ORDER BY m.attname)
              FROM mapped AS m WHERE m.ordinal = wanted.ordinal), '[]'),
        'relations', COALESCE((
            SELECT json_agg(json_build_object('oid', c.oid::int8, 'schema', n.nspname, 'name', c.relname, 'kind', c.relkind,
                    'persistence', c.relpersistence, 'identity', c.relreplident,
                    'storage', CASE WHEN c.oid <> wanted.oid THEN c.relfilenode::int8 END,
                    'identity_columns', COALESCE((
                        SELECT json_agg(json_build_object('name', a.attname, 'number', a.attnum) ORDER BY a.attnum)
                          FROM pg_index AS x
                          JOIN pg_attribute AS a ON a.attrelid = x.indrelid
                               AND a.attnum = ANY ((x.indkey::int2[])[0:x.indnkeyatts - 1])
                         WHERE x.indrelid = c.oid AND x.indimmediate AND x.indisvalid
                           AND CASE c.relreplident WHEN 'd' THEN x.indisprimary
                                                   WHEN 'i' THEN x.indisreplident ELSE false END), '[]')
                   ) ORDER BY c.oid)
              FROM tree JOIN pg_class AS c ON c.oid = tree.oid JOIN pg_namespace AS n ON n.oid = c.relnamespace
             WHERE tree.ordinal = wanted.ordinal
               AND (c.oid = wanted.oid OR wanted.relkind = 'p' AND c.relkind <> 'p')), '[]'),
        'partitions', COALESCE((
            SELECT json_agg(json_build_object('relation', tree.oid::int8, 'version', tree.attached::text::int8,
                    'was_born_empty', c.relfilenode IN (0, c.oid) AND EXISTS (
                        SELECT FROM pg_attribute AS born JOIN pg_attribute AS a ON a.attrelid = born.attrelid
                         WHERE born.attrelid = tree.oid AND born.attnum = -1 AND a.attnum > 0
                           AND a.xmin = born.xmin AND a.cmin = born.cmin AND tree.attached = born.xmin
                           AND tree.attached_by::text::int8 > born.cmin::text::int8
                           AND born.xmax = '0'::xid AND a.xmax = '0'::xid)) ORDER BY tree.oid)
              FROM tree JOIN pg_class AS c ON c.oid = tree.oid
             WHERE tree.ordinal = wanted.ordinal AND wanted.relkind = 'p' AND tree.parent IS NOT NULL), '[]'),
        'children', COALESCE((
            SELECT json_agg(json_build_object('relation', tree.oid::int8, 'version', tree.attached::text::int8,
                    'schema', n.nspname, 'name', c.relname, 'parent_schema', parent_n.nspname, 'parent', parent.relname)
                    ORDER BY tree.oid)
              FROM tree JOIN pg_class AS c ON c.oid = tree.oid JOIN pg_namespace AS n ON n.oid = c.relnamespace
              JOIN pg_class AS parent ON parent.oid = tree.parent
              JOIN pg_namespace AS parent_n ON parent_n.oid = parent.relnamespace
             WHERE tree.ordinal = wanted.ordinal AND wanted.relkind = 'r' AND c.relpersistence <> 't'), '[]'),
        'members', COALESCE((
            SELECT json_agg(json_build_object('relation', member.prrelid::int8, 'oid', member.oid::int8,
                    'version', member.xmin::text::int8, 'filter', {filter}, 'columns', {columns}) ORDER BY member.oid)
              FROM pg_publication_rel AS member
             WHERE member.prpubid = (SELECT oid FROM publication)
               AND member.prrelid IN (SELECT l.oid FROM lineage AS l WHERE l.ordinal = wanted.ordinal)), '[]'),
        'schemas', COALESCE({schemas}, '[]')
    ) ORDER BY wanted.ordinal) FROM wanted))"
    )
}

/// Returns one json value for [`super::Sum`]: the identity and the xmin of every catalog row that [`everything`] reads.
/// Rows with the same xmin have the same contents, except for values that PostgreSQL changes in place, and nothing here
/// depends on those.
pub(super) fn sum(version: i32) -> String {
    let schemas = if version >= FINE_GRAINED_PUBLICATIONS {
        "UNION ALL SELECT concat_ws(' ', 'schema', oid, xmin) FROM pg_publication_namespace
                    WHERE pnpubid = (SELECT oid FROM publication)"
    } else {
        ""
    };
    format!(
        "-- whether it changed
WITH RECURSIVE {RELATIONS},
facts(fact) AS (
    SELECT concat_ws(' ', 'publication', oid, xmin) FROM publication
    UNION ALL SELECT concat_ws(' ', 'member', oid, xmin) FROM pg_publication_rel
               WHERE prpubid = (SELECT oid FROM publication)
    {schemas}
    UNION ALL SELECT concat_ws(' ', 'wanted', ordinal, namespace, namespace_version, oid, row_security_active(oid))
                FROM wanted
    UNION ALL SELECT concat_ws(' ', 'tenants', oid, row_security_active(oid)) FROM tenants
    UNION ALL SELECT concat_ws(' ', 'below', tree.ordinal, c.oid, c.xmin, c.relfilenode, tree.parent, tree.attached)
                FROM tree JOIN pg_class AS c ON c.oid = tree.oid
    UNION ALL SELECT concat_ws(' ', 'above', l.ordinal, c.oid, c.xmin) FROM lineage AS l JOIN pg_class AS c ON c.oid = l.oid
    UNION ALL SELECT concat_ws(' ', 'index', x.indexrelid, x.xmin) FROM tree JOIN pg_index AS x ON x.indrelid = tree.oid
    UNION ALL SELECT concat_ws(' ', 'column', a.attrelid, a.attnum, a.xmin)
                FROM wanted JOIN pg_attribute AS a ON a.attrelid = wanted.oid AND a.attnum > 0
    UNION ALL SELECT concat_ws(' ', 'type', t.ordinal, t.number, y.oid, y.xmin) FROM types AS t JOIN pg_type AS y ON y.oid = t.oid
    UNION ALL SELECT concat_ws(' ', 'label', e.oid, e.xmin) FROM types AS t JOIN pg_enum AS e ON e.enumtypid = t.oid
    UNION ALL SELECT concat_ws(' ', 'attribute', a.attrelid, a.attnum, a.xmin)
                FROM types AS t JOIN pg_type AS y ON y.oid = t.oid AND y.typtype = 'c'
                JOIN pg_attribute AS a ON a.attrelid = y.typrelid AND a.attnum > 0)
SELECT json_build_object('lsn', {LSN},
    'value', (SELECT concat_ws(' ', count(*), sum(hashtextextended(fact, 0))) FROM facts))"
    )
}

/// The WAL insert position, read after the statement's snapshot was taken.
const LSN: &str = "CASE WHEN pg_is_in_recovery() THEN '0/0' ELSE pg_current_wal_insert_lsn()::text END";
