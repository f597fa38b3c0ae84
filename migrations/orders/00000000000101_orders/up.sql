-- Amounts are whole minor units. The status moves New -> (Processing) -> Finished | Cancelled and never back (S5).
create table orders (
    id             uuid        primary key,
    user_id        text        not null,
    amount         bigint      not null check (amount > 0),
    description    text,
    status         text        not null default 'New' check (status in ('New', 'Processing', 'Finished', 'Cancelled')),
    failure_reason text        check (failure_reason in ('insufficient_funds', 'account_not_found')),
    created_at     timestamptz not null,
    updated_at     timestamptz not null,
    traceparent    text        not null
) with (fillfactor = 85);
-- The lists, newest first. The status is in no index, so that ending an order is a heap-only update.
create index orders_by_user on orders (user_id, created_at desc, id desc);
create index orders_by_time on orders (created_at desc, id desc);

-- One row a change of status: the stream of events, read like the outbox by (xid, id), and orders' inbox. The row that ends
-- an order carries where its result came from.
create table order_event (
    xid            xid8        not null default pg_current_xact_id(),
    id             bigint      generated always as identity,
    order_id       uuid        not null,
    status         text        not null,
    failure_reason text,
    at             timestamptz not null,
    event_id       text,
    source         text,
    topic          text,
    partition      int,
    log_offset     bigint,
    sent_at        timestamptz,
    published_at   timestamptz,
    received_at    timestamptz,
    traceparent    text,
    primary key (order_id, status)
);
create index order_event_by_position on order_event (xid, id);
