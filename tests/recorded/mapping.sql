-- Rows of tables under a mapping of one's own. Each paragraph is a transaction.

INSERT INTO shop.memberships (company, role, person, joined) VALUES
    ('acme', 'reader', 1, '2020-02-29 12:00:00.5+02'), ('Müller & Söhne', 'writer', 2, 'infinity');

UPDATE shop.memberships SET note = 'nothing of this is mapped';

UPDATE shop.memberships SET role = 'writer' WHERE person = 1;

UPDATE shop.memberships SET left_at = '2021-01-01' WHERE person = 1;

UPDATE shop.memberships SET left_at = NULL, person = 3 WHERE person = 1;

INSERT INTO shop.folders VALUES
    ('acme', 'Ordner', 12.5, 'gehört zu', '00000000-0000-0000-0000-00000000000a', NULL),
    ('acme', '漢字 🦀', -0.01, 'a#b@c:d', '00000000-0000-0000-0000-00000000000b', 'member'),
    ('acme', E'tab\tline\nquote"back\\slash', 0, '', '00000000-0000-0000-0000-00000000000c', '');

INSERT INTO shop.facts
SELECT 'acme', '\x00ff', 'n' || n, format('{"@type": "type.googleapis.com/base.v1.%s", "data": %s}', kind, data),
       CASE n % 3 WHEN 0 THEN 'draft' WHEN 1 THEN 'live' ELSE 'gone' END
  FROM (VALUES
      (0, 'DoubleValue', '-0.0'), (1, 'DoubleValue', '1E2'), (2, 'DoubleValue', '1'), (3, 'IntegerValue', '1e3'),
      (4, 'StringValue', '"\u00e9\ud83e\udd80"'), (6, 'DoubleArrayValue', '[-0.0, 0.30000000000000004]'),
      (7, 'StringArrayValue', '["\/"]')
  ) AS v (n, kind, data);

UPDATE shop.facts SET state = 'live';

UPDATE shop.facts SET name = name || 'é', state = CASE name WHEN 'n4' THEN 'gone' ELSE 'draft' END;

INSERT INTO shop.commits VALUES ('acme', 1), ('Müller & Söhne', 2);

INSERT INTO shop.commits VALUES ('acme', 3);
INSERT INTO shop.folders VALUES ('acme', 'f', 1, 'r', '00000000-0000-0000-0000-00000000000d', NULL);
INSERT INTO shop.commits VALUES ('acme', 4);

DELETE FROM shop.folders;
DELETE FROM shop.facts;

INSERT INTO shop.memberships (company, role, person, joined)
SELECT company, 'reader', 99, 'epoch' FROM shop.companies;
INSERT INTO shop.folders
SELECT company, 'folder', 1, 'the-end', '00000000-0000-0000-0000-00000000000e', NULL FROM shop.companies;
