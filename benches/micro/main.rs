//! `make bench-micro`: how long the pure core takes, piece by piece, by Criterion. Words after the command choose cases by name:
//! `make bench-micro ARGS=decide`. The same pieces in instructions, against limits: `make gate`.

mod cases;

use std::time::Duration;

use criterion::{Criterion, Throughput};

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30)
        .configure_from_args();
    for case in cases::all() {
        let mut group = criterion.benchmark_group("core");
        group.throughput(Throughput::Elements(case.operations as u64));
        let (name, mut run) = (case.name, case.make());
        group.bench_function(name, |bencher| bencher.iter(&mut run));
        group.finish();
    }
    criterion.final_summary();
}
