//! The manual pages against the programs: every flag and every variable of `--help` is in its page, and no
//! page has others; `mandoc` finds nothing to warn of; the examples that need no installation run.
//!
//! Without `mandoc` its part is skipped with a message, unless `REQUIRE_MANDOC=1` asks for it.

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const DAEMONS: &[(&str, &str)] = &[
    (env!("CARGO_BIN_EXE_orchestratord"), "orchestratord.8"),
    (env!("CARGO_BIN_EXE_pool-managerd"), "pool-managerd.8"),
];
const PROVISIONER: &str = env!("CARGO_BIN_EXE_engine-provisioner");
const LLORCH: &str = env!("CARGO_BIN_EXE_llorch");
const PAGES: &[&str] =
    &["engine-provisioner.8", "llama-orch-handoff.5", "llorch.1", "orchestratord.8", "pool-managerd.8"];

fn page(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("man").join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(page(name)).unwrap_or_else(|error| panic!("man/{name}: {error}"))
}

fn help(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).arg("--help").output().expect("it runs");
    assert!(output.status.success(), "{program} {words:?}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Flags of a help text, without those that every program has, and variables.
fn of_help(help: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let word = |text: &str| -> String {
        text.chars().take_while(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).collect()
    };
    let flags = help.lines().filter_map(|line| {
        let line = line.trim_start().trim_start_matches("-h, ").trim_start_matches("-V, ");
        line.strip_prefix("--").map(word)
    });
    let flags = flags.filter(|flag| !matches!(flag.as_str(), "" | "help" | "version")).collect();
    let variables = help.split("[env: ").skip(1).map(word).collect();
    (flags, variables)
}

/// Flags that a page explains, and variables that it names.
fn of_page(page: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let flags = page
        .lines()
        .filter_map(|line| line.strip_prefix(".It Fl -")?.split(' ').next())
        .map(str::to_string)
        .collect();
    let variables = page
        .lines()
        .filter(|line| line.starts_with(".Ev ") || line.starts_with(".It Ev "))
        .flat_map(|line| line.split(' '))
        .filter(|word| word.len() > 2 && word.bytes().all(|b| b.is_ascii_uppercase() || b == b'_'))
        .map(str::to_string)
        .collect();
    (flags, variables)
}

#[test]
fn every_flag_and_variable_is_in_its_page_and_no_other() {
    for (program, name) in DAEMONS {
        let (flags, variables) = of_help(&help(program, &[]));
        let (told, named) = of_page(&text(name));
        assert!(flags.len() > 5, "{name}: {flags:?}");
        assert_eq!(told, flags, "man/{name} (left) has other flags than --help (right)");
        let missing: Vec<&String> = variables.difference(&named).collect();
        assert!(missing.is_empty(), "man/{name} does not name {missing:?}");
    }
}

/// A command's section of a page.
fn section<'a>(page: &'a str, program: &str, command: &str) -> &'a str {
    let start = format!(".Ss {program} ");
    let found = page.split(&start).find(|section| section.lines().next() == Some(command));
    let section = found.unwrap_or_else(|| panic!("no section on {program} {command}"));
    section.split("\n.Sh ").next().expect("a section").split("\n.Ss ").next().expect("a section")
}

#[test]
fn every_command_of_the_provisioner_is_in_its_page_with_its_flags() {
    let page = text("engine-provisioner.8");
    // `plan` and `check` share the section of `up`.
    for (command, words) in [
        ("run", &["run"][..]),
        ("run", &[]),
        ("up", &["up"]),
        ("up", &["plan"]),
        ("up", &["check"]),
        ("models", &["models", "ls"]),
        ("build", &["build"]),
    ] {
        let (flags, variables) = of_help(&help(PROVISIONER, words));
        let (told, named) = of_page(section(&page, "engine-provisioner", command));
        assert!(flags.len() > 5, "{words:?}: {flags:?}");
        assert_eq!(told, flags, "{words:?}: the page (left) has other flags than --help (right)");
        let missing: Vec<&String> = variables.difference(&named).collect();
        assert!(missing.is_empty(), "{words:?}: the page does not name {missing:?}");
    }
}

#[test]
fn every_command_of_llorch_is_in_its_page_with_its_flags() {
    let whole = help(LLORCH, &[]);
    let commands = whole.split("Commands:").nth(1).expect("a list").lines().skip(1);
    let commands: Vec<&str> = commands
        .take_while(|line| line.starts_with("  "))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(commands.len() > 10, "{commands:?}");
    let page = text("llorch.1");
    for command in commands {
        let section = section(&page, "llorch", command);
        assert!(page.contains(&format!("\n.Cm {command}\n")), "{command} is not in the synopsis");
        // The flags of `models` are those of its actions.
        let words = if command == "models" { vec![command, "ls"] } else { vec![command] };
        let (flags, variables) = of_help(&help(LLORCH, &words));
        let (told, named) = of_page(section);
        assert_eq!(told, flags, "llorch {command}: the page (left) has other flags than --help (right)");
        let missing: Vec<&String> = variables.difference(&named).collect();
        assert!(missing.is_empty(), "llorch {command}: the page does not name {missing:?}");
    }
}

#[test]
fn every_field_of_a_handoff_is_in_its_page() {
    let page = text("llama-orch-handoff.5");
    let all = r#"{"url":"http://127.0.0.1:1","slots":2,"device_mask":"0","engine_version":"1","models":["a"],
        "model_bytes":1,"pid":1,"pid_start":1,"boot_id":"b","pid_ns":1,"auth":{"file":"/k"}}"#;
    let parsed = llama_orch::wire::handoff::parse(all.as_bytes()).expect("a handoff");
    let llama_orch::wire::handoff::HandoffFile::Engine(handoff) = parsed else { panic!("it has a URL") };
    for field in handoff.to_value().as_object().expect("an object").keys() {
        assert!(
            page.lines().any(|line| line.starts_with(".") && line.contains(&format!("Va {field}"))),
            "{field}"
        );
    }
    // Its example is a handoff.
    let example =
        page.split("Bd -literal -offset indent\n").nth(1).and_then(|rest| rest.split("\n.Ed").next());
    let example = example.expect("an example");
    assert!(llama_orch::wire::handoff::parse(example.as_bytes()).is_ok(), "{example}");
}

#[test]
fn mandoc_finds_nothing_to_warn_of() {
    let lint = |name: &str| Command::new("mandoc").args(["-T", "lint", "-W", "all"]).arg(page(name)).output();
    if lint("llorch.1").is_err() {
        let required = env::var_os("REQUIRE_MANDOC").is_some_and(|value| !value.is_empty());
        assert!(!required, "REQUIRE_MANDOC is set, and there is no mandoc: apt-get install mandoc");
        return skip("there is no mandoc; apt-get install mandoc, or set REQUIRE_MANDOC=1 to insist");
    }
    for name in PAGES {
        let output = lint(name).expect("it runs");
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        // Pages that are not installed yet are not found.
        let told: Vec<&str> =
            told.lines().filter(|line| !line.contains("referenced manual not found")).collect();
        assert!(told.is_empty(), "{told:#?}");
    }
    let shipped = fs::read_dir(page("")).expect("the pages").count();
    assert_eq!(shipped, PAGES.len(), "a page that no test knows");
}

#[allow(clippy::print_stderr, reason = "who reads the test's output should know that this did not run")]
fn skip(why: &str) {
    eprintln!("skipped: {why}");
}

#[test]
fn examples_of_the_daemons_are_configurations_that_start() {
    let directory = tempfile::tempdir().expect("a directory");
    let token = directory.path().join("token");
    fs::write(&token, "0123456789012345678901234567890123456789012\n").expect("written");
    for (program, name) in DAEMONS {
        let examples = text(name).split(".Sh EXAMPLES").nth(1).expect("examples").to_string();
        // The block of variables, as a shell would set them.
        let block = examples.split("-offset indent\n").nth(1).and_then(|rest| rest.split("\n.Ed").next());
        let variables = block
            .expect("a block")
            .replace("\\e\n", " ")
            .replace("/etc/llama-orch/token", &token.display().to_string());
        let variables: Vec<(&str, &str)> =
            variables.split_whitespace().filter_map(|word| word.split_once('=')).collect();
        assert!(variables.len() >= 3, "{variables:?}");
        let output = Command::new(program)
            .arg("--check-config")
            .envs(variables)
            .current_dir(directory.path())
            .output()
            .expect("it runs");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}
