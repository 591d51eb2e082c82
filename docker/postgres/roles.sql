-- Creates the two roles of tuplewatch. A superuser runs this file once with psql, in the watched database:
--
--   tuplewatch_owner   runs `tuplewatch setup`: owns the schema, the tables and the publication, and creates the slot
--   tuplewatch         runs `tuplewatch serve`: reads
--
-- The passwords come from the environment (psql 15 or newer):
--
--     TUPLEWATCH_OWNER_PASSWORD=… TUPLEWATCH_PASSWORD=… \
--         psql --set ON_ERROR_STOP=1 --file docker/postgres/roles.sql postgres://postgres@HOST/DATABASE
--
-- With docker/compose.yaml, PostgreSQL's image runs this file when it creates the cluster.

\getenv owner_password TUPLEWATCH_OWNER_PASSWORD
\getenv password TUPLEWATCH_PASSWORD

CREATE ROLE tuplewatch_owner LOGIN REPLICATION PASSWORD :'owner_password';
CREATE ROLE tuplewatch LOGIN REPLICATION PASSWORD :'password';

-- `setup` creates a schema and a publication, and both need CREATE on the database.
DO $$
BEGIN
    EXECUTE format('GRANT CREATE ON DATABASE %I TO tuplewatch_owner', current_database());
END
$$;

-- The schema must exist before `setup`, so that default privileges can be set for its tables.
CREATE SCHEMA tuplewatch AUTHORIZATION tuplewatch_owner;
GRANT USAGE ON SCHEMA tuplewatch TO tuplewatch;
ALTER DEFAULT PRIVILEGES FOR ROLE tuplewatch_owner IN SCHEMA tuplewatch GRANT SELECT ON TABLES TO tuplewatch;

-- The Data and Tenancy APIs write, and also need:
--
--     ALTER DEFAULT PRIVILEGES FOR ROLE tuplewatch_owner IN SCHEMA tuplewatch
--         GRANT INSERT, UPDATE, DELETE ON TABLES TO tuplewatch;
--
-- or, if the tables exist already:
--
--     GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA tuplewatch TO tuplewatch;

-- Your application writes with its own role. After `setup`, it needs:
--
--     GRANT SELECT, INSERT, DELETE ON tuplewatch.relation_tuples TO app;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON tuplewatch.attributes TO app;
