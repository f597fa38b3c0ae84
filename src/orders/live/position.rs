//! What a client has seen of the orders' events, and its text, an event's `id:`. Pure.
//!
//! An event's position is (xid, id): the transaction that wrote it, then its number. Transactions commit in another order than they
//! begin, so "everything up to here" is not one position: what was still open below it is yet to come. [`Seen`] is exactly that
//! set. It is what a look goes on from, where a new stream begins, and what a client sends back as `Last-Event-ID`.
//!
//! Only positions of committed events and transactions that were open go into it, never a bound that no event has reached. So it
//! outlives a crash of the server: whatever lies at or below a committed event is decided for ever, while ids above it may be given again.

use std::fmt;
use std::str::FromStr;

/// Of one event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub xid: u64,
    /// At least 1.
    pub id: i64,
}

/// A set of events: all of transactions below `below` that were not `open`; of the transaction of `at`, exactly those up to `at`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The last event that was delivered; none where everything below was.
    at: Option<Position>,
    below: u64,
    /// Sorted, all below `below`, without that of `at`.
    open: Vec<u64>,
}

/// Open transactions that a text names at most; with more, the set is made smaller, and a resume delivers some events again.
const OPEN_MAX: usize = 512;
/// Characters of a text at most.
const TEXT_MAX: usize = 16 * 1024;

impl Seen {
    /// All events of finished transactions, where `high` is the highest of those, and of `open` which were not finished.
    pub fn all_up_to(high: u64, open: &[u64]) -> Self {
        Self { at: None, below: high + 1, open: open.iter().copied().filter(|x| *x <= high).collect() }
    }

    pub fn at(&self) -> Option<Position> {
        self.at
    }

    pub fn below(&self) -> u64 {
        self.below
    }

    pub fn open(&self) -> &[u64] {
        &self.open
    }

    pub fn contains(&self, event: Position) -> bool {
        match self.at {
            Some(at) if at.xid == event.xid => event.id <= at.id,
            _ => event.xid < self.below && self.open.binary_search(&event.xid).is_err(),
        }
    }

    /// In which of three rounds an event that is not in the set comes: the rest of a transaction that was delivered in part, those
    /// that were open, all younger ones; within a round by position. [`Seen::then`] holds in this order only.
    pub fn round(&self, event: Position) -> u8 {
        match self.at {
            Some(at) if at.xid == event.xid => 0,
            _ if event.xid < self.below => 1,
            _ => 2,
        }
    }

    /// The set after `event`, the next one that was due. `open_now` are the transactions that are still open, sorted: what is not
    /// among them and lies below `event` was delivered or has nothing.
    #[must_use]
    pub fn then(&self, event: Position, open_now: &[u64]) -> Self {
        let at = Some(event);
        match self.round(event) {
            0 => Self { at, ..self.clone() },
            1 => {
                let still = |x: &u64| *x > event.xid || (*x < event.xid && open_now.binary_search(x).is_ok());
                Self { at, below: self.below, open: self.open.iter().copied().filter(still).collect() }
            }
            _ => Self { at, below: event.xid + 1, open: open_now.iter().copied().take_while(|x| *x < event.xid).collect() },
        }
    }

    /// Of this set what lies up to `event`, which is in it: what a client has seen that gets current states in the order of their
    /// positions, and whatever came before with them.
    #[must_use]
    pub fn up_to(&self, event: Position) -> Self {
        let open = self.open.iter().copied().take_while(|x| *x < event.xid).collect();
        Self { at: Some(event), below: event.xid + 1, open }
    }

    /// Whether every event of this set can have been known where all of `everything` was: else it comes from another server.
    pub fn is_within(&self, everything: &Self) -> bool {
        self.below <= everything.below && self.at.is_none_or(|at| at.xid < everything.below)
    }

    /// Smaller where it would name too many transactions: nothing is ever missed by that.
    fn bounded(&self) -> (u64, &[u64]) {
        match self.open.get(OPEN_MAX) {
            Some(first_left_out) => (*first_left_out, &self.open[..OPEN_MAX]),
            None => (self.below, &self.open),
        }
    }
}

/// `xid-id`, then `+below` where that is not the next xid, then `~xid,xid` where some were open.
impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self.at.unwrap_or(Position { xid: self.below.saturating_sub(1), id: i64::MAX });
        let (below, open) = self.bounded();
        write!(f, "{}-{}", at.xid, at.id)?;
        if below != at.xid + 1 {
            write!(f, "+{below}")?;
        }
        for (n, xid) in open.iter().enumerate() {
            write!(f, "{}{xid}", if n == 0 { '~' } else { ',' })?;
        }
        Ok(())
    }
}

/// No text that [`Seen`] writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no id of an event")]
pub struct NoEventId;

impl FromStr for Seen {
    type Err = NoEventId;

    fn from_str(text: &str) -> Result<Self, NoEventId> {
        if text.len() > TEXT_MAX {
            return Err(NoEventId);
        }
        let (text, open) = text.split_once('~').map_or((text, None), |(text, open)| (text, Some(open)));
        let (at, below) = text.split_once('+').map_or((text, None), |(at, below)| (at, Some(below)));
        let (xid, id) = at.split_once('-').ok_or(NoEventId)?;
        let at = Position { xid: number(xid)?, id: number(id)?.cast_signed() };
        let below = below.map_or(Ok(at.xid + 1), number)?;
        let open: Vec<u64> = open.map_or(Ok(Vec::new()), |open| open.split(',').map(number).collect())?;
        let sorted = open.windows(2).all(|pair| pair[0] < pair[1]);
        let sound = sorted && open.len() <= OPEN_MAX && open.last().is_none_or(|last| *last < below) && !open.contains(&at.xid);
        let one_way = !text.contains('+') || below != at.xid + 1;
        if at.id < 1 || below < 1 || !sound || !one_way { Err(NoEventId) } else { Ok(Self { at: Some(at), below, open }) }
    }
}

/// Plain digits; fits into a signed number, as all of Postgres's do for some centuries.
fn number(text: &str) -> Result<u64, NoEventId> {
    let plain = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|n| plain && *n <= i64::MAX.unsigned_abs()).ok_or(NoEventId)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn at(xid: u64, id: i64) -> Position {
        Position { xid, id }
    }

    #[test]
    fn a_quiet_events_id_is_its_position() {
        let seen = Seen::all_up_to(7, &[]).then(at(9, 4), &[]);
        assert_eq!(seen.to_string(), "9-4");
        assert!(seen.contains(at(9, 4)) && seen.contains(at(8, 99)) && !seen.contains(at(9, 5)) && !seen.contains(at(10, 1)));
    }

    #[test]
    fn an_id_carries_what_was_open_below_it() {
        let early = Seen::all_up_to(98, &[]).then(at(110, 5), &[99, 104, 200]);
        assert_eq!(early.to_string(), "110-5~99,104");
        let late = Seen::all_up_to(110, &[99, 104]).then(at(99, 3), &[104]);
        assert_eq!(late.to_string(), "99-3+111~104");
        assert!(late.contains(at(110, 5)) && late.contains(at(99, 3)));
        assert!(!late.contains(at(99, 4)) && !late.contains(at(104, 1)) && !late.contains(at(111, 9)));
        assert_eq!(late.to_string().parse(), Ok(late));
    }

    #[test]
    fn what_is_no_id_is_refused() {
        for text in [
            "",
            "1",
            "1-",
            "-1",
            "1-0",
            "a-1",
            "01-1",
            "1-1+",
            "1-1~",
            "1-1+0",
            "1-1~1",
            "1-1~5",
            "9-1~3,2",
            "9-1~3,3",
            " 9-1",
            "9-1 ",
            "9223372036854775808-1",
            "1-1+2+3",
            "9-1~2~3",
            "9-1~2+4",
        ] {
            assert_eq!(text.parse::<Seen>(), Err(NoEventId), "{text}");
        }
    }

    #[test]
    fn an_id_stays_short_and_misses_nothing_for_it() {
        let open: Vec<u64> = (1..=2_000).collect();
        let seen = Seen::all_up_to(0, &[]).then(at(5_000, 1), &open);
        let text = seen.to_string();
        assert!(text.len() < 8 * 1024, "{}", text.len());
        let read: Seen = text.parse().unwrap();
        for xid in 1..6_000 {
            assert!(!read.contains(at(xid, 1)) || seen.contains(at(xid, 1)), "{xid}");
        }
        assert!(read.contains(at(5_000, 1)));
    }

    /// What can happen, one step at a time.
    #[derive(Clone, Debug)]
    enum Step {
        Begin,
        /// The nth of the open transactions writes one event.
        Write(usize),
        Commit(usize),
        Abort(usize),
        /// One of the two readers looks; the client, where it is there, gets at most so many of what that brings and then breaks off.
        Look {
            reader: usize,
            gets: usize,
        },
        /// The client comes (back) to a reader, and gets at most so many of what it missed.
        Come {
            reader: usize,
            gets: usize,
        },
    }

    fn step() -> impl Strategy<Value = Step> {
        let gets = || prop_oneof![Just(usize::MAX), 0usize..5];
        prop_oneof![
            2 => Just(Step::Begin),
            4 => (0usize..8).prop_map(Step::Write),
            3 => (0usize..8).prop_map(Step::Commit),
            1 => (0usize..8).prop_map(Step::Abort),
            3 => (0usize..2, gets()).prop_map(|(reader, gets)| Step::Look { reader, gets }),
            2 => (0usize..2, gets()).prop_map(|(reader, gets)| Step::Come { reader, gets }),
        ]
    }

    #[derive(Default)]
    struct World {
        next_xid: u64,
        next_id: i64,
        open: Vec<(u64, Vec<Position>)>,
        committed: BTreeSet<Position>,
    }

    impl World {
        fn snapshot(&self) -> Vec<u64> {
            self.open.iter().map(|(xid, _)| *xid).collect()
        }

        /// What is due after `seen`, with the sets that follow each; and where that leads.
        fn look(&self, seen: &Seen) -> (Vec<(Position, Seen)>, Seen) {
            let (now, mut due): (_, Vec<Position>) =
                (self.snapshot(), self.committed.iter().copied().filter(|e| !seen.contains(*e)).collect());
            due.sort_by_key(|e| (seen.round(*e), *e));
            let mut after = seen.clone();
            let due: Vec<_> = due
                .into_iter()
                .map(|e| {
                    after = after.then(e, &now);
                    (e, after.clone())
                })
                .collect();
            let high = due.iter().map(|(e, _)| e.xid).max().unwrap_or(0).max(seen.below - 1);
            (due, Seen::all_up_to(high, &now))
        }
    }

    #[derive(Default)]
    struct Client {
        got: Vec<Position>,
        last: Option<String>,
        connected_to: Option<usize>,
    }

    impl Client {
        fn takes(&mut self, due: Vec<(Position, Seen)>, gets: usize) {
            let breaks_off = gets < due.len();
            for (event, seen) in due.into_iter().take(gets) {
                self.got.push(event);
                self.last = Some(seen.to_string());
            }
            if breaks_off {
                self.connected_to = None;
            }
        }
    }

    /// Every event is an order of its own here, so what a client without an id gets first, the current states, is all events.
    fn comes(world: &World, readers: &mut [Seen; 2], client: &mut Client, reader: usize, gets: usize) {
        let (due, all) = world.look(&readers[reader]);
        if client.connected_to == Some(reader) {
            client.takes(due, usize::MAX);
        }
        client.connected_to = Some(reader);
        readers[reader] = all.clone();
        let seen: Option<Seen> = client.last.as_ref().map(|text| text.parse().unwrap());
        let missed = match seen {
            Some(seen) => {
                assert!(seen.is_within(&all), "{seen} within {all}");
                let mut missed: Vec<_> =
                    world.committed.iter().copied().filter(|e| all.contains(*e) && !seen.contains(*e)).collect();
                missed.sort_by_key(|e| (seen.round(*e), *e));
                let mut after = seen;
                missed
                    .into_iter()
                    .map(|e| {
                        after = after.then(e, all.open());
                        (e, after.clone())
                    })
                    .collect()
            }
            None => world.committed.iter().copied().filter(|e| all.contains(*e)).map(|e| (e, all.up_to(e))).collect(),
        };
        client.takes(missed, gets);
    }

    fn run(steps: &[Step], resume: impl Fn(&str) -> String) -> (Vec<Position>, BTreeSet<Position>) {
        let mut world = World { next_xid: 3, next_id: 1, ..World::default() };
        let mut readers = [Seen::all_up_to(0, &[]), Seen::all_up_to(0, &[])];
        let mut client = Client::default();
        let finish = [Step::Come { reader: 0, gets: usize::MAX }];
        for step in steps.iter().chain(&finish) {
            let len = world.open.len().max(1);
            match step {
                Step::Begin if world.open.len() < 8 => {
                    world.open.push((world.next_xid, Vec::new()));
                    world.next_xid += 1;
                }
                Step::Write(n) if !world.open.is_empty() => {
                    let (xid, events) = &mut world.open[n % len];
                    events.push(at(*xid, world.next_id));
                    world.next_id += 1;
                }
                Step::Commit(n) if !world.open.is_empty() => {
                    let (_, events) = world.open.remove(n % len);
                    world.committed.extend(events);
                }
                Step::Abort(n) if !world.open.is_empty() => drop(world.open.remove(n % len)),
                Step::Look { reader, gets } => {
                    let (due, all) = world.look(&readers[*reader]);
                    readers[*reader] = all;
                    if client.connected_to == Some(*reader) {
                        client.takes(due, *gets);
                    }
                }
                Step::Come { reader, gets } => {
                    client.last = client.last.as_deref().map(&resume);
                    comes(&world, &mut readers, &mut client, *reader, *gets);
                }
                _ => {}
            }
        }
        (client.got, world.committed)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]
        #[test]
        fn whatever_commits_when_and_wherever_a_client_resumes_it_gets_every_event_once(steps in proptest::collection::vec(step(), 0..60)) {
            let (got, committed) = run(&steps, str::to_owned);
            let once: BTreeSet<_> = got.iter().copied().collect();
            prop_assert_eq!(once.len(), got.len(), "none twice: {:?}", got);
            prop_assert_eq!(once, committed, "none missed");
        }

        #[test]
        fn every_text_is_read_as_what_it_was_written_from(xid in 1u64..1_000, id in 1i64..1_000, ahead in 0u64..50, open in proptest::collection::btree_set(1u64..1_000, 0..20)) {
            let seen = Seen { at: Some(at(xid, id)), below: xid + ahead + 1, open: open.into_iter().filter(|x| *x != xid && *x < xid + ahead + 1).collect() };
            prop_assert_eq!(seen.to_string().parse::<Seen>(), Ok(seen));
        }

        #[test]
        fn no_text_makes_the_reader_panic(text in "\\PC*", like in "[0-9+~,-]{0,30}") {
            let _ = text.parse::<Seen>();
            if let Ok(seen) = like.parse::<Seen>() {
                prop_assert_eq!(seen.to_string(), like);
            }
        }
    }

    /// The negative control of the property above: an id that is only the event's position misses what commits late.
    #[test]
    fn an_id_without_what_was_open_would_miss_what_commits_late() {
        let steps = [
            Step::Begin,
            Step::Write(0),
            Step::Begin,
            Step::Write(1),
            Step::Commit(1),
            Step::Come { reader: 1, gets: usize::MAX },
            Step::Commit(0),
        ];
        let bare = |id: &str| id.split(['+', '~']).next().unwrap().to_owned();
        let (got, committed) = run(&steps, bare);
        assert_eq!((got.len(), committed.len()), (1, 2));
        assert_eq!(run(&steps, str::to_owned).0.len(), 2);
    }
}
