//! One stop signal for every task of a process: the first asks all to drain, each within its own bound.

use tokio_util::sync::CancellationToken;

/// A handle on the process's one stop; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Shutdown(CancellationToken);

impl Shutdown {
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks everyone to drain. Idempotent.
    pub fn stop(&self) {
        self.0.cancel();
    }

    pub fn is_stopping(&self) -> bool {
        self.0.is_cancelled()
    }

    /// Resolves when stopping begins, at once if it has begun.
    pub async fn stopped(&self) {
        self.0.cancelled().await;
    }
}
