//! Accepting orders: concurrent requests commit together, each gets its own answer.

use std::collections::HashMap;
use std::sync::Arc;

use futures::FutureExt;
use uuid::Uuid;

use crate::db::{Db, DbError, GroupCommit, Notifier};

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

pub type Intake = GroupCommit<Placement, Result<Placed, PlaceError>>;

/// Starts the committer of `db`'s orders.
pub fn intake(db: Db, notifier: Notifier) -> Intake {
    let runtime = db.runtime().clone();
    GroupCommit::start(&runtime, move |placements| {
        let (db, notifier) = (db.clone(), notifier.clone());
        async move { place_all(&db, &notifier, Arc::new(placements)).await }.boxed()
    })
}

async fn place_all(db: &Db, notifier: &Notifier, placements: Arc<Vec<Placement>>) -> Vec<Result<Placed, PlaceError>> {
    match place_together(db, placements.clone()).await {
        Ok(answers) => {
            notifier.committed();
            answers
        }
        // One bad row must fail only its own request: with several in the batch, each goes alone.
        Err(DbError::Defect(_)) if placements.len() > 1 => {
            let mut answers = Vec::with_capacity(placements.len());
            for placement in placements.iter() {
                let alone = place_together(db, Arc::new(vec![placement.clone()])).await;
                answers.extend(alone.unwrap_or_else(|error| vec![Err(error.into())]));
            }
            notifier.committed();
            answers
        }
        Err(error) => placements.iter().map(|_| Err(error.clone().into())).collect(),
    }
}

/// One transaction of one statement; what was there before is read after it.
async fn place_together(db: &Db, placements: Arc<Vec<Placement>>) -> Result<Vec<Result<Placed, PlaceError>>, DbError> {
    let firsts: Arc<Vec<Placement>> = Arc::new(first_of_each(&placements));
    let mut conn = db.get().await?;
    let inserted = store::insert(&mut conn, &firsts).await?;
    let ids: Vec<Uuid> = placements.iter().map(|p| p.order.id).collect();
    let mut fresh: std::collections::HashSet<Uuid> = inserted.into_iter().collect();
    let known = |id: &Uuid| !fresh.contains(id);
    let before: Vec<Uuid> = ids.iter().copied().filter(known).collect();
    let mut stored: HashMap<Uuid, Order> = HashMap::new();
    if !before.is_empty() {
        stored.extend(store::find(&mut conn, &before).await?.into_iter().map(|order| (order.id, order)));
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
fn first_of_each(placements: &[Placement]) -> Vec<Placement> {
    let mut seen = std::collections::HashSet::with_capacity(placements.len());
    placements.iter().filter(|p| seen.insert(p.order.id)).cloned().collect()
}

fn accepted(placement: &Placement) -> Order {
    let NewOrder { id, user_id, amount, description } = placement.order.clone();
    let at = placement.at;
    Order { id, user_id, amount, description, status: OrderStatus::New, failure_reason: None, created_at: at, updated_at: at }
}

fn same_fields(order: &Order, asked: &NewOrder) -> bool {
    order.user_id == asked.user_id && order.amount == asked.amount && order.description == asked.description
}
