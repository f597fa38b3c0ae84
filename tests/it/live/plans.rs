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

/// Red where all of the user's orders are read for each page.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_comes_back_after_a_moment_costs_what_happened_meanwhile_however_many_orders_there_are() {
    const READ_OF_THE_USER: &str =
        "select coalesce(sum(idx_tup_read), 0)::bigint as n from pg_stat_user_indexes where indexrelname = 'orders_by_user'";
    let shop = Shop::new().await;
    let one = shop.replica("one").await;
    shop.run(&accept("u", 1, GROWN)).await;
    let mut late = shop.conn().await;
    run(&mut late, &format!("begin; {}", accept("u", GROWN + 1, GROWN + 1))).await;
    let mut stream = Events::open(&one.base, LISTED, "").await;
    stream.take(1_000).await;
    shop.run(&accept("u", GROWN + 2, GROWN + 2)).await;
    let seen = stream.take(1).await.remove(0);
    assert_eq!(seen.order(), order(GROWN + 2));
    drop(stream);

    run(&mut late, "commit").await;
    shop.run(&finish(GROWN + 2, GROWN + 2)).await;
    shop.run(&accept("v", GROWN + 100, GROWN + 200)).await;
    shop.run(&accept("u", GROWN + 3, GROWN + 3)).await;
    let before = count(&shop.db, READ_OF_THE_USER).await;
    let mut back = Events::open(&one.base, LISTED, &seen.id).await;
    let expected = [(1, "New"), (2, "Finished"), (3, "New")].map(|(n, status)| (order(GROWN + n), status.to_owned()));
    assert_eq!(said(&back.take(3).await), expected);
    shop.run(&accept("u", GROWN + 4, GROWN + 4)).await;
    assert_eq!(said(&back.take(1).await), [(order(GROWN + 4), "New".to_owned())], "and nothing twice");
    // A session tells its statistics a little later. A thousand are enough to know that there are many.
    until("statistics", async || count(&shop.db, READ_OF_THE_USER).await >= before + 1_000).await;
    let read = count(&shop.db, READ_OF_THE_USER).await - before;
    assert!(read < 5_000, "{read} of the user's orders were read for four events");
}
