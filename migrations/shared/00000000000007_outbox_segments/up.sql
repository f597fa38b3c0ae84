-- The outbox in segments: what is published is dropped by emptying whole tables, so no row is ever deleted one by one and none lies dead.
-- A writer names the segment, by its clock (messaging/outbox/segment.rs); whoever reads `outbox` reads them all. The version before this,
-- which may still be running, goes on writing into `outbox` itself and truncates all of them together.
--
-- Inherited tables and no partitions: routing made an insert of 64 to 2 000 rows 3 to 9 % dearer (docs/adr/0009).
-- No autovacuum: there is nothing to clean, and a table that is emptied each second or so has no statistics worth having. The one
-- against the wraparound of transaction ids comes all the same.
create table outbox_1 (primary key (xid, id)) inherits (outbox) with (autovacuum_enabled = off, toast.autovacuum_enabled = off);
create table outbox_2 (primary key (xid, id)) inherits (outbox) with (autovacuum_enabled = off, toast.autovacuum_enabled = off);
create table outbox_3 (primary key (xid, id)) inherits (outbox) with (autovacuum_enabled = off, toast.autovacuum_enabled = off);
create table outbox_4 (primary key (xid, id)) inherits (outbox) with (autovacuum_enabled = off, toast.autovacuum_enabled = off);

-- One identity for all: the ids of a transaction keep their order across segments.
do $$
declare
    segment text;
begin
    foreach segment in array array['outbox_1', 'outbox_2', 'outbox_3', 'outbox_4'] loop
        execute format('alter table %I alter column id set default nextval(%L)', segment, pg_get_serial_sequence('outbox', 'id'));
    end loop;
end $$;

-- The segments that hold anything, `outbox` itself as 0. By their sizes: nothing is locked or read for it.
create function filled_outbox_segments() returns table (segment int) language sql volatile as $$
    select s.segment
      from (values (0, 'outbox'), (1, 'outbox_1'), (2, 'outbox_2'), (3, 'outbox_3'), (4, 'outbox_4')) as s (segment, name)
     where pg_relation_size(s.name::regclass) > 0
     order by s.segment
$$;

-- Empties one segment where all of it is on the log: true; false where a row lies beyond `published`, or where somebody else has a lock for
-- longer than writers may be made to wait. One segment a call, so that no lock is held while another one is waited for; and here, not in a
-- client's transaction, because a process that is frozen inside one would keep every writer out.
create function purge_outbox_segment(of_epoch bigint, published pg_snapshot, of_segment int) returns boolean language plpgsql volatile
    set lock_timeout = '50ms' as $$
declare
    segment regclass := case of_segment when 0 then 'outbox' else 'outbox_' || of_segment end;
    -- By the index: a transaction that was open, or began, when the cursor's snapshot was taken.
    beyond  text := format('select exists (select 1 from only %s where xid >= pg_snapshot_xmin($1) and not pg_visible_in_snapshot(xid, $1))',
                           segment);
    found_beyond boolean;
begin
    perform 1 from outbox_cursor where name = 'outbox' and epoch = of_epoch for update;
    if not found then
        raise exception 'shopd_fenced: another relay has the outbox';
    end if;
    -- No writer is held up for a segment that cannot be emptied yet.
    execute beyond into found_beyond using published;
    if found_beyond then
        return false;
    end if;
    execute format('lock table only %s in access exclusive mode', segment);
    -- Truncating alone would wait for an open insert and then remove its row. A volatile function's every statement sees what was
    -- committed before it, so this look comes after the wait.
    execute beyond into found_beyond using published;
    if found_beyond then
        return false;
    end if;
    execute format('truncate only %s', segment);
    return true;
exception
    when lock_not_available then
        return false;
end $$;
