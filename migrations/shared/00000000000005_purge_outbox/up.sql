-- Empties the outbox where all of it is on the log: true; false where a row lies beyond `published`, or where somebody else has a lock
-- for longer than writers may be made to wait. Here and not in a client's transaction, because a process that is frozen inside one would
-- keep every writer out.
create function purge_outbox(of_epoch bigint, published pg_snapshot) returns boolean language plpgsql volatile
    set lock_timeout = '50ms' as $$
begin
    perform 1 from outbox_cursor where name = 'outbox' and epoch = of_epoch for update;
    if not found then
        raise exception 'shopd_fenced: another relay has the outbox';
    end if;
    lock table outbox in access exclusive mode;
    -- Truncating alone would wait for an open insert and then remove its row. A volatile function's every statement sees what was
    -- committed before it, so this look comes after the wait.
    if exists (select 1 from outbox where xid >= pg_snapshot_xmin(published) and not pg_visible_in_snapshot(xid, published)) then
        return false;
    end if;
    truncate outbox;
    return true;
exception
    when lock_not_available then
        return false;
end $$;
