//! Dead letters of the shop's own handlers.

use std::process::Output;
use std::time::Duration;

use diesel_async::SimpleAsyncConnection;

use super::lines;
use crate::support::books::count;
use crate::support::inside::{Inside, until};

const AFTER: Duration = Duration::from_millis(500);

async fn shopd(shop: &Inside, arguments: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_shopd"));
    command.args(arguments).args(["--log", "json"]).envs(shop.env()).output().await.expect("the program")
}

async fn audited(shop: &Inside) {
    let output = shopd(shop, &["audit", "--json"]).await;
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
}

/// The shop's own handlers: whatever is parked, redriven, discarded and asked for again, the books stay right and the audit is quiet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_users_parked_requests_and_what_becomes_of_them_never_alarm_the_audit() {
    let shop = Inside::on_kafka().await;
    let run = async |statements: &str| shop.payments.get().await.unwrap().batch_execute(statements).await.unwrap();
    run("create table refused (user_id text primary key);
         insert into refused values ('ann'), ('bob');
         create function refuse() returns trigger language plpgsql as $$ begin
             if exists (select from refused r where r.user_id = new.user_id) then raise exception 'not this user'; end if;
             return new;
         end $$;
         create trigger refuse before insert on payment for each row execute function refuse();")
    .await;
    for user in ["ann", "bob", "cid"] {
        shop.account(user, 1_000_000).await;
    }
    let parts = [shop.relay("orders"), shop.relay("payments"), shop.orders(), shop.payments(), shop.sweep(AFTER)];
    for _ in 0..5 {
        for user in ["ann", "bob", "cid"] {
            shop.place(user, 4).await;
        }
    }
    until("the others end", async || shop.waiting().await == 40).await;
    until("repeats are kept once", async || {
        count(&shop.orders, "select count(*) as n from order_retry where asks > 1").await > 0
            && count(&shop.payments, "select count(*) as n from dead_letter").await == 40
    })
    .await;
    audited(&shop).await;
    let failed = shopd(&shop, &["dlq", "redrive", "--key", "ann", "--json"]).await;
    assert_eq!(failed.status.code(), Some(1), "{failed:?}");
    run("delete from refused").await;
    let redriven = shopd(&shop, &["dlq", "redrive", "--key", "ann", "--json"]).await;
    assert!(redriven.status.success() && lines(&redriven).iter().all(|line| line["outcome"] == "applied"), "{redriven:?}");
    let ledger = "select count(*) as n from (select p.log_offset < lag(p.log_offset) over (order by t.id) as back from transfer t
                    join payment p using (order_id) where p.user_id = 'ann') l where back";
    assert_eq!(count(&shop.payments, ledger).await, 0, "decided in log order");
    audited(&shop).await;
    let discarded = shopd(&shop, &["dlq", "discard", "--key", "bob", "--json"]).await;
    assert!(discarded.status.success(), "{discarded:?}");
    audited(&shop).await;
    // What was discarded is asked for again.
    shop.until_healed().await;
    assert_eq!(count(&shop.orders, "select count(*) as n from orders where status = 'Finished'").await, 60);
    audited(&shop).await;
    for part in parts {
        part.stop().await;
    }
}
