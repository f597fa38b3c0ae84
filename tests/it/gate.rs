//! The gate on instruction counts (`make gate`): its comparison and its reading of callgrind, which must be able to say no.

#[path = "../../benches/gate/callgrind.rs"]
#[allow(dead_code)] // nothing is run here
mod callgrind;
#[path = "../../benches/gate/limits.rs"]
mod limits;

use callgrind::Cost;
use limits::{Finding, Limits, compare};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn one(instructions: u64, allocations: u64) -> Limits {
    Limits::from([("decide".to_owned(), Cost { instructions, allocations })])
}

#[test]
fn a_case_above_its_tolerance_closes_the_gate() {
    let limits = one(1_000, 3);
    for (instructions, allocations, fails) in
        [(1_000, 3, false), (1_050, 3, false), (1_051, 3, true), (2_000, 3, true), (1_000, 4, true), (10, 3, false), (10, 4, true)]
    {
        let findings = compare(&limits, &one(instructions, allocations));
        assert_eq!(findings["decide"].fails(), fails, "{instructions} instructions, {allocations} allocations");
    }
    assert!(matches!(compare(&limits, &one(900, 3))["decide"], Finding::Cheaper { .. }));
}

#[test]
fn a_case_without_a_limit_and_a_limit_without_a_case_close_the_gate() {
    assert_eq!(compare(&Limits::new(), &one(1, 1))["decide"], Finding::Unlimited);
    assert_eq!(compare(&one(1, 1), &Limits::new())["decide"], Finding::Gone);
    assert!(Finding::Unlimited.fails() && Finding::Gone.fails());
}

#[test]
fn limits_are_read_as_they_are_written() {
    let limits = Limits::from([
        ("a".to_owned(), Cost { instructions: 7, allocations: 0 }),
        ("b_c".to_owned(), Cost { instructions: 123_456_789, allocations: 12 }),
    ]);
    assert_eq!(limits::read(&limits::write(&limits)), Ok(limits));
    for odd in ["a", "a 1", "a 1 2 3", "a x 2", "a 1 -2"] {
        assert!(limits::read(odd).is_err(), "{odd}");
    }
}

#[test]
fn only_our_own_instructions_and_the_calls_to_the_allocator_are_counted() {
    let profile = "\
        events: Ir\n\nob=/lib/libc.so.6\nfl=malloc.c\nfn=malloc\n0 500\n\n\
        ob=/target/gate-1f\nfl=???\nfn=shopd::decide\n0 100\ncob=/lib/libc.so.6\ncfn=malloc\ncalls=3 0\n0 500\n\
        cob=/target/gate-1f\ncfn=shopd::inner\ncalls=9 0\n0 4000\n0 11\n\nfn=shopd::inner\n0 4000\n\n\
        ob=/lib/libc.so.6\nfn=calloc\n0 7\ncfn=malloc\ncalls=5 0\n0 8\n\ntotals: 4618\n";
    assert_eq!(callgrind::cost(profile, "gate-1f"), Cost { instructions: 4_111, allocations: 3 });
}
