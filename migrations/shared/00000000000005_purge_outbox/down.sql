drop function purge_outbox(bigint, pg_snapshot);
