//! Accepting orders: concurrent requests commit together, each gets its own answer; those that have a key of the client's find it
//! stored with the order, and those whose key the gateway added find its stamp on the order itself, which costs no row.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures::FutureExt;
use uuid::Uuid;

use crate::db::{Conn, Db, DbError, GroupCommit, Notifier, each_for_itself};
use crate::http::idempotency::{self, Plan, Settled};

use super::order::{NewOrder, Order, OrderStatus};
use super::store::{self, Placement, Stamped};
use super::{Origin, Placing};

/// The stored order, and whether it was there before.
#[derive(Clone, Debug)]
pub struct Placed {
    pub order: Order,
    /// Another request with the same id and the same fields came before.
    pub replayed: bool,
    /// Nobody had it before, another try of this request included.
    pub is_new: bool,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum PlaceError {
    #[error("an order with this id exists and differs")]
    Conflict,
    #[error(transparent)]
    Db(#[from] DbError),
}

/// Times that the orders that were there before are read.
const READS_MAX: usize = 2;

pub type Intake = GroupCommit<Placement, Settled<Placing>>;

/// Starts the committer of `db`'s orders.
pub fn intake(db: Db, notifier: Notifier) -> Intake {
    let runtime = db.runtime().clone();
    let caution = Arc::new(Caution::default());
    GroupCommit::start(&runtime, "orders", move |batch| {
        let (db, notifier, caution) = (db.clone(), notifier.clone(), caution.clone());
        async move {
            let settled = each_for_itself(batch, |batch| place_together(&db, &notifier, &caution, batch)).await;
            settled.into_iter().map(|settled| settled.unwrap_or_else(Settled::from)).collect()
        }
        .boxed()
    })
}

/// Batches that are not taken to be new throughout any more, because one was not.
#[derive(Default)]
struct Caution(AtomicU32);

impl Caution {
    /// Whoever sends known orders again and again makes no batch be written twice but one in so many.
    const BATCHES: u32 = 64;

    /// Whether the next batch may be taken to be new.
    fn allows(&self) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_err()
    }

    fn begin(&self) {
        self.0.store(Self::BATCHES, Ordering::Relaxed);
    }
}

/// One statement; a transaction around it only where answers are stored with it.
async fn place_together(
    db: &Db,
    notifier: &Notifier,
    caution: &Caution,
    batch: Arc<Vec<Placement>>,
) -> Result<Vec<Settled<Placing>>, DbError> {
    if batch.iter().any(|placement| placement.key.is_some()) {
        let settled = place_with_keys(db, batch).await?;
        notifier.committed(settled.len());
        return Ok(settled);
    }
    let conn = db.get().await?;
    let placed = place_without_keys(&conn, notifier, caution, &batch.iter().collect::<Vec<_>>()).await?;
    Ok(placed.into_iter().map(Settled::Done).collect())
}

/// Taken to be new, which costs a third of finding out which are; where one is not, nothing was written, and that is found out.
async fn place_without_keys(
    conn: &Conn,
    notifier: &Notifier,
    caution: &Caution,
    placements: &[&Placement],
) -> Result<Vec<Placing>, DbError> {
    if caution.allows() {
        let new = first_of_each(placements);
        match notifier.committing(conn, placements.len(), store::insert(conn, &new)).await {
            Ok(()) => return answers(conn, placements, placements.iter().map(|placement| placement.order.id).collect()).await,
            Err(DbError::Duplicate(_)) => caution.begin(),
            Err(error) => return Err(error),
        }
    }
    let placed = place(conn, placements).await?;
    notifier.committed(placements.len());
    Ok(placed)
}

async fn place_with_keys(db: &Db, batch: Arc<Vec<Placement>>) -> Result<Vec<Settled<Placing>>, DbError> {
    db.transaction(move |conn| {
        let batch = batch.clone();
        async move {
            let plan = Plan::claim(conn, batch.iter().map(|placement| placement.key.as_ref()).collect()).await?;
            let placed = place(conn, &plan.due(&batch)).await?;
            let (settled, answers) = plan.settle(placed)?;
            idempotency::store(conn, answers).await?;
            Ok(settled)
        }
        .boxed()
    })
    .await
}

/// Writes those that are new; what was there before is read afterwards.
async fn place(conn: &Conn, placements: &[&Placement]) -> Result<Vec<Placing>, DbError> {
    if placements.is_empty() {
        return Ok(Vec::new());
    }
    let fresh = store::insert_missing(conn, &first_of_each(placements)).await?.into_iter().collect();
    answers(conn, placements, fresh).await
}

/// What each is told, once those of the ids `fresh` are written.
async fn answers(conn: &Conn, placements: &[&Placement], mut fresh: HashSet<Uuid>) -> Result<Vec<Placing>, DbError> {
    let mut stored = before(conn, placements, &fresh).await?;
    let answers = placements.iter().map(|placement| {
        let id = placement.order.id;
        if fresh.remove(&id) {
            let order = accepted(placement);
            stored.insert(id, Ok((order.clone(), placement.origin.stamp)));
            return Ok(Placed { order, replayed: false, is_new: true });
        }
        match stored.get(&id) {
            Some(Ok((order, stamp))) => answer_again(order, *stamp, placement),
            Some(Err(error)) => Err(error.clone().into()),
            None => Err(DbError::Unavailable(format!("order {id} is being written by somebody else")).into()),
        }
    });
    Ok(answers.collect())
}

/// The orders of `placements` that are not `fresh`. One that cannot be read fails whoever asks for it: those beside it are written, and
/// tried again they would be told that they were there before.
///
/// The insert waits for whoever is writing the same id and this statement comes after it, so it sees the row; not so where somebody
/// removes it by hand in between, or where the server reads elsewhere than it writes. It looks again, and then gives up.
async fn before(
    conn: &Conn,
    placements: &[&Placement],
    fresh: &HashSet<Uuid>,
) -> Result<HashMap<Uuid, Result<Stamped, DbError>>, DbError> {
    let mut missing: Vec<Uuid> = placements.iter().map(|p| p.order.id).filter(|id| !fresh.contains(id)).collect();
    let mut stored = HashMap::new();
    for _ in 0..READS_MAX {
        if missing.is_empty() {
            break;
        }
        let found = store::find_stamped(conn, &missing).await?;
        stored.extend(found);
        missing.retain(|id| !stored.contains_key(id));
    }
    Ok(stored)
}

/// Answers a request whose order was placed before, by a request with the stamp `by`. Another try of that one is answered as it was
/// then, whatever has become of the order: its client has not been answered yet.
fn answer_again(order: &Order, by: Option<Uuid>, placement: &Placement) -> Placing {
    if !same_fields(order, &placement.order) {
        return Err(PlaceError::Conflict);
    }
    let own = by.is_some() && by == placement.origin.stamp;
    let order = if own { as_accepted(order.clone()) } else { order.clone() };
    Ok(Placed { order, replayed: !own, is_new: false })
}

/// Of several requests with one id the first counts; the others are answered by it.
fn first_of_each<'p>(placements: &[&'p Placement]) -> Vec<&'p Placement> {
    let mut seen = HashSet::with_capacity(placements.len());
    placements.iter().copied().filter(|p| seen.insert(p.order.id)).collect()
}

fn accepted(placement: &Placement) -> Order {
    let NewOrder { id, user_id, amount, description } = placement.order.clone();
    let (at, Origin { trace, request_id, .. }) = (placement.at, &placement.origin);
    tracing::debug!(order_id = %id, user_id = user_id.as_str(), request_id = &**request_id, trace_id = trace.trace_id(), "an order was written");
    Order { id, user_id, amount, description, status: OrderStatus::New, failure_reason: None, created_at: at, updated_at: at }
}

/// As it was before anything became of it.
fn as_accepted(order: Order) -> Order {
    Order { status: OrderStatus::New, failure_reason: None, updated_at: order.created_at, ..order }
}

fn same_fields(order: &Order, asked: &NewOrder) -> bool {
    order.user_id == asked.user_id && order.amount == asked.amount && order.description == asked.description
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use proptest::prelude::*;

    use super::*;
    use crate::money::Amount;
    use crate::orders::{FailureReason, Origin};
    use crate::trace::TraceContext;
    use crate::user_id::UserId;

    fn placement(amount: i64, stamp: Option<Uuid>) -> Placement {
        let (user_id, amount) = (UserId::new("ann").unwrap(), Amount::from_minor(amount).unwrap());
        let origin = Origin { trace: TraceContext::new_root(), request_id: "r".into(), stamp };
        let order = NewOrder { id: Uuid::nil(), user_id, amount, description: None };
        Placement { order, origin, at: DateTime::from_timestamp_micros(1).unwrap(), key: None }
    }

    fn ended(order: &Order) -> Order {
        let at = DateTime::from_timestamp_micros(9).unwrap();
        let reason = Some(FailureReason::AccountNotFound);
        Order { status: OrderStatus::Cancelled, failure_reason: reason, updated_at: at, ..order.clone() }
    }

    proptest! {
        #[test]
        fn only_another_try_of_the_request_that_placed_an_order_is_answered_as_it_was(
            first in proptest::option::of(0u8..3),
            second in proptest::option::of(0u8..3),
            amounts in (1i64..3, 1i64..3),
            has_ended in any::<bool>(),
        ) {
            let stamp = |n: Option<u8>| n.map(|n| Uuid::from_u128(n.into()));
            let was = accepted(&placement(amounts.0, stamp(first)));
            let now = if has_ended { ended(&was) } else { was.clone() };
            match answer_again(&now, stamp(first), &placement(amounts.1, stamp(second))) {
                Err(error) => prop_assert!(amounts.0 != amounts.1, "{error}"),
                Ok(placed) => {
                    prop_assert_eq!(amounts.0, amounts.1);
                    let same_request = first.is_some() && first == second;
                    prop_assert_eq!(placed.replayed, !same_request);
                    prop_assert_eq!(placed.order, if same_request { was } else { now });
                }
            }
        }
    }
}
