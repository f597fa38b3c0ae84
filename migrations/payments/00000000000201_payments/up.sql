-- Amounts and balances are whole minor units. No index on the balance, and room in the page: its updates stay heap-only.
create table account (
    id         bigint      generated always as identity primary key,
    user_id    text        not null unique,
    balance    bigint      not null default 0 check (balance >= 0),
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);

-- The ledger. A row moves an amount from one account to another, so the books balance by construction; 0 is the world that
-- deposits come from, -1 the shop that payments go to. `account_id` is the user's side, whose balance afterwards is kept.
create table transfer (
    id            bigint      generated always as identity,
    account_id    bigint      not null,
    from_account  bigint      not null,
    to_account    bigint      not null,
    amount        bigint      not null check (amount > 0),
    order_id      uuid,
    balance_after bigint      not null check (balance_after >= 0),
    created_at    timestamptz not null,
    primary key (account_id, id),
    check (account_id > 0 and ((from_account = 0 and to_account = account_id and order_id is null)
                            or (from_account = account_id and to_account = -1 and order_id is not null)))
);
-- At most one debit an order, for ever (S3).
create unique index transfer_by_order on transfer (order_id) where order_id is not null;

-- The decision on every order's payment, and payments' inbox: one row an order for ever, with where its request came from.
create table payment (
    order_id        uuid        primary key,
    user_id         text        not null,
    amount          bigint      not null check (amount > 0),
    status          text        not null check (status in ('Finished', 'Cancelled')),
    failure_reason  text        check (failure_reason in ('insufficient_funds', 'account_not_found')),
    result_event_id uuid        not null,
    event_id        text        not null,
    source          text,
    topic           text        not null,
    partition       int         not null,
    log_offset      bigint      not null,
    sent_at         timestamptz,
    published_at    timestamptz not null,
    received_at     timestamptz not null,
    decided_at      timestamptz not null,
    traceparent     text,
    check ((status = 'Finished') = (failure_reason is null))
);

-- What is written here is history.
create function history_is_immutable() returns trigger language plpgsql as $$
begin
    raise exception '% is immutable', tg_table_name;
end $$;
create trigger transfer_is_immutable before update or delete on transfer for each row execute function history_is_immutable();
create trigger payment_is_immutable before update or delete on payment for each row execute function history_is_immutable();
