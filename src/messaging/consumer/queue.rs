//! Which records of a batch may be applied, and which wait behind a parked one of their key: the rule, pure.

use std::collections::{HashMap, HashSet};

/// What becomes of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    Apply,
    /// It waits in its key's queue.
    Wait,
    /// One with its business key waits there already: that one answers for both.
    Repeat,
    /// Its key's queue is full, or it lies behind a record of its partition for which this is so: the partition stops there.
    Beyond,
}

/// Whose order is kept: a partition, and a key in it.
pub type Line = (i32, String);

/// The queues of the keys that are parked, and where partitions stop.
#[derive(Debug, Default)]
pub struct Queues {
    /// How many more each takes.
    room: HashMap<Line, usize>,
    /// Who is in them, as far as this batch may repeat it.
    members: HashMap<Line, HashSet<String>>,
    /// The first offset of a partition that is not passed.
    stops: HashMap<i32, i64>,
}

impl Queues {
    /// From here on records of this key wait; `room` more of them at most.
    pub fn park(&mut self, line: Line, business_key: &str, room: usize) {
        self.members.entry(line.clone()).or_default().insert(business_key.to_owned());
        self.room.insert(line, room);
    }

    /// A queue that was there before, and takes `room` more.
    pub fn open(&mut self, line: Line, room: usize) {
        self.room.insert(line, room);
    }

    pub fn is_empty(&self) -> bool {
        self.room.is_empty()
    }

    /// A member of a queue that was parked before.
    pub fn member(&mut self, line: Line, business_key: String) {
        self.members.entry(line).or_default().insert(business_key);
    }

    pub fn is_parked(&self, line: &Line) -> bool {
        self.room.contains_key(line)
    }

    /// Decides on the record at `offset`; to be asked in log order within each partition, and once a record unless the answer was
    /// [`Admission::Apply`].
    pub fn admit(&mut self, line: &Line, business_key: &str, offset: i64) -> Admission {
        if !self.passes(line.0, offset) {
            return Admission::Beyond;
        }
        let Some(room) = self.room.get_mut(line) else { return Admission::Apply };
        let members = self.members.entry(line.clone()).or_default();
        if members.contains(business_key) {
            return Admission::Repeat;
        }
        if *room == 0 {
            self.stops.insert(line.0, offset);
            return Admission::Beyond;
        }
        *room -= 1;
        members.insert(business_key.to_owned());
        Admission::Wait
    }

    /// Whether the partition does not stop before `offset`.
    pub fn passes(&self, partition: i32, offset: i64) -> bool {
        self.stops.get(&partition).is_none_or(|stop| offset < *stop)
    }

    /// Where partitions stop.
    pub fn stops(&self) -> &HashMap<i32, i64> {
        &self.stops
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever comes, what waits and what follows it are one key's records in log order, without a gap and within the bound.
        #[test]
        fn a_parked_keys_records_wait_in_order_and_other_keys_flow(
            records in proptest::collection::vec((0i32..2, 0u8..3, 0u8..6), 0..60), room in 0usize..4,
        ) {
            let mut queues = Queues::default();
            let line = |partition: i32, key: u8| (partition, key.to_string());
            queues.park(line(0, 0), "head", room);
            let mut stopped = None;
            let mut waiting = HashSet::new();
            for (offset, (partition, key, business)) in records.into_iter().enumerate() {
                let admission = queues.admit(&line(partition, key), &business.to_string(), offset as i64);
                let expected = match (partition, key) {
                    (0, _) if stopped.is_some() => Admission::Beyond,
                    (0, 0) if waiting.contains(&business) => Admission::Repeat,
                    (0, 0) if waiting.len() == room => { stopped = Some(offset as i64); Admission::Beyond }
                    (0, 0) => { waiting.insert(business); Admission::Wait }
                    _ => Admission::Apply,
                };
                prop_assert_eq!(admission, expected);
            }
            prop_assert_eq!(queues.stops().get(&0).copied(), stopped);
            prop_assert_eq!(queues.stops().len(), usize::from(stopped.is_some()));
        }
    }

    #[test]
    fn a_repeat_of_what_is_parked_needs_no_room() {
        let mut queues = Queues::default();
        let line = (3, "ann".to_owned());
        queues.park(line.clone(), "o1", 0);
        queues.member(line.clone(), "o2".into());
        assert_eq!(queues.admit(&line, "o1", 7), Admission::Repeat);
        assert_eq!(queues.admit(&line, "o2", 8), Admission::Repeat);
        assert_eq!(queues.admit(&line, "o3", 9), Admission::Beyond);
        assert_eq!(queues.admit(&(3, "bob".into()), "o4", 10), Admission::Beyond);
        assert_eq!(queues.admit(&(4, "bob".into()), "o4", 11), Admission::Apply);
    }
}
