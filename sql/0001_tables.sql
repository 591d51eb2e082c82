-- tuplewatch, version 1: the tables of the `tuples` preset.
--
-- The tables contain relation tuples and attributes, one row for each fact, which any program writes with ordinary SQL. Nothing in this
-- file concerns replication: tuplewatch reads the tables through a publication, which `tuplewatch setup` creates afterwards.
--
-- `tuplewatch setup` applies this file in one transaction. This command does the same:
--
--     psql --single-transaction --set ON_ERROR_STOP=1 --file 0001_tables.sql
--
-- Applying the file again changes nothing. It works with PostgreSQL 14 to 18. The role that applies it owns the objects.
--
-- Privileges that writers need (tuplewatch grants nobody access to the tables):
--
--     GRANT SELECT, INSERT, DELETE ON tuplewatch.relation_tuples TO app;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON tuplewatch.attributes TO app;
--
-- If clients use base.v1.Data, tuplewatch itself is such a writer. With base.v1.Tenancy it also writes tuplewatch.tenants:
--
--     GRANT SELECT, INSERT, DELETE ON tuplewatch.tenants TO the_role_of_tuplewatch;
--
-- Writers should not use TRUNCATE: the WAL does not contain the truncated rows, so it is a gap in history and ends the streams of
-- subscribers. Use DELETE.

CREATE SCHEMA IF NOT EXISTS tuplewatch;

-- USAGE lets a role name objects of the schema; it gives no access to a table. Every writer needs it, for the tables and for
-- tuplewatch.snap_token(), and no name in this schema is secret.
GRANT USAGE ON SCHEMA tuplewatch TO PUBLIC;


-- The files that have been applied. Each file adds its own row as its last step.

CREATE TABLE IF NOT EXISTS tuplewatch.schema_version (
    version    integer     NOT NULL PRIMARY KEY,
    name       text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);


-- Forms
--
-- The constraints below refuse values that the Watch API cannot represent, so that a mistake is an error for its writer, and not
-- later for every subscriber. The forms are those of Permify:
--
--   ids               1 to 128 of a-z A-Z 0-9 _ - @ . : +      or a single *
--   types, relations  1 to 64 of a-z A-Z _
--
-- Each constraint checks the length and a set of refused characters. A pattern with {1,128} means the same, but takes 16 us for a
-- value instead of 0.5 us (measured on PostgreSQL 15, with ids of 30 characters).
--
-- The columns have COLLATE "C": the values are ASCII, the order does not depend on a locale, comparing is a memcmp, and an upgrade of
-- the operating system that changes collations leaves the primary keys intact. It also makes ranges such as a-z in the patterns
-- independent of the database's locale.
--
-- The longest possible key is 128 * 3 + 64 * 4 = 640 bytes, far below what a btree entry can hold (2,704).


-- Tenants that a subscriber may ask for. Watch answers NOT_FOUND for any other.

CREATE TABLE IF NOT EXISTS tuplewatch.tenants (
    id         text COLLATE "C" NOT NULL PRIMARY KEY,
    name       text             NOT NULL,
    created_at timestamptz      NOT NULL DEFAULT now(),

    CONSTRAINT tenants_id_form
        CHECK (id = '*' OR (length(id) BETWEEN 1 AND 128 AND id !~ '[^a-zA-Z0-9_@.:+-]'))
);

-- `t1` exists from the start, so that a first try needs one statement less. If somebody deletes it, applying this file again does
-- not create it again.
INSERT INTO tuplewatch.tenants (id, name)
SELECT 't1', 'first tenant'
 WHERE NOT EXISTS (SELECT FROM tuplewatch.schema_version WHERE version = 1)
    ON CONFLICT DO NOTHING;


-- Relations: entity_type:entity_id#relation@subject_type:subject_id[#subject_relation]
--
--     document:7#viewer@user:ada             subject_relation is ''
--     document:7#viewer@group:ops#member     subject_relation is 'member'
--
-- Insert and delete rows. An UPDATE works too: subscribers receive it as a delete and a create.
--
-- The primary key is the whole row. So no fact exists twice (write with ON CONFLICT DO NOTHING), and with the default replica
-- identity a delete contains the whole old row.
--
-- There is no foreign key to tenants, on purpose. Each inserted tuple would lock the row of its tenant: all writers of a tenant
-- would share-lock one row, each with its own WAL record and, if two overlap, with a multixact that must be vacuumed. The benefit
-- would be small: tuples of a tenant that is not (yet) in tenants do no harm, because nobody can subscribe to them.
--
-- There is no further index either. An index that begins with the subject helps to list everything that ada can see, but makes
-- every insert more expensive. An application with such a query should create the index.

CREATE TABLE IF NOT EXISTS tuplewatch.relation_tuples (
    tenant_id        text COLLATE "C" NOT NULL,
    entity_type      text COLLATE "C" NOT NULL,
    entity_id        text COLLATE "C" NOT NULL,
    relation         text COLLATE "C" NOT NULL,
    subject_type     text COLLATE "C" NOT NULL,
    subject_id       text COLLATE "C" NOT NULL,
    subject_relation text COLLATE "C" NOT NULL DEFAULT '',

    PRIMARY KEY (tenant_id, entity_type, entity_id, relation, subject_type, subject_id, subject_relation),

    CONSTRAINT relation_tuples_tenant_id_form
        CHECK (tenant_id = '*' OR (length(tenant_id) BETWEEN 1 AND 128 AND tenant_id !~ '[^a-zA-Z0-9_@.:+-]')),
    CONSTRAINT relation_tuples_entity_type_form
        CHECK (length(entity_type) BETWEEN 1 AND 64 AND entity_type !~ '[^a-zA-Z_]'),
    CONSTRAINT relation_tuples_entity_id_form
        CHECK (entity_id = '*' OR (length(entity_id) BETWEEN 1 AND 128 AND entity_id !~ '[^a-zA-Z0-9_@.:+-]')),
    CONSTRAINT relation_tuples_relation_form
        CHECK (length(relation) BETWEEN 1 AND 64 AND relation !~ '[^a-zA-Z_]'),
    CONSTRAINT relation_tuples_subject_type_form
        CHECK (length(subject_type) BETWEEN 1 AND 64 AND subject_type !~ '[^a-zA-Z_]'),
    CONSTRAINT relation_tuples_subject_id_form
        CHECK (subject_id = '*' OR (length(subject_id) BETWEEN 1 AND 128 AND subject_id !~ '[^a-zA-Z0-9_@.:+-]')),
    -- Empty for a direct subject. Write Permify's `...`, which means the same, as ''.
    CONSTRAINT relation_tuples_subject_relation_form
        CHECK (length(subject_relation) <= 64 AND subject_relation !~ '[^a-zA-Z_]')
);


-- Attribute values: a protobuf Any in its JSON form, one of eight messages.
--
--     {"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true}
--     {"@type": "type.googleapis.com/base.v1.StringArrayValue", "data": ["a", "b"]}
--
--   @type, after type.googleapis.com/base.v1.     data                                    without data
--   StringValue     StringArrayValue              string                                  ""     []
--   IntegerValue    IntegerArrayValue             integral number, -2^31 to 2^31 - 1      0      []
--   DoubleValue     DoubleArrayValue              number that a double can hold, or       0      []
--                                                 "NaN", "Infinity", "-Infinity"
--   BooleanValue    BooleanArrayValue             true or false                           false  []
--
-- `data` may be missing, because protobuf's JSON leaves out default values. 1.0 and 1e3 are integral. null, numbers as strings, and
-- a third member are refused, because every value should have only one form.
--
-- CHECK constraints use these functions. Replacing a function by a stricter one does not check existing rows.

-- Checks an element of an array, or a single value; `kind` is String, Integer, Double or Boolean.
CREATE OR REPLACE FUNCTION tuplewatch.is_attribute_datum(kind text, datum jsonb) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$
    SELECT CASE jsonb_typeof(datum)
        WHEN 'string'  THEN kind = 'String'
                            OR (kind = 'Double' AND datum IN ('"NaN"', '"Infinity"', '"-Infinity"'))
        WHEN 'boolean' THEN kind = 'Boolean'
        WHEN 'number'  THEN CASE kind
            WHEN 'Integer' THEN datum::numeric BETWEEN -2147483648 AND 2147483647
                                AND datum::numeric = trunc(datum::numeric)
            -- The largest finite double: a larger number could only be delivered as infinity.
            WHEN 'Double'  THEN abs(datum::numeric) <= 1.7976931348623157e308
            ELSE false
        END
        ELSE false
    END
$$;

CREATE OR REPLACE FUNCTION tuplewatch.is_attribute_value(value jsonb) RETURNS boolean
LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE
AS $$
DECLARE
    message text  := value ->> '@type';
    data    jsonb := value -> 'data';
    -- Compared as a whole, because a pattern alone would cost 15 us for each row.
    kind    text  := CASE message
        WHEN 'type.googleapis.com/base.v1.StringValue'       THEN 'String'
        WHEN 'type.googleapis.com/base.v1.StringArrayValue'  THEN 'String'
        WHEN 'type.googleapis.com/base.v1.IntegerValue'      THEN 'Integer'
        WHEN 'type.googleapis.com/base.v1.IntegerArrayValue' THEN 'Integer'
        WHEN 'type.googleapis.com/base.v1.DoubleValue'       THEN 'Double'
        WHEN 'type.googleapis.com/base.v1.DoubleArrayValue'  THEN 'Double'
        WHEN 'type.googleapis.com/base.v1.BooleanValue'      THEN 'Boolean'
        WHEN 'type.googleapis.com/base.v1.BooleanArrayValue' THEN 'Boolean'
    END;
BEGIN
    -- A value that is not an object has no @type, and so no kind.
    IF kind IS NULL THEN
        RETURN false;
    ELSIF value - '@type' - 'data' <> '{}' THEN
        RETURN false;
    ELSIF data IS NULL THEN
        RETURN true;
    ELSIF message NOT LIKE '%ArrayValue' THEN
        RETURN tuplewatch.is_attribute_datum(kind, data);
    ELSIF jsonb_typeof(data) <> 'array' THEN
        RETURN false;
    END IF;
    RETURN NOT EXISTS (
        SELECT FROM jsonb_array_elements(data) AS element
         WHERE NOT tuplewatch.is_attribute_datum(kind, element));
END
$$;

-- A CHECK constraint calls its function as the role that writes the row, so writers need EXECUTE. By default everybody has it, but a
-- database may have other default privileges.
GRANT EXECUTE ON FUNCTION tuplewatch.is_attribute_datum(text, jsonb) TO PUBLIC;
GRANT EXECUTE ON FUNCTION tuplewatch.is_attribute_value(jsonb) TO PUBLIC;


-- Attributes: entity_type:entity_id$attribute = value. Insert, update and delete rows. Subscribers receive an UPDATE as a delete and a
-- create.

CREATE TABLE IF NOT EXISTS tuplewatch.attributes (
    tenant_id   text COLLATE "C" NOT NULL,
    entity_type text COLLATE "C" NOT NULL,
    entity_id   text COLLATE "C" NOT NULL,
    attribute   text COLLATE "C" NOT NULL,
    value       jsonb            NOT NULL,

    PRIMARY KEY (tenant_id, entity_type, entity_id, attribute),

    CONSTRAINT attributes_tenant_id_form
        CHECK (tenant_id = '*' OR (length(tenant_id) BETWEEN 1 AND 128 AND tenant_id !~ '[^a-zA-Z0-9_@.:+-]')),
    CONSTRAINT attributes_entity_type_form
        CHECK (length(entity_type) BETWEEN 1 AND 64 AND entity_type !~ '[^a-zA-Z_]'),
    CONSTRAINT attributes_entity_id_form
        CHECK (entity_id = '*' OR (length(entity_id) BETWEEN 1 AND 128 AND entity_id !~ '[^a-zA-Z0-9_@.:+-]')),
    CONSTRAINT attributes_attribute_form
        CHECK (length(attribute) BETWEEN 1 AND 64 AND attribute !~ '[^a-zA-Z_]'),
    CONSTRAINT attributes_value_form
        CHECK (tuplewatch.is_attribute_value(value))
);

-- Subscribers receive a delete with its value, which is not in the primary key, and PostgreSQL sends an unchanged large value only in
-- the old row of an UPDATE. Both need the whole old row. The statement runs only if necessary, because ALTER TABLE locks out every
-- reader and writer even if it changes nothing.
DO $$
BEGIN
    IF (SELECT relreplident FROM pg_catalog.pg_class WHERE oid = 'tuplewatch.attributes'::regclass) <> 'f' THEN
        ALTER TABLE tuplewatch.attributes REPLICA IDENTITY FULL;
    END IF;
END
$$;


COMMENT ON SCHEMA tuplewatch IS 'Relation tuples and attributes whose changes tuplewatch streams to subscribers.';
COMMENT ON TABLE tuplewatch.schema_version IS 'The files of tuplewatch''s sql/ that have been applied.';
COMMENT ON TABLE tuplewatch.tenants IS 'Tenants that subscribers may watch.';
COMMENT ON TABLE tuplewatch.relation_tuples IS 'One row for each relation tuple: entity#relation@subject. Watched. Do not TRUNCATE: use DELETE.';
COMMENT ON TABLE tuplewatch.attributes IS 'One row for each attribute of an entity. Watched. Do not TRUNCATE: use DELETE.';
COMMENT ON COLUMN tuplewatch.relation_tuples.subject_relation IS 'Empty unless the subject is a set, as in group:ops#member.';
COMMENT ON COLUMN tuplewatch.attributes.value IS 'JSON form of a base.v1 value: {"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true}';
COMMENT ON FUNCTION tuplewatch.is_attribute_value(jsonb) IS 'Whether Watch can represent this attribute value.';

INSERT INTO tuplewatch.schema_version (version, name) VALUES (1, 'tables') ON CONFLICT DO NOTHING;
