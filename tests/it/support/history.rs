//! A shop's past, written straight into its databases: as many orders as wanted, ended, paid, and in balance.

use diesel_async::SimpleAsyncConnection;
use shopd::db::{self, Db, Schema};
use shopd::messaging::log::{Log, PostgresLog};

use super::books::connect;
use super::postgres;

const REQUESTS: &str = "order-payment-requests";
const RESULTS: &str = "payment-status-updates";
/// Users `u0`..; order `k` is of user `k % USERS`.
pub const USERS: usize = 10;

pub struct History {
    pub orders_url: String,
    pub payments_url: String,
    pub orders: Db,
    pub payments: Db,
}

/// Order `k` of the history, in hexadecimal as Postgres writes it.
pub fn order(k: usize) -> String {
    format!("00000000-0000-7000-8000-{k:012x}")
}

/// The functions `o(k)` and `e(k)`: the id of order `k`, and of its result; `t(k)`: a time that grows with it.
const FUNCTIONS: &str = "
    create function o(k bigint) returns uuid language sql immutable as
        $$ select ('00000000-0000-7000-8000-' || lpad(to_hex(k), 12, '0'))::uuid $$;
    create function e(k bigint) returns uuid language sql immutable as
        $$ select ('00000000-0000-7001-8000-' || lpad(to_hex(k), 12, '0'))::uuid $$;
    create function t(k bigint) returns timestamptz language sql immutable as
        $$ select timestamptz '2026-01-01 00:00:00Z' + k * interval '1 millisecond' $$;";

impl History {
    /// Orders 1..=`orders`, 5 minor units each: every tenth cancelled, the others finished; the log, in the orders database, has two
    /// partitions a topic, all read and dropped.
    pub async fn new(orders: usize) -> Self {
        Self::at(postgres::database("orders").await, postgres::database("payments").await, orders).await
    }

    pub async fn at(orders_url: String, payments_url: String, orders: usize) -> Self {
        let history = Self { orders: connect(&orders_url), payments: connect(&payments_url), orders_url, payments_url };
        db::migrate(&history.orders, &[Schema::Orders, Schema::Log]).await.expect("a schema");
        db::migrate(&history.payments, &[Schema::Payments]).await.expect("a schema");
        let config = shopd::config::Config::default();
        let log = PostgresLog::new(history.orders.clone(), &config.log, config.kafka.fetch_wait);
        log.create_topics(&[REQUESTS, RESULTS], 2).await.expect("topics");
        history.in_orders(FUNCTIONS).await;
        history.in_payments(FUNCTIONS).await;
        history.write(orders).await;
        history
    }

    async fn write(&self, n: usize) {
        self.in_orders(&format!(
            "insert into orders (id, user_id, amount, status, failure_reason, created_at, updated_at, traceparent, accepted_xid, accepted_id)
             select o(k), 'u' || k % {USERS}, 5, case when k % 10 = 0 then 'Cancelled' else 'Finished' end,
                    case when k % 10 = 0 then 'insufficient_funds' end, t(k), t(k + 10), '',
                    case when k % 2 = 0 then pg_current_xact_id() end, case when k % 2 = 0 then nextval('order_event_id_seq') end
               from generate_series(1, {n}) k;
             insert into order_event (order_id, status, at, traceparent) select o(k), 'New', t(k), '' from generate_series(1, {n}, 2) k;
             insert into order_event (order_id, status, failure_reason, at, event_id, source, topic, partition, log_offset)
             select o(k), case when k % 10 = 0 then 'Cancelled' else 'Finished' end, case when k % 10 = 0 then 'insufficient_funds' end,
                    t(k + 10), e(k)::text, '/shopd/payments', '{RESULTS}', 0, k from generate_series(1, {n}) k;
             insert into consumer_offset (topic, partition, next_offset) select '{RESULTS}', generate_series(0, 1), {n};
             update shopd_log.partition set start_offset = {n}, next_offset = {n};
             update sweep_cursor set swept_to = now();"
        ))
        .await;
        self.in_payments(&format!(
            "insert into account (user_id, created_at, updated_at) select 'u' || i, t(0), t(0) from generate_series(0, {USERS} - 1) i;
             insert into transfer (account_id, from_account, to_account, amount, balance_after, created_at)
             select id, 0, id, 1000000000, 1000000000, t(0) from account;
             insert into transfer (account_id, from_account, to_account, amount, order_id, balance_after, created_at)
             select a.id, a.id, -1, 5, o(k), 1000000000 - 5 * row_number() over (partition by a.id order by k), t(k + 5)
               from generate_series(1, {n}) k join account a on a.user_id = 'u' || k % {USERS} where k % 10 <> 0 order by k;
             update account a set balance = (select min(balance_after) from transfer t where t.account_id = a.id);
             insert into payment (order_id, user_id, amount, status, failure_reason, result_event_id, event_id, source, topic, partition,
                                  log_offset, published_at, received_at, decided_at)
             select o(k), 'u' || k % {USERS}, 5, case when k % 10 = 0 then 'Cancelled' else 'Finished' end,
                    case when k % 10 = 0 then 'insufficient_funds' end, e(k), k::text, '/shopd/orders', '{REQUESTS}', 0, k, t(k), t(k),
                    t(k + 5) from generate_series(1, {n}) k;
             insert into consumer_offset (topic, partition, next_offset) select '{REQUESTS}', generate_series(0, 1), {n};"
        ))
        .await;
    }

    /// Puts every order's request and result back on the log, in its partitions 0.
    pub async fn fill_log(&self, n: usize) {
        let value = |fields: &str| format!("convert_to('{{\"OrderId\":\"' || o(k) || '\",' || {fields} || '}}', 'UTF8')");
        let request = value(r#"'"UserId":"u' || k % 10 || '","Amount":0.05,"Description":null'"#);
        let result = value(
            r#"case when k % 10 = 0 then '"Status":"Cancelled","FailureReason":"insufficient_funds"' else '"Status":"Finished"' end"#,
        );
        for (topic, source, value) in [(REQUESTS, "/shopd/orders", request), (RESULTS, "/shopd/payments", result)] {
            let header = |length: usize, text: &str| format!("int4send({length}) || convert_to({text}, 'UTF8')");
            let headers = [
                header(5, "'ce_id'"),
                header(36, "e(k)::text"),
                header(9, "'ce_source'"),
                header(source.len(), &format!("'{source}'")),
            ]
            .join(" || ");
            self.in_orders(&format!(
                "insert into shopd_log.record (topic_id, partition, \"offset\", value, headers, timestamp)
                 select t.id, 0, k - 1, {value}, {headers}, now()
                   from shopd_log.topic t cross join generate_series(1, {n}) k where t.name = '{topic}';
                 update shopd_log.partition set start_offset = 0 where partition = 0;"
            ))
            .await;
        }
    }

    /// Puts a record in place of the last one that the log has dropped; `source` is who wrote it.
    pub async fn last_record(&self, topic: &str, event_id: &str, source: &str, value: &str) {
        let header = |text: &str| format!("int4send({}) || convert_to('{text}', 'UTF8')", text.len());
        let headers = ["ce_id", event_id, "ce_source", source].map(header).join(" || ");
        self.in_orders(&format!(
            "update shopd_log.partition p set start_offset = start_offset - 1 from shopd_log.topic t
              where t.id = p.topic_id and t.name = '{topic}' and p.partition = 0;
             insert into shopd_log.record (topic_id, partition, \"offset\", value, headers, timestamp)
             select p.topic_id, 0, p.start_offset, convert_to('{value}', 'UTF8'), {headers}, now()
               from shopd_log.partition p join shopd_log.topic t on t.id = p.topic_id where t.name = '{topic}' and p.partition = 0;"
        ))
        .await;
    }

    /// In one transaction.
    pub async fn in_orders(&self, statements: &str) {
        run(&self.orders, statements).await;
    }

    /// In one transaction, past the triggers that keep history as it is.
    pub async fn in_payments(&self, statements: &str) {
        run(&self.payments, statements).await;
    }

    /// For a process of `shopd`.
    pub fn env(&self) -> Vec<(String, String)> {
        [("ORDERS", &self.orders_url), ("PAYMENTS", &self.payments_url)]
            .map(|(role, url)| (format!("SHOPD__{role}__DATABASE_URL"), url.clone()))
            .to_vec()
    }
}

async fn run(db: &Db, statements: &str) {
    let mut conn = db.dedicated().await.expect("a connection");
    let setup = "set statement_timeout = 0; set session_replication_role = replica;";
    conn.batch_execute(setup).await.expect(setup);
    conn.batch_execute(statements).await.unwrap_or_else(|error| panic!("{error}: {statements}"));
}
