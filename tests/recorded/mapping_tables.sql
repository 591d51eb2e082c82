-- The tables of `mapping.yaml`.

CREATE SCHEMA shop;
CREATE TYPE shop.role AS ENUM ('reader', 'writer');
CREATE TABLE shop.companies (company text PRIMARY KEY);
CREATE TABLE shop.memberships (
    company text, role shop.role, person int, joined timestamptz, left_at date, note text, PRIMARY KEY (company, person));
CREATE TABLE shop.folders (
    company text, kind text, folder numeric(10, 2), relation text, subject uuid, subject_relation text,
    PRIMARY KEY (company, kind, folder));
CREATE TABLE shop.facts (company text, document bytea, name text, value text, state text, PRIMARY KEY (company, document, name));
CREATE TABLE shop.commits (company text, id bigint PRIMARY KEY);
INSERT INTO shop.companies VALUES ('acme'), ('Müller & Söhne');
