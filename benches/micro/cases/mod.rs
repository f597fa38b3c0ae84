//! The pure core, piece by piece: what both `make bench-micro` (time) and `make gate` (instructions) measure.
//!
//! A case owns its inputs, which are the same in every run, and can be run any number of times.

mod payments;
mod values;
mod wire;

use std::hint::black_box;

/// One piece of the core over fixed inputs, made when they are needed.
pub struct Case {
    pub name: &'static str,
    /// Requests, records or values that one run handles.
    pub operations: usize,
    make: Box<dyn FnOnce() -> Run>,
}

/// Runs the piece over all its inputs.
pub type Run = Box<dyn FnMut()>;

impl Case {
    fn new<R: FnMut() + 'static>(name: &'static str, operations: usize, make: impl FnOnce() -> R + 'static) -> Self {
        Self { name, operations, make: Box::new(move || Box::new(make())) }
    }

    /// `each` on every one of the hundred inputs; what it makes is dropped within the operation, as a caller would.
    fn over<I: 'static, T>(
        name: &'static str,
        inputs: impl FnOnce() -> [I; INPUTS] + 'static,
        each: impl Fn(&I) -> T + 'static,
    ) -> Self {
        let make = move || {
            let inputs = inputs();
            move || {
                for input in &inputs {
                    drop(black_box(each(black_box(input))));
                }
            }
        };
        Self::new(name, INPUTS, make)
    }

    pub fn make(self) -> Run {
        (self.make)()
    }
}

const INPUTS: usize = 100;

/// The inputs numbered from 0.
fn inputs<I>(input: impl FnMut(usize) -> I) -> [I; INPUTS] {
    std::array::from_fn(input)
}

/// Every case, in the order in which reports show them.
pub fn all() -> Vec<Case> {
    [payments::cases(), wire::cases(), values::cases()].into_iter().flatten().collect()
}
