//! Finding the records that cannot be applied, inside the transaction that applies all others: by halves, each under a savepoint.

use std::panic::AssertUnwindSafe;

use diesel_async::AsyncConnection;
use futures::FutureExt;

use crate::db::{Conn, DbError};

use super::delivery::Received;
use super::handler::Handler;
use super::queue::{Admission, Queues};

/// What became of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Applied,
    /// It keeps failing, and this is why.
    Failed(String),
    /// It waits in its key's queue.
    Waits,
    /// One with its business key waits already.
    Repeat,
    /// Its partition stops before it.
    Beyond,
}

/// Whether another try of the same record will fail again: the database itself refuses it. Whatever passes with time never counts. A
/// unique index may have been lost in a race, but not again and again.
pub fn keeps_failing(error: &DbError) -> bool {
    matches!(error, DbError::Defect(_) | DbError::Duplicate(_))
}

/// Applies `records`, in log order within each partition, except those that wait, and says what became of each. One that fails is
/// parked: those of its key that come after it wait, `room` at most.
///
/// # Errors
/// Whatever is not a record's fault; the transaction is of no more use then.
pub async fn isolate<H: Handler>(
    conn: &mut Conn,
    handler: &H,
    records: &[Received<H::Event>],
    queues: &mut Queues,
    room: usize,
) -> Result<Vec<Outcome>, DbError> {
    let mut outcomes: Vec<Option<Outcome>> = vec![None; records.len()];
    let mut ranges = Vec::from([(0, records.len())]);
    while let Some((start, end)) = ranges.pop() {
        let mut chosen = Vec::new();
        for index in start..end {
            if outcomes[index].is_some() {
                continue;
            }
            let Received { event, delivery } = &records[index];
            let keys = handler.keys(event);
            let line = (delivery.position.partition, keys.ordering);
            outcomes[index] = match queues.admit(&line, &keys.business, delivery.position.offset) {
                Admission::Apply => {
                    chosen.push(index);
                    None
                }
                Admission::Wait => Some(Outcome::Waits),
                Admission::Repeat => Some(Outcome::Repeat),
                Admission::Beyond => Some(Outcome::Beyond),
            };
        }
        let Some(&first) = chosen.first() else { continue };
        let some: Vec<Received<H::Event>> = chosen.iter().map(|index| records[*index].clone()).collect();
        let applied: Result<(), DbError> = conn
            .transaction(async |conn| {
                let applied = AssertUnwindSafe(handler.apply(conn, &some)).catch_unwind().await;
                applied.unwrap_or_else(|_| Err(DbError::Defect("its handler panicked".into())))
            })
            .await;
        match applied {
            Ok(()) => chosen.into_iter().for_each(|index| outcomes[index] = Some(Outcome::Applied)),
            Err(error) if !keeps_failing(&error) => return Err(error),
            Err(error) if chosen.len() == 1 => {
                let Received { event, delivery } = &records[first];
                let keys = handler.keys(event);
                queues.park((delivery.position.partition, keys.ordering), &keys.business, room);
                outcomes[first] = Some(Outcome::Failed(error.to_string()));
            }
            Err(_) => {
                let middle = chosen[chosen.len() / 2];
                // The earlier half first: what fails there holds up its key's records in the later one.
                ranges.push((middle, end));
                ranges.push((start, middle));
            }
        }
    }
    // Each was decided on: a range is given up only when all of it is.
    Ok(outcomes.into_iter().map(|outcome| outcome.unwrap_or(Outcome::Beyond)).collect())
}
