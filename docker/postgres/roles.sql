-- The two roles of tuplewatch, for psql, run once by a superuser in the database that is watched:
--
--   tuplewatch_owner   runs `tuplewatch setup`: owns schema, tables and publication, and makes the slot
--   tuplewatch         runs `tuplewatch serve`: reads
--
-- Their passwords come from the environment (psql 15 or newer):
--
--     TUPLEWATCH_OWNER_PASSWORD=… TUPLEWATCH_PASSWORD=… \
--         psql --set ON_ERROR_STOP=1 --file docker/postgres/roles.sql postgres://postgres@HOST/DATABASE
--
-- docker/compose.yaml has the image of PostgreSQL run it when it makes the cluster.

\getenv owner_password TUPLEWATCH_OWNER_PASSWORD
\getenv password TUPLEWATCH_PASSWORD

CREATE ROLE tuplewatch_owner LOGIN REPLICATION PASSWORD :'owner_password';
CREATE ROLE tuplewatch LOGIN REPLICATION PASSWORD :'password';

-- For the schema, and for the publication: making one takes CREATE on the database.
DO $$
BEGIN
    EXECUTE format('GRANT CREATE ON DATABASE %I TO tuplewatch_owner', current_database());
END
$$;

-- Before setup, so that its tables can be granted before they are there.
CREATE SCHEMA tuplewatch AUTHORIZATION tuplewatch_owner;
GRANT USAGE ON SCHEMA tuplewatch TO tuplewatch;
ALTER DEFAULT PRIVILEGES FOR ROLE tuplewatch_owner IN SCHEMA tuplewatch GRANT SELECT ON TABLES TO tuplewatch;

-- For the Data and Tenancy APIs, which write, this as well:
--
--     ALTER DEFAULT PRIVILEGES FOR ROLE tuplewatch_owner IN SCHEMA tuplewatch
--         GRANT INSERT, UPDATE, DELETE ON TABLES TO tuplewatch;
--
-- and where the tables are there already:
--
--     GRANT INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA tuplewatch TO tuplewatch;

-- For your application, which writes with a role of its own, after setup:
--
--     GRANT SELECT, INSERT, DELETE ON tuplewatch.relation_tuples TO app;
--     GRANT SELECT, INSERT, UPDATE, DELETE ON tuplewatch.attributes TO app;
