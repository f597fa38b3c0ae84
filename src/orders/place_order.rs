//! Accepting orders: concurrent requests commit together, each gets its own answer; those that have a key find it stored with
//! the order.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::FutureExt;
use uuid::Uuid;

use crate::db::{Conn, Db, DbError, GroupCommit, Notifier, each_for_itself};
use crate::http::idempotency::{self, Plan, Settled};

use super::Placing;
use super::order::{NewOrder, Order, OrderStatus};
use super::store::{self, Placement};

/// The stored order, and whether it was there before.
#[derive(Clone, Debug)]
pub struct Placed {
    pub order: Order,
    /// The same id with the same fields came before.
    pub replayed: bool,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum PlaceError {
    #[error("an order with this id exists and differs")]
    Conflict,
    #[error(transparent)]
    Db(#[from] DbError),
}

pub type Intake = GroupCommit<Placement, Settled<Placing>>;

/// Starts the committer of `db`'s orders.
pub fn intake(db: Db, notifier: Notifier) -> Intake {
    let runtime = db.runtime().clone();
    GroupCommit::start(&runtime, move |batch| {
        let (db, notifier) = (db.clone(), notifier.clone());
        async move {
            let settled = each_for_itself(batch, |batch| place_together(&db, &notifier, batch)).await;
            settled.into_iter().map(|settled| settled.unwrap_or_else(Settled::from)).collect()
        }
        .boxed()
    })
}

/// One statement; a transaction around it only where answers are stored with it.
async fn place_together(db: &Db, notifier: &Notifier, batch: Arc<Vec<Placement>>) -> Result<Vec<Settled<Placing>>, DbError> {
    let settled = if batch.iter().all(|placement| placement.key.is_none()) {
        let placed = place(&mut *db.get().await?, &batch.iter().collect::<Vec<_>>()).await?;
        placed.into_iter().map(Settled::Done).collect()
    } else {
        place_with_keys(db, batch).await?
    };
    notifier.committed();
    Ok(settled)
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
async fn place(conn: &mut Conn, placements: &[&Placement]) -> Result<Vec<Placing>, DbError> {
    if placements.is_empty() {
        return Ok(Vec::new());
    }
    let mut fresh: HashSet<Uuid> = store::insert(conn, &first_of_each(placements)).await?.into_iter().collect();
    let before: Vec<Uuid> = placements.iter().map(|p| p.order.id).filter(|id| !fresh.contains(id)).collect();
    let mut stored: HashMap<Uuid, Order> = HashMap::new();
    if !before.is_empty() {
        stored.extend(store::find(conn, &before).await?.into_iter().map(|order| (order.id, order)));
    }
    let answers = placements.iter().map(|placement| {
        let id = placement.order.id;
        if fresh.remove(&id) {
            let order = accepted(placement);
            stored.insert(id, order.clone());
            return Ok(Placed { order, replayed: false });
        }
        match stored.get(&id) {
            Some(order) if same_fields(order, &placement.order) => Ok(Placed { order: order.clone(), replayed: true }),
            Some(_) => Err(PlaceError::Conflict),
            None => Err(DbError::Unavailable(format!("order {id} is being written by somebody else")).into()),
        }
    });
    Ok(answers.collect())
}

/// Of several requests with one id the first counts; the others are answered by it.
fn first_of_each<'p>(placements: &[&'p Placement]) -> Vec<&'p Placement> {
    let mut seen = HashSet::with_capacity(placements.len());
    placements.iter().copied().filter(|p| seen.insert(p.order.id)).collect()
}

fn accepted(placement: &Placement) -> Order {
    let NewOrder { id, user_id, amount, description } = placement.order.clone();
    let at = placement.at;
    Order { id, user_id, amount, description, status: OrderStatus::New, failure_reason: None, created_at: at, updated_at: at }
}

fn same_fields(order: &Order, asked: &NewOrder) -> bool {
    order.user_id == asked.user_id && order.amount == asked.amount && order.description == asked.description
}
