//! What does it cost to find who is next for a slot?
//!
//! 1, 1,000 and 100,000 waiters for 1, 10 and 1,000 models, of one client or of a thousand. One is taken
//! for an engine with one of the models, and put back: the queue stays as long as it is.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use llama_orch::orchestratord::admission::{Admission, Priority, Serves, Waiter, Wanted};
use llama_orch::time::Mono;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Want(String);

impl Wanted for Want {
    fn model(&self) -> Option<&str> {
        Some(&self.0)
    }
}

fn queue_of(waiters: u64, models: u64, clients: u64) -> Admission<Want> {
    let mut queue = Admission::new(200_000);
    for id in 0..waiters {
        let waiter = Waiter {
            id,
            ask: Want(format!("model-{}", id % models)),
            priority: if id % 10 == 0 { Priority::Batch } else { Priority::Interactive },
            // Each client asks for every model.
            client: format!("10.0.{}", id / models % clients).into(),
            since: Mono(id),
            deadline: Mono(id).plus_ms(60_000),
        };
        assert!(queue.push(waiter).is_ok(), "it has room");
    }
    queue
}

fn admission(c: &mut Criterion) {
    let mut group = c.benchmark_group("admission/take-next");
    for (waiters, models, clients) in [
        (1u64, 1u64, 1u64),
        (1_000, 1, 1),
        (1_000, 1, 1_000),
        (1_000, 10, 100),
        (1_000, 1_000, 1),
        (100_000, 1, 1),
        (100_000, 1, 1_000),
        (100_000, 10, 1_000),
        (100_000, 1_000, 100),
        (100_000, 1_000, 1),
    ] {
        let mut queue = queue_of(waiters, models, clients);
        let served = ["model-0".to_string()];
        let name = format!("{waiters}-waiters/{models}-models/{clients}-clients");
        group.bench_function(BenchmarkId::new("one-model", &name), |b| {
            b.iter(|| {
                let taken = queue.next_fitting(Serves::Models(black_box(&served)), |_| true);
                let taken = taken.expect("somebody waits for it");
                assert!(queue.push(taken).is_ok(), "it has room");
            });
        });
        group.bench_function(BenchmarkId::new("nobody-fits", &name), |b| {
            b.iter(|| queue.next_fitting(Serves::Models(black_box(&served)), |_| false).is_none());
        });
        if models > 1 {
            group.bench_function(BenchmarkId::new("anything", &name), |b| {
                b.iter(|| {
                    let taken = queue.next_fitting(Serves::Anything, |_| true).expect("somebody waits");
                    assert!(queue.push(taken).is_ok(), "it has room");
                });
            });
        }
    }
}

criterion_group!(benches, admission);
criterion_main!(benches);
