//! A shop's parts inside the test process, on either log: each is started and stopped by itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shopd::config::{Config, Secret};
use shopd::contracts::TOPICS;
use shopd::db::{self, Db, Notifier, Schema};
use shopd::http::idempotency::Settled;
use shopd::messaging::Consumer;
use shopd::messaging::log::{KafkaLog, PostgresLog, SharedLog};
use shopd::money::Amount;
use shopd::orders::{self, Ends, NewOrder, OnPayment, Orders, Origin, SweepRules, Sweeper};
use shopd::payments::{Known, OnOrder, Payments};
use shopd::relay::Relay;
use shopd::shutdown::Shutdown;
use shopd::trace::TraceContext;
use shopd::user_id::UserId;
use tokio::sync::Notify;
use uuid::Uuid;

use super::books::{assert_balanced, count};
use super::shop::{PATIENCE, poll};
use super::{kafka, postgres};

pub const REQUESTS: &str = "order-payment-requests";
pub const RESULTS: &str = "payment-status-updates";
/// Of both topics.
pub const PARTITIONS: i32 = 3;

pub struct Inside {
    pub orders: Db,
    pub payments: Db,
    pub log: SharedLog,
    pub config: Config,
    urls: [String; 2],
    wakes: [Arc<Notify>; 2],
    accept: Orders,
    /// Told by the consumer of results, of nobody else's.
    pub ends: Ends,
}

/// Something that runs until it is stopped.
pub struct Part {
    stop: Shutdown,
    task: tokio::task::JoinHandle<()>,
}

impl Part {
    pub async fn stop(self) {
        self.stop.stop();
        self.task.await.expect("a clean end");
    }
}

/// What came of a request without a key.
pub fn done<R: std::fmt::Debug>(settled: Settled<R>) -> R {
    match settled {
        Settled::Done(result) => result,
        other => panic!("{other:?}"),
    }
}

impl Inside {
    pub async fn on_kafka() -> Self {
        let mut config = Config::default();
        config.kafka = kafka::config(&kafka::shared().await);
        let log = Arc::new(KafkaLog::new(&config.kafka));
        let urls = [postgres::database("orders").await, postgres::database("payments").await];
        Self::new(config, urls, |_| log).await
    }

    pub async fn on_postgres() -> Self {
        let config = Config::default();
        let urls = [postgres::database("orders").await, postgres::database("payments").await];
        let (log, wait) = (config.log.clone(), Duration::from_millis(300));
        Self::new(config, urls, move |orders| Arc::new(PostgresLog::new(orders, &log, wait))).await
    }

    async fn new(mut config: Config, urls: [String; 2], log: impl FnOnce(Db) -> SharedLog) -> Self {
        config.database = postgres::config();
        config.kafka.partitions = PARTITIONS;
        config.kafka.fetch_wait = Duration::from_millis(300);
        let [orders, payments] = [0, 1].map(|at| Db::new(&Secret::new(&*urls[at]), "test", &config.database).expect("a database"));
        db::migrate(&orders, &[Schema::Orders, Schema::Log]).await.expect("a schema");
        db::migrate(&payments, &[Schema::Payments]).await.expect("a schema");
        let log = log(orders.clone());
        log.create_topics(&TOPICS, PARTITIONS).await.expect("topics");
        let wakes = [Arc::new(Notify::new()), Arc::new(Notify::new())];
        let accept = Orders::new(orders.clone(), Notifier::local([wakes[0].clone()]));
        let ends = Ends::new(orders.clone(), false, Shutdown::new());
        Self { orders, payments, log, config, urls, wakes, accept, ends }
    }

    /// For a process of `shopd` beside it.
    pub fn env(&self) -> Vec<(String, String)> {
        let kafka = &self.config.kafka;
        let all = [
            ("SHOPD__ORDERS__DATABASE_URL", self.urls[0].clone()),
            ("SHOPD__PAYMENTS__DATABASE_URL", self.urls[1].clone()),
            ("SHOPD__KAFKA__BOOTSTRAP_SERVERS", kafka.bootstrap_servers.join(",")),
            ("SHOPD__KAFKA__TOPIC_PREFIX", kafka.topic_prefix.clone()),
        ];
        all.into_iter().filter(|(_, value)| !value.is_empty()).map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// Opens an account with so many minor units in it.
    pub async fn account(&self, user: &str, minor: i64) {
        let payments = Payments::new(self.payments.clone());
        let user = UserId::new(user).expect("a user");
        done(payments.open_account(user.clone(), None).await).expect("an account");
        done(payments.deposit(user, Amount::from_minor(minor).expect("an amount"), None).await).expect("a deposit");
    }

    /// Accepts orders of 1.00 each, and returns their ids.
    pub async fn place(&self, user: &str, orders: usize) -> Vec<Uuid> {
        let mut ids = Vec::new();
        for _ in 0..orders {
            let order = NewOrder {
                id: Uuid::now_v7(),
                user_id: UserId::new(user).expect("a user"),
                amount: Amount::from_minor(100).expect("an amount"),
                description: Some("a book".into()),
            };
            ids.push(order.id);
            let origin = Origin { trace: TraceContext::new_root(), request_id: "r".into(), stamp: None };
            done(self.accept.place(order, origin, None).await).expect("accepted");
        }
        ids
    }

    fn run<F: Future<Output = ()> + Send + 'static>(&self, work: impl FnOnce(Shutdown) -> F) -> Part {
        let stop = Shutdown::new();
        Part { task: tokio::spawn(work(stop.clone())), stop }
    }

    pub fn relay(&self, name: &'static str) -> Part {
        let (db, wake) = if name == "orders" { (&self.orders, &self.wakes[0]) } else { (&self.payments, &self.wakes[1]) };
        let relay = Relay {
            db: db.clone(),
            log: self.log.clone(),
            reach: Arc::default(),
            name,
            owner: "relay".into(),
            config: self.config.relay.clone(),
            partitions: PARTITIONS,
            wake: wake.clone(),
        };
        self.run(|stop| relay.run(stop))
    }

    pub fn payments(&self) -> Part {
        let handler = OnOrder::new(Notifier::local([self.wakes[1].clone()]), Known::default());
        let consumer = Consumer::new(
            self.payments.clone(),
            self.log.clone(),
            REQUESTS,
            "payments".into(),
            self.config.consumer.clone(),
            handler,
        );
        self.run(|stop| consumer.run(stop))
    }

    pub fn orders(&self) -> Part {
        let handler = OnPayment::new(Notifier::local([]), self.ends.clone());
        let consumer =
            Consumer::new(self.orders.clone(), self.log.clone(), RESULTS, "orders".into(), self.config.consumer.clone(), handler);
        self.run(|stop| consumer.run(stop))
    }

    pub fn sweeper(&self, after: Duration, asks_per_second_max: u32) -> Sweeper {
        let notifier = Notifier::local([self.wakes[0].clone()]);
        Sweeper::new(self.orders.clone(), notifier, SweepRules { after, asks_per_second_max })
    }

    /// Sweeps until it is stopped.
    pub fn sweep(&self, after: Duration) -> Part {
        let sweeper = self.sweeper(after, 1_000);
        self.run(|stop| orders::run_sweeper(sweeper, stop))
    }

    /// Waits until the log holds so many records of `topic`, those that it has dropped included.
    pub async fn until_on_the_log(&self, topic: &str, records: i64) {
        until(&format!("{records} records of {topic}"), async || self.ends(topic).await.iter().sum::<i64>() >= records).await;
    }

    pub async fn ends(&self, topic: &str) -> Vec<i64> {
        let mut ends = Vec::new();
        for partition in 0..PARTITIONS {
            ends.push(self.log.bounds(topic, partition).await.expect("bounds").1);
        }
        ends
    }

    /// What retention does: every record that is there is dropped.
    pub async fn drop_records(&self, topic: &str) {
        for (partition, end) in (0..).zip(self.ends(topic).await) {
            self.log.delete_records_before(topic, partition, end).await.expect("dropped");
        }
    }

    pub async fn waiting(&self) -> i64 {
        count(&self.orders, "select count(*) as n from orders where status = 'New'").await
    }

    /// Waits until every order has ended, and proves that the books balance and nothing was charged twice.
    pub async fn until_healed(&self) -> Duration {
        let since = Instant::now();
        until("every order ends", async || self.waiting().await == 0).await;
        let took = since.elapsed();
        assert_balanced(&self.orders, &self.payments).await;
        until("nothing is asked for any more", async || count(&self.orders, "select count(*) as n from order_retry").await == 0)
            .await;
        took
    }
}

/// Waits until `done`, within the tests' patience.
pub async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let since = Instant::now();
    while !done().await {
        assert!(since.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        poll().await;
    }
}
