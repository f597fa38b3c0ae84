//! Fills a shop's tables with orders that are paid, as if it had taken them itself: the audit must find nothing in them.
//!
//! Set by set, straight into both databases, which go side by side. Rows come in the order of their primary keys; the other indexes are
//! dropped before and made again from their own definitions after, so that what a migration adds is kept.

use std::time::Duration;

use tokio_postgres::Client;

use super::super::rig::{Servers, Shop};
use super::super::{Result, step};

/// Rows of one statement; each is a transaction.
const CHUNK: u64 = 500_000;
const PATIENCE: Duration = Duration::from_secs(1_800);
/// One order of so many is this one user's, whose lists are deep.
pub const USER_SHARE: u64 = 20;
pub const USER: &str = "reader";

/// What is made; see the statements.
#[derive(Clone, Copy, Debug)]
pub struct Filling {
    pub orders: u64,
    /// `u0..`, and one more for [`USER`].
    pub accounts: u64,
}

impl Filling {
    pub fn of(orders: u64) -> Self {
        Self { orders, accounts: (orders / 10).max(1_000) }
    }

    /// Orders of the users `u0..`; the rest are [`USER`]'s.
    fn spread(self) -> u64 {
        self.orders - self.orders / USER_SHARE
    }

    /// Into databases that were just migrated, while no role runs.
    pub async fn fill(self, servers: &Servers, shop: &Shop<'_>) -> Result<()> {
        let orders = servers.connect(&shop.orders_database()).await?;
        let payments = servers.connect(&shop.payments_database()).await?;
        for client in [&orders, &payments] {
            // What is filled in is not lost for anybody; a crash would only mean to begin again.
            run(client, "set synchronous_commit = off; set maintenance_work_mem = '1GB'; set jit = off").await?;
            run(client, FUNCTIONS).await?;
        }
        futures::future::try_join(self.fill_orders(&orders), self.fill_payments(&payments)).await?;
        for client in [&orders, &payments] {
            run(client, "drop schema filling cascade").await?;
        }
        servers.checkpoint().await
    }

    async fn fill_orders(self, client: &Client) -> Result<()> {
        let indexes = Indexes::drop(client, &["orders", "order_event"]).await?;
        let (spread, accounts) = (self.spread(), self.accounts);
        for (from, to) in chunks(self.orders) {
            step(&format!("size: {from} orders are filled in"));
            run(client, &ORDERS.replace(":from", &from.to_string()).replace(":to", &to.to_string()).with(spread, accounts)).await?;
            run(client, &EVENTS.replace(":from", &from.to_string()).replace(":to", &to.to_string()).with(spread, accounts)).await?;
        }
        // The sweeper has been by all of them.
        run(
            client,
            "update sweep_cursor set swept_to = last.created_at, swept_id = last.id
                       from (select created_at, id from orders order by id desc limit 1) last",
        )
        .await?;
        indexes.make_again(client).await?;
        run(client, "vacuum (freeze, analyze)").await
    }

    async fn fill_payments(self, client: &Client) -> Result<()> {
        let indexes = Indexes::drop(client, &["account", "transfer", "payment"]).await?;
        let (spread, accounts) = (self.spread(), self.accounts);
        for (from, to) in chunks(self.orders) {
            run(client, &PAYMENTS.replace(":from", &from.to_string()).replace(":to", &to.to_string()).with(spread, accounts))
                .await?;
        }
        let an_account = spread.div_ceil(accounts) + 1;
        let mut from = 0;
        while from < accounts {
            let to = (from + CHUNK / an_account).min(accounts);
            run(client, &ACCOUNTS.replace(":from", &from.to_string()).replace(":to", &to.to_string()).with(spread, accounts))
                .await?;
            run(client, &LEDGER.replace(":from", &from.to_string()).replace(":to", &to.to_string()).with(spread, accounts)).await?;
            from = to;
        }
        let reader = READER.replace(":orders", &self.orders.to_string()).with(spread, accounts);
        run(client, &reader).await?;
        indexes.make_again(client).await?;
        run(client, "vacuum (freeze, analyze)").await
    }
}

trait With {
    fn with(self, spread: u64, accounts: u64) -> String;
}

impl With for String {
    fn with(self, spread: u64, accounts: u64) -> String {
        self.replace(":spread", &spread.to_string()).replace(":accounts", &accounts.to_string())
    }
}

fn chunks(count: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..count).step_by(CHUNK as usize).map(move |from| (from, (from + CHUNK).min(count)))
}

async fn run(client: &Client, statements: &str) -> Result<()> {
    let done = tokio::time::timeout(PATIENCE, client.batch_execute(statements)).await;
    done.map_err(|_| format!("filling takes longer than {PATIENCE:?}: {statements}"))?
        .map_err(|error| format!("{error:?} in {statements}").into())
}

/// Indexes that no constraint needs, by their definitions.
struct Indexes(Vec<String>);

impl Indexes {
    async fn drop(client: &Client, tables: &[&str]) -> Result<Self> {
        let asked = "select i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid) from pg_index i
                      where i.indrelid = any($1::text[]::regclass[])
                        and not exists (select from pg_constraint c where c.conindid = i.indexrelid)";
        let mut definitions = Vec::new();
        for row in client.query(asked, &[&tables]).await? {
            let (name, definition): (String, String) = (row.try_get(0)?, row.try_get(1)?);
            run(client, &format!("drop index {name}")).await?;
            definitions.push(definition);
        }
        Ok(Self(definitions))
    }

    async fn make_again(self, client: &Client) -> Result<()> {
        for definition in self.0 {
            run(client, &definition).await?;
        }
        Ok(())
    }
}

/// Order `n`, from 0, was accepted 100 us after the one before, a day ago; decided 3 ms and final 5 ms later. The users `u0..` have orders
/// by turns; the last orders are the reader's. Ids are UUIDs of version 7 with that time. A user's requests lie in one partition, at offsets
/// that grow with `n`.
const FUNCTIONS: &str = "
create schema filling;
create function filling.at(n bigint) returns timestamptz language sql immutable as
    $$ select '2025-06-12T00:00:00Z'::timestamptz + n * interval '100 microseconds' $$;
create function filling.id(n bigint, kind int) returns uuid language sql immutable as
    $$ select (lpad(to_hex(1749686400000 + n / 10), 12, '0') || '700' || kind || '8000' || lpad(to_hex(n), 12, '0'))::uuid $$;
create function filling.trace(n bigint) returns text language sql immutable as
    $$ select '00-' || lpad(to_hex(n + 1), 32, 'a') || '-' || lpad(to_hex(n + 1), 16, 'b') || '-01' $$;
create function filling.account(n bigint, spread bigint, accounts bigint) returns bigint language sql immutable as
    $$ select case when n < spread then n % accounts else accounts end $$;
create function filling.name(k bigint, accounts bigint) returns text language sql immutable as
    $$ select case when k < accounts then 'u' || k else 'reader' end $$;
";

const ORDERS: &str = "
insert into orders (id, user_id, amount, description, status, created_at, updated_at, traceparent, accepted_xid, accepted_id)
select filling.id(n, 0), filling.name(filling.account(n, :spread, :accounts), :accounts), 1, 'a small book', 'Finished', filling.at(n),
       filling.at(n) + interval '5 milliseconds', filling.trace(n), pg_current_xact_id(), nextval('order_event_id_seq')
  from generate_series(:from::bigint, :to::bigint - 1) n";

const EVENTS: &str = "
insert into order_event (order_id, status, at, event_id, source, topic, partition, log_offset, sent_at, published_at, received_at, traceparent)
select filling.id(n, 0), 'Finished', filling.at(n) + interval '5 milliseconds', filling.id(n, 1)::text, '/shopd/payments',
       'payment-status-updates', (n % 12)::int, n, filling.at(n) + interval '3 milliseconds', filling.at(n) + interval '4 milliseconds',
       filling.at(n) + interval '5 milliseconds', filling.trace(n)
  from generate_series(:from::bigint, :to::bigint - 1) n";

const PAYMENTS: &str = "
insert into payment (order_id, user_id, amount, status, result_event_id, event_id, source, topic, partition, log_offset, sent_at,
                     published_at, received_at, decided_at, traceparent)
select filling.id(n, 0), filling.name(k, :accounts), 1, 'Finished', filling.id(n, 1), filling.id(n, 2)::text, '/shopd/orders',
       'order-payment-requests', (k % 12)::int, n, filling.at(n), filling.at(n) + interval '1 millisecond',
       filling.at(n) + interval '2 milliseconds', filling.at(n) + interval '3 milliseconds', filling.trace(n)
  from generate_series(:from::bigint, :to::bigint - 1) n, filling.account(n, :spread, :accounts) k";

/// A deposit before the first order, then a minor unit an order.
const ACCOUNTS: &str = "
insert into account (id, user_id, balance, created_at, updated_at) overriding system value
select k + 1, filling.name(k, :accounts), 900000000000 - (:spread / :accounts + (k < :spread % :accounts)::int), filling.at(-20000),
       filling.at(:spread) from generate_series(:from::bigint, :to::bigint - 1) k";

const LEDGER: &str = "
insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
select k + 1, 0, k + 1, 900000000000, null, 900000000000, filling.at(-10000)
  from generate_series(:from::bigint, :to::bigint - 1) k;
insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
select k + 1, k + 1, -1, 1, filling.id(j * :accounts + k, 0), 900000000000 - j - 1, filling.at(j * :accounts + k) + interval '3 milliseconds'
  from generate_series(:from::bigint, :to::bigint - 1) k,
       generate_series(0::bigint, :spread / :accounts + (k < :spread % :accounts)::int - 1) j";

const READER: &str = "
insert into account (id, user_id, balance, created_at, updated_at) overriding system value
values (:accounts + 1, 'reader', 900000000000 - (:orders - :spread), filling.at(-20000), filling.at(:orders));
select setval(pg_get_serial_sequence('account', 'id'), :accounts + 1);
insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
values (:accounts + 1, 0, :accounts + 1, 900000000000, null, 900000000000, filling.at(-10000));
insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
select :accounts + 1, :accounts + 1, -1, 1, filling.id(n, 0), 900000000000 - (n - :spread) - 1, filling.at(n) + interval '3 milliseconds'
  from generate_series(:spread::bigint, :orders::bigint - 1) n";
