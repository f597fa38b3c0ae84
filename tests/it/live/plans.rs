//! What a look for events costs goes by what is new, whatever its plans were made for.

use super::*;

const SMALL: usize = 60;
const GROWN: usize = 20_000;
/// Entries that were read of the indexes by position.
const READ: &str = "select sum(idx_tup_read)::bigint as n from pg_stat_user_indexes where indexrelname ~ 'by_position$'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pages_of_events_are_read_by_their_index_by_plans_that_were_made_while_the_tables_were_small() {
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    shop.run(&accept("u", 1, SMALL)).await;
    // And not once more by itself: plans would be made anew.
    for table in ["orders", "order_event"] {
        shop.run(&format!("alter table {table} set (autovacuum_enabled = off); analyze {table}")).await;
    }
    let mut stream = Events::open(&one.base, LISTED, "").await;
    stream.take(SMALL).await;
    let next = async |stream: &mut Events, n: usize| {
        shop.run(&accept("u", n, n)).await;
        assert_eq!(said(&stream.take(1).await), [(order(n), "New".to_owned())]);
    };
    next(&mut stream, SMALL + 1).await;
    let before = count(&shop.db, READ).await;
    // Twenty pages, none of them for this stream.
    shop.run(&accept("v", 1_000, 999 + GROWN)).await;
    next(&mut stream, SMALL + 2).await;
    // A session tells its statistics a little later.
    until("statistics", async || count(&shop.db, READ).await >= before + GROWN as i64).await;
    let read = count(&shop.db, READ).await - before;
    println!("{read} entries read for {GROWN} events");
    assert!(read < 3 * GROWN as i64, "{read} entries were read for {GROWN} events");

    // A page of a view that says itself what an event is: its arm is read and sorted as a whole.
    let before = count(&shop.db, READ).await;
    shop.run(
        "create view with_condition as
             select xid, id, at from order_event union all select accepted_xid, accepted_id, created_at from orders where accepted_xid is not null;
         set enable_seqscan = off; set enable_bitmapscan = off; set plan_cache_mode = force_generic_plan;
         prepare page(xid8) as select * from with_condition where (xid, id) >= ($1, 0) order by xid, id limit 10;
         execute page('0'); select pg_stat_force_next_flush();"
    )
    .await;
    until("such a page reads all events, or this shows nothing", async || count(&shop.db, READ).await - before >= GROWN as i64 / 2)
        .await;
}
