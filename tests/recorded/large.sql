-- A transaction in many messages, between two small ones.

INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', 'before', 'viewer', 'user', 'u');

INSERT INTO tuplewatch.relation_tuples
SELECT 't1', 'large', n::text, 'viewer', 'group', 'g-' || n % 7, CASE n % 3 WHEN 0 THEN 'member' ELSE '' END
  FROM generate_series(1, 4000) AS n;
INSERT INTO tuplewatch.attributes
SELECT 't1', 'large', n::text, 'size',
       jsonb_build_object('@type', 'type.googleapis.com/base.v1.IntegerArrayValue', 'data', jsonb_build_array(n, -n))
  FROM generate_series(1, 1000) AS n;
UPDATE tuplewatch.relation_tuples SET relation = 'editor' WHERE entity_type = 'large' AND subject_id = 'g-1';
DELETE FROM tuplewatch.attributes WHERE entity_type = 'large';

DELETE FROM tuplewatch.relation_tuples WHERE entity_id = 'the-end' AND tenant_id = 't1';
