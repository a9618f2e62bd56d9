//! Replays the corpus of the fuzz targets, which live in a workspace of their own beside it, and cuts and changes
//! of it: what was found once must not come back, and the targets must go on building.

#[path = "fuzz/targets.rs"]
mod targets;

use std::path::Path;

#[test]
fn the_corpus_passes() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let mut random = fastrand::Rng::with_seed(1);
    for (name, check) in targets::TARGETS {
        let files = std::fs::read_dir(corpus.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let inputs: Vec<Vec<u8>> =
            files.map(|file| std::fs::read(file.expect("a file").path()).expect("readable")).collect();
        assert!(!inputs.is_empty(), "{name} has no corpus");
        for input in &inputs {
            check(input);
            for length in 0..input.len().min(512) {
                check(&input[..length]);
            }
            for _ in 0..200 {
                let mut changed = input.clone();
                if !changed.is_empty() {
                    let at = random.usize(..changed.len());
                    changed[at] = random.u8(..);
                }
                check(&changed);
            }
        }
    }
}

#[test]
fn every_target_has_its_program() {
    let manifest = include_str!("fuzz/Cargo.toml");
    for (name, _) in targets::TARGETS {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
    }
}
