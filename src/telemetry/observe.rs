//! Figures that are looked up when somebody asks for the metrics, and cost nothing until then.

use std::sync::{Mutex, PoisonError};

type Observer = Box<dyn Fn() -> bool + Send>;

static OBSERVERS: Mutex<Vec<Observer>> = Mutex::new(Vec::new());

/// Calls `observer` before every scrape; it sets its gauges, and says whether what it looks at is still there: else it is forgotten.
pub fn observe(observer: impl Fn() -> bool + Send + 'static) {
    OBSERVERS.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(observer));
}

/// Brings every observed figure up to date.
pub fn look() {
    OBSERVERS.lock().unwrap_or_else(PoisonError::into_inner).retain(|observer| observer());
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn what_is_gone_is_looked_at_once_more_and_then_forgotten() {
        let looked = Arc::new(AtomicUsize::new(0));
        let (thing, counted) = (Arc::new(()), looked.clone());
        let watched = Arc::downgrade(&thing);
        observe(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            watched.upgrade().is_some()
        });
        look();
        drop(thing);
        (0..3).for_each(|_| look());
        assert_eq!(looked.load(Ordering::Relaxed), 2);
    }
}
