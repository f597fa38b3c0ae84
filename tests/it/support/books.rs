//! Whether the books balance: the invariants that data can show, asked of both databases.

use diesel::sql_types::{BigInt, Text};
use diesel_async::RunQueryDsl;
use shopd::config::Secret;
use shopd::db::{Db, sql};

use super::postgres;

#[derive(diesel::QueryableByName)]
struct Count {
    #[diesel(sql_type = BigInt)]
    n: i64,
}

#[derive(diesel::QueryableByName)]
struct Fact {
    #[diesel(sql_type = Text)]
    fact: String,
}

pub fn connect(url: &str) -> Db {
    Db::new(&Secret::new(url), "test", &postgres::config()).expect("a database")
}

/// The number that a statement answers as `n`.
pub async fn count(db: &Db, statement: &'static str) -> i64 {
    let mut conn = db.get().await.expect("a connection");
    sql(statement).get_result::<Count>(&mut *conn).await.expect(statement).n
}

/// The texts that a statement answers as `fact`.
pub async fn facts(db: &Db, statement: &'static str) -> Vec<String> {
    let mut conn = db.get().await.expect("a connection");
    let facts: Vec<Fact> = sql(statement).load(&mut *conn).await.expect(statement);
    facts.into_iter().map(|fact| fact.fact).collect()
}

/// Every order has ended, and what ended it is in the ledger exactly once (S1..S5, S8).
pub async fn assert_balanced(orders: &Db, payments: &Db) {
    for (broken, statement) in [
        (
            "S1 balances are what the ledger says",
            "select count(*) as n from account a where a.balance <> coalesce((select sum(case when t.to_account = a.id then t.amount else -t.amount end) from transfer t where t.account_id = a.id), 0)",
        ),
        ("S2 no balance is negative", "select count(*) as n from account where balance < 0"),
        (
            "S3 no order is debited twice",
            "select count(*) as n from (select order_id from transfer where order_id is not null group by order_id having count(*) > 1) twice",
        ),
        (
            "S4 a debit for each payment that is finished, of its amount and user",
            "select count(*) as n from payment p full join (select t.*, a.user_id from transfer t join account a on a.id = t.account_id where t.order_id is not null) t using (order_id) where (p.status = 'Finished') is distinct from (t.order_id is not null) or (t.order_id is not null and (t.amount <> p.amount or t.user_id <> p.user_id))",
        ),
        (
            "S8 running balances chain",
            "select count(*) as n from (select balance_after - lag(balance_after, 1, 0::bigint) over (partition by account_id order by id) as step, case when to_account = account_id then amount else -amount end as amount from transfer) l where step <> amount",
        ),
        (
            "a ledger's times never go backwards",
            "select count(*) as n from (select created_at < lag(created_at) over (partition by account_id order by id) as back from transfer) l where back",
        ),
    ] {
        assert_eq!(count(payments, statement).await, 0, "{broken}");
    }
    assert_eq!(
        count(orders, "select count(*) as n from orders where status not in ('Finished', 'Cancelled')").await,
        0,
        "L1 every order ends"
    );
    let ends = "select id || ' ' || status || ' ' || user_id || ' ' || amount || ' ' || coalesce(failure_reason, '') as fact from orders order by 1";
    let decisions = "select order_id || ' ' || status || ' ' || user_id || ' ' || amount || ' ' || coalesce(failure_reason, '') as fact from payment order by 1";
    assert_eq!(facts(orders, ends).await, facts(payments, decisions).await, "S4 what ended each order is what was decided");
    assert_eq!(
        count(orders, "select count(*) as n from orders o where (select count(*) from order_change e where e.order_id = o.id and e.xid is not null) <> 2")
            .await,
        0,
        "each order began and ended once"
    );
}
