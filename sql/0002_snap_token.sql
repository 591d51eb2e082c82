-- tuplewatch, version 2: snap_token(), the token of the transaction that asks for it.
--
--     BEGIN;
--     INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', '7', 'viewer', 'user', 'ada');
--     SELECT tuplewatch.snap_token();
--     COMMIT;
--
-- A writer cannot know where its commit will be in the WAL, so this token does not name a position. It names the
-- transaction, and tuplewatch finds its commit: Watch with this token yields everything after it. It works in any
-- transaction, also in a READ ONLY one, and in one that touches no watched table. Not on a standby: there are no
-- transactions of its own there. A token asked for inside a savepoint that is rolled back names nothing that happened; Watch
-- then starts at its LSN floor, which is earlier, never later.
--
-- Applied by `tuplewatch setup` after 0001_tables.sql, in one transaction. Applying it again changes nothing.
--
-- 45 bytes, big endian, written in URL-safe base64 (RFC 4648, section 5) without padding: 60 characters.
--
--   offset  bytes
--        0      1  format: 2, a transaction token
--        1      8  source: first 8 bytes of sha256(system identifier as 8 bytes, oid of the database as 4)
--        9     16  id: random, chosen here
--       25      8  the transaction's 64-bit id (xid8)
--       33      8  LSN floor: a flushed WAL position before the commit of this transaction
--       41      4  check: first 4 bytes of sha256(bytes 0 to 40)
--
-- The id, not the transaction id, is what finds the transaction in the stream: after a crash PostgreSQL gives an
-- unflushed transaction id to another transaction. So a transactional logical message with the id as its content goes into
-- the WAL, which the publication's reader receives with the transaction, and not at all if it is rolled back.
--
-- Costs: a transaction id, a WAL record of about 80 bytes, one read of pg_control.

CREATE OR REPLACE FUNCTION tuplewatch.snap_token() RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
-- The names below mean what they say, whatever the search_path of the caller and whatever it has in pg_temp.
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- First of all: what is flushed from here on, the commit record included, lies at or above the floor. Flushed, not merely
    -- written: a crash can take the rest of the WAL, this transaction in it, and then others commit where it was. Whoever
    -- starts at the floor must not miss those.
    lsn_floor CONSTANT pg_lsn := pg_current_wal_flush_lsn();
    id        CONSTANT bytea  := uuid_send(gen_random_uuid());
    source    bytea;
    body      bytea;
BEGIN
    SELECT substring(sha256(int8send(cluster.system_identifier) || oidsend(database.oid)) FROM 1 FOR 8)
      INTO STRICT source
      FROM pg_control_system() AS cluster, pg_database AS database
     WHERE database.datname = current_database();

    PERFORM pg_logical_emit_message(true, 'tuplewatch', id);

    body := '\x02'::bytea || source || id || xid8send(pg_current_xact_id()) || pg_lsn_send(lsn_floor);
    -- translate() also drops the padding; encode() breaks lines at 76 characters, of which there are 60.
    RETURN translate(encode(body || substring(sha256(body) FROM 1 FOR 4), 'base64'), '+/=', '-_');
END
$$;

-- For everybody: the token tells nothing that any role could not read for itself (pg_control_system() and the WAL position
-- are open to all), and the message adds nothing that any role could not already write to the WAL. So the function runs with
-- the rights of its caller, not as SECURITY DEFINER. To close it: REVOKE EXECUTE … FROM PUBLIC, then GRANT to the writers.
GRANT EXECUTE ON FUNCTION tuplewatch.snap_token() TO PUBLIC;

COMMENT ON FUNCTION tuplewatch.snap_token() IS 'Token of the current transaction: Watch with it yields everything after this transaction.';

INSERT INTO tuplewatch.schema_version (version, name) VALUES (2, 'snap_token') ON CONFLICT DO NOTHING;
