//! What goes over the wire: JSON of clients and of events, headers.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use shopd::contracts::{Envelope, Headers, Outcome, PaymentRequested, PaymentStatusUpdated};
use shopd::http::ReadBody;
use shopd::messaging::{Delivery, Position, Received};
use shopd::money::Amount;
use shopd::orders::rules::{OrderBody, PlaceOrder};
use shopd::orders::{FailureReason, Order, OrderStatus};
use shopd::trace::TraceContext;
use shopd::user_id::UserId;
use uuid::Uuid;

use super::{Case, INPUTS, inputs};

const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

pub fn cases() -> Vec<Case> {
    let placed = |order: Order| {
        let (id, user, amount) = (order.id, order.user_id, order.amount);
        format!(r#"{{"orderId":"{id}","userId":"{user}","amount":{amount},"description":"two books and a \"pen\""}}"#)
    };
    vec![
        Case::over("place_order_read", move || orders().map(placed), |body| PlaceOrder::read(body.as_bytes())),
        Case::over("order_write", orders, |order| serde_json::to_vec(&OrderBody::from(order.clone()))),
        Case::over("request_encode", requested, PaymentRequested::encode),
        Case::over("request_decode", || requested().map(|event| event.encode()), |value| PaymentRequested::decode(value)),
        Case::over("result_encode", results, PaymentStatusUpdated::encode),
        Case::over("result_decode", || results().map(|event| event.encode()), |value| PaymentStatusUpdated::decode(value)),
        Case::over("headers_write", ids, |id| headers(*id)),
        Case::over("headers_read", || ids().map(|id| read_back(headers(id))), Envelope::read),
    ]
}

/// Ids as random as those of clients, and the same in every run.
pub struct Ids(fastrand::Rng);

impl Ids {
    pub fn new() -> Self {
        Self(fastrand::Rng::with_seed(7))
    }

    pub fn next(&mut self) -> Uuid {
        uuid::Builder::from_random_bytes(self.0.u128(..).to_be_bytes()).into_uuid()
    }
}

pub fn ids() -> [Uuid; INPUTS] {
    let mut ids = Ids::new();
    inputs(|_| ids.next())
}

pub fn request(order_id: Uuid, user: usize) -> PaymentRequested {
    PaymentRequested {
        order_id,
        user_id: user_id(user),
        amount: amount(user),
        description: Some("two books and a \"pen\"".to_owned()),
        timestamp: time(user),
    }
}

/// A record as the consumer hands it on.
pub fn received<E>(event: E, at: usize) -> Received<E> {
    let headers = read_back(headers(Uuid::from_u128(at as u128 + 1)));
    let delivery = Delivery {
        position: Position { topic: "order-payment-requests".into(), partition: (at % 12) as i32, offset: at as i64 },
        key: None,
        value: None,
        envelope: Envelope::read(&headers),
        trace: TraceContext::new_root(),
        headers,
        published_at: time(at),
        received_at: time(at),
    };
    Received { event, delivery }
}

/// From 0.01 on, with and without decimals.
pub fn amount(n: usize) -> Amount {
    Amount::from_minor((n as i64 * 7_919) % 1_000_000 + 1).expect("within the limits of an amount")
}

pub fn time(n: usize) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(1_749_723_072_123_456 + n as i64).expect("a time of this century")
}

fn user_id(n: usize) -> UserId {
    UserId::new(format!("customer-{n:06}")).expect("a short name")
}

fn requested() -> [PaymentRequested; INPUTS] {
    let mut ids = Ids::new();
    inputs(|n| request(ids.next(), n))
}

fn results() -> [PaymentStatusUpdated; INPUTS] {
    let mut ids = Ids::new();
    inputs(|n| match n % 4 {
        0 => {
            let failure_reason = Some("insufficient_funds".into());
            PaymentStatusUpdated { order_id: ids.next(), outcome: Outcome::Cancelled, failure_reason }
        }
        _ => PaymentStatusUpdated { order_id: ids.next(), outcome: Outcome::Finished, failure_reason: None },
    })
}

fn orders() -> [Order; INPUTS] {
    let mut ids = Ids::new();
    inputs(|n| Order {
        id: ids.next(),
        user_id: user_id(n),
        amount: amount(n),
        description: Some("two books and a \"pen\"".to_owned()),
        status: if n.is_multiple_of(2) { OrderStatus::New } else { OrderStatus::Cancelled },
        failure_reason: (!n.is_multiple_of(2)).then_some(FailureReason::InsufficientFunds),
        created_at: time(n),
        updated_at: time(n + 1),
    })
}

fn headers(event: Uuid) -> Vec<(&'static str, Bytes)> {
    Envelope::headers(event, PaymentRequested::TYPE, "/shopd/orders", time(0), TRACEPARENT, "01890a5d-ac96-774b-bcce-b302099a8057")
}

fn read_back(headers: Vec<(&'static str, Bytes)>) -> Headers {
    headers.into_iter().collect()
}
