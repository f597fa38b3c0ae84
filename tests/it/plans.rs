//! A plan that is made while a table is small serves it when it is large: sessions keep theirs, and a burst is faster than ANALYZE.

use diesel_async::SimpleAsyncConnection;

use crate::support::books::count;
use crate::support::inside::{Inside, until};

/// ANALYZE comes to a table by itself from about here on.
const SMALL: usize = 60;
const GROWN: i64 = 20_000;
const BATCH: usize = 100;

/// Entries that were read of each table's indexes.
const OF_ORDERS: &str = "select sum(idx_tup_read)::bigint as n from pg_stat_user_indexes where relname = 'orders'";
const OF_ACCOUNTS: &str = "select sum(idx_tup_read)::bigint as n from pg_stat_user_indexes where relname = 'account'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orders_end_and_balances_move_row_by_row_by_plans_that_were_made_while_the_tables_were_small() {
    let shop = Inside::on_postgres().await;
    let (mut orders, mut payments) = (shop.orders.dedicated().await.unwrap(), shop.payments.dedicated().await.unwrap());
    let parts = [shop.relay("orders"), shop.payments(), shop.relay("payments"), shop.orders()];
    let end = async |some: usize| {
        shop.place("ann", some).await;
        until("every order ends", async || shop.waiting().await == 0).await;
    };
    shop.account("ann", 1_000_000).await;
    end(SMALL).await;
    // And not once more by itself: plans would be made anew.
    orders.batch_execute("alter table orders set (autovacuum_enabled = off); analyze orders").await.unwrap();
    payments.batch_execute("alter table account set (autovacuum_enabled = off); analyze account").await.unwrap();
    // The plans.
    end(1).await;
    let read = async || [count(&shop.orders, OF_ORDERS).await, count(&shop.payments, OF_ACCOUNTS).await];
    let small = read().await;
    // Grown, and beside it what a plan does of a join as it is written without thinking of plans. In one go: what others do on this server may
    // make a session plan anew at any time.
    orders
        .batch_execute(&format!(
            "prepare plain(uuid[]) as update orders o set status = o.status from (select unnest($1) as id) e
              where o.id = e.id and o.status in ('New', 'Processing');
             execute plain('{{}}');
             insert into orders (id, user_id, amount, status, created_at, updated_at, traceparent)
             select gen_random_uuid(), 'ann', 100, 'Finished', clock_timestamp(), clock_timestamp(), traceparent
               from (select traceparent from orders limit 1) one, generate_series(1, {GROWN});
             execute plain(array[gen_random_uuid()]);
             select pg_stat_force_next_flush();"
        ))
        .await
        .unwrap();
    until("a plain join reads the whole table by its plan, or this shows nothing", async || read().await[0] - small[0] >= GROWN)
        .await;
    payments
        .batch_execute(&format!("insert into account (user_id) select 'user-' || n from generate_series(1, {GROWN}) n"))
        .await
        .unwrap();
    let before = read().await;
    end(BATCH).await;
    // The sessions tell their statistics a little later.
    until("statistics", async || read().await[0] >= before[0] + BATCH as i64 && read().await[1] > before[1]).await;
    let after = read().await;
    println!("entries read of indexes, orders and accounts: {before:?}, {after:?}");
    for (before, after) in before.iter().zip(after) {
        assert!(after - before < GROWN, "{} entries were read for {BATCH} orders", after - before);
    }

    for part in parts {
        part.stop().await;
    }
}
