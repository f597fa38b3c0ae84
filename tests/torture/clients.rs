//! The load: clients with retries and time limits, through the gateways and at the services themselves. They write down
//! what they did and what they were told, and judge nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::cluster::Cluster;
use super::history::{Account, Answer, Asked, Call, End, Entry, Fields, Order, Outcome, now};
use super::support::shop::{self, Client};

const PATIENCE: Duration = Duration::from_secs(4);
const TRIES_MAX: usize = 4;
/// Orders of one client that it remembers for reading and for placing again.
const RECENT_MAX: usize = 40;

/// What a round's clients share.
pub struct Load {
    gateways: Vec<Client>,
    orders: Vec<Client>,
    payments: Vec<Client>,
    /// Accounts that are there from the start, and then some that are opened on the way, or never.
    pub users: Vec<String>,
    pub opened: usize,
    /// No two deposits of a round are of the same amount.
    next_deposit: AtomicI64,
    pub stop: AtomicBool,
    /// Orders that somebody saw ended, for the forger.
    pub ended: std::sync::Mutex<Vec<Order>>,
}

impl Load {
    pub fn new(cluster: &Cluster, rng: &mut StdRng) -> Self {
        let clients = |urls: &[String]| urls.iter().map(|url| Client::new(url.clone())).collect();
        let count = rng.random_range(4..24);
        Self {
            gateways: clients(&cluster.gateways),
            orders: clients(&cluster.direct_orders),
            payments: clients(&cluster.direct_payments),
            users: (0..count + 4).map(|n| format!("u{n}")).collect(),
            opened: count,
            next_deposit: AtomicI64::new(6_000),
            stop: AtomicBool::new(false),
            ended: std::sync::Mutex::default(),
        }
    }

    /// Opens the first accounts, each with something in it, while nothing is broken.
    pub async fn begin(&self, history: &mut Vec<Call>) {
        let one = One { load: self, rng: StdRng::seed_from_u64(0), history: Vec::new(), recent: Vec::new() };
        let mut calls = Vec::new();
        for user in &self.users[..self.opened] {
            calls.push(one.call(0, Asked::Open { user: user.clone() }, PATIENCE).await);
            calls.push(one.call(0, one.deposit_of(user, None), PATIENCE).await);
        }
        history.extend(calls);
    }
}

/// One client.
struct One<'a> {
    load: &'a Load,
    rng: StdRng,
    history: Vec<Call>,
    recent: Vec<(Uuid, Fields)>,
}

/// Runs until the load is told to stop; what happened.
pub async fn run(load: Arc<Load>, seed: u64, think: Duration) -> Vec<Call> {
    let mut one = One { load: &load, rng: StdRng::seed_from_u64(seed), history: Vec::new(), recent: Vec::new() };
    while !load.stop.load(Ordering::Relaxed) {
        one.step().await;
        let pause = one.rng.random_range(0..=2 * think.as_millis() as u64);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    one.history
}

impl One<'_> {
    async fn step(&mut self) {
        match self.rng.random_range(0..100) {
            0..58 => self.place().await,
            58..66 => self.place_twice_at_once().await,
            66..70 => self.place_again().await,
            70..80 => self.deposit().await,
            80..90 => self.read().await,
            90..97 => {
                let user = self.user();
                self.once(Asked::Balance { user }).await;
            }
            97..99 => {
                let user = self.user();
                self.once(Asked::List { user }).await;
            }
            _ => {
                let user = self.user();
                self.once(Asked::Open { user }).await;
            }
        }
    }

    /// Half the time one of three: accounts that everybody wants.
    fn user(&mut self) -> String {
        let hot = self.rng.random_bool(0.5);
        let count = if hot { 3 } else { self.load.users.len() };
        self.load.users[self.rng.random_range(0..count)].clone()
    }

    fn fields(&mut self) -> Fields {
        let description = self.rng.random_bool(0.3).then(|| format!("\"кн\u{1f4d6}\\{}", self.rng.random_range(0..9)));
        Fields { user: self.user(), amount: self.rng.random_range(1..=2_600), description }
    }

    fn remember(&mut self, id: Uuid, fields: &Fields) {
        if self.recent.len() == RECENT_MAX {
            let at = self.rng.random_range(0..RECENT_MAX);
            self.recent.swap_remove(at);
        }
        self.recent.push((id, fields.clone()));
    }

    /// One order, placed again with the same fields until an answer says what became of it, or patience ends.
    async fn place(&mut self) {
        let (id, fields) = (Uuid::now_v7(), self.fields());
        self.remember(id, &fields);
        self.until_known(Asked::Place { id, fields }).await;
    }

    /// Two clients of one mind: both ask for the same order at once, through different doors.
    async fn place_twice_at_once(&mut self) {
        let (id, fields) = (Uuid::now_v7(), self.fields());
        self.remember(id, &fields);
        let mut other = fields.clone();
        if self.rng.random_bool(0.3) {
            other.amount += 1;
        }
        let (first, second) = (self.rng.random::<u32>() as usize, self.rng.random::<u32>() as usize);
        let (a, b) = tokio::join!(
            self.call(first, Asked::Place { id, fields }, PATIENCE),
            self.call(second, Asked::Place { id, fields: other }, PATIENCE),
        );
        self.history.extend([a, b]);
    }

    /// A known id, with the same fields or with others.
    async fn place_again(&mut self) {
        if self.recent.is_empty() {
            return;
        }
        let (id, mut fields) = self.recent[self.rng.random_range(0..self.recent.len())].clone();
        match self.rng.random_range(0..4) {
            0 => fields.amount += 1,
            1 => fields.user = self.user(),
            2 => fields.description = Some("another".into()),
            _ => {}
        }
        self.once(Asked::Place { id, fields }).await;
    }

    /// Under a key until an answer says what became of it; without one it is asked for once, and its fate may stay open.
    async fn deposit(&mut self) {
        let user = self.user();
        let key = self.rng.random_bool(0.8).then(|| Uuid::from_u128(self.rng.random()).to_string());
        let asked = self.deposit_of(&user, key.clone());
        if key.is_none() {
            return self.once(asked).await;
        }
        self.until_known(asked).await;
        if self.rng.random_bool(0.1) {
            // The key again with another body: refused, and never applied beside the first.
            let asked = self.deposit_of(&user, key);
            self.once(asked).await;
        }
    }

    fn deposit_of(&self, user: &str, key: Option<String>) -> Asked {
        Asked::Deposit { user: user.to_owned(), amount: self.load.next_deposit.fetch_add(1, Ordering::Relaxed), key }
    }

    async fn read(&mut self) {
        if !self.recent.is_empty() {
            let (id, _) = self.recent[self.rng.random_range(0..self.recent.len())];
            self.once(Asked::Get { id }).await;
        }
    }

    async fn once(&mut self, asked: Asked) {
        let (door, patience) = (self.rng.random::<u32>() as usize, self.patience());
        let call = self.call(door, asked, patience).await;
        if matches!(call.outcome, Outcome::NotSent) {
            // A client's pace where nobody listens.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.history.push(call);
    }

    async fn until_known(&mut self, asked: Asked) {
        for _ in 0..TRIES_MAX {
            self.once(asked.clone()).await;
            if self.history.last().is_some_and(|call| call.answer().is_some()) || self.load.stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }

    /// Sometimes none to speak of, so that the fate of what works is unknown, too.
    fn patience(&mut self) -> Duration {
        if self.rng.random_bool(0.03) { Duration::from_millis(self.rng.random_range(1..60)) } else { PATIENCE }
    }

    /// `door` picks who is asked: mostly a gateway.
    async fn call(&self, door: usize, asked: Asked, patience: Duration) -> Call {
        let begun = now();
        let outcome = match tokio::time::timeout(patience, self.send(door, &asked)).await {
            Err(_) => Outcome::Indefinite("no answer in time".into()),
            Ok(Err(error)) if error.is_connect() => Outcome::NotSent,
            Ok(Err(error)) => Outcome::Indefinite(error.to_string()),
            // These are sent where a request met a fault that it did not make; whether it had an effect is open. 408 is what a frozen
            // server says when it goes on and finds that the request's head took too long.
            Ok(Ok(answer)) if matches!(answer.status, 408 | 502..=504) || answer.text.contains("idempotency_in_progress") => {
                Outcome::Indefinite(answer.text)
            }
            Ok(Ok(answer)) => Outcome::Answered(read(&asked, &answer)),
        };
        let call = Call { begun, ended: now(), asked, outcome };
        for order in call.answer().into_iter().flat_map(|answer| &answer.orders).filter(|order| order.is_final()) {
            let mut ended = self.load.ended.lock().expect("nobody panics with it");
            if ended.len() < 5_000 {
                ended.push(order.clone());
            }
        }
        call
    }

    async fn send(&self, door: usize, asked: &Asked) -> Result<shop::Answer, reqwest::Error> {
        let (gateway, n) = (door % 10 < 7, (door / 10) % 2);
        let orders = if gateway { (&self.load.gateways[n], "/api/OrdersProxy") } else { (&self.load.orders[n], "/api/Orders") };
        let payments =
            if gateway { (&self.load.gateways[n], "/api/PaymentsProxy") } else { (&self.load.payments[n], "/api/Account") };
        match asked {
            Asked::Open { user } => payments.0.send("POST", &format!("{}/{user}", payments.1), &[], None).await,
            Asked::Deposit { user, amount, key } => {
                let headers: Vec<(&str, &str)> = key.iter().map(|key| ("Idempotency-Key", key.as_str())).collect();
                let path = format!("{}/{user}/deposit", payments.1);
                payments.0.send("POST", &path, &headers, Some(&decimal(*amount))).await
            }
            Asked::Place { id, fields } => {
                let description = serde_json::to_string(&fields.description).expect("a text");
                let body = format!(
                    r#"{{"orderId":"{id}","userId":"{}","amount":{},"description":{description}}}"#,
                    fields.user,
                    decimal(fields.amount)
                );
                orders.0.send("POST", orders.1, &[], Some(&body)).await
            }
            Asked::Get { id } => orders.0.send("GET", &format!("{}/{id}", orders.1), &[], None).await,
            Asked::List { user } => orders.0.send("GET", &format!("{}?userId={user}", orders.1), &[], None).await,
            Asked::Balance { user } => payments.0.send("GET", &format!("{}/{user}/balance", payments.1), &[], None).await,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct OrderJson {
    id: Uuid,
    user_id: String,
    amount: Box<RawValue>,
    description: Option<String>,
    status: String,
    failure_reason: Option<String>,
}

impl From<OrderJson> for Order {
    fn from(json: OrderJson) -> Self {
        let fields = Fields { user: json.user_id, amount: minor(json.amount.get()), description: json.description };
        Self { id: json.id, fields, status: json.status, reason: json.failure_reason }
    }
}

fn read(asked: &Asked, answer: &shop::Answer) -> Answer {
    let mut read = Answer { status: answer.status, replayed: header(answer, "idempotent-replayed") == "true", ..Answer::default() };
    if !matches!(answer.status, 200 | 201) {
        let problem: serde_json::Value = serde_json::from_str(&answer.text).unwrap_or_default();
        read.code = problem["code"].as_str().unwrap_or_default().to_owned();
        return read;
    }
    match asked {
        Asked::Place { .. } | Asked::Get { .. } => {
            read.orders.extend(serde_json::from_str::<OrderJson>(&answer.text).ok().map(Order::from));
        }
        Asked::List { .. } => match serde_json::from_str::<Vec<OrderJson>>(&answer.text) {
            Ok(orders) => read.orders.extend(orders.into_iter().map(Order::from)),
            // As an answer that the contract does not know: an empty list would agree with anything.
            Err(error) => read.code = format!("and is no list: {error}"),
        },
        Asked::Open { .. } | Asked::Deposit { .. } | Asked::Balance { .. } => {
            read.balance = Some(minor(&shop::raw_member(&answer.text, "balance")));
        }
    }
    read
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EntryJson {
    id: i64,
    amount: Box<RawValue>,
    balance_after: Box<RawValue>,
    order_id: Option<Uuid>,
    created_at: chrono::DateTime<chrono::Utc>,
}

impl From<EntryJson> for Entry {
    fn from(json: EntryJson) -> Self {
        let (amount, balance_after) = (minor(json.amount.get()), minor(json.balance_after.get()));
        Self { id: json.id, amount, balance_after, order: json.order_id, at: json.created_at.timestamp_micros() }
    }
}

/// Reads everything there is, through a gateway, when all is quiet.
pub async fn end(load: &Load) -> Result<End, String> {
    let mut end = End::default();
    let orders: Vec<OrderJson> = pages(&load.gateways[0], "/api/OrdersProxy?limit=500").await?.ok_or("no orders to list")?;
    end.orders.extend(orders.into_iter().map(|order| (order.id, order.into())));
    for user in &load.users {
        let path = format!("/api/PaymentsProxy/{user}/transactions?limit=500");
        let Some(entries) = pages::<EntryJson>(&load.gateways[1], &path).await? else { continue };
        let mut ledger: Vec<Entry> = entries.into_iter().map(Entry::from).collect();
        ledger.reverse();
        let path = format!("/api/PaymentsProxy/{user}/balance");
        let answer = load.gateways[0].send("GET", &path, &[], None).await.map_err(|error| error.to_string())?;
        if answer.status != 200 {
            return Err(format!("{path} was answered {}", answer.status));
        }
        end.accounts.insert(user.clone(), Account { balance: minor(&shop::raw_member(&answer.text, "balance")), ledger });
    }
    Ok(end)
}

/// All pages of a list; `None` where what it is of does not exist.
async fn pages<T: serde::de::DeserializeOwned>(client: &Client, path: &str) -> Result<Option<Vec<T>>, String> {
    let mut all = Vec::new();
    let mut next = path.to_owned();
    loop {
        let answer = client.send("GET", &next, &[], None).await.map_err(|error| error.to_string())?;
        match answer.status {
            200 => all.extend(serde_json::from_str::<Vec<T>>(&answer.text).map_err(|error| format!("{next}: {error}"))?),
            404 => return Ok(None),
            status => return Err(format!("{next} was answered {status}: {}", answer.text)),
        }
        match header(&answer, "x-next-cursor") {
            "" => return Ok(Some(all)),
            cursor => next = format!("{path}&cursor={cursor}"),
        }
    }
}

fn header<'a>(answer: &'a shop::Answer, name: &str) -> &'a str {
    answer.headers.get(name).map_or("", String::as_str)
}

/// Minor units of a decimal text with at most two decimals.
fn minor(text: &str) -> i64 {
    let (whole, cents) = text.split_once('.').unwrap_or((text, ""));
    let digits = format!("{whole}{cents:0<2}");
    digits.parse().unwrap_or_else(|_| panic!("an amount: {text}"))
}

fn decimal(minor: i64) -> String {
    format!("{}.{:02}", minor / 100, minor % 100)
}
