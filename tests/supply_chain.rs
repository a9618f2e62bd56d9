//! Which crates there are, under which licences, and why one is there twice: from `cargo metadata`, without a
//! network.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Licences that may be part of a program under GPL-3.0-or-later.
const LICENCES: &[&str] = &[
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CC0-1.0",
    "GPL-3.0-or-later",
    "ISC",
    "LGPL-2.1-or-later",
    "MIT",
    "MPL-2.0",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Crates of which more than one version is locked, and why.
const TWICE: &[(&str, &str)] = &[
    ("getrandom", "ring still asks for 0.2"),
    ("syn", "derive macros move to 3 one after the other; at build time only"),
    ("thiserror", "nvml-wrapper still asks for 1"),
    ("thiserror-impl", "as thiserror"),
    ("windows-sys", "for Windows, on which nothing of this is built"),
];

fn metadata() -> Value {
    let ask = |more: &[&str]| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["metadata", "--locked", "--format-version", "1"]).args(more);
        cargo.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo runs")
    };
    // Crates for other systems are on no machine that has only built this: they are fetched where they are missing.
    let mut output = ask(&["--offline"]);
    if !output.status.success() {
        output = ask(&[]);
    }
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn packages(metadata: &Value) -> &[Value] {
    metadata["packages"].as_array().expect("packages")
}

fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value[name].as_str().unwrap_or_default()
}

/// Whether an SPDX expression leaves a choice that is allowed. `/` is how `OR` was written once.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let allowed = any_of(&words, &mut at);
    allowed && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize) -> bool {
    let mut allowed = all_of(words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        allowed |= all_of(words, at);
    }
    allowed
}

fn all_of(words: &[&str], at: &mut usize) -> bool {
    let mut allowed = one(words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        allowed &= one(words, at);
    }
    allowed
}

fn one(words: &[&str], at: &mut usize) -> bool {
    let word = words.get(*at).copied().unwrap_or_default();
    *at += 1;
    if word == "(" {
        let allowed = any_of(words, at);
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return allowed && closed;
    }
    if words.get(*at) == Some(&"WITH") {
        let whole = format!("{word} WITH {}", words.get(*at + 1).copied().unwrap_or_default());
        *at += 2;
        return LICENCES.contains(&whole.as_str());
    }
    LICENCES.contains(&word)
}

#[test]
fn expressions_are_read_as_spdx_says() {
    for good in ["MIT", "MIT/Apache-2.0", "GPL-2.0-only OR MIT", "(MIT OR X) AND Unicode-3.0", "MIT AND ISC"]
    {
        assert!(is_allowed(good), "{good}");
    }
    for bad in ["", "GPL-2.0-only", "MIT AND Proprietary", "(MIT", "MIT)", "Apache-2.0 WITH X", "MIT MIT"] {
        assert!(!is_allowed(bad), "{bad}");
    }
}

#[test]
fn every_crate_is_free_to_be_part_of_this_and_comes_from_the_registry() {
    let metadata = metadata();
    let mut wrong = Vec::new();
    for package in packages(&metadata) {
        let (name, licence) = (text(package, "name"), text(package, "license"));
        if !is_allowed(licence) {
            wrong.push(format!("{name}: licence {licence:?}"));
        }
        let source = text(package, "source");
        if name != "llama-orch" && source != "registry+https://github.com/rust-lang/crates.io-index" {
            wrong.push(format!("{name}: from {source:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn crates_are_there_once_or_it_is_known_why_not() {
    let metadata = metadata();
    let mut versions: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages(&metadata) {
        versions.entry(text(package, "name")).or_default().insert(text(package, "version"));
    }
    let twice: BTreeMap<_, _> = versions.into_iter().filter(|(_, versions)| versions.len() > 1).collect();
    let known: BTreeSet<&str> = TWICE.iter().map(|(name, _)| *name).collect();
    let found: BTreeSet<&str> = twice.keys().copied().collect();
    assert_eq!(found, known, "found (left) and known (right); {twice:?}");
}

/// In `Cargo.toml` a comment on the same line or above says why a dependency is there.
#[test]
fn every_dependency_says_why_it_is_there() {
    let (mut section, mut above, mut silent, mut seen) = ("", "", Vec::new(), 0);
    for line in include_str!("../Cargo.toml").lines() {
        if line.starts_with('[') {
            section = line;
        } else if section.ends_with("dependencies]") && line.contains('=') && !line.starts_with('#') {
            seen += 1;
            if !above.starts_with('#') {
                silent.push(line);
            }
        }
        above = line;
    }
    assert!(seen > 25 && silent.is_empty(), "{silent:#?}");
}
