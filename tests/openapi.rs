//! The OpenAPI documents: they say of every route what the daemons' own tables say, and the daemons keep to
//! what they say.
//!
//! The second part is opt-in, because it fetches schemathesis from PyPI: `REQUIRE_SCHEMATHESIS=1 cargo test
//! --test openapi`. Without the variable it says that it was skipped.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use harness::*;
use llama_orch::service::auth::Policy;
use llama_orch::service::routes::{ANY_METHOD, Route};
use serde_json::Value;

/// The version that is fetched: another one may ask for more.
const PACKAGE: &str = "schemathesis==4.32.5";
/// What is held against the documents.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
                      response_schema_conformance,response_headers_conformance";
/// Methods that a document may name.
const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

fn document(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/openapi").join(format!("{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).expect("a document")).expect("JSON")
}

/// A route's path as a document writes it.
fn template(path: &str) -> String {
    path.replace("...}", "}")
}

/// The schemes of which any opens a route.
fn schemes(policy: Policy) -> BTreeSet<&'static str> {
    use llama_orch::service::auth::Scope;
    if policy.is_open() {
        return BTreeSet::new();
    }
    let name = |scope: &Scope| match scope {
        Scope::Client => "clientToken",
        Scope::Node => "nodeToken",
        Scope::Admin => "adminToken",
    };
    Scope::ALL.iter().filter(|scope| policy.admits(**scope)).map(name).collect()
}

/// Every reference leads somewhere.
fn check_references(value: &Value, root: &Value) {
    match value {
        Value::Object(fields) => {
            if let Some(Value::String(target)) = fields.get("$ref") {
                let pointer = target.strip_prefix('#').expect("a reference within the document");
                assert!(root.pointer(pointer).is_some(), "{target} leads nowhere");
            }
            fields.values().for_each(|value| check_references(value, root));
        }
        Value::Array(list) => list.iter().for_each(|value| check_references(value, root)),
        _ => {}
    }
}

fn check<E>(name: &str, routes: &[Route<E>]) {
    let document = document(name);
    assert_eq!((&document["openapi"], &document["info"]["title"]), (&"3.1.0".into(), &name.into()));
    check_references(&document, &document);
    let mut documented: BTreeMap<(String, String), &Value> = BTreeMap::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            assert!(METHODS.contains(&method.as_str()), "{name}: {method} {path}");
            documented.insert((path.clone(), method.clone()), operation);
        }
    }
    let (mut ids, mut expected) = (BTreeSet::new(), BTreeSet::new());
    for route in routes {
        let methods = match route.method {
            ANY_METHOD => METHODS.map(str::to_string).to_vec(),
            method => vec![method.to_lowercase()],
        };
        for method in methods {
            let what = format!("{name}: {method} {}", route.path);
            let key = (template(route.path), method);
            let operation = *documented.get(&key).unwrap_or_else(|| panic!("{what} is not documented"));
            expected.insert(key);
            let id = operation["operationId"].as_str().expect("an id").to_string();
            assert!(ids.insert(id), "{what}: its id is another one's");
            assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{what}");
            let security = operation["security"].as_array().expect("who may call it");
            let named: BTreeSet<&str> = security
                .iter()
                .flat_map(|any| any.as_object().expect("schemes").keys().map(String::as_str))
                .collect();
            assert_eq!(named, schemes(route.policy), "{what}: who may call it");
            let statuses: Vec<&str> =
                operation["responses"].as_object().expect("answers").keys().map(String::as_str).collect();
            for (status, wanted) in [
                ("401", !route.policy.is_open()),
                ("403", !route.policy.is_open()),
                ("421", route.policy != Policy::Public),
            ] {
                assert_eq!(statuses.contains(&status), wanted, "{what}: {status} in {statuses:?}");
            }
            assert!(statuses.iter().any(|status| status.starts_with('2')), "{what}: {statuses:?}");
            let wanted: BTreeSet<String> = route
                .path
                .split('/')
                .filter(|part| part.starts_with('{'))
                .map(|part| part.trim_matches(['{', '}']).trim_end_matches("...").to_string())
                .collect();
            let parameters = operation["parameters"].as_array().map(Vec::as_slice).unwrap_or_default();
            let found: BTreeSet<String> = parameters
                .iter()
                .filter(|parameter| parameter["in"] == "path")
                .map(|parameter| parameter["name"].as_str().expect("a name").to_string())
                .collect();
            assert_eq!(found, wanted, "{what}: the parts of its path");
        }
    }
    let invented: Vec<_> = documented.keys().filter(|key| !expected.contains(key)).collect();
    assert!(invented.is_empty(), "{name} has no such routes: {invented:?}");
}

#[test]
fn every_route_is_documented_and_none_is_invented() {
    check("orchestratord", llama_orch::orchestratord::api::ROUTES);
    check("pool-managerd", llama_orch::pool_managerd::api::ROUTES);
}

#[test]
fn both_daemons_show_their_document_to_whoever_may_call_anything() {
    let home = Home::start(&[("LLORCH_API_TOKEN", "a-token-0123456789abcdef0123456789abcdef")]);
    let ask = |token: Option<&str>| ask(home.port, "GET", "/openapi.json", token, "").expect("an answer");
    assert_eq!(ask(None).status, 401);
    let shown = ask(Some("a-token-0123456789abcdef0123456789abcdef"));
    assert_eq!((shown.status, shown.json()), (200, document("orchestratord")));
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let addr = format!("127.0.0.1:{port}");
    let _agent = Process::start(POOL_MANAGERD, &[], &[("POOL_MANAGERD_ADDR", &addr)], directory.path());
    let shown = until("the agent", || get(port, "/v2/openapi.json").filter(|answer| answer.status == 200));
    assert_eq!(shown.json(), document("pool-managerd"));
}

/// The schemathesis to run, installed by the first test that asks; `None` where it was not asked for.
fn schemathesis() -> Option<PathBuf> {
    static INSTALLED: OnceLock<Option<PathBuf>> = OnceLock::new();
    INSTALLED.get_or_init(install_schemathesis).clone()
}

#[allow(clippy::print_stderr, reason = "a skipped test has to say so")]
fn install_schemathesis() -> Option<PathBuf> {
    if std::env::var_os("REQUIRE_SCHEMATHESIS").is_none_or(|value| value != "1") {
        eprintln!("skipped: set REQUIRE_SCHEMATHESIS=1 to fetch schemathesis and test with it");
        return None;
    }
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("schemathesis");
    fs::create_dir_all(&root).expect("a directory");
    let run = |program: &Path, args: &[&str]| {
        let status = Command::new(program).args(args).current_dir(&root).status().expect("it runs");
        assert!(status.success(), "{program:?} {args:?}: {status}");
    };
    let python = root.join("venv/bin/python");
    if !python.exists() {
        run(Path::new("python3"), &["-m", "venv", "venv"]);
    }
    let program = root.join("venv/bin/schemathesis");
    let has = |program: &Path| {
        let version = Command::new(program).arg("--version").output();
        let wanted = PACKAGE.rsplit('=').next().unwrap_or_default();
        version.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim_end().ends_with(wanted))
    };
    if !has(&program) {
        run(&python, &["-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE]);
    }
    Some(program)
}

/// Asks a daemon what its document allows and what it forbids, always the same, below paths that begin as
/// `paths` says. No fault of its own are 501, for TRACE; 503, which says that something is not there now; and
/// 504, where the client itself gave it a millisecond.
fn hold_against(program: &Path, name: &str, paths: &str, url: &str, directory: &Path) {
    let expected = r#"["2xx", "3xx", "4xx", "501", "503", "504"]"#;
    let config = format!("[checks]\nnot_a_server_error.expected-statuses = {expected}\n");
    let file = directory.join("schemathesis.toml");
    fs::write(&file, config).expect("written");
    let document =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/openapi").join(format!("{name}.json"));
    let output = Command::new(program)
        .arg("--config-file")
        .arg(&file)
        .arg("run")
        .arg(document)
        .args(["--url", url, "--checks", CHECKS, "--phases", "examples,coverage,fuzzing"])
        .args(["--max-examples", "10", "--seed", "7", "--generation-deterministic", "--workers", "1"])
        // A stream without an end has no place here.
        .args(["--exclude-path", "/v2/dashboard/events", "--include-path-regex", paths])
        .args(["--request-timeout", "60", "--suppress-health-check", "all", "--continue-on-failure"])
        .args(["--no-color", "--warnings", "off"])
        .current_dir(directory)
        .output()
        .expect("schemathesis runs");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} does not keep to its document:\n{said}");
    assert!(said.contains("Test cases") || said.contains("generated"), "nothing was asked:\n{said}");
}

#[test]
fn the_control_plane_keeps_to_its_document() {
    let Some(program) = schemathesis() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let port = free_port();
    let addr = format!("127.0.0.1:{port}");
    let env = [
        ("ORCHESTRATORD_ADDR", addr.as_str()),
        ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
        // What waits for an engine that is not there waits for nothing.
        ("ORCHD_ADMISSION_TIMEOUT_MS", "50"),
        ("ORCHESTRATORD_FIRST_BYTE_TIMEOUT_MS", "5000"),
    ];
    let daemon = Process::start(ORCHESTRATORD, &[], &env, directory.path());
    until("the daemon", || get(port, "/ready").filter(|answer| answer.status == 200));
    hold_against(&program, "orchestratord", "^/", &format!("http://{addr}"), directory.path());
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

#[test]
fn a_control_plane_with_engines_keeps_to_its_document() {
    let Some(program) = schemathesis() else { return };
    let home = Home::start(&[("ORCHD_ADMISSION_TIMEOUT_MS", "500")]);
    let port = free_port();
    let _engine =
        demo_engine(port, &["--tokens-per-second", "0", "--prefill-ms", "0"], home.directory.path());
    hand_over(&home.engines(), "pool-0-r0.json", &handoff(port, "r0", 4));
    home.until_routable(1.0);
    let url = format!("http://127.0.0.1:{}", home.port);
    let paths = "^/(v1|v2/(tasks|sessions|pools|handoffs|explain))(/|$)";
    hold_against(&program, "orchestratord", paths, &url, home.directory.path());
    assert!(!home.daemon.log().contains("panicked"), "{}", home.daemon.log());
}

#[test]
fn the_agent_keeps_to_its_document() {
    let Some(program) = schemathesis() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let (port, engine_port) = (free_port(), free_port());
    let addr = format!("127.0.0.1:{port}");
    let _engine = demo_engine(engine_port, &["--tokens-per-second", "0"], directory.path());
    let agent = Process::start(POOL_MANAGERD, &[], &[("POOL_MANAGERD_ADDR", &addr)], directory.path());
    let engines = directory.path().join(".runtime/engines");
    hand_over(&engines, "pool-0-r0.json", &handoff(engine_port, "r0", 4));
    until("the pool", || {
        get(port, "/v2/pools/pool-0/status").filter(|answer| answer.json()["ready"] == true)
    });
    hold_against(&program, "pool-managerd", "^/", &format!("http://{addr}/v2"), directory.path());
    assert!(!agent.log().contains("panicked"), "{}", agent.log());
}
