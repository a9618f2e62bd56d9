//! Rules that are taken out, one at a time: a simulation that does not notice is worth nothing.
//!
//! The sources stay as they are. With `MUTANTS=1` they are copied into a package of its own, in which
//! every rule of the table asks whether it is the one that is missing; that package is built once, and
//! its simulation is run for each. Without it, only the table is held against the sources.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A rule that can be taken out.
pub(crate) struct Mutant {
    /// What it is called, in [`SWITCH`].
    pub(crate) name: &'static str,
    /// Below `src`.
    pub(crate) file: &'static str,
    /// Occurs once there.
    pub(crate) text: &'static str,
    /// What stands there instead; `$off` is true where the rule is missing.
    pub(crate) replacement: &'static str,
}

/// The environment variable that names the missing rule.
const SWITCH: &str = "LLORCH_MUTANT";
/// Stories in which a missing rule must be noticed.
const SEEDS: &str = "200";
/// Stories in which nothing may be noticed where none is missing.
const SEEDS_SOUND: &str = "40";
/// Fewest rules that are worth the effort.
const MUTANTS_MIN: usize = 12;

/// How a rule of the copy asks whether it is missing.
const SWITCH_SOURCE: &str = r#"
/// Which rule is missing.
pub mod mutant {
    /// Whether it is this one.
    pub fn is(name: &str) -> bool {
        static MISSING: std::sync::OnceLock<String> = std::sync::OnceLock::new();
        MISSING.get_or_init(|| std::env::var("LLORCH_MUTANT").unwrap_or_default()) == name
    }
}
"#;

#[test]
fn every_rule_of_the_table_is_in_the_sources_once() {
    let names: BTreeSet<&str> = MUTANTS.iter().map(|mutant| mutant.name).collect();
    assert_eq!(names.len(), MUTANTS.len(), "two rules of one name");
    assert!(names.len() >= MUTANTS_MIN);
    for Mutant { name, file, text, replacement } in MUTANTS {
        let source = fs::read_to_string(package().join("src").join(file)).expect(file);
        assert_eq!(source.matches(text).count(), 1, "{name}: {text:?} in {file}");
        assert!(replacement.contains("$off"), "{name} is never missing");
    }
}

#[test]
#[allow(clippy::print_stdout, reason = "the table is what it is asked for")]
fn whichever_rule_is_missing_is_noticed() {
    if std::env::var_os("MUTANTS").is_none() {
        return;
    }
    let simulation = build();
    let run = |missing: &str, seeds: &str| run(&simulation, missing, seeds);
    let (passes, text) = run("", SEEDS_SOUND);
    assert!(passes, "no rule is missing: {text}");
    let mut survivors = Vec::new();
    let only = std::env::var("MUTANTS").unwrap_or_default();
    for Mutant { name, .. } in MUTANTS.iter().filter(|mutant| only == "1" || only == mutant.name) {
        let (passes, text) = run(name, SEEDS);
        println!("{name:36} {}", if passes { "SURVIVES" } else { &text });
        if passes {
            survivors.push(name);
        }
    }
    assert!(survivors.is_empty(), "missing, and nobody noticed: {survivors:?}");
}

/// Runs the simulation until a first test has failed: whether none did, and else which, and its first words.
fn run(simulation: &Path, missing: &str, seeds: &str) -> (bool, String) {
    let mut child = Command::new(simulation)
        .args(["--nocapture", "--skip", "mutants::", "--skip", "the_same_seed"])
        .env(SWITCH, missing)
        .env("SIM_SEEDS", seeds)
        .env_remove("SIM_SEED")
        .env("RUST_BACKTRACE", "0")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let (stdout, mut stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let panics = std::thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).map(|_| String::from_utf8_lossy(&text).into_owned())
    });
    let lines = BufReader::new(stdout).lines().map_while(Result::ok);
    let failed = lines.filter(|line| line.starts_with("test ")).find(|line| line.ends_with("FAILED"));
    if failed.is_some() {
        // What else it does is not needed any more.
        child.kill().expect("killed");
    }
    let status = child.wait().expect("it has ended");
    let text = panics.join().expect("read").expect("read");
    let Some(test) = failed else { return (status.success(), format!("{status}: {text}")) };
    let test = test.trim_start_matches("test ").trim_end_matches(" ... FAILED");
    let mut said = text.lines().skip_while(|line| !line.contains("panicked at"));
    let why = said.clone().find(|line| line.contains("seed ")).or_else(|| said.nth(1));
    (false, format!("{test}: {}", why.unwrap_or_default()))
}

fn package() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Builds the copy; the path of its simulation. What was built before is used again.
fn build() -> PathBuf {
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join("mutants");
    let _ = fs::remove_dir_all(copy.join("src"));
    let _ = fs::remove_dir_all(copy.join("tests"));
    copy_tree(&package().join("src"), &copy.join("src"));
    copy_tree(&package().join("tests/simulation"), &copy.join("tests/simulation"));
    // The sources include them, and the build needs them.
    copy_tree(&package().join("packaging/openapi"), &copy.join("packaging/openapi"));
    copy_tree(&package().join("packaging/link"), &copy.join("packaging/link"));
    fs::copy(package().join("tests/simulation.rs"), copy.join("tests/simulation.rs")).expect("copied");
    fs::copy(package().join("Cargo.lock"), copy.join("Cargo.lock")).expect("copied");
    for Mutant { name, file, text, replacement } in MUTANTS {
        let path = copy.join("src").join(file);
        let source = fs::read_to_string(&path).expect(file);
        assert_eq!(source.matches(text).count(), 1, "{name}: another rule changed {text:?} in {file}");
        let off = format!("crate::mutant::is({name:?})");
        fs::write(path, source.replace(text, &replacement.replace("$off", &off))).expect("written");
    }
    let root = copy.join("src/lib.rs");
    let source = fs::read_to_string(&root).expect("the root");
    fs::write(root, source + SWITCH_SOURCE).expect("written");
    fs::remove_dir_all(copy.join("src/bin")).expect("it has programs");
    fs::write(copy.join("Cargo.toml"), manifest()).expect("written");
    let output = Command::new(env!("CARGO"))
        .args([
            "test",
            "--offline",
            "--test",
            "simulation",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .current_dir(&copy)
        .env("CARGO_TARGET_DIR", copy.join("target"))
        .output()
        .expect("cargo runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let messages = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let built = messages.filter(|message| message["target"]["name"] == "simulation");
    let mut paths = built.filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    paths.next_back().expect("cargo says what it built")
}

/// The package's manifest without programs and benchmarks, a workspace of its own.
fn manifest() -> String {
    let text = fs::read_to_string(package().join("Cargo.toml")).expect("a manifest");
    let sections = text.split("\n[").enumerate().map(|(at, section)| match at {
        0 => section.to_string(),
        _ => format!("\n[{section}"),
    });
    let kept = sections.filter(|section| {
        let section = section.trim_start();
        !section.starts_with("[[bin]]") && !section.starts_with("[[bench]]")
    });
    kept.collect::<String>().replace("default-run = \"llorch\"\n", "") + "\n[workspace]\n"
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("made");
    for entry in fs::read_dir(from).expect("it is there") {
        let entry = entry.expect("an entry");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).expect("copied");
        }
    }
}

const REGISTRY: &str = "orchestratord/service_registry.rs";
const EXPIRY: &str = "orchestratord/service_registry/expiry.rs";
const POLLED: &str = "orchestratord/service_registry/polled.rs";
const RESTORE: &str = "orchestratord/service_registry/restore.rs";
const TOGETHER: &str = "orchestratord/service_registry/together.rs";
const SNAPSHOT: &str = "orchestratord/service_registry/snapshot.rs";
const TABLE: &str = "orchestratord/replica_table.rs";
const CONTROL: &str = "orchestratord/core.rs";
const QUEUE: &str = "orchestratord/admission.rs";
const MEMBERSHIP: &str = "pool_managerd/membership.rs";
const REPLICAS: &str = "replicas/registry.rs";

/// The rules.
const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "seq",
        file: REGISTRY,
        text: "                && seq <= last\n",
        replacement: "                && seq <= last && !$off\n",
    },
    Mutant {
        name: "heartbeat of an old incarnation",
        file: REGISTRY,
        text: "            if new < old {",
        replacement: "            if new < old && !$off {",
    },
    Mutant {
        name: "registration of an old incarnation",
        file: REGISTRY,
        text: "                    && new < known\n                    && node.status.leased()",
        replacement: "                    && new < known && !$off\n                    && node.status.leased()",
    },
    Mutant {
        name: "goodbye of an old incarnation",
        file: REGISTRY,
        text: "            && new < known\n        {",
        replacement: "            && new < known && !$off\n        {",
    },
    Mutant {
        name: "twin fence",
        file: REGISTRY,
        text: "if theirs == *ours || ",
        replacement: "if $off || theirs == *ours || ",
    },
    Mutant {
        name: "heartbeat of a clone",
        file: REGISTRY,
        text: "            if is_other_boot(beat.boot_id",
        replacement: "            if !$off && is_other_boot(beat.boot_id",
    },
    Mutant {
        name: "departed",
        file: REGISTRY,
        text: "self.departed.includes(&request.node_id, i, now.mono)",
        replacement: "!$off && self.departed.includes(&request.node_id, i, now.mono)",
    },
    Mutant {
        name: "confirmed by a heartbeat",
        file: REGISTRY,
        text: "r.confirmation = Confirmation::Doubted;",
        replacement: "if !$off { r.confirmation = Confirmation::Doubted; }",
    },
    Mutant {
        name: "one-way partition",
        file: REGISTRY,
        text: "if fresh || (!is_told_apart && ",
        replacement: "if fresh || ((!is_told_apart || $off) && ",
    },
    Mutant {
        name: "lease by arrival",
        file: REGISTRY,
        text: "        if node.status.leased() {\n            self.schedule(",
        replacement: "        if node.status.leased() && !$off {\n            self.schedule(",
    },
    Mutant {
        name: "mass expiry is held",
        file: EXPIRY,
        text: "let mass = of >= EXPIRY_HOLD_NODES_MIN && ",
        replacement: "let mass = !$off && of >= EXPIRY_HOLD_NODES_MIN && ",
    },
    Mutant {
        name: "bound of the hold",
        file: EXPIRY,
        text: "(Some(hold), true) if now.mono < hold.until => {",
        replacement: "(Some(hold), true) if now.mono < hold.until || $off => {",
    },
    Mutant {
        name: "who never beat is no majority",
        file: REGISTRY,
        text: "self.status.leased() && self.newcomer.is_none()",
        replacement: "self.status.leased() && (self.newcomer.is_none() || $off)",
    },
    Mutant {
        name: "what an old file says takes no work",
        file: RESTORE,
        text: "if trusted && !replica.doubted {",
        replacement: "if (trusted || $off) && !replica.doubted {",
    },
    Mutant {
        name: "who was silent comes back silent",
        file: RESTORE,
        text: "Standing::Silent => (NodeStatus::Suspect, RESTORED_SILENT, self.limits.offline_grace_ms),",
        replacement:
            "Standing::Silent if $off => (NodeStatus::Registering, RESTORED, self.limits.node_timeout_ms),
            Standing::Silent => (NodeStatus::Suspect, RESTORED_SILENT, self.limits.offline_grace_ms),",
    },
    Mutant {
        name: "restored incarnations fence",
        file: RESTORE,
        text: "node.incarnation = record.incarnation;",
        replacement: "node.incarnation = record.incarnation.filter(|_| !$off);",
    },
    Mutant {
        name: "heartbeats win over polls",
        file: POLLED,
        text: "None if self.node_beats(index, now) =>",
        replacement: "None if !$off && self.node_beats(index, now) =>",
    },
    Mutant {
        name: "stale answers to polls",
        file: POLLED,
        text: "is_some_and(|told_at| sent <= told_at)",
        replacement: "is_some_and(|told_at| sent <= told_at && !$off)",
    },
    Mutant {
        name: "lease of who is polled",
        file: POLLED,
        text: "            Via::Poll => timeout_ms.max(",
        replacement: "            Via::Poll if !$off => timeout_ms.max(",
    },
    Mutant {
        name: "the first of a name stays polled",
        file: POLLED,
        text: "_ if other_boot && !node.restored =>",
        replacement: "_ if other_boot && !node.restored && !$off =>",
    },
    Mutant {
        name: "who left is not polled back",
        file: POLLED,
        text: "if report.incarnation.is_some_and(|i| self.departed",
        replacement: "if !$off && report.incarnation.is_some_and(|i| self.departed",
    },
    Mutant {
        name: "who is polled registers before it beats",
        file: POLLED,
        text: "(node.registered, node.seq) = (false, None);",
        replacement: "(node.registered, node.seq) = ($off && node.registered, None);",
    },
    Mutant {
        name: "what is behind an agent fails with it",
        file: TOGETHER,
        text: "matches!(other.target, Target::Relay { .. }))",
        replacement: "matches!(other.target, Target::Relay { .. })) && ($off <= (other == replica))",
    },
    Mutant {
        name: "nodes that drain take no work",
        file: REGISTRY,
        text: "matches!(self, NodeStatus::Online | NodeStatus::Registering)\n",
        replacement: "matches!(self, NodeStatus::Online | NodeStatus::Registering) || ($off && self == NodeStatus::Draining)\n",
    },
    Mutant {
        name: "nodes without a lease take no work",
        file: REGISTRY,
        text: "            self.table.update(replica, now, changes, |r| r.node_status = status);",
        replacement: "            self.table.update(replica, now, changes, |r| if !$off || status.takes_work() { r.node_status = status });",
    },
    Mutant {
        name: "replicas that drain take no work",
        file: SNAPSHOT,
        text: "r.draining = beat.draining || pool.draining;",
        replacement: "r.draining = (beat.draining || pool.draining) && !$off;",
    },
    Mutant {
        name: "replicas that are not named go",
        file: SNAPSHOT,
        text: ".filter(|(_, r)| table.get(**r).is_none_or(|r| r.seen_in_beat != beats))",
        replacement: ".filter(|(_, r)| table.get(**r).is_none_or(|r| r.seen_in_beat != beats) && !$off)",
    },
    Mutant {
        name: "generation in a snapshot",
        file: SNAPSHOT,
        text: "if old.generation != beat.generation || ",
        replacement: "if (old.generation != beat.generation && !$off) || ",
    },
    Mutant {
        name: "generation at the relay",
        file: REPLICAS,
        text: "if generation.is_some_and(|generation| generation != replica.serial) {",
        replacement: "if !$off && generation.is_some_and(|generation| generation != replica.serial) {",
    },
    Mutant {
        name: "time only after what arrived",
        file: CONTROL,
        text: "        if tick {\n            self.registry.expire(",
        replacement: "        if tick || $off {\n            self.registry.expire(",
    },
    Mutant {
        name: "circuit",
        file: CONTROL,
        text: "        if !timeout {\n",
        replacement: "        if !timeout && !$off {\n",
    },
    Mutant {
        name: "one trial at a time",
        file: TABLE,
        text: "            *trying = true;\n",
        replacement: "            *trying = !$off;\n",
    },
    Mutant {
        name: "a trial ends itself only",
        file: TABLE,
        text: "        if grant.trial == Some(cold.trials)\n",
        replacement: "        if (grant.trial == Some(cold.trials) || ($off && grant.trial.is_some()))\n",
    },
    Mutant {
        name: "slots are given back",
        file: TABLE,
        text: "cold.in_flight.saturating_sub(grant.slots);",
        replacement: "cold.in_flight.saturating_sub(if $off { 0 } else { grant.slots });",
    },
    Mutant {
        name: "no second try after the first byte",
        file: CONTROL,
        text: "                if answered {\n",
        replacement: "                if answered && !$off {\n",
    },
    Mutant {
        name: "attempts",
        file: CONTROL,
        text: "} else if timeout || attempts >= ATTEMPTS_MAX {",
        replacement: "} else if timeout || (attempts >= ATTEMPTS_MAX && !$off) {",
    },
    Mutant {
        name: "who waits is served",
        file: CONTROL,
        text: "                    self.serve_waiters(replica, now, effects);\n                }\n                Change::ReplicaNotReady",
        replacement: "                    if !$off { self.serve_waiters(replica, now, effects); }\n                }\n                Change::ReplicaNotReady",
    },
    Mutant {
        name: "length of the queue",
        file: QUEUE,
        text: "if self.waiters.len() >= self.capacity {",
        replacement: "if self.waiters.len() >= self.capacity && !$off {",
    },
    Mutant {
        name: "limit of a wait",
        file: CONTROL,
        text: "deadline: request.since.plus_ms(wait_ms),",
        replacement: "deadline: request.since.plus_ms(if $off { u64::MAX } else { wait_ms }),",
    },
    Mutant {
        name: "change at once",
        file: MEMBERSHIP,
        text: "        if is_news && self.failures == 0 && ",
        replacement: "        if !$off && is_news && self.failures == 0 && ",
    },
    Mutant {
        name: "404 registers again",
        file: MEMBERSHIP,
        text: "Answer::UnknownNode => Trouble::Unknown,",
        replacement: "Answer::UnknownNode => if $off { Trouble::Failing } else { Trouble::Unknown },",
    },
    Mutant {
        name: "longest backoff",
        file: MEMBERSHIP,
        text: "doubled(BACKOFF_MS_MIN, self.failures, BACKOFF_MS_MAX)",
        replacement: "doubled(BACKOFF_MS_MIN, self.failures, if $off { u64::MAX / 4 } else { BACKOFF_MS_MAX })",
    },
    Mutant {
        name: "backoff of a member",
        file: MEMBERSHIP,
        text: "pause_ms = pause_ms.min(self.interval_ms);",
        replacement: "pause_ms = if $off { pause_ms } else { pause_ms.min(self.interval_ms) };",
    },
    Mutant {
        name: "jitter",
        file: MEMBERSHIP,
        text: "let spread_ms = self.interval_ms * JITTER_PERCENT / 100;",
        replacement: "let spread_ms = self.interval_ms * if $off { 90 } else { JITTER_PERCENT } / 100;",
    },
    Mutant {
        name: "no wall clock",
        file: MEMBERSHIP,
        text: "self.due_at = sent.sent_at.plus_ms(pause_ms).max(now.mono);",
        replacement: "self.due_at = sent.sent_at.plus_ms(if $off { pause_ms - now.wall.unix_ms() % 7 } else { pause_ms }).max(now.mono);",
    },
    Mutant {
        name: "files that are gone",
        file: "replicas/directory.rs",
        text: "for name in self.missing(listing) {",
        replacement: "for name in self.missing(listing).into_iter().filter(|_| !$off) {",
    },
    Mutant {
        name: "relist after overflow",
        file: "replicas/watch.rs",
        text: "            if hint.dirty || hint.lost {\n                self.look_at(now);",
        replacement: "            if (hint.dirty || hint.lost) && !$off {\n                self.look_at(now);",
    },
    Mutant {
        name: "half a file",
        file: "replicas/scan.rs",
        text: "self.hints.extend(due.collect::<Vec<_>>());",
        replacement: "if !$off { self.hints.extend(due.collect::<Vec<_>>()); }",
    },
];
