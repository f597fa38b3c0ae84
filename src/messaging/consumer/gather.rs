//! What the next transaction does: put together while the one before it is on its way, so that the database need not wait for that.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;

use super::batch::Batch;
use super::fetcher::Fetched;
use super::holding::Holding;

/// What one transaction takes in, and one piece more: what is refused of it is kept whole, in one statement, within the database's timeouts.
const BYTES_MAX: usize = 16 * 1024 * 1024;

/// For so long after a batch begins nothing is put together and nothing is freed: its first statements need the thread, and the server waits for them.
/// The rest of a large batch takes the server several times as long.
pub const QUIET: Duration = Duration::from_millis(10);

pub struct Gathered<E> {
    topic: Arc<str>,
    records_max: usize,
    batch: Batch<E>,
    /// At most; what was let go counts.
    bytes: usize,
}

impl<E> Gathered<E> {
    /// One transaction's takes in `records_max` records, and one piece more.
    pub fn new(topic: Arc<str>, records_max: usize) -> Self {
        Self { topic, records_max, batch: Batch::default(), bytes: 0 }
    }

    /// What comes next of a partition of ours; anything else was left by a fetcher that has ended.
    pub fn add(&mut self, one: Fetched<E>, holding: &mut Holding) {
        if !holding.expects(&one) {
            return;
        }
        let records = one.records();
        self.bytes += one.bytes();
        if records >= super::MANY {
            // Room for all of them at once: to grow is to copy what is there.
            self.batch.received.reserve((self.records_max + records).saturating_sub(self.batch.received.len()));
        }
        self.batch.add(&self.topic, one);
    }

    /// Lets go of what is not ours any more, or stopped before that.
    pub fn keep_ours(&mut self, holding: &Holding) {
        if self.batch.moves.iter().all(|m| holding.reads(m.partition, m.epoch)) {
            return;
        }
        self.batch.moves.retain(|m| holding.reads(m.partition, m.epoch));
        let moves = &self.batch.moves;
        let ours = |partition: i32| moves.iter().any(|m| m.partition == partition);
        self.batch.received.retain(|one| ours(one.delivery.position.partition));
        self.batch.poisoned.retain(|(delivery, _)| ours(delivery.position.partition));
    }

    pub fn records(&self) -> usize {
        self.batch.received.len() + self.batch.poisoned.len()
    }

    pub fn is_empty(&self) -> bool {
        self.batch.moves.is_empty()
    }

    pub fn is_full(&self) -> bool {
        self.records() >= self.records_max || self.bytes >= BYTES_MAX
    }

    /// Takes in what comes until `applying` is done, from when the statements of a large batch are on their way.
    pub async fn meanwhile<T>(
        &mut self,
        applying: impl Future<Output = T>,
        fetched: &mut mpsc::Receiver<Fetched<E>>,
        holding: &mut Holding,
    ) -> T {
        let mut applying = pin!(applying);
        if let Ok(done) = timeout(QUIET, &mut applying).await {
            return done;
        }
        loop {
            tokio::select! {
                biased;
                done = &mut applying => return done,
                Some(more) = fetched.recv(), if !self.is_full() => self.add(more, holding),
            }
        }
    }

    /// All of it; the next one begins empty.
    pub fn take(&mut self) -> Batch<E> {
        self.bytes = 0;
        let mut batch = std::mem::take(&mut self.batch);
        batch.moves.sort_by_key(|m| m.partition);
        batch
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::super::batch::Decoded;
    use super::super::delivery::{Delivery, Received};
    use super::super::keeper::Assignment;
    use super::super::offsets::Owned;
    use super::*;

    fn holding(partitions: &[(i32, i64)]) -> Holding {
        let mut holding = Holding::of("t".into());
        holding.follow(&assignment(partitions), |_| std::future::pending());
        holding
    }

    fn assignment(partitions: &[(i32, i64)]) -> Assignment {
        let owned = partitions.iter().map(|(partition, epoch)| Owned { partition: *partition, next_offset: 0, epoch: *epoch });
        Assignment { owned: owned.collect(), share: 9 }
    }

    /// Two records, at `from` and after it.
    fn piece(partition: i32, epoch: i64, from: i64) -> Fetched<()> {
        piece_of(partition, epoch, from, 2)
    }

    fn piece_of(partition: i32, epoch: i64, from: i64, bytes: usize) -> Fetched<()> {
        let record = |offset: i64| Received { event: (), delivery: Delivery::at(partition, offset) };
        let decoded = Decoded { received: vec![record(from), record(from + 1)], poisoned: Vec::new(), bytes };
        Fetched::Records { partition, epoch, from, decoded, next_offset: from + 2, end_offset: 9 }
    }

    fn spans(batch: &Batch<()>) -> Vec<(i32, i64, i64)> {
        batch.moves.iter().map(|m| (m.partition, m.from, m.to)).collect()
    }

    fn places(batch: &Batch<()>) -> Vec<(i32, i64)> {
        batch.received.iter().map(|one| (one.delivery.position.partition, one.delivery.position.offset)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_while_a_large_batch_is_applied_is_the_next_one_and_of_a_small_one_nothing_is_taken() {
        let (mut holding, mut gathered) = (holding(&[(0, 1)]), Gathered::new("t".into(), 3));
        let (to, mut fetched) = mpsc::channel(3);
        for from in [0, 2, 4] {
            to.try_send(piece(0, 1, from)).unwrap();
        }
        gathered.meanwhile(sleep(QUIET / 2), &mut fetched, &mut holding).await;
        assert!(gathered.is_empty());
        let done = gathered
            .meanwhile(
                async {
                    sleep(QUIET * 3).await;
                    "done"
                },
                &mut fetched,
                &mut holding,
            )
            .await;
        assert_eq!((done, gathered.records(), gathered.is_full(), fetched.len()), ("done", 4, true, 1));
        let batch = gathered.take();
        assert_eq!((spans(&batch), places(&batch)), (vec![(0, 0, 4)], vec![(0, 0), (0, 1), (0, 2), (0, 3)]));
        assert_eq!((gathered.records(), gathered.is_full(), gathered.is_empty()), (0, false, true));
    }

    #[tokio::test(start_paused = true)]
    async fn large_records_fill_a_batch_by_their_bytes_and_the_next_one_counts_from_none() {
        let (mut holding, mut gathered) = (holding(&[(0, 1)]), Gathered::new("t".into(), 100));
        let (to, mut fetched) = mpsc::channel(4);
        for from in [0, 2, 4, 6] {
            to.try_send(piece_of(0, 1, from, BYTES_MAX / 2)).unwrap();
        }
        for left in [2, 0] {
            gathered.meanwhile(sleep(QUIET * 3), &mut fetched, &mut holding).await;
            assert_eq!((gathered.records(), gathered.is_full(), fetched.len()), (4, true, left));
            gathered.take();
            assert!(!gathered.is_full());
        }
    }

    #[tokio::test]
    async fn what_was_put_together_of_a_partition_that_stops_or_goes_is_let_go() {
        let (mut holding, mut gathered) = (holding(&[(0, 1), (1, 1), (2, 1)]), Gathered::new("t".into(), 100));
        for partition in [2, 1, 0] {
            gathered.add(piece(partition, 1, 0), &mut holding);
        }
        gathered.keep_ours(&holding);
        assert_eq!(gathered.records(), 6);
        holding.stop(&Owned { partition: 1, next_offset: 0, epoch: 1 });
        // Another's meanwhile, and ours again.
        holding.follow(&assignment(&[(0, 1), (1, 1), (2, 3)]), |_| std::future::pending());
        gathered.keep_ours(&holding);
        assert_eq!(gathered.records(), 2);
        gathered.add(piece(2, 1, 2), &mut holding);
        gathered.add(piece(2, 3, 0), &mut holding);
        let batch = gathered.take();
        assert_eq!(spans(&batch), [(0, 0, 2), (2, 0, 2)]);
        assert_eq!(places(&batch), [(0, 0), (0, 1), (2, 0), (2, 1)]);
        assert_eq!(batch.moves[1].epoch, 3);
    }

    #[tokio::test]
    async fn what_does_not_follow_is_left_out() {
        let (mut holding, mut gathered) = (holding(&[(0, 1)]), Gathered::new("t".into(), 100));
        gathered.add(piece(0, 1, 2), &mut holding);
        gathered.add(piece(7, 1, 0), &mut holding);
        assert!(gathered.is_empty());
        gathered.add(piece(0, 1, 0), &mut holding);
        gathered.add(piece(0, 1, 0), &mut holding);
        assert_eq!(places(&gathered.take()), [(0, 0), (0, 1)]);
    }
}
