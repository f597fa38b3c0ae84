//! A consumer's database behind the consumer's own seam: offsets, leases, and the one transaction of a batch.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use shopd::db::DbError;
use shopd::messaging::consumer::{Batch, Committed, Inbox, Owned, Standing};
use shopd::messaging::{Delivery, Poison, Received};

use crate::postgres::{Key, Postgres, Tx};
use crate::tables::{MemberRow, OffsetRow};
use crate::world::{Guard, Process};

/// As the statement of the heartbeat has it.
const CUT_OFF_AFTER_MS: u64 = 10_000;

/// As the real transaction does after losing a race.
const ATTEMPTS_MAX: usize = 3;

/// What a service does with a batch, in the batch's transaction.
#[async_trait]
pub trait Effect: Send + Sync + 'static {
    type Event: Clone + Send + Sync + 'static;

    fn decode(value: &[u8]) -> Result<Self::Event, Poison>;

    async fn apply(tx: &mut Tx, batch: &[Received<Self::Event>]) -> Result<(), DbError>;
}

/// One replica's view of its consumer's database.
pub struct ProcessInbox<E> {
    pub db: Postgres,
    pub process: Process,
    pub lease: Duration,
    pub effect: std::marker::PhantomData<E>,
}

#[async_trait]
impl<E: Effect> Inbox for ProcessInbox<E> {
    type Event = E::Event;

    fn decode(&self, delivery: &Delivery) -> Result<E::Event, Poison> {
        E::decode(delivery.value.as_deref().unwrap_or_default())
    }

    async fn ensure(&self, partitions: i32) -> Result<(), DbError> {
        self.db
            .statement(&self.process, |state| {
                for partition in 0..partitions {
                    state.tables.offsets.entry(partition).or_default();
                }
                Ok(())
            })
            .await
    }

    async fn heartbeat(&self, reaches_log: bool) -> Result<Standing, DbError> {
        let now = self.db.world.now_ms();
        let (me, until) = (self.process.name(), now + self.lease.as_millis() as u64);
        let (world, number) = (&self.db.world, self.process.number());
        self.db
            .statement(&self.process, |state| {
                let members = &mut state.tables.members;
                let fresh = || MemberRow { seen_until_ms: until, reaches_log, reaches_since_ms: now };
                let row = members.entry(me.to_owned()).or_insert_with(fresh);
                let since = if row.reaches_log == reaches_log { row.reaches_since_ms } else { now };
                *row = MemberRow { reaches_since_ms: since, ..fresh() };
                let mut owned = Vec::new();
                let locked: Vec<i32> = state.tables.offsets.keys().copied().filter(|n| state.is_locked(&Key::Offset(*n))).collect();
                for (partition, row) in &mut state.tables.offsets {
                    if row.owner.as_deref() != Some(me) {
                        continue;
                    }
                    owned.push(Owned { partition: *partition, next_offset: row.next_offset, epoch: row.epoch });
                    if !locked.contains(partition) {
                        row.lease_until_ms = until;
                    }
                }
                let members = &state.tables.members;
                let live: Vec<_> = members.iter().filter(|(_, row)| row.seen_until_ms >= now).collect();
                let for_long = |row: &MemberRow| row.reaches_since_ms + CUT_OFF_AFTER_MS < now;
                let well = live.iter().any(|(_, row)| row.reaches_log && for_long(row));
                let shares = |row: &MemberRow| !well || row.reaches_log || !for_long(row) || !world.holds(Guard::CutOff);
                let sharing: Vec<&str> = live.iter().filter(|(_, row)| shares(row)).map(|(name, _)| name.as_str()).collect();
                let (cut_off, rank) = (!sharing.contains(&me), sharing.iter().filter(|name| **name < me).count());
                if cut_off {
                    world.tell(number, "replica cut off from the log shares nothing", [owned.len() as i64, 0, 0]);
                }
                let standing = Standing { owned, members: sharing.len(), rank, cut_off, others: live.len() - 1 };
                state.autocommit();
                Ok(standing)
            })
            .await
    }

    async fn acquire(&self, partitions: i32, at_most: usize) -> Result<Vec<Owned>, DbError> {
        let now = self.db.world.now_ms();
        let me = self.process.name();
        let acquired = self
            .db
            .statement(&self.process, |state| {
                let free = |partition: &i32, row: &OffsetRow| {
                    *partition < partitions
                        && (row.owner.is_none() || row.lease_until_ms < now)
                        && !state.is_locked(&Key::Offset(*partition))
                };
                let free: Vec<i32> =
                    state.tables.offsets.iter().filter(|(n, row)| free(n, row)).map(|(n, _)| *n).take(at_most).collect();
                let mut owned = Vec::new();
                for partition in free {
                    let row = state.tables.offsets.entry(partition).or_default();
                    row.owner = Some(me.to_owned());
                    row.epoch += 1;
                    row.lease_until_ms = now + self.lease.as_millis() as u64;
                    owned.push(Owned { partition, next_offset: row.next_offset, epoch: row.epoch });
                }
                state.autocommit();
                Ok(owned)
            })
            .await?;
        for one in &acquired {
            self.db.world.tell(self.process.number(), "partition acquired", [i64::from(one.partition), one.next_offset, one.epoch]);
        }
        Ok(acquired)
    }

    async fn release(&self, partitions: Option<&[i32]>) -> Result<(), DbError> {
        let mut tx = self.db.begin(&self.process).await?;
        let all: Vec<i32> = self.db.state().tables.offsets.keys().copied().collect();
        let which: BTreeSet<i32> = all.into_iter().filter(|n| partitions.is_none_or(|given| given.contains(n))).collect();
        let locked = lock_offsets(&mut tx, &which).await;
        tx.answer(locked).await?;
        let me = self.process.name().to_owned();
        tx.write(move |tables| {
            for (_, row) in tables.offsets.iter_mut().filter(|(n, row)| which.contains(n) && row.owner.as_ref() == Some(&me)) {
                row.owner = None;
                row.lease_until_ms = 0;
            }
        });
        tx.commit().await
    }

    async fn leave(&self) -> Result<(), DbError> {
        let me = self.process.name().to_owned();
        self.db
            .statement(&self.process, |state| {
                state.tables.members.remove(&me);
                Ok(())
            })
            .await?;
        self.release(None).await
    }

    async fn commit(&self, batch: &Arc<Batch<E::Event>>) -> Result<Committed, DbError> {
        let mut attempt = 1;
        loop {
            match self.commit_once(batch).await {
                Err(DbError::Duplicate(_)) if attempt < ATTEMPTS_MAX => attempt += 1,
                Ok(()) => {
                    self.db.notify();
                    return Ok(Committed::default());
                }
                Err(error) => return Err(error),
            }
        }
    }
}

async fn lock_offsets(tx: &mut Tx, partitions: &BTreeSet<i32>) -> Result<(), DbError> {
    for partition in partitions {
        tx.lock(Key::Offset(*partition)).await?;
    }
    Ok(())
}

impl<E: Effect> ProcessInbox<E> {
    async fn commit_once(&self, batch: &Arc<Batch<E::Event>>) -> Result<(), DbError> {
        let mut tx = self.db.begin(&self.process).await?;
        let advanced = self.advance(&mut tx, batch).await;
        tx.answer(advanced).await?;
        if !batch.received.is_empty() {
            E::apply(&mut tx, &batch.received).await?;
        }
        let letters: Vec<(i32, i64)> = batch.poisoned.iter().map(|(d, _)| (d.position.partition, d.position.offset)).collect();
        tx.write(move |tables| tables.letters.extend(letters));
        if !batch.poisoned.is_empty() {
            if !self.db.world.holds(Guard::DeadLetter) {
                return Err(DbError::Unavailable("a record cannot be read".into()));
            }
            self.db.world.tell(self.process.number(), "dead letters", [batch.poisoned.len() as i64, 0, 0]);
        }
        for one in &batch.moves {
            let records = batch.received.iter().filter(|r| r.delivery.position.partition == one.partition).count();
            self.db.world.tell(self.process.number(), "batch; from, to, records", [one.from, one.to, records as i64]);
        }
        tx.commit().await
    }

    /// `advance_offsets`, and beside it what the fence is for.
    async fn advance(&self, tx: &mut Tx, batch: &Batch<E::Event>) -> Result<(), DbError> {
        lock_offsets(tx, &batch.moves.iter().map(|one| one.partition).collect()).await?;
        let world = &self.db.world;
        let mut fenced = false;
        for one in &batch.moves {
            let (next_offset, epoch) =
                self.db.state().tables.offsets.get(&one.partition).map_or((0, 0), |row| (row.next_offset, row.epoch));
            fenced |= world.holds(Guard::OffsetCompare) && next_offset != one.from;
            fenced |= world.holds(Guard::LeaseEpoch) && epoch != one.epoch;
        }
        if fenced {
            world.tell(self.process.number(), "batch fenced", [0; 3]);
            return Err(DbError::Fenced("an offset did not move".into()));
        }
        let until = world.now_ms() + self.lease.as_millis() as u64;
        let (world, moves, me) = (world.clone(), batch.moves.clone(), self.process.name().to_owned());
        tx.write(move |tables| {
            for one in moves {
                let row = tables.offsets.entry(one.partition).or_default();
                let (partition, stands) = (one.partition, row.next_offset);
                world.check(row.epoch == one.epoch, || {
                    format!("S12: {me} commits partition {partition} under epoch {}, which is {}'s by now", one.epoch, row.epoch)
                });
                world.check(stands == one.from, || {
                    format!("S12: {me} applies partition {partition} from {} although {stands} is next", one.from)
                });
                row.next_offset = one.to;
                row.lease_until_ms = until;
            }
        });
        Ok(())
    }
}
