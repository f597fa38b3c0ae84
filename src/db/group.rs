//! Group commit: requests that arrive together commit together, and one that arrives alone waits for nobody.
//!
//! Whatever is waiting when the database is free is taken as one batch; while that batch commits, the next one gathers. The
//! fsync and the round trip are shared, `synchronous_commit` stays on.
//!
//! Where several came together the next batch waits a little for as many as come, see [`Crowd`]: or the first of them would be taken
//! alone, and every second commit would be for a handful.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, timeout_at};

use super::crowd::Crowd;
use super::error::DbError;
use crate::faults;

/// Requests in one batch at most.
const BATCH_MAX: usize = 256;
/// Requests waiting at most; above that a request is refused, not queued.
const QUEUE_MAX: usize = 4_096;

/// The queue is full, or the process is stopping.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("too many requests are waiting for the database")]
pub struct Overloaded;

impl From<Overloaded> for DbError {
    fn from(overloaded: Overloaded) -> Self {
        Self::Unavailable(overloaded.to_string())
    }
}

/// Commits a batch; where that ends in a defect, each of its requests alone: one bad row must fail only its own.
pub async fn each_for_itself<Q, A, F>(batch: Vec<Q>, commit: impl Fn(Arc<Vec<Q>>) -> F) -> Vec<Result<A, DbError>>
where
    Q: Clone,
    F: Future<Output = Result<Vec<A>, DbError>>,
{
    let batch = Arc::new(batch);
    match commit(batch.clone()).await {
        Ok(answers) => answers.into_iter().map(Ok).collect(),
        Err(DbError::Defect(_)) if batch.len() > 1 => {
            let mut answers = Vec::with_capacity(batch.len());
            for request in batch.iter() {
                let alone = commit(Arc::new(vec![request.clone()])).await;
                let none = || DbError::Defect("a request without an answer".into());
                answers.push(alone.and_then(|mut answers| answers.pop().ok_or_else(none)));
            }
            answers
        }
        Err(error) => batch.iter().map(|_| Err(error.clone())).collect(),
    }
}

/// Hands requests to one committer; cheap to clone. The committer ends when the last handle is gone.
pub struct GroupCommit<Q, A>(Arc<Handles<Q, A>>);

impl<Q, A> Clone for GroupCommit<Q, A> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

/// What the handles share; the committer has the queue alone.
struct Handles<Q, A>(Arc<Queue<Q, A>>);

impl<Q, A> Drop for Handles<Q, A> {
    fn drop(&mut self) {
        self.0.arrived.close();
    }
}

/// Whoever waits for several is woken once, when they are there. A channel wakes its reader for each, and on a busy machine each time costs the
/// two of them as much as the request itself.
struct Queue<Q, A> {
    waiting: Mutex<VecDeque<(Q, oneshot::Sender<A>)>>,
    /// A permit for each that is waiting; it comes after its request.
    arrived: Semaphore,
}

/// The committer's end of the queue: with it goes whoever waits there, and hears of it.
struct Taking<Q, A>(Arc<Queue<Q, A>>);

impl<Q, A> Drop for Taking<Q, A> {
    fn drop(&mut self) {
        let mut waiting = self.0.locked();
        self.0.arrived.close();
        waiting.clear();
    }
}

impl<Q, A> Queue<Q, A> {
    fn locked(&self) -> MutexGuard<'_, VecDeque<(Q, oneshot::Sender<A>)>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `count`, until `due` where that is given; they stay in the queue. False when nobody can come any more.
    async fn wait_for(&self, count: usize, due: Option<Instant>) -> bool {
        // Given back at once: the permits only count.
        let there = self.arrived.acquire_many(count as u32);
        match due {
            None => there.await.is_ok(),
            Some(_) if self.arrived.available_permits() >= count => true,
            Some(due) => !matches!(timeout_at(due, there).await, Ok(Err(_))),
        }
    }

    /// # Errors
    /// [`Overloaded`] where the queue is full, or nobody is there to take from it.
    fn push(&self, request: Q, to: oneshot::Sender<A>) -> Result<(), Overloaded> {
        let mut waiting = self.locked();
        if waiting.len() >= QUEUE_MAX || self.arrived.is_closed() {
            return Err(Overloaded);
        }
        waiting.push_back((request, to));
        drop(waiting);
        self.arrived.add_permits(1);
        Ok(())
    }

    /// Those who are there, in the order in which they came.
    fn take(&self, max: usize) -> Vec<(Q, oneshot::Sender<A>)> {
        let count = self.arrived.forget_permits(max);
        self.locked().drain(..count).collect()
    }
}

impl<Q: Send + 'static, A: Send + 'static> GroupCommit<Q, A> {
    /// `of` names the requests in the metrics. `commit` answers every request of its batch, in order; it never fails as a whole.
    pub fn start<F>(runtime: &Handle, of: &'static str, commit: F) -> Self
    where
        F: Fn(Vec<Q>) -> BoxFuture<'static, Vec<A>> + Send + 'static,
    {
        let queue = Arc::new(Queue { waiting: Mutex::default(), arrived: Semaphore::new(0) });
        let handles = Arc::new(Handles(queue.clone()));
        let taking = Taking(queue);
        runtime.spawn(async move {
            let queue = &taking.0;
            let (mut crowd, together) = (Crowd::new(), metrics::histogram!("shopd_group_commit_requests", "of" => of));
            while queue.wait_for(1, None).await {
                let (enough, due) = crowd.next(Instant::now());
                if enough > 1 && !queue.wait_for(enough.min(BATCH_MAX), Some(due)).await {
                    break;
                }
                let mut taken = queue.take(BATCH_MAX);
                let (count, began) = (taken.len(), Instant::now());
                // Nobody waits for these any more, and nothing of them was done.
                taken.retain(|(_, to)| !to.is_closed());
                if taken.is_empty() {
                    continue;
                }
                together.record(taken.len() as f64);
                let (requests, answers): (Vec<_>, Vec<_>) = taken.into_iter().unzip();
                // Their answers are dropped, so whoever waits hears that it failed.
                if faults::point!("group.before_commit").is_err() {
                    continue;
                }
                // In a task of its own: should it panic, its own requests fail and the committer lives.
                let done = tokio::spawn(commit(requests)).await;
                crowd.done(count, enough, began);
                let Ok(done) = done else { continue };
                if faults::point!("group.after_commit").is_err() {
                    continue;
                }
                for (answer, to) in done.into_iter().zip(answers) {
                    // A client that went away does not read its answer; its effect stands.
                    let _ = to.send(answer);
                }
            }
        });
        Self(handles)
    }

    /// # Errors
    /// [`Overloaded`] at once where the queue is full; nothing was done then.
    pub async fn submit(&self, request: Q) -> Result<A, Overloaded> {
        let (to, answer) = oneshot::channel();
        self.0.0.push(request, to)?;
        answer.await.map_err(|_| Overloaded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn requests_that_wait_together_commit_together_and_each_gets_its_own_answer() {
        let sizes = Arc::new(std::sync::Mutex::new(Vec::new()));
        let gate = Arc::new(tokio::sync::Semaphore::new(0));
        let (counted, opened) = (sizes.clone(), gate.clone());
        let group = GroupCommit::start(&Handle::current(), "test", move |requests: Vec<u32>| {
            let (counted, opened) = (counted.clone(), opened.clone());
            async move {
                counted.lock().unwrap().push(requests.len());
                opened.acquire().await.unwrap().forget();
                requests.into_iter().map(|n| n * 2).collect::<Vec<u32>>()
            }
            .boxed()
        });
        let submit = |n: u32| {
            let group = group.clone();
            tokio::spawn(async move { group.submit(n).await })
        };
        let until = async |what: &dyn Fn() -> bool| {
            let waited = async {
                while !what() {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(std::time::Duration::from_secs(20), waited).await.unwrap();
        };
        // One alone is taken at once; what comes while it commits gathers.
        let mut calls = vec![submit(0)];
        until(&|| sizes.lock().unwrap().len() == 1).await;
        calls.extend((1..100).map(submit));
        until(&|| group.0.0.arrived.available_permits() == 99).await;
        gate.add_permits(100);
        for (n, call) in calls.into_iter().enumerate() {
            assert_eq!(call.await.unwrap().unwrap(), n as u32 * 2);
        }
        assert_eq!(*sizes.lock().unwrap(), [1, 99]);
    }

    #[tokio::test]
    async fn of_a_batch_with_one_bad_row_the_others_are_done_each_once() {
        let done = std::sync::Mutex::new(Vec::<u32>::new());
        let commit = |batch: Arc<Vec<u32>>| {
            let answer: Result<Vec<u32>, DbError> =
                if batch.contains(&0) { Err(DbError::Defect("zero".into())) } else { Ok(batch.to_vec()) };
            done.lock().unwrap().extend(answer.iter().flatten().copied());
            async { answer }
        };
        let answers = each_for_itself(vec![1, 0, 2], commit).await;
        assert!(matches!(answers[..], [Ok(1), Err(DbError::Defect(_)), Ok(2)]), "{answers:?}");
        assert_eq!(*done.lock().unwrap(), [1, 2]);
        let away = |_| async { Err::<Vec<u32>, _>(DbError::Unavailable("away".into())) };
        let answers = each_for_itself(vec![1, 2], away).await;
        assert!(answers.iter().all(|answer| matches!(answer, Err(DbError::Unavailable(_)))) && answers.len() == 2);
    }

    #[tokio::test]
    async fn a_batch_that_panics_fails_alone() {
        let group = GroupCommit::start(&Handle::current(), "test", |requests: Vec<u32>| {
            async move {
                assert!(!requests.contains(&0), "on purpose");
                requests
            }
            .boxed()
        });
        assert!(group.submit(0).await.is_err());
        assert_eq!(group.submit(1).await.unwrap(), 1);
    }

    #[test]
    fn who_waits_for_a_committer_that_ends_hears_of_it_and_so_does_who_comes_later() {
        let own = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let group = GroupCommit::start(own.handle(), "test", |_: Vec<u32>| std::future::pending::<Vec<u32>>().boxed());
        let other = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        other.block_on(async {
            let (begun, waits) = (group.submit(1), group.submit(2));
            let ends = async {
                tokio::task::yield_now().await;
                own.shutdown_background();
            };
            let bound = std::time::Duration::from_secs(20);
            let (begun, waits, ()) =
                tokio::time::timeout(bound, futures::future::join3(begun, waits, ends)).await.expect("they hear of it");
            assert!(begun.is_err() && waits.is_err());
            // It may just be ending still.
            assert!(tokio::time::timeout(bound, group.submit(3)).await.expect("and so does this one").is_err());
        });
    }

    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_not_begun() {
        let gate = Arc::new(tokio::sync::Semaphore::new(0));
        let (opened, seen) = (gate.clone(), Arc::new(std::sync::Mutex::new(Vec::new())));
        let saw = seen.clone();
        let group = GroupCommit::start(&Handle::current(), "test", move |requests: Vec<u32>| {
            let (opened, saw) = (opened.clone(), saw.clone());
            async move {
                saw.lock().unwrap().extend(requests.iter().copied());
                opened.acquire().await.unwrap().forget();
                requests
            }
            .boxed()
        });
        let first = tokio::spawn({
            let group = group.clone();
            async move { group.submit(1).await }
        });
        while seen.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
        assert!(group.submit(2).now_or_never().is_none());
        let third = tokio::spawn(async move { group.submit(3).await });
        gate.add_permits(100);
        assert_eq!((first.await.unwrap().unwrap(), third.await.unwrap().unwrap()), (1, 3));
        assert_eq!(*seen.lock().unwrap(), [1, 3]);
    }
}
