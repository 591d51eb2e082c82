-- What Permify writes, in its own tables. Each paragraph is a transaction.

INSERT INTO transactions (tenant_id) VALUES ('t1');
INSERT INTO relation_tuples (tenant_id, entity_type, entity_id, relation, subject_type, subject_id, subject_relation) VALUES
    ('t1', 'document', '1', 'viewer', 'user', 'ada', ''),
    ('t1', 'document', '1', 'viewer', 'group', 'ops', 'member');

-- Nothing is written, and its writer waits for its token even so.
INSERT INTO transactions (tenant_id) VALUES ('t1');

INSERT INTO transactions (tenant_id) VALUES ('t2');
INSERT INTO relation_tuples (tenant_id, entity_type, entity_id, relation, subject_type, subject_id, subject_relation) VALUES
    ('t2', 'document', 'of t2', 'viewer', 'user', 'é', '');

INSERT INTO transactions (tenant_id) VALUES ('t1');
INSERT INTO attributes (tenant_id, entity_type, entity_id, attribute, value)
SELECT 't1', 'document', '1', lower(kind),
       jsonb_build_object('@type', 'type.googleapis.com/base.v1.' || kind, 'data', data::jsonb)
  FROM (VALUES
      ('StringValue', '"é"'), ('IntegerValue', '-7'), ('DoubleValue', '2.5'), ('BooleanValue', 'true'),
      ('StringArrayValue', '["a", ""]'), ('IntegerArrayValue', '[1, -2]'), ('DoubleArrayValue', '[0.5]'),
      ('BooleanArrayValue', '[true, false]')
  ) AS v (kind, data);

-- An attribute in place of another, and a tuple that is deleted.
INSERT INTO transactions (tenant_id) VALUES ('t1');
UPDATE attributes SET expired_tx_id = pg_current_xact_id() WHERE attribute = 'integervalue';
INSERT INTO attributes (tenant_id, entity_type, entity_id, attribute, value) VALUES
    ('t1', 'document', '1', 'integervalue', '{"@type": "type.googleapis.com/base.v1.IntegerValue", "data": 8}');
UPDATE relation_tuples SET expired_tx_id = pg_current_xact_id() WHERE subject_id = 'ada';

-- Garbage collection tells nobody anything.
DELETE FROM relation_tuples WHERE expired_tx_id <> '9223372036854775807';
DELETE FROM attributes WHERE expired_tx_id <> '9223372036854775807';
DELETE FROM transactions;

-- In many messages. Each but the last has the token of the transaction before, which is of the same tenant here.
INSERT INTO transactions (tenant_id) VALUES ('t1');
INSERT INTO relation_tuples (tenant_id, entity_type, entity_id, relation, subject_type, subject_id, subject_relation)
SELECT 't1', 'large', n::text, 'viewer', 'user', 'u', '' FROM generate_series(1, 1500) AS n;

-- A tenant is deleted, and with it what held for it.
DELETE FROM relation_tuples WHERE tenant_id = 't2';
DELETE FROM transactions WHERE tenant_id = 't2';

INSERT INTO transactions (tenant_id) VALUES ('t1');
INSERT INTO relation_tuples (tenant_id, entity_type, entity_id, relation, subject_type, subject_id, subject_relation)
SELECT tenant, 'document', 'the-end', 'viewer', 'user', 'u', '' FROM unnest(ARRAY['t1', 't2']) AS tenant;
