//! Bounds in time for a worker thread's requests, by one timer for all of them.
//!
//! A timer of the runtime's own costs each request two system calls and two locks, because setting one wakes the reactor, and nearly
//! every one is taken back unused. Here a request only leaves its waker; a task looks at all of them every [`TICK`] while there are any.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use actix_web::rt::spawn;
use tokio::sync::Notify;
use tokio::time::sleep;

/// How late a bound may be.
const TICK: Duration = Duration::from_millis(5);

/// One of these a worker thread.
#[derive(Clone)]
pub struct Deadlines(Rc<Inner>);

struct Inner {
    waiting: RefCell<Vec<Option<Waiting>>>,
    /// Places in `waiting` that are free.
    free: RefCell<Vec<usize>>,
    /// Of places that are taken.
    count: Cell<usize>,
    begin: Rc<Notify>,
}

struct Waiting {
    until: Instant,
    waker: Waker,
}

impl Deadlines {
    /// Call on the thread whose requests it bounds, within its runtime; it ends with the last handle.
    pub fn start() -> Self {
        let begin = Rc::new(Notify::new());
        let inner =
            Rc::new(Inner { waiting: RefCell::default(), free: RefCell::default(), count: Cell::new(0), begin: begin.clone() });
        let weak = Rc::downgrade(&inner);
        spawn(async move {
            loop {
                match weak.upgrade() {
                    None => return,
                    Some(inner) if inner.count.get() == 0 => {
                        drop(inner);
                        begin.notified().await;
                    }
                    Some(inner) => {
                        inner.wake_late(Instant::now());
                        drop(inner);
                        sleep(TICK).await;
                    }
                }
            }
        });
        Self(inner)
    }

    /// `work`, or `None` where it is not done by `until` (and [`TICK`] later). It stays where it is pinned: handed over it would be in the
    /// caller's future twice, as argument and as what is awaited.
    pub async fn bound<F: Future>(&self, until: Instant, mut work: Pin<&mut F>) -> Option<F::Output> {
        let mut place = Place { inner: &self.0, at: None };
        std::future::poll_fn(move |cx| match work.as_mut().poll(cx) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending if Instant::now() >= until => Poll::Ready(None),
            Poll::Pending => {
                place.wait(until, cx);
                Poll::Pending
            }
        })
        .await
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.begin.notify_one();
    }
}

impl Inner {
    fn wake_late(&self, now: Instant) {
        // What is woken runs later, so nothing is borrowed twice.
        for waiting in self.waiting.borrow().iter().flatten() {
            if waiting.until <= now {
                waiting.waker.wake_by_ref();
            }
        }
    }
}

/// A place among those who wait, given back when dropped.
struct Place<'d> {
    inner: &'d Inner,
    at: Option<usize>,
}

impl Place<'_> {
    fn wait(&mut self, until: Instant, cx: &Context<'_>) {
        let mut waiting = self.inner.waiting.borrow_mut();
        match self.at {
            Some(at) => {
                if let Some(Some(mine)) = waiting.get_mut(at)
                    && !mine.waker.will_wake(cx.waker())
                {
                    mine.waker = cx.waker().clone();
                }
            }
            None => {
                let mine = Some(Waiting { until, waker: cx.waker().clone() });
                let free = self.inner.free.borrow_mut().pop();
                self.at = Some(match free {
                    Some(at) => {
                        waiting[at] = mine;
                        at
                    }
                    None => {
                        waiting.push(mine);
                        waiting.len() - 1
                    }
                });
                self.inner.count.set(self.inner.count.get() + 1);
                if self.inner.count.get() == 1 {
                    self.inner.begin.notify_one();
                }
            }
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(at) = self.at {
            self.inner.waiting.borrow_mut()[at] = None;
            self.inner.free.borrow_mut().push(at);
            self.inner.count.set(self.inner.count.get() - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;
    use std::pin::pin;

    use futures::future::join_all;

    use super::*;

    #[actix_web::test]
    async fn what_is_late_ends_soon_after_its_bound_and_the_rest_goes_on() {
        let deadlines = Deadlines::start();
        let began = Instant::now();
        let of = |ms: u64| {
            let deadlines = deadlines.clone();
            async move {
                let late = deadlines.bound(began + Duration::from_millis(ms), pin!(pending::<()>())).await;
                (late.is_none(), began.elapsed() >= Duration::from_millis(ms))
            }
        };
        let work = pin!(async {
            tokio::task::yield_now().await;
            7
        });
        let done = deadlines.bound(began + Duration::from_secs(60), work);
        let (late, done) = futures::future::join(join_all([30, 10, 20, 10].map(of)), done).await;
        assert_eq!(late, [(true, true); 4]);
        assert_eq!(done, Some(7));
        assert!(began.elapsed() < Duration::from_secs(5));
        assert_eq!((deadlines.0.count.get(), deadlines.0.free.borrow().len()), (0, 5), "every place is given back");
        // It had gone to rest meanwhile, or will; both times it is woken.
        tokio::task::yield_now().await;
        assert!(deadlines.bound(Instant::now(), pin!(pending::<()>())).await.is_none());
        assert!(deadlines.bound(Instant::now() + Duration::from_millis(1), pin!(pending::<()>())).await.is_none());
    }
}
