//! Several servers that are asked one after the other within one bound: databases, brokers, and the addresses of either's names.

use tokio::time::Instant;

/// The end of the first of so many even shares of the time until then. One that takes a connection and then says nothing must leave time for
/// those behind it.
pub fn share(until: Instant, shares: usize) -> Instant {
    let now = Instant::now();
    now + until.saturating_duration_since(now) / u32::try_from(shares).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn whoever_uses_up_its_share_leaves_the_others_theirs() {
        let until = Instant::now() + Duration::from_secs(6);
        for left in (1..=3).rev() {
            let share = share(until, left);
            assert_eq!(share, Instant::now() + Duration::from_secs(2));
            tokio::time::advance(share - Instant::now()).await;
        }
        assert_eq!((share(until, 1), share(until, 0)), (until, until), "nothing is left, and nobody");
    }
}
