//! What operators watch: the table of metrics against what the daemons show, `promtool` on both and on the
//! alerts, and a real Prometheus that scrapes them with the configuration that is shipped.
//!
//! Without `promtool` and `prometheus` their parts are skipped with a message, unless `REQUIRE_PROMTOOL=1`
//! asks for them.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "daemons/harness.rs"]
mod harness;
mod tls_support;

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::*;
use serde_json::Value;
use tls_support::{Pki, Socket};

/// Longest that a Prometheus may take to start, scrape and evaluate on a machine that has other work.
const PROMETHEUS_PATIENCE: Duration = Duration::from_secs(120);

fn packaging(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging").join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(packaging(path)).unwrap_or_else(|error| panic!("packaging/{path}: {error}"))
}

/// A program, if it is there. Fails where it must be.
#[allow(clippy::print_stdout, reason = "a test that is skipped says so")]
fn program(name: &str) -> Option<Command> {
    let is_there = Command::new(name).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if is_there.is_ok_and(|status| status.success()) {
        return Some(Command::new(name));
    }
    assert!(env::var("REQUIRE_PROMTOOL").is_err(), "{name} is missing");
    println!("skipped: there is no {name}");
    None
}

/// Labels of a family, with the values that were seen.
type Labels = BTreeMap<String, BTreeSet<String>>;

/// A family as a scrape shows it.
#[derive(Debug, Default, PartialEq)]
struct Family {
    kind: String,
    help: String,
    labels: Labels,
}

/// Families of a scrape by name.
fn families(scrape: &str) -> BTreeMap<String, Family> {
    let mut found: BTreeMap<String, Family> = BTreeMap::new();
    for line in scrape.lines() {
        if let Some((name, help)) = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' ')) {
            found.entry(name.into()).or_default().help = help.into();
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            found.entry(name.into()).or_default().kind = kind.into();
        } else if let Some((name, rest)) = line.split_once('{') {
            let Some(family) = found.get_mut(name) else { continue };
            let labels = rest.rsplit_once('}').expect("labels end").0;
            for pair in labels.split("\",") {
                let (label, value) = pair.split_once("=\"").expect("a label has a value");
                let values = family.labels.entry(label.into()).or_default();
                values.insert(value.trim_end_matches('"').into());
            }
        }
    }
    found
}

/// Rows of the table by name.
fn rows() -> BTreeMap<String, Family> {
    let table = text("METRICS.md");
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    let mut found = BTreeMap::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, help] = cells[..] else { panic!("four cells: {row}") };
        let labels = labels.split(';').map(str::trim).filter(|label| !label.is_empty()).map(|label| {
            let (name, values) = label.split_once(": ").unwrap_or((label, ""));
            let values = values.split(", ").filter(|value| !value.is_empty()).map(str::to_string);
            (name.trim_matches('`').to_string(), values.collect())
        });
        let family = Family { kind: kind.into(), help: help.into(), labels: labels.collect() };
        let earlier = found.insert(name.trim_matches('`').to_string(), family);
        assert!(earlier.is_none(), "two rows for {name}");
    }
    found
}

/// A control plane and an agent that serves one engine, and has answered a request.
struct Pair {
    directory: tempfile::TempDir,
    control: u16,
    agent: u16,
    _processes: [Process; 3],
}

fn pair() -> Pair {
    let directory = tempfile::tempdir().expect("a directory");
    let (control, agent, engine) = (free_port(), free_port(), free_port());
    let (control_addr, agent_addr) = (format!("127.0.0.1:{control}"), format!("127.0.0.1:{agent}"));
    let control_url = format!("http://{control_addr}");
    let orchestratord =
        Process::start(ORCHESTRATORD, &["--cloud-profile", "--addr", &control_addr], &[], directory.path());
    let pool_managerd = Process::start(
        POOL_MANAGERD,
        &["--cloud-profile", "--addr", &agent_addr, "--orchestratord-url", &control_url],
        &[("POOL_MANAGERD_STATE_DIR", "agent")],
        directory.path(),
    );
    let engine_process = demo_engine(engine, &[], directory.path());
    until("the agent", || get(agent, "/ready").filter(|answer| answer.status == 200));
    hand_over(&directory.path().join(".runtime/engines"), "r0.json", &handoff(engine, "r0", 2));
    until("a replica", || metric(control, "orchestratord_replicas_routable").filter(|count| *count == 1.0));
    let body = r#"{"messages":[{"role":"user","content":"Hello"}],"max_tokens":2}"#;
    assert_eq!(post(control, "/v1/chat/completions", body).status, 200);
    Pair { directory, control, agent, _processes: [orchestratord, pool_managerd, engine_process] }
}

/// The metrics of a daemon that speaks TLS, which has some more.
fn scrape_over_tls(daemon: &str, prefix: &str) -> String {
    let directory = tempfile::tempdir().expect("a directory");
    let pki = Pki::new();
    let (cert, key) = pki.issue(&["localhost"]).save(directory.path(), "own");
    let port = free_port();
    let addr = format!("127.0.0.1:{port}");
    let cert_variable = format!("{prefix}_TLS_CERT");
    let key_variable = format!("{prefix}_TLS_KEY");
    let env = [
        (cert_variable.as_str(), cert.to_str().expect("UTF-8")),
        (key_variable.as_str(), key.to_str().expect("UTF-8")),
    ];
    let _daemon = Process::start(daemon, &["--addr", &addr], &env, directory.path());
    let config = pki.client(None);
    until("metrics over TLS", || {
        let tcp = TcpStream::connect(("127.0.0.1", port)).ok()?;
        tcp.set_read_timeout(Some(PATIENCE)).ok()?;
        let mut socket = Socket::client(tcp, "localhost", &config);
        socket.handshake().ok()?;
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").ok()?;
        let mut text = String::new();
        socket.read_to_string(&mut text).ok()?;
        text.split_once("\r\n\r\n").map(|(_, body)| body.to_string())
    })
}

#[test]
fn every_metric_is_in_the_table_and_no_other() {
    let pair = pair();
    let mut shown = families(&scrape_over_tls(ORCHESTRATORD, "ORCHESTRATORD"));
    shown.extend(families(&scrape_over_tls(POOL_MANAGERD, "POOL_MANAGERD")));
    for port in [pair.control, pair.agent] {
        for (name, family) in families(&get(port, "/metrics").expect("metrics").body) {
            let merged = shown.entry(name).or_default();
            merged.kind.clone_from(&family.kind);
            merged.help.clone_from(&family.help);
            for (label, values) in family.labels {
                merged.labels.entry(label).or_default().extend(values);
            }
        }
    }
    let rows = rows();
    let of = |families: &BTreeMap<String, Family>| families.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(
        of(&rows),
        of(&shown),
        "packaging/METRICS.md (left) has other metrics than the daemons (right)"
    );
    for (name, shown) in shown {
        let row = &rows[&name];
        assert_eq!(row.kind, shown.kind, "{name}");
        let help = shown.help.trim_end_matches('.');
        assert!(row.help.starts_with(help), "{name}: {:?} is not what the daemon says: {help}", row.help);
        for (label, values) in shown.labels {
            // A label without values in the table has others on each machine.
            let told = row.labels.get(&label);
            let is_told = match &told {
                Some(told) => told.is_empty() || values.is_subset(told),
                None => label == "le",
            };
            assert!(is_told, "{name}: the table says of {label} {told:?}, the daemon shows {values:?}");
        }
    }
}

#[test]
fn what_alerts_and_dashboard_ask_for_exists() {
    let rows = rows();
    for file in ["monitoring/alerts.yml", "monitoring/dashboard.json"] {
        let text = text(file);
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let mut asked = 0;
        for word in words {
            let is_metric = word.starts_with("orchestratord_") || word.starts_with("pool_managerd_");
            if !is_metric {
                continue;
            }
            asked += 1;
            let family = ["_bucket", "_sum", "_count"]
                .iter()
                .filter_map(|suffix| word.strip_suffix(suffix))
                .find(|family| rows.get(*family).is_some_and(|row| row.kind == "histogram"));
            assert!(rows.contains_key(family.unwrap_or(word)), "{file} asks for {word}");
        }
        assert!(asked > 10, "{file}: {asked}");
    }
    let dashboard: Value = serde_json::from_str(&text("monitoring/dashboard.json")).expect("JSON");
    assert_eq!(dashboard["templating"]["list"][0]["type"], "datasource");
    for panel in dashboard["panels"].as_array().expect("panels") {
        if panel["type"] != "row" {
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{}", panel["title"]);
        }
    }
}

#[test]
fn promtool_finds_nothing_to_say() {
    let Some(_) = program("promtool") else { return };
    let pair = pair();
    for port in [pair.control, pair.agent] {
        let metrics = get(port, "/metrics").expect("metrics").body;
        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool starts");
        promtool.stdin.take().expect("a pipe").write_all(metrics.as_bytes()).expect("written");
        let output = promtool.wait_with_output().expect("promtool ends");
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.trim().is_empty(), "{said}");
    }
    for words in [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ] {
        let output = Command::new("promtool")
            .args(words)
            .current_dir(packaging("monitoring"))
            .output()
            .expect("promtool runs");
        assert!(
            output.status.success(),
            "{words:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let tested = text("monitoring/alerts_test.yml");
    for line in text("monitoring/alerts.yml").lines() {
        if let Some(alert) = line.trim_start().strip_prefix("- alert: ") {
            assert!(tested.contains(&format!("alertname: {alert}\n")), "no test of {alert}");
        }
    }
}

#[test]
fn a_prometheus_scrapes_both_daemons_as_configured() {
    let Some(mut prometheus) = program("prometheus") else { return };
    let pair = pair();
    let directory = pair.directory.path();
    let config = text("monitoring/prometheus.yml")
        .replace("127.0.0.1:8080", &format!("127.0.0.1:{}", pair.control))
        .replace("127.0.0.1:9200", &format!("127.0.0.1:{}", pair.agent))
        .replace(": 15s", ": 1s");
    fs::write(directory.join("prometheus.yml"), config).expect("written");
    fs::copy(packaging("monitoring/alerts.yml"), directory.join("alerts.yml")).expect("copied");
    let port = free_port();
    let mut child = prometheus
        .args(["--config.file=prometheus.yml", "--storage.tsdb.path=tsdb", "--log.level=error"])
        .arg(format!("--web.listen-address=127.0.0.1:{port}"))
        .current_dir(directory)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("prometheus starts");
    let begun = Instant::now();
    let wanted = [
        ("up%7Bjob%3D%22orchestratord%22%7D", 1.0),
        ("up%7Bjob%3D%22pool-managerd%22%7D", 1.0),
        ("sum(orchestratord_requests_total%7Boutcome%3D%22answered%22%7D)", 1.0),
        ("sum(pool_managerd_pool_slots)", 2.0),
        ("histogram_quantile(0.5,orchestratord_request_seconds_bucket)%3E%3Dbool%200", 1.0),
        ("count(ALERTS%7Balertstate%3D%22firing%22%7D)%20or%20vector(0)", 0.0),
    ];
    let mut seen = Vec::new();
    while begun.elapsed() < PROMETHEUS_PATIENCE {
        seen = wanted.iter().map(|(query, _)| value(port, query)).collect();
        if seen.iter().zip(&wanted).all(|(seen, (_, value))| *seen == Some(*value)) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = child.kill();
    let _ = child.wait();
    for ((query, value), seen) in wanted.iter().zip(seen) {
        assert_eq!(seen, Some(*value), "{query}");
    }
}

/// The first value of an instant query.
fn value(port: u16, query: &str) -> Option<f64> {
    let answer = get(port, &format!("/api/v1/query?query={query}"))?;
    let json: Value = serde_json::from_str(&answer.body).ok()?;
    json["data"]["result"][0]["value"][1].as_str()?.parse().ok()
}
