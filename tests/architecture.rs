//! Holds the sources to the architecture: which room may use which, which files are pure, and a few
//! limits on every file.
//!
//! The sources are read as tokens, so comments and strings never count, and every path is expanded:
//! `use std::{fs, net::TcpStream}` names `std::fs` and `std::net::TcpStream`. What stands under
//! `#[cfg(test)]` may do what tests need; only `unsafe` and `mio` are refused there too.
//!
//! A new file in a room that decides things is pure unless it is named here as a shell; a new room is
//! an error until the table of edges knows it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;

/// Which rooms a room may use. A file directly under `src/` is a room of its own.
const EDGES: &[(&str, &[&str])] = &[
    ("time", &[]),
    ("settings", &[]),
    ("metrics", &["time"]),
    ("http", &[]),
    ("wire", &["time"]),
    ("reactor", &["time"]),
    ("net", &["http", "metrics", "reactor", "time", "wire"]),
    ("service", &["http", "metrics", "net", "reactor", "settings", "time", "wire"]),
    ("replicas", &["http", "net", "reactor", "service", "settings", "time", "wire"]),
    ("handoff_watcher", &["reactor", "replicas", "time", "wire"]),
    ("pool_registry_types", &["wire"]),
    (
        "node_registration",
        &["net", "pool_managerd", "pool_registry_types", "reactor", "service", "time", "wire"],
    ),
    ("service_registry", &["orchestratord", "pool_registry_types", "reactor", "time", "wire"]),
    ("pool_managerd", DAEMON_USES),
    ("orchestratord", DAEMON_USES),
    ("engine_provisioner", DAEMON_USES),
    ("cli", DAEMON_USES),
    ("bin", &["cli", "engine_provisioner", "orchestratord", "pool_managerd", "settings"]),
    ("lib", &[]),
];

/// What a program may use: never another program.
const DAEMON_USES: &[&str] =
    &["http", "metrics", "net", "reactor", "replicas", "service", "settings", "time", "wire"];

/// Rooms in which every file is pure, but for the shells named beside them.
const PURE_ROOMS: &[(&str, &[&str])] = &[
    ("time", &[]),
    ("metrics", &[]),
    ("pool_registry_types", &[]),
    ("wire", &[]),
    ("http", &[]),
    ("replicas", &["replicas/liveness.rs", "replicas/probe.rs", "replicas/scan.rs", "replicas/watch.rs"]),
    (
        "pool_managerd",
        &[
            "pool_managerd/config.rs",
            "pool_managerd/control_client.rs",
            "pool_managerd/daemon.rs",
            "pool_managerd/gpu_reader.rs",
            "pool_managerd/daemon/managed.rs",
            "pool_managerd/daemon/operations.rs",
            "pool_managerd/mod.rs",
            "pool_managerd/provisioner_client.rs",
        ],
    ),
    (
        "orchestratord",
        &[
            "orchestratord/config.rs",
            "orchestratord/daemon.rs",
            "orchestratord/daemon/agents.rs",
            "orchestratord/daemon/dashboard.rs",
            "orchestratord/daemon/direct.rs",
            "orchestratord/daemon/front_door.rs",
            "orchestratord/daemon/pool_orders.rs",
            "orchestratord/daemon/state.rs",
            "orchestratord/daemon/tasks.rs",
            "orchestratord/daemon/workers.rs",
            "orchestratord/mod.rs",
        ],
    ),
];

/// Pure files in rooms that otherwise act.
const PURE_FILES: &[&str] = &[
    "cli/demo_engine/answers.rs",
    "cli/demo_engine/dialect.rs",
    "engine_provisioner/asking.rs",
    "engine_provisioner/devices.rs",
    "engine_provisioner/docker_run.rs",
    "engine_provisioner/file.rs",
    "engine_provisioner/flags.rs",
    "engine_provisioner/model_ref.rs",
    "engine_provisioner/models/answer.rs",
    "engine_provisioner/models/gguf.rs",
    "engine_provisioner/models/hub.rs",
    "engine_provisioner/models/ranges.rs",
    "engine_provisioner/models/reference.rs",
    "engine_provisioner/notify.rs",
    "engine_provisioner/options.rs",
    "engine_provisioner/plan.rs",
    "engine_provisioner/source/plan.rs",
    "engine_provisioner/supervision.rs",
    "engine_provisioner/supervision/restarts.rs",
    "net/buffer.rs",
    "net/meter.rs",
    "net/relay.rs",
    "service/attempts.rs",
    "service/auth.rs",
    "service/events.rs",
    "service/hosts.rs",
    "service/lag.rs",
    "service/routes.rs",
];

/// What a pure file may not name, and why not.
const IMPURE: &[(&str, &str)] = &[
    ("mio", "names the reactor's library"),
    ("std::fs", "touches files"),
    ("std::thread", "starts threads"),
    ("std::env", "reads the environment"),
    ("std::process", "touches processes"),
    ("std::os", "touches the system"),
    ("std::time::Instant", "asks a clock"),
    ("std::time::SystemTime", "asks a clock"),
    ("Instant::now", "asks a clock"),
    ("SystemTime::now", "asks a clock"),
    ("std::net", "names sockets"),
    ("fastrand", "draws randomness that was not handed in"),
    ("rand", "draws randomness that was not handed in"),
    ("getrandom", "draws randomness that was not handed in"),
    ("log", "writes to the log"),
    ("rustix", "calls the kernel"),
    ("inotify", "calls the kernel"),
    ("signal_hook", "calls the kernel"),
    ("ureq", "names sockets"),
    ("rustls", "speaks TLS"),
];

/// Exceptions from [`IMPURE`]: plain values, and a generator that is seeded by whoever creates the core.
const PURE_AFTER_ALL: &[&str] = &[
    "std::net::IpAddr",
    "std::net::Ipv4Addr",
    "std::net::Ipv6Addr",
    "std::net::SocketAddr",
    "fastrand::Rng",
];
/// Exceptions from the exceptions.
const IMPURE_AFTER_ALL: &[&str] = &["fastrand::Rng::new"];

/// The rooms that may name `mio`.
const MIO_ROOMS: &[&str] = &["reactor", "net"];

/// Longest file in lines, its tests included: what is longer has more than one subject.
const LINES_MAX: usize = 900;

/// One source file; its path is relative to `src/`.
struct Source {
    path: String,
    text: String,
}

/// A rule that a line breaks.
#[derive(Debug, PartialEq, Eq)]
struct Violation {
    path: String,
    line: usize,
    rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "src/{}:{}: {}", self.path, self.line, self.rule)
    }
}

#[test]
fn the_sources_keep_to_the_architecture() {
    let sources = read_sources();
    assert!(sources.len() > 50, "only {} files were found", sources.len());
    let found: Vec<String> = sources.iter().flat_map(check).map(|violation| violation.to_string()).collect();
    assert!(found.is_empty(), "{} violations:\n{}", found.len(), found.join("\n"));
}

#[test]
fn the_lists_name_files_that_exist() {
    let sources = read_sources();
    let paths: BTreeSet<&str> = sources.iter().map(|source| source.path.as_str()).collect();
    let shells = PURE_ROOMS.iter().flat_map(|(_, shells)| shells.iter());
    for listed in shells.chain(PURE_FILES) {
        assert!(paths.contains(listed), "src/{listed} is listed here and does not exist");
    }
    let rooms: BTreeSet<&str> = paths.iter().map(|path| room_of(path)).collect();
    for (room, _) in EDGES {
        assert!(rooms.contains(room), "the room {room} is listed here and does not exist");
    }
}

/// Rooms can be put in an order in which each uses only earlier ones.
#[test]
fn dependencies_run_downward_only() {
    let mut above: BTreeMap<&str, &[&str]> = EDGES.iter().copied().collect();
    let mut below: BTreeSet<&str> = BTreeSet::new();
    while !above.is_empty() {
        let ready: Vec<&str> = above
            .iter()
            .filter(|(_, uses)| uses.iter().all(|used| below.contains(used)))
            .map(|(room, _)| *room)
            .collect();
        assert!(!ready.is_empty(), "a circle among {:?}", above.keys());
        for room in ready {
            above.remove(room);
            below.insert(room);
        }
    }
}

#[test]
fn planted_violations_are_found() {
    let planted: &[(&str, &str, usize, &str)] = &[
        ("orchestratord/core.rs", "use mio::Token;", 1, "only reactor/ and net/ name mio"),
        ("wire/id.rs", "use std::{fmt,\n net::{IpAddr, TcpStream}};", 2, "std::net::TcpStream"),
        ("wire/id.rs", "use std::net::*;", 1, "names sockets"),
        ("http/head.rs", "fn f() { std::fs::read(\"a\"); }", 1, "touches files"),
        ("time.rs", "use std::time::Instant;", 1, "asks a clock"),
        ("metrics.rs", "fn f() { let _ = Instant::now(); }", 1, "asks a clock"),
        ("replicas/brand_new.rs", "fn f() {\n\n log::info!(\"x\"); }", 3, "writes to the log"),
        ("pool_managerd/core.rs", "fn f() -> u8 { fastrand::u8(..) }", 1, "randomness"),
        ("pool_managerd/core.rs", "fn f() { fastrand::Rng::new(); }", 1, "randomness"),
        ("net/relay.rs", "#[cfg(test)]\nmod tests { use std::fs; }\nuse std::env;", 3, "environment"),
        ("service/events.rs", "use std::thread;", 1, "starts threads"),
        ("wire/id.rs", "use crate::http::head;", 1, "wire may not use http"),
        ("wire/id.rs", "use super::super::http::head;", 1, "leaves its room"),
        ("orchestratord/api.rs", "use crate::{time, pool_managerd::core};", 1, "may not use pool_managerd"),
        ("cli/mod.rs", "use crate::orchestratord;", 1, "cli may not use orchestratord"),
        ("bin/llorch.rs", "use llama_orch::reactor;", 1, "bin may not use reactor"),
        ("attic/mod.rs", "use crate::time;", 1, "unknown room attic"),
        ("wire/id.rs", "use crate::attic::x;", 1, "unknown room attic"),
        ("cli/mod.rs", "#[cfg(test)]\nmod tests { unsafe fn f() {} }", 2, "unsafe"),
        ("replicas/probe.rs", "#[cfg(test)]\nuse mio::Poll;", 2, "only reactor/ and net/ name mio"),
    ];
    for (path, code, line, rule) in planted {
        let text = format!("//! A doc.\n{code}\n");
        let found = check(&Source { path: path.to_string(), text });
        assert!(
            found.iter().any(|v| v.path == *path && v.line == line + 1 && v.rule.contains(rule)),
            "{path}: {code}: {found:?}"
        );
    }
    let without_doc = Source { path: "cli/mod.rs".into(), text: "use std::fmt;\n".into() };
    assert!(check(&without_doc).iter().any(|v| v.line == 1 && v.rule.contains("//!")));
    let long = Source { path: "cli/mod.rs".into(), text: "//! A doc.\n".repeat(LINES_MAX + 1) };
    assert!(check(&long).iter().any(|v| v.line == LINES_MAX + 1 && v.rule.contains("900 lines")));
}

#[test]
fn what_only_looks_like_a_violation_is_none() {
    let innocent: &[(&str, &str)] = &[
        ("wire/id.rs", "// std::fs, unsafe\n/* use mio; /* nested */ log::x */ fn f() {}"),
        ("wire/id.rs", "const A: &str = \"std::fs \\\" unsafe\"; const B: &str = r#\"log::a \" mio::b\"#;"),
        ("wire/id.rs", "fn f<'a>(a: &'a str) -> char { let _ = b'\\''; let _ = '\"'; '\\u{7f}' }"),
        ("wire/url.rs", "use std::net::{IpAddr, Ipv4Addr, SocketAddr};"),
        ("orchestratord/core.rs", "fn f() { let _ = fastrand::Rng::with_seed(1); catalog::log::x(); }"),
        ("orchestratord/core.rs", "#[cfg(test)]\n#[allow(dead_code)]\nmod tests { use std::fs; fn f() {} }"),
        ("orchestratord/core.rs", "#[cfg(test)]\nuse std::{fs, env};\nfn f() {}"),
        ("orchestratord/daemon.rs", "use std::{fs, env, thread}; fn f() { log::info!(\"\"); }"),
        ("orchestratord/service_registry/tests.rs", "use std::fs; use crate::pool_managerd;"),
        ("reactor/ready.rs", "use mio::Token;"),
        ("replicas/probing.rs", "use super::registry; pub(super) fn f() {}"),
    ];
    for (path, code) in innocent {
        let found = check(&Source { path: path.to_string(), text: format!("//! A doc.\n{code}\n") });
        assert!(found.is_empty(), "{path}: {code}: {found:?}");
    }
}

/// Every rule, held against one file.
fn check(source: &Source) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut broken = |line: usize, rule: String| {
        found.push(Violation { path: source.path.clone(), line, rule });
    };
    if !source.text.starts_with("//!") {
        broken(1, "begins without a module doc (//!)".into());
    }
    let lines = source.text.lines().count();
    if lines > LINES_MAX {
        broken(lines, format!("is longer than {LINES_MAX} lines: split it by subject"));
    }
    let room = room_of(&source.path);
    let all = tokens(&source.text);
    for token in all.iter().filter(|token| token.text == "unsafe") {
        broken(token.line, "unsafe code".into());
    }
    for (path, line) in paths(&all) {
        if begins(&path, "mio") && !MIO_ROOMS.contains(&room) {
            broken(line, "only reactor/ and net/ name mio".into());
        }
    }
    let Some(uses) = uses_of(room) else {
        broken(2, format!("unknown room {room}: say in tests/architecture.rs what it may use"));
        return found;
    };
    // A file of its own that holds tests; its parent includes it under `#[cfg(test)]`.
    if source.path.ends_with("/tests.rs") {
        return found;
    }
    let pure = is_pure(&source.path);
    for (path, line) in paths(&without_tests(&all)) {
        if let Some(target) = target_room(&path, &source.path) {
            match target {
                Err(rule) => broken(line, rule),
                Ok(target) if target == room || uses.contains(&target.as_str()) => {}
                Ok(target) if uses_of(&target).is_none() => {
                    broken(
                        line,
                        format!("unknown room {target}: say in tests/architecture.rs who may use it"),
                    );
                }
                Ok(target) => broken(line, format!("{room} may not use {target} ({path})")),
            }
        }
        if pure && let Some(why) = impure(&path) {
            broken(line, format!("a pure file {why}: {path}"));
        }
    }
    found
}

fn uses_of(room: &str) -> Option<&'static [&'static str]> {
    EDGES.iter().find(|(name, _)| *name == room).map(|(_, uses)| *uses)
}

/// The first directory below `src/`, or the file's own name there.
fn room_of(path: &str) -> &str {
    path.split('/').next().unwrap_or(path).trim_end_matches(".rs")
}

fn is_pure(path: &str) -> bool {
    let room = PURE_ROOMS.iter().find(|(room, _)| *room == room_of(path));
    room.is_some_and(|(_, shells)| !shells.contains(&path)) || PURE_FILES.contains(&path)
}

fn impure(path: &str) -> Option<&'static str> {
    let allowed = PURE_AFTER_ALL.iter().any(|good| begins(path, good))
        && !IMPURE_AFTER_ALL.iter().any(|bad| begins(path, bad));
    let why = IMPURE.iter().find(|(bad, _)| begins(path, bad)).map(|(_, why)| *why);
    why.filter(|_| !allowed)
}

/// Whether `path` is `prefix` or something within it.
fn begins(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// The room of this crate that a path leads to; an error for one that climbs out by `super`.
fn target_room(path: &str, file: &str) -> Option<Result<String, String>> {
    let mut parts = path.split("::");
    match parts.next()? {
        "crate" | "llama_orch" => {
            // `crate` alone, or `pub(in crate)`: nothing is reached.
            let target = parts.next()?;
            // An item of `lib.rs` itself would be no room; there is none.
            Some(Ok(target.to_string()))
        }
        "super" => {
            let climbs = 1 + parts.take_while(|part| *part == "super").count();
            let depth = file.trim_end_matches("/mod.rs").split('/').count();
            (climbs >= depth).then(|| Err(format!("{path} leaves its room by super: write crate:: instead")))
        }
        _ => None,
    }
}

fn read_sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut sources = Vec::new();
    read_directory(&root, &root, &mut sources);
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

fn read_directory(root: &Path, directory: &Path, sources: &mut Vec<Source>) {
    for entry in fs::read_dir(directory).expect("a directory of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            read_directory(root, &path, sources);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).expect("a source file is text");
            let path =
                path.strip_prefix(root).expect("below src").to_str().expect("a plain name").to_string();
            sources.push(Source { path, text });
        }
    }
}

/// A name, or one character of punctuation; `::` is one token.
#[derive(Clone, Debug)]
struct Token {
    text: String,
    line: usize,
}

/// The tokens of a source. Comments are left out, literals become nothing.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let (mut found, mut i, mut line) = (Vec::new(), 0, 1);
    while i < chars.len() {
        let start = i;
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= chars.len() {
                        break;
                    }
                }
            }
            '"' => i = end_of_text(&chars, i),
            // A character, or a lifetime.
            '\'' if at(i + 1) == '\\' => {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            '\'' if at(i + 2) == '\'' => i += 3,
            c if is_name(c) => {
                while is_name(at(i)) {
                    i += 1;
                }
                let name: String = chars[start..i].iter().collect();
                let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
                if matches!(name.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                    let end: String = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                    let rest: String = chars[i + hashes + 1..].iter().collect();
                    let body = rest.find(&end).map_or(rest.as_str(), |found| &rest[..found]);
                    i += 2 * hashes + 2 + body.chars().count();
                } else if !matches!((name.as_str(), at(i)), ("b" | "c", '"') | ("b", '\'')) {
                    found.push(Token { text: name, line });
                }
            }
            ':' if at(i + 1) == ':' => {
                found.push(Token { text: "::".into(), line });
                i += 2;
            }
            c => {
                if !c.is_whitespace() {
                    found.push(Token { text: c.to_string(), line });
                }
                i += 1;
            }
        }
        let end = i.min(chars.len());
        line += chars[start.min(end)..end].iter().filter(|c| **c == '\n').count();
    }
    found
}

/// The index behind a string that begins at `start`.
fn end_of_text(chars: &[char], start: usize) -> usize {
    let mut i = start + 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

/// The tokens without the items that stand under `#[cfg(test)]`.
fn without_tests(all: &[Token]) -> Vec<Token> {
    const CFG_TEST: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let (mut kept, mut i) = (Vec::new(), 0);
    while i < all.len() {
        let matches = all.len() >= i + CFG_TEST.len()
            && all[i..].iter().zip(CFG_TEST).all(|(token, wanted)| token.text == wanted);
        if matches {
            i = end_of_item(all, i);
        } else {
            kept.push(all[i].clone());
            i += 1;
        }
    }
    kept
}

/// The index behind an item whose first attribute begins at `start`.
fn end_of_item(all: &[Token], start: usize) -> usize {
    let text = |index: usize| all.get(index).map_or("", |token| token.text.as_str());
    let mut i = start;
    while text(i) == "#" {
        i = end_of_group(all, i + 1);
    }
    let is_statement = matches!(text(i), "use" | "const" | "static");
    while i < all.len() {
        match text(i) {
            ";" => return i + 1,
            "{" if !is_statement => return end_of_group(all, i),
            "{" | "(" | "[" => i = end_of_group(all, i),
            _ => i += 1,
        }
    }
    i
}

/// The index behind the bracket that closes the one at `start`.
fn end_of_group(all: &[Token], start: usize) -> usize {
    let mut depth = 0;
    for (i, token) in all.iter().enumerate().skip(start) {
        match token.text.as_str() {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    all.len()
}

/// Every path that is written, with groups of imports expanded, and the line of its last part.
fn paths(all: &[Token]) -> Vec<(String, usize)> {
    let (mut found, mut i) = (Vec::new(), 0);
    while i < all.len() {
        i = match is_word(&all[i]) {
            true => path(all, i, "", &mut found),
            false => i + 1,
        };
    }
    found
}

fn is_word(token: &Token) -> bool {
    token.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// Reads one path that begins at `start` below `prefix`; returns the index behind it.
fn path(all: &[Token], start: usize, prefix: &str, found: &mut Vec<(String, usize)>) -> usize {
    let text = |index: usize| all.get(index).map_or("", |token| token.text.as_str());
    let mut whole = if prefix.is_empty() { text(start).into() } else { format!("{prefix}::{}", text(start)) };
    let (mut i, mut line) = (start + 1, all[start].line);
    while text(i) == "::" {
        i += 1;
        match all.get(i) {
            Some(next) if is_word(next) => {
                whole = format!("{whole}::{}", next.text);
                line = next.line;
                i += 1;
            }
            Some(next) if next.text == "{" => {
                let end = end_of_group(all, i);
                i += 1;
                while i + 1 < end {
                    i = if is_word(&all[i]) { path(all, i, &whole, found) } else { i + 1 };
                    // `a as b`: the second name is no path.
                    i += 2 * usize::from(text(i) == "as");
                }
                return end;
            }
            _ => break,
        }
    }
    found.push((whole, line));
    i
}
