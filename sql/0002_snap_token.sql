-- tuplewatch, version 2: snap_token(), which returns the token of the current transaction.
--
--     BEGIN;
--     INSERT INTO tuplewatch.relation_tuples VALUES ('t1', 'document', '7', 'viewer', 'user', 'ada');
--     SELECT tuplewatch.snap_token();
--     COMMIT;
--
-- A writer does not know the WAL position of its commit in advance, so this token names the transaction instead, and tuplewatch finds
-- its commit: Watch with this token yields everything after the transaction. The function works in any transaction, even in one that is
-- READ ONLY or changes no watched table. It does not work on a standby, which has no transactions of its own. If the token comes from
-- inside a savepoint that is rolled back, its message does not reach tuplewatch. Watch then starts at the token's LSN floor, which is
-- earlier, never later.
--
-- `tuplewatch setup` applies this file after 0001_tables.sql, in one transaction. Applying it again changes nothing.
--
-- A token has 45 bytes, big endian, in URL-safe base64 (RFC 4648, section 5) without padding: 60 characters.
--
--   offset  bytes
--        0      1  format: 2, a transaction token
--        1      8  source: first 8 bytes of sha256(system identifier as 8 bytes, oid of the database as 4)
--        9     16  id: random, chosen here
--       25      8  the transaction's 64-bit id (xid8)
--       33      8  LSN floor: a flushed WAL position before the commit of this transaction
--       41      4  check: first 4 bytes of sha256(bytes 0 to 40)
--
-- tuplewatch finds the transaction in the stream by the random id, not by the transaction id, because after a crash PostgreSQL assigns
-- an unflushed transaction id to another transaction. So the function writes a transactional logical message with the random id into the
-- WAL. tuplewatch receives the message with the transaction, and does not receive it if the transaction is rolled back.
--
-- A call costs a transaction id, a WAL record of about 80 bytes, and a read of pg_control.

CREATE OR REPLACE FUNCTION tuplewatch.snap_token() RETURNS text
LANGUAGE plpgsql VOLATILE PARALLEL UNSAFE
-- So that the names below do not depend on the caller's search_path, or on its objects in pg_temp.
SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    -- This comes first, so that the commit record will be at or above the floor. The floor is a flushed position, not merely a written
    -- one: a crash can lose the unflushed WAL, including this transaction, and other transactions then commit at these positions. A
    -- stream that starts at the floor must not miss them.
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
    -- translate() also removes the padding. encode() breaks lines at 76 characters, and a token has 60.
    RETURN translate(encode(body || substring(sha256(body) FROM 1 FOR 4), 'base64'), '+/=', '-_');
END
$$;

-- Everybody may call the function. Its token contains nothing that a role could not read anyway (pg_control_system() and the WAL
-- position are open to all), and every role may write logical messages anyway. So it runs with the privileges of its caller, not as
-- SECURITY DEFINER. To restrict it: REVOKE EXECUTE … FROM PUBLIC, then GRANT it to the writers.
GRANT EXECUTE ON FUNCTION tuplewatch.snap_token() TO PUBLIC;

COMMENT ON FUNCTION tuplewatch.snap_token() IS 'Token of the current transaction: Watch with it yields everything after this transaction.';

INSERT INTO tuplewatch.schema_version (version, name) VALUES (2, 'snap_token') ON CONFLICT DO NOTHING;
