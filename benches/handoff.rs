//! What a handoff costs: reading one file's bytes, and comparing a directory's full listing of 1,
//! 100 and 10,000 files with the last one, when nothing changed, when one file changed, and at start.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use llama_orch::replicas::{AllowList, EnginePolicy, FileContent, ListedFile, Listing, Registry};
use llama_orch::time::{Mono, Now, Wall};
use llama_orch::wire::handoff::{self, HandoffFile};

fn text(n: usize, slots: u32) -> String {
    // 32 pools of at most 313 replicas: within the limits of a heartbeat.
    let (pool, replica, port) = (n % 32, n / 32, 10_000 + n);
    format!(
        r#"{{"pool_id":"pool-{pool}","replica_id":"r{replica}","url":"http://127.0.0.1:{port}","engine":"llamacpp","engine_version":"b6789","slots":{slots},"gpu_device":{},"model":{{"id":"qwen3-8b","path":"/models/qwen3-8b.gguf"}},"pid":{},"ready":true}}"#,
        n % 8,
        1_000 + n
    )
}

fn file(n: usize, slots: u32) -> ListedFile {
    let content = match handoff::parse(text(n, slots).as_bytes()) {
        Ok(HandoffFile::Engine(handoff)) => FileContent::Handoff(handoff.into()),
        other => panic!("a benchmark's handoff is good: {other:?}"),
    };
    ListedFile {
        name: format!("{n:05}.json").into(),
        modified: Wall(u64::from(slots)),
        content: Arc::new(content),
    }
}

fn now() -> Now {
    Now { mono: Mono(1_000_000_000), wall: Wall(1_700_000_000_000_000_000) }
}

fn empty() -> Registry {
    Registry::new(EnginePolicy::new(Vec::new(), Some(9200), AllowList::default(), ""), 1)
}

fn parse(c: &mut Criterion) {
    let text = text(7, 4);
    let mut group = c.benchmark_group("handoff_parse");
    group.throughput(Throughput::Bytes(text.len() as u64));
    group.bench_function("one", |b| b.iter(|| handoff::parse(black_box(text.as_bytes()))));
    group.finish();
}

fn listing(c: &mut Criterion) {
    for files in [1usize, 100, 10_000] {
        let listed: Vec<ListedFile> = (0..files).map(|n| file(n, 4)).collect();
        let mut other = listed.clone();
        other[files / 2] = file(files / 2, 8);
        let (listed, other) = (Listing::whole(listed), Listing::whole(other));
        let mut changes = Vec::new();

        let mut group = c.benchmark_group("handoff_listing");
        group.throughput(Throughput::Elements(files as u64));
        let mut registry = empty();
        registry.listing(&listed, now(), &mut changes);
        group.bench_function(BenchmarkId::new("unchanged", files), |b| {
            b.iter(|| registry.listing(black_box(&listed), now(), &mut changes));
        });
        let mut is_other = false;
        group.bench_function(BenchmarkId::new("one_changed", files), |b| {
            b.iter(|| {
                is_other = !is_other;
                registry.listing(black_box(if is_other { &other } else { &listed }), now(), &mut changes);
                changes.clear();
            });
        });
        group.bench_function(BenchmarkId::new("first", files), |b| {
            b.iter_batched(
                empty,
                |mut registry| {
                    registry.listing(black_box(&listed), now(), &mut changes);
                    changes.clear();
                    registry
                },
                BatchSize::LargeInput,
            );
        });
        group.finish();
    }
}

criterion_group!(benches, parse, listing);
criterion_main!(benches);
