//! Opening accounts: those that are asked for together are opened together, each user's first request (S10).

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::FutureExt;

use crate::db::{Conn, Db, DbError, GroupCommit, each_for_itself};
use crate::http::idempotency::{self, Keyed, Plan, Settled};
use crate::money::Minor;
use crate::user_id::UserId;

use super::account::{Account, OpenError};
use super::{Opened, store};

/// An account on its way into the database.
#[derive(Clone, Debug)]
pub struct Opening {
    pub user: UserId,
    pub key: Option<Keyed<Opened>>,
}

pub type Openings = GroupCommit<Opening, Settled<Opened>>;

/// Starts the committer of `db`'s new accounts.
pub fn openings(db: Db) -> Openings {
    let runtime = db.runtime().clone();
    GroupCommit::start(&runtime, "accounts", move |batch: Vec<Opening>| {
        let db = db.clone();
        async move {
            let settled = each_for_itself(batch, |batch| open_together(&db, batch)).await;
            settled.into_iter().map(|settled| settled.unwrap_or_else(Settled::from)).collect()
        }
        .boxed()
    })
}

/// One statement; a transaction around it only where answers are stored with it.
async fn open_together(db: &Db, batch: Arc<Vec<Opening>>) -> Result<Vec<Settled<Opened>>, DbError> {
    if batch.iter().all(|opening| opening.key.is_none()) {
        let opened = open(&mut *db.get().await?, &batch.iter().collect::<Vec<_>>()).await?;
        return Ok(opened.into_iter().map(Settled::Done).collect());
    }
    db.transaction(move |conn| {
        let batch = batch.clone();
        async move {
            let plan = Plan::claim(conn, batch.iter().map(|opening| opening.key.as_ref()).collect()).await?;
            let opened = open(conn, &plan.due(&batch)).await?;
            let (settled, answers) = plan.settle(opened)?;
            idempotency::store(conn, answers).await?;
            Ok(settled)
        }
        .boxed()
    })
    .await
}

async fn open(conn: &mut Conn, batch: &[&Opening]) -> Result<Vec<Opened>, DbError> {
    let users: HashSet<&str> = batch.iter().map(|opening| opening.user.as_str()).collect();
    if users.is_empty() {
        return Ok(Vec::new());
    }
    let mut new: HashMap<String, i64> = store::open(conn, &users.into_iter().collect::<Vec<_>>()).await?;
    let answer = |opening: &&Opening| {
        // Of several requests for one user the first opens it.
        let id = new.remove(opening.user.as_str()).ok_or(OpenError::Exists)?;
        Ok(Account { id, user_id: opening.user.clone(), balance: Minor(0) })
    };
    Ok(batch.iter().map(answer).collect())
}
