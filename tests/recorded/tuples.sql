-- Facts of every form in the tables of the preset `tuples`. Each paragraph is a transaction.

INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', '1', 'viewer', 'user', 'ada', '');

INSERT INTO tuplewatch.relation_tuples VALUES
    ('t1', 'document', '1', 'viewer', 'group', 'ops', 'member'),
    ('t2', 'document', '2', 'owner', 'user', 'bob', ''),
    ('t1', 'document', '*', 'viewer', 'user', '*', ''),
    ('t1', 'd', '-', 'r', 's', '@', 'x'),
    ('t2', 'folder', 'a_b-c@d.e:f+g', 'parent_of', 'document', '1', '');

-- The longest ones.
INSERT INTO tuplewatch.relation_tuples VALUES
    ('t1', repeat('entity_T', 8), repeat('0123456789abcdef', 8), repeat('relation', 8), repeat('subjectT', 8),
     repeat('ABCDEFGHIJKLMNOP', 8), repeat('member_O', 8));

-- Messages of every length around that of the shortest frame, which shorter ones are filled up to: a transaction for each.
DO $$
BEGIN
    FOR n IN 56..86 LOOP
        INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', lpad('', n, 'ab'), 'viewer', 'user', 'u');
        COMMIT;
    END LOOP;
END
$$

UPDATE tuplewatch.relation_tuples SET subject_id = 'eve' WHERE subject_id = 'ada';

-- Nothing changes, and so nothing comes.
UPDATE tuplewatch.relation_tuples SET subject_id = subject_id WHERE subject_id = 'eve';

UPDATE tuplewatch.relation_tuples SET tenant_id = 't2', relation = 'moved' WHERE tenant_id = 't1' AND subject_id = 'eve';

DELETE FROM tuplewatch.relation_tuples WHERE subject_type = 'group';

INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'again', 'viewer', 'user', 'u');
DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'again';
INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'again', 'viewer', 'user', 'u') ON CONFLICT DO NOTHING;
INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'again', 'viewer', 'user', 'u') ON CONFLICT DO NOTHING;

BEGIN;
INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'kept', 'viewer', 'user', 'u');
SAVEPOINT s;
INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'undone', 'viewer', 'user', 'u');
ROLLBACK TO SAVEPOINT s;
COMMIT;

-- Attributes of the eight types, each with its default, its extremes, and without `data`.
INSERT INTO tuplewatch.attributes
SELECT tenant, 'document', n::text, 'value',
       jsonb_strip_nulls(jsonb_build_object('@type', 'type.googleapis.com/base.v1.' || kind, 'data', data::jsonb))
  FROM (VALUES
      (1, 'StringValue', NULL), (2, 'StringValue', '""'), (3, 'StringValue', '"é 漢字 🦀 \" \\ \u0001 \n"'),
      (4, 'StringValue', '"' || repeat('x', 127) || '"'), (5, 'StringValue', '"' || repeat('y', 128) || '"'),
      (10, 'IntegerValue', NULL), (11, 'IntegerValue', '0'), (12, 'IntegerValue', '1'), (13, 'IntegerValue', '-1'),
      (14, 'IntegerValue', '2147483647'), (15, 'IntegerValue', '-2147483648'), (16, 'IntegerValue', '7.0'),
      (20, 'DoubleValue', NULL), (21, 'DoubleValue', '0'), (22, 'DoubleValue', '0.1'), (23, 'DoubleValue', '-2.5e-3'),
      (24, 'DoubleValue', '1.7976931348623157e308'), (25, 'DoubleValue', '5e-324'), (26, 'DoubleValue', '"NaN"'),
      (27, 'DoubleValue', '"Infinity"'), (28, 'DoubleValue', '"-Infinity"'), (29, 'DoubleValue', '9007199254740993'),
      (30, 'BooleanValue', NULL), (31, 'BooleanValue', 'false'), (32, 'BooleanValue', 'true'),
      (40, 'StringArrayValue', NULL), (41, 'StringArrayValue', '[]'), (42, 'StringArrayValue', '["", "a", "é", ""]'),
      (50, 'IntegerArrayValue', NULL), (51, 'IntegerArrayValue', '[]'),
      (52, 'IntegerArrayValue', '[0, -1, 2147483647, -2147483648]'),
      (60, 'DoubleArrayValue', NULL), (61, 'DoubleArrayValue', '[]'),
      (62, 'DoubleArrayValue', '[0, -0.5, "NaN", "-Infinity", 1e-7]'),
      (70, 'BooleanArrayValue', NULL), (71, 'BooleanArrayValue', '[]'), (72, 'BooleanArrayValue', '[true, false, true]')
  ) AS v (n, kind, data), (VALUES ('t1'), ('t2')) AS t (tenant)
 ORDER BY tenant, v.n;

-- A message of its own for one with a default, which has the shortest encoding.
INSERT INTO tuplewatch.attributes VALUES
    ('t1', 'd', '1', 'a', '{"@type": "type.googleapis.com/base.v1.BooleanValue"}');

-- Lengths of two and three bytes.
INSERT INTO tuplewatch.attributes
SELECT 't1', 'document', 'long', 'of_' || translate(n::text, '0123456789', 'abcdefghij'),
       jsonb_build_object('@type', 'type.googleapis.com/base.v1.StringValue', 'data', repeat('z', n))
  FROM unnest(ARRAY[200, 2000]) AS n;

INSERT INTO tuplewatch.attributes VALUES
    ('t1', 'document', 'long', 'of_all', jsonb_build_object(
        '@type', 'type.googleapis.com/base.v1.StringValue', 'data', repeat('z', 70000)));

UPDATE tuplewatch.attributes SET value = '{"@type": "type.googleapis.com/base.v1.IntegerValue", "data": 8}'
 WHERE entity_id IN ('11', 'long') AND attribute <> 'of_all';

DELETE FROM tuplewatch.attributes WHERE attribute = 'of_all';

DELETE FROM tuplewatch.attributes WHERE entity_id = '72' OR entity_id = '42';

-- Tuples and attributes of both tenants in one transaction.
INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'mixed', 'viewer', 'user', 'u');
INSERT INTO tuplewatch.attributes VALUES
    ('t2', 'document', 'mixed', 'public', '{"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true}'),
    ('t1', 'document', 'mixed', 'public', '{"@type": "type.googleapis.com/base.v1.BooleanValue", "data": true}');
INSERT INTO tuplewatch.relation_tuples VALUES ('t2', 'document', 'mixed', 'viewer', 'user', 'u');
DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'mixed';

INSERT INTO tuplewatch.relation_tuples
SELECT tenant, 'document', 'the-end', 'viewer', 'user', 'u' FROM unnest(ARRAY['t1', 't2']) AS tenant;
