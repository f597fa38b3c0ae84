//! Connections to one broker between two requests: as many as were needed at once, for whoever asks next.

use std::io::Result;
use std::time::Duration;

use tokio::time::Instant;

use super::dial::{Dialed, Dialer};

/// More requests to one broker are seldom on their way at once. Where they are, those beyond make a connection each time.
const KEPT_MAX: usize = 8;
/// A connection that nobody used for so long is closed: its broker may be gone for good, and one that is there closes it after ten minutes
/// (`connections.max.idle.ms`), when the next request would be lost on it.
pub(super) const IDLE_MAX: Duration = Duration::from_secs(240);
/// Buffers that a request was written into are kept up to here.
const BUFFER_KEPT_MAX: usize = 1024 * 1024;

/// A connection with the buffers of its last request. For one that was not answered there is no way back to the others.
pub(super) struct Line {
    pub connection: Dialed,
    pub request: Vec<u8>,
    pub scratch: Vec<u8>,
    used: Instant,
}

impl Line {
    /// Bounded by the caller, as [`Dialer::dial`] is.
    pub async fn dial(dialer: &Dialer, broker: &str, until: Instant) -> Result<Self> {
        let connection = dialer.dial(broker, until).await?;
        Ok(Self { connection, request: Vec::new(), scratch: Vec::new(), used: Instant::now() })
    }

    fn is_usable(&self) -> bool {
        self.connection.is_admitted() && self.used.elapsed() < IDLE_MAX
    }
}

/// The last one that came back goes out first: those that a burst needed stay behind and are closed.
#[derive(Default)]
pub(super) struct Lines(Vec<Line>);

impl Lines {
    pub fn take(&mut self) -> Option<Line> {
        self.close_unusable();
        self.0.pop()
    }

    pub fn put(&mut self, mut line: Line) {
        for buffer in [&mut line.request, &mut line.scratch] {
            buffer.clear();
            buffer.shrink_to(BUFFER_KEPT_MAX);
        }
        line.used = Instant::now();
        if self.0.len() < KEPT_MAX {
            self.0.push(line);
        }
    }

    pub fn close_unusable(&mut self) {
        self.0.retain(Line::is_usable);
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
