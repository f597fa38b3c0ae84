-- How far orders were looked at for a result that does not come: all that were accepted before (swept_to, swept_id) have ended or
-- are in order_retry. One row, locked by the one replica that sweeps; the others see by it when it is time again.
create table sweep_cursor (
    name          text        primary key,
    swept_to      timestamptz not null default 'epoch',
    swept_id      uuid        not null default '00000000-0000-0000-0000-000000000000',
    -- Where looking for those that have ended meanwhile goes on, by order id.
    checked_to    uuid        not null default '00000000-0000-0000-0000-000000000000',
    next_walk_at  timestamptz not null default '-infinity',
    next_sweep_at timestamptz not null default '-infinity',
    -- Rows of order_retry after the last sweep.
    waiting       bigint      not null default 0
) with (fillfactor = 20);
insert into sweep_cursor (name) values ('orders');

-- Orders without a result, each until it ends. `asked_xid` wrote the last repeat of its request.
create table order_retry (
    order_id    uuid        primary key,
    asks        int         not null default 0,
    next_ask_at timestamptz not null,
    asked_xid   xid8
) with (fillfactor = 70);
create index order_retry_by_time on order_retry (next_ask_at, order_id);
