//! What payments does with requests: thin effects around [`decide`]; one place to read what commits together.

use std::collections::{HashMap, HashSet};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use uuid::Uuid;

use crate::contracts::{Outcome, PAYMENT_STATUS_UPDATES, PaymentRequested, PaymentStatusUpdated};
use crate::db::{Conn, DbError, Notifier, Pipeline};
use crate::messaging::{Delivery, Fence, Handler, Keys, Message, Poison, Received, outbox};
use crate::user_id::UserId;

use super::SOURCE;
use super::at_once;
use super::decide::{Accounts, Decision, Held, Verdict, decide};
use super::known::Known;
use super::store::{self, Decided, Entry, Record};

/// So many come first, so that the server has something to do while the ledger's lines are made.
const FIRST: usize = 100;
/// Decisions that are written by one statement a table, and lines of the ledger: as a statement they fit into a socket's buffer.
const PIECE: usize = 700;
const LINES: usize = 2_000;

/// The handler of `order-payment-requests`.
pub struct OnOrder {
    notifier: Notifier,
    known: Known,
}

impl OnOrder {
    /// `notifier` is told after every batch: its results wait in the outbox. `known` is what this process knows of accounts.
    pub fn new(notifier: Notifier, known: Known) -> Self {
        Self { notifier, known }
    }
}

#[async_trait]
impl Handler for OnOrder {
    type Event = PaymentRequested;

    fn decode(&self, delivery: &Delivery) -> Result<PaymentRequested, Poison> {
        let value = delivery.value.as_deref().ok_or_else(|| Poison("the record has no value".into()))?;
        PaymentRequested::decode(value).map_err(|error| Poison(error.to_string()))
    }

    /// An account's decisions follow the log (S8); an order is decided once.
    fn keys(&self, event: &PaymentRequested) -> Keys {
        Keys { ordering: event.user_id.as_str().to_owned(), business: event.order_id.to_string() }
    }

    /// Two round trips: what is known, with the accounts locked; then all that was decided.
    async fn apply(&self, conn: &Conn, batch: &[Received<PaymentRequested>]) -> Result<(), DbError> {
        let orders: Vec<Uuid> = batch.iter().map(|request| request.event.order_id).collect();
        let users: HashSet<&UserId> = batch.iter().map(|request| &request.event.user_id).collect();
        self.known.forget(users.iter().copied());
        let users: Vec<&str> = users.into_iter().map(UserId::as_str).collect();
        let (decided, locked) = tokio::join!(biased; store::decided(conn, &orders), store::lock(conn, &users));
        let (decided, (mut accounts, at)) = (decided?, locked?);

        let (moved, decisions) = settle(batch, &decided, &mut accounts);
        let (first, rest) = decisions.split_at(decisions.len().min(FIRST));
        // Made later, but they outlive the pipeline that borrows them.
        let (entries, repeats);
        let mut pipeline = Pipeline::default();
        write(&mut pipeline, conn, batch, first, at).await;
        pipeline.send(store::set_balances(conn, &moved, at)).await;
        entries = self::entries(batch, &decisions);
        for some in entries.chunks(LINES) {
            pipeline.send(store::write_entries(conn, some, at)).await;
        }
        for some in rest.chunks(PIECE) {
            write(&mut pipeline, conn, batch, some, at).await;
        }
        repeats = self::repeats(batch, &decided, at);
        pipeline.send(outbox::append(conn, &repeats)).await;
        pipeline.finish().await
    }

    async fn apply_at_once(&self, conn: &Conn, fence: &Fence<'_>, batch: &[Received<PaymentRequested>]) -> Result<bool, DbError> {
        at_once::apply(conn, &self.notifier, &self.known, fence, batch).await
    }

    fn tell(&self, batch: &[Received<PaymentRequested>]) {
        for one in batch.iter().filter(|_| tracing::enabled!(tracing::Level::DEBUG)) {
            let (order_id, user_id) = (&one.event.order_id, one.event.user_id.as_str());
            let (request_id, trace_id) = (one.delivery.envelope.request_id.as_deref(), one.delivery.trace.trace_id());
            tracing::debug!(%order_id, user_id, request_id, trace_id, "a payment was decided");
        }
    }

    fn committed(&self, records: usize) {
        self.notifier.committed(records);
    }
}

/// All that a batch of requests writes.
pub struct Effects<'b> {
    /// Accounts with another balance.
    pub moved: Vec<Held>,
    /// New decisions.
    pub records: Vec<Record<'b>>,
    /// New lines of the ledger, each account's in the order in which they happened.
    pub entries: Vec<Entry>,
    /// A result for every order of the batch.
    pub messages: Vec<Message>,
}

/// What a batch comes to, over what is known of its orders and the accounts, which must be locked. Pure but for new trace ids.
pub fn effects<'b>(
    batch: &'b [Received<PaymentRequested>],
    decided: &HashMap<Uuid, Decided>,
    accounts: &mut Accounts,
    at: DateTime<Utc>,
) -> Effects<'b> {
    let (moved, decisions) = settle(batch, decided, accounts);
    let (records, mut messages) = lines(batch, &decisions, at);
    messages.extend(repeats(batch, decided, at));
    Effects { moved, records, entries: entries(batch, &decisions), messages }
}

/// The accounts that move, and the new decisions in log order.
fn settle(
    batch: &[Received<PaymentRequested>],
    decided: &HashMap<Uuid, Decided>,
    accounts: &mut Accounts,
) -> (Vec<Held>, Vec<Decision>) {
    let requests: Vec<&PaymentRequested> = batch.iter().map(|request| &request.event).collect();
    let decisions = decide(accounts, &decided.keys().copied().collect(), &requests);
    let debited: HashSet<i64> = decisions.iter().filter_map(|decision| Some(decision.debit?.account_id)).collect();
    let moved = accounts.values().filter(|account| debited.contains(&account.id)).cloned().collect();
    (moved, decisions)
}

/// Sends what `decisions` write beside the ledger, and waits for nothing.
async fn write<'b>(
    pipeline: &mut Pipeline<'b>,
    conn: &'b Conn,
    batch: &'b [Received<PaymentRequested>],
    decisions: &[Decision],
    at: DateTime<Utc>,
) {
    let (records, messages) = lines(batch, decisions, at);
    pipeline.send(async move { store::write_payments(conn, &records, crate::contracts::ORDER_PAYMENT_REQUESTS, at).await }).await;
    pipeline.send(async move { outbox::append(conn, &messages).await }).await;
}

/// What `decisions` write beside the ledger: themselves, and the results.
fn lines<'b>(
    batch: &'b [Received<PaymentRequested>],
    decisions: &[Decision],
    at: DateTime<Utc>,
) -> (Vec<Record<'b>>, Vec<Message>) {
    let records: Vec<Record> = decisions.iter().map(|decision| record(&batch[decision.index], decision.verdict)).collect();
    let messages = records.iter().map(|record| result(record, at)).collect();
    (records, messages)
}

fn record(request: &Received<PaymentRequested>, verdict: Verdict) -> Record<'_> {
    let (status, failure_reason) = match verdict {
        Verdict::Paid => ("Finished", None),
        Verdict::InsufficientFunds => ("Cancelled", Some("insufficient_funds")),
        Verdict::AccountNotFound => ("Cancelled", Some("account_not_found")),
    };
    let result_event_id = verdict.result_event_id(request.event.order_id);
    Record { request, status, failure_reason, result_event_id }
}

/// The ledger's lines, account by account: its index takes those of one side by side. Each account's stay in the order in which they
/// happened.
fn entries(batch: &[Received<PaymentRequested>], decisions: &[Decision]) -> Vec<Entry> {
    let entry = |decision: &Decision| {
        let request = &batch[decision.index].event;
        decision.debit.map(|debit| Entry {
            account_id: debit.account_id,
            amount: request.amount.minor(),
            order_id: Some(request.order_id),
            balance_after: debit.balance_after,
        })
    };
    let mut entries: Vec<Entry> = decisions.iter().filter_map(entry).collect();
    entries.sort_by_key(|entry| entry.account_id);
    entries
}

fn result(record: &Record<'_>, at: DateTime<Utc>) -> Message {
    message(record.request, record.status, record.failure_reason.map(String::from), record.result_event_id, at)
}

/// A repeat, whatever its event id, is answered with the recorded decision under that result's own event id (S7, S14); once
/// a batch is enough.
fn repeats(batch: &[Received<PaymentRequested>], decided: &HashMap<Uuid, Decided>, at: DateTime<Utc>) -> Vec<Message> {
    let mut answered = HashSet::new();
    let repeat = |request: &Received<PaymentRequested>| {
        let known = decided.get(&request.event.order_id).filter(|_| answered.insert(request.event.order_id))?;
        Some(message(request, &known.status, known.failure_reason.clone(), known.result_event_id, at))
    };
    batch.iter().filter_map(repeat).collect()
}

fn message(
    request: &Received<PaymentRequested>,
    status: &str,
    failure_reason: Option<String>,
    event_id: Uuid,
    at: DateTime<Utc>,
) -> Message {
    let outcome = if status == "Finished" { Outcome::Finished } else { Outcome::Cancelled };
    let order_id = request.event.order_id;
    Message {
        event_id,
        topic: PAYMENT_STATUS_UPDATES,
        key: order_id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).to_owned(),
        payload: PaymentStatusUpdated { order_id, outcome, failure_reason }.encode(),
        kind: PaymentStatusUpdated::TYPE,
        source: SOURCE,
        traceparent: request.delivery.trace.traceparent(),
        request_id: request.delivery.envelope.request_id.clone().unwrap_or_default(),
        created_at: at,
    }
}
