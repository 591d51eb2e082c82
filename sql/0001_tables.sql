-- tuplewatch, version 1: the tables of the `tuples` preset.
--
-- Who has which relation to what, one row per fact, written with ordinary SQL by any program. Nothing in here knows about
-- replication: tuplewatch reads these tables through a publication, which `tuplewatch setup` creates afterwards.
--
-- Applied by `tuplewatch setup`, in one transaction. By hand it is the same:
--
--     psql --single-transaction --set ON_ERROR_STOP=1 --file 0001_tables.sql
--
-- Applying it again changes nothing. PostgreSQL 14 to 18. The role that applies it owns what it creates.
--
-- What writers need (tuplewatch grants nobody access to the tables):
--
--     GRANT SELECT, INSERT, DELETE ON tuplewatch.relation_tuples TO app;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON tuplewatch.attributes TO app;
--
-- tuplewatch is such a writer itself where clients use base.v1.Data, and with base.v1.Tenancy one of tuplewatch.tenants:
--
--     GRANT SELECT, INSERT, DELETE ON tuplewatch.tenants TO the_role_of_tuplewatch;
--
-- What writers should leave alone: TRUNCATE. It tells subscribers that something is gone but not what, so it ends their
-- streams. DELETE says what.

CREATE SCHEMA IF NOT EXISTS tuplewatch;

-- USAGE lets a role name what is in the schema; it opens no table. Every writer needs it, for its tables as for
-- tuplewatch.snap_token(), and there is nothing in here whose mere name is a secret.
GRANT USAGE ON SCHEMA tuplewatch TO PUBLIC;


-- Which of these files have been applied. Each file adds its own row as its last step.

CREATE TABLE IF NOT EXISTS tuplewatch.schema_version (
    version    integer     NOT NULL PRIMARY KEY,
    name       text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);


-- Forms
--
-- The constraints below refuse what the Watch API could not represent, so that a mistake is an error for its writer and
-- not, later, for every subscriber. The forms are those of Permify:
--
--   ids               1 to 128 of a-z A-Z 0-9 _ - @ . : +      or a single *
--   types, relations  1 to 64 of a-z A-Z _
--
-- They are written as a length and a set of refused characters: a pattern with {1,128} says the same, but takes 16 us a value
-- to match where this takes 0.5 us (measured on PostgreSQL 15, ids of 30 characters).
--
-- COLLATE "C": the values are ASCII, so the order is the same for everybody, comparing is a memcmp, and an operating
-- system upgrade that changes its collations leaves the primary keys intact. It also keeps ranges such as a-z in the
-- patterns from depending on the database's locale.
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

-- `t1` is there from the start, so that a first try needs one statement less. Only from the start: whoever deletes it
-- does not get it back when this file is applied again.
INSERT INTO tuplewatch.tenants (id, name)
SELECT 't1', 'first tenant'
 WHERE NOT EXISTS (SELECT FROM tuplewatch.schema_version WHERE version = 1)
    ON CONFLICT DO NOTHING;


-- Relations: entity_type:entity_id#relation@subject_type:subject_id[#subject_relation]
--
--     document:7#viewer@user:ada             subject_relation is ''
--     document:7#viewer@group:ops#member     subject_relation is 'member'
--
-- Rows are inserted and deleted. An UPDATE works too: subscribers see it as a delete and a create.
--
-- The primary key is the whole row. So the same fact is never there twice (write with ON CONFLICT DO NOTHING), and the
-- default replica identity already tells subscribers everything about a deleted row.
--
-- No foreign key to tenants, on purpose. It would take a row lock on the tenant for every inserted tuple: all writers of a
-- tenant would share-lock one row, each with a WAL record of its own and, where two overlap, a multixact to be vacuumed.
-- It would buy little: tuples of a tenant that is not (yet) in tenants harm nobody, for nobody can subscribe to them.
--
-- No further index either: one that leads with the subject helps "what can ada see", and costs every insert. The
-- application that asks that question should create it.

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
    -- Empty for a plain subject. Permify's `...` means the same and is written as ''.
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
-- `data` may be missing, since protobuf's JSON leaves out default values. 1.0 and 1e3 are integral. Not accepted are null,
-- numbers as strings, and any third member: every value has one way to be written.
--
-- CHECK constraints use these functions. Replacing them with stricter ones does not examine the rows that are there.

-- One element of an array, or the whole of a plain value; `kind` is String, Integer, Double or Boolean.
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
            -- The largest finite double: a number beyond it could only be delivered as infinity.
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
    -- Compared whole, not matched by a pattern: that alone would cost 15 us a row.
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
    -- Whatever is not an object has no @type, and so no kind.
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

-- A CHECK constraint calls its function as the role that writes the row, so writers must be able to. Functions usually are
-- open to everybody; a database may have changed that default.
GRANT EXECUTE ON FUNCTION tuplewatch.is_attribute_datum(text, jsonb) TO PUBLIC;
GRANT EXECUTE ON FUNCTION tuplewatch.is_attribute_value(jsonb) TO PUBLIC;


-- Attributes: entity_type:entity_id$attribute = value. Inserted, updated (a delete and a create to subscribers), deleted.

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

-- A delete is reported with its value, which the primary key does not hold; and an update that leaves a large value as it
-- is sends it in the old row only. Both take the whole old row. Set once, since ALTER TABLE locks out every reader and
-- writer even where there is nothing to change.
DO $$
BEGIN
    IF (SELECT relreplident FROM pg_catalog.pg_class WHERE oid = 'tuplewatch.attributes'::regclass) <> 'f' THEN
        ALTER TABLE tuplewatch.attributes REPLICA IDENTITY FULL;
    END IF;
END
$$;


COMMENT ON SCHEMA tuplewatch IS 'Relation tuples and attributes whose changes tuplewatch streams to subscribers.';
COMMENT ON TABLE tuplewatch.schema_version IS 'Which files of tuplewatch''s sql/ have been applied.';
COMMENT ON TABLE tuplewatch.tenants IS 'Tenants that subscribers may watch.';
COMMENT ON TABLE tuplewatch.relation_tuples IS 'One row per relation: entity#relation@subject. Watched. Do not TRUNCATE: use DELETE.';
COMMENT ON TABLE tuplewatch.attributes IS 'One row per attribute of an entity. Watched. Do not TRUNCATE: use DELETE.';
COMMENT ON COLUMN tuplewatch.relation_tuples.subject_relation IS 'Empty unless the subject is a set, as in group:ops#member.';
COMMENT ON COLUMN tuplewatch.attributes.value IS 'JSON form of a base.v1 value: {"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true}';
COMMENT ON FUNCTION tuplewatch.is_attribute_value(jsonb) IS 'Whether Watch can represent this attribute value.';

INSERT INTO tuplewatch.schema_version (version, name) VALUES (1, 'tables') ON CONFLICT DO NOTHING;
