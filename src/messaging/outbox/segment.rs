//! Which segment of the outbox a writer's rows go into, by its clock.
//!
//! Whatever it says is safe: nothing is dropped that lies beyond the relay's cursor, in whatever segment it lies. It only has to move
//! on, so that a segment is soon left by its writers and can be emptied.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// `outbox_1` to `outbox_4`; `outbox` itself, as 0, belongs to writers that name none.
pub const SEGMENTS: u64 = 4;
/// How long writers stay with one.
pub const TURN: Duration = Duration::from_secs(1);

/// The segment to write into now.
pub fn current() -> i32 {
    at(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}

fn at(since_epoch: Duration) -> i32 {
    (1 + since_epoch.as_secs() / TURN.as_secs() % SEGMENTS) as i32
}

/// A statement's text with the table that it inserts into, between what stands before and after it: one text a segment, each with a plan
/// of its own, because routing the rows in the server is dearer (docs/adr/0009).
macro_rules! in_segment {
    ($before:literal, $after:literal) => {
        match $crate::messaging::outbox::segment::current() {
            1 => concat!($before, "outbox_1", $after),
            2 => concat!($before, "outbox_2", $after),
            3 => concat!($before, "outbox_3", $after),
            _ => concat!($before, "outbox_4", $after),
        }
    };
}
pub(crate) use in_segment;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writers_go_round_the_segments() {
        let turns: Vec<i32> = (0..9).map(|turn| at(TURN * turn)).collect();
        assert_eq!(turns, [1, 2, 3, 4, 1, 2, 3, 4, 1]);
    }
}
