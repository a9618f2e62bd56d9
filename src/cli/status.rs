//! `llorch status`: what a daemon knows, in tables: nodes, pools, replicas, GPUs, queue.
//!
//! It asks either daemon: a control plane about its nodes, an agent about its machine.

use std::ffi::OsString;

use serde_json::{Value, json};

use crate::reactor;
use crate::service::credentials;
use crate::settings::{Exit, Setting, Settings, Words, boolean, flag, number};

use super::remote::{self, Remote, Service};
use super::table::{Cell, Column, Table};
use super::terminal::{Interrupt, Picture, Screen, Tone, clean, wrapped};

/// Models that a cell names; more are counted.
const MODELS_NAMED: usize = 2;
/// Width of a bar, in characters.
const BAR: usize = 10;

pub(super) static TABLE: &[Setting] = &[
    remote::URL,
    credentials::API_TOKEN,
    credentials::API_TOKEN_FILE,
    credentials::ADMIN_TOKEN,
    credentials::ADMIN_TOKEN_FILE,
    remote::TLS_CA,
    remote::TLS_CERT,
    remote::TLS_KEY,
    remote::TIMEOUT,
    flag("json", Some("false"), "BOOL", "One JSON object: the daemon's own answers"),
    flag("watch", Some("false"), "BOOL", "Show it again and again, until Ctrl-C"),
    flag("interval-ms", Some("1000"), "MS", "How often with --watch; 100 to 3600000"),
];
pub(super) const ABOUT: &str = "Show nodes, pools, replicas, slots, GPUs and the queue";

/// Runs `llorch status`.
pub(super) fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let settings = Settings::read_words("llorch status", ABOUT, TABLE, Words::None, args, |name| {
        std::env::var_os(name)
    })?;
    let remote = Remote::from_settings(&settings)?;
    let as_json = settings.need("json", boolean)?;
    let interval_ms = settings.need("interval-ms", number(100, 3_600_000))?;
    if !settings.need("watch", boolean)? {
        let status = ask(&remote)?;
        Screen::new().write(&shown(&status, as_json, &remote, &Screen::new()));
        return Ok(());
    }
    // A daemon that is not there at the start is more likely a wrong URL than one that restarts.
    let mut status = ask(&remote);
    status.as_ref().map_err(Clone::clone)?;
    let interrupt = Interrupt::watch()?;
    let picture = (!as_json).then(|| Picture::begin(Screen::new()));
    loop {
        let screen = Screen::new();
        let text = match &status {
            Ok(status) => shown(status, as_json, &remote, &screen),
            Err(exit) => wrapped(&exit.message, screen.width).join("\n") + "\n",
        };
        let is_read = match &picture {
            Some(picture) => picture.draw(&text),
            None => screen.write(&text),
        };
        if !is_read || interrupt.pause(interval_ms) {
            return Ok(());
        }
        status = ask(&remote);
    }
}

fn shown(status: &Value, as_json: bool, remote: &Remote, screen: &Screen) -> String {
    match as_json {
        true => format!("{status}\n"),
        false => text(status, &remote.url().to_string(), reactor::now().wall.unix_ms(), screen),
    }
}

/// Everything that is shown, as one object.
fn ask(remote: &Remote) -> Result<Value, Exit> {
    let (service, version) = remote.service()?;
    let ready = remote.ask("GET", "/ready", None)?.1;
    let mut status = json!({"url": remote.url(), "version": version, "ready": ready["ready"],
        "not_ready_because": ready["reason"]});
    match service {
        Service::ControlPlane => {
            status["service"] = json!("orchestratord");
            status["pools"] = Value::Array(remote.list("/v2/pools", "pools")?);
            // In the HOME profile there are none, and the pools name the only machine.
            status["nodes"] = match remote.list("/v2/nodes", "nodes") {
                Ok(nodes) => Value::Array(nodes),
                Err(exit) if exit.code == remote::EXIT_REFUSED => json!([]),
                Err(exit) => return Err(exit),
            };
            let metrics = remote.ask("GET", "/metrics", None)?.1;
            let metric = |name: &str| value_of(metrics.as_str().unwrap_or(""), name);
            status["queue"] = json!({
                "running": metric("orchestratord_requests_in_flight"),
                "waiting": metric("orchestratord_requests_waiting"),
            });
        }
        Service::Agent => {
            let report = remote.get("/v2/pools")?;
            status["service"] = json!("pool-managerd");
            status["node"] = report;
            status["gpus"] = remote.get("/v2/gpus")?;
            status["handoffs"] = remote.get("/v2/handoffs")?;
            status["drains"] = remote.get("/v2/drains")?["drains"].take();
        }
    }
    Ok(status)
}

/// A metric without labels; null where there is none, as where they are closed.
fn value_of(metrics: &str, name: &str) -> Value {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|number| number.trim().parse::<f64>().ok()).map_or(Value::Null, |n| json!(n as u64))
}

fn text(status: &Value, url: &str, now_ms: u64, screen: &Screen) -> String {
    let mut text = String::new();
    let service = words(&status["service"]);
    let (tone, state) = match status["ready"].as_bool() {
        Some(true) => (Tone::Good, "ready".to_string()),
        _ => (Tone::Bad, format!("not ready: {}", words(&status["not_ready_because"]))),
    };
    text.push_str(&format!(
        "{} {} at {url}: {}\n",
        screen.paint(Tone::Strong, &service),
        words(&status["version"]),
        screen.paint(tone, &state)
    ));
    if status["service"] == "orchestratord" {
        control_plane(&mut text, status, now_ms, screen);
    } else {
        agent(&mut text, status, now_ms, screen);
    }
    text
}

fn section(text: &mut String, table: &Table, screen: &Screen) {
    let part = table.text(screen);
    if !part.is_empty() {
        text.push('\n');
        text.push_str(&part);
    }
}

fn control_plane(text: &mut String, status: &Value, now_ms: u64, screen: &Screen) {
    let sum = |name: &str| list(&status["pools"]).map(|pool| pool[name].as_u64().unwrap_or(0)).sum::<u64>();
    text.push_str(&format!(
        "requests: {} running, {} waiting; {} of {} slots free\n",
        words(&status["queue"]["running"]),
        words(&status["queue"]["waiting"]),
        sum("slots_free"),
        sum("slots_total"),
    ));
    let mut nodes = Table::new(&[
        Column("NODE", 0),
        Column("STATUS", 0),
        Column("ROUTABLE", 0),
        Column("GPUS", 2),
        Column("SINCE", 3),
        Column("ADDRESS", 4),
    ]);
    for node in list(&status["nodes"]) {
        let routable = list(&node["replicas"]).filter(|replica| replica["routable"] == true).count();
        let is_online = node["status"] == "Online";
        let tone = match node["status"].as_str() {
            Some("Online") => Tone::Good,
            Some("Offline") => Tone::Bad,
            _ => Tone::Warning,
        };
        nodes.row(
            vec![
                Cell::plain(words(&node["node_id"])),
                Cell::new(tone, &words(&node["status"])),
                Cell::plain(format!("{routable} of {}", list(&node["replicas"]).count())),
                Cell::plain(list(&node["capabilities"]["gpus"]).count()),
                Cell::new(Tone::Faint, &since(&node["since_ms"], now_ms)),
                Cell::plain(words(&node["address"])),
            ],
            node["reason"].as_str().filter(|_| !is_online).map(str::to_string),
        );
    }
    section(text, &nodes, screen);
    let mut gpus = Table::new(&[
        Column("GPU", 0),
        Column("MEMORY", 0),
        Column("USED", 1),
        Column("BUSY", 2),
        Column("TEMP", 3),
        Column("NAME", 4),
    ]);
    for node in list(&status["nodes"]) {
        for gpu in list(&node["capabilities"]["gpus"]) {
            let load = list(&node["gpu_loads"]).find(|load| load["device_id"] == gpu["device_id"]);
            let load = load.unwrap_or(&Value::Null);
            let number = |name: &str| load[name].as_f64();
            let total = number("vram_total_bytes").or(gpu["vram_total_bytes"].as_f64());
            let used = total.zip(number("vram_free_bytes")).map(|(total, free)| (total - free).max(0.0));
            let mut cells =
                vec![Cell::plain(format!("{}/{}", words(&node["node_id"]), words(&gpu["device_id"])))];
            cells.extend(use_of_gpu(
                used,
                total,
                number("utilization_percent"),
                number("temperature_celsius"),
            ));
            cells.push(Cell::plain(words(&gpu["name"])));
            gpus.row(cells, None);
        }
    }
    pools(text, &status["pools"], screen);
    let mut replicas = Table::new(REPLICAS);
    for replica in list(&status["pools"]).flat_map(|pool| list(&pool["replicas"])) {
        let name = format!(
            "{}/{}/{}",
            words(&replica["node_id"]),
            words(&replica["pool_id"]),
            words(&replica["replica_id"])
        );
        let (tone, state) = match (replica["routable"].as_bool(), replica["draining"].as_bool()) {
            (Some(true), _) => (Tone::Good, "routable"),
            (_, Some(true)) => (Tone::Warning, "draining"),
            _ => (Tone::Bad, "out"),
        };
        let note = replica["reason"].as_str().filter(|reason| *reason != state).map(str::to_string);
        replicas.row(replica_cells(&name, tone, state, replica, now_ms), note);
    }
    section(text, &replicas, screen);
    section(text, &gpus, screen);
    if list(&status["pools"]).count() == 0 {
        text.push_str(
            "\nno engine yet: hand one over with `llorch adopt URL`, or start one with engine-provisioner\n",
        );
    }
}

fn agent(text: &mut String, status: &Value, now_ms: u64, screen: &Screen) {
    let node = &status["node"];
    text.push_str(&format!("node {}, version {}\n", words(&node["node_id"]), words(&node["version"])));
    for drain in list(&status["drains"]) {
        text.push_str(&format!("{}\n", screen.paint(Tone::Warning, &super::drain::sentence(drain, now_ms))));
    }
    pools(text, &node["pools"], screen);
    let mut replicas = Table::new(REPLICAS);
    for pool in list(&node["pools"]) {
        for replica in list(&pool["replicas"]) {
            let name = format!("{}/{}", words(&pool["pool_id"]), words(&replica["replica_id"]));
            let state = words(&replica["state"]);
            let tone = match state.as_str() {
                "ready" => Tone::Good,
                "broken" => Tone::Bad,
                _ => Tone::Warning,
            };
            let note = replica["reason"].as_str().filter(|_| state != "ready").map(str::to_string);
            replicas.row(replica_cells(&name, tone, &state, replica, now_ms), note);
        }
    }
    section(text, &replicas, screen);
    gpus(text, &status["gpus"], screen);
    let mut files = Table::new(&[Column("FILE", 0), Column("STATE", 0)]);
    for file in list(&status["handoffs"]["files"]).filter(|file| !file["error"].is_null()) {
        files.row(
            vec![Cell::plain(words(&file["file"])), Cell::new(Tone::Bad, &words(&file["state"]))],
            Some(words(&file["error"])),
        );
    }
    section(text, &files, screen);
}

const REPLICAS: &[Column] = &[
    Column("REPLICA", 0),
    Column("STATE", 0),
    Column("FREE", 0),
    Column("MODEL", 1),
    Column("ENGINE", 2),
    Column("SINCE", 3),
    Column("URL", 4),
];

fn replica_cells(name: &str, tone: Tone, state: &str, replica: &Value, now_ms: u64) -> Vec<Cell> {
    let models: Vec<String> = list(&replica["models"]).map(words).collect();
    vec![
        Cell::plain(name),
        Cell::new(tone, state),
        Cell::plain(format!("{}/{}", words(&replica["slots_free"]), words(&replica["slots_total"]))),
        Cell::plain(named(&models)),
        Cell::plain(words(&replica["engine"])),
        Cell::new(Tone::Faint, &since(&replica["since_ms"], now_ms)),
        Cell::plain(words(&replica["url"])),
    ]
}

const POOLS_ON_NODES: &[Column] =
    &[Column("POOL", 0), Column("STATE", 0), Column("FREE", 0), Column("REPLICAS", 2), Column("NODES", 3)];
const POOLS: &[Column] = POOLS_ON_NODES.split_at(4).0;

fn pools(text: &mut String, pools: &Value, screen: &Screen) {
    // An agent's pools are all on its own machine.
    let on_nodes = list(pools).any(|pool| pool["nodes"].is_array());
    let mut table = Table::new(if on_nodes { POOLS_ON_NODES } else { POOLS });
    for pool in list(pools) {
        let (tone, state) = match (pool["ready"].as_bool(), pool["draining"].as_bool()) {
            (_, Some(true)) => (Tone::Warning, "draining"),
            (Some(true), _) => (Tone::Good, "ready"),
            _ => (Tone::Bad, "not ready"),
        };
        table.row(
            vec![
                Cell::plain(words(&pool["pool_id"])),
                Cell::new(tone, state),
                Cell::plain(format!("{}/{}", words(&pool["slots_free"]), words(&pool["slots_total"]))),
                Cell::plain(list(&pool["replicas"]).count()),
                Cell::plain(list(&pool["nodes"]).count()),
            ],
            None,
        );
    }
    section(text, &table, screen);
}

fn gpus(text: &mut String, gpus: &Value, screen: &Screen) {
    let mut table = Table::new(&[
        Column("GPU", 0),
        Column("STATE", 0),
        Column("MEMORY", 0),
        Column("USED", 1),
        Column("BUSY", 2),
        Column("TEMP", 3),
        Column("NAME", 4),
    ]);
    for gpu in list(&gpus["gpus"]) {
        let state = words(&gpu["state"]);
        let tone = if state == "ok" { Tone::Good } else { Tone::Bad };
        let (used, total) = (gpu["memory_used_bytes"].as_f64(), gpu["memory_total_bytes"].as_f64());
        let busy = gpu["utilization_ratio"].as_f64().map(|share| share * 100.0);
        let mut cells = vec![Cell::plain(words(&gpu["index"])), Cell::new(tone, &state)];
        cells.extend(use_of_gpu(used, total, busy, gpu["temperature_celsius"].as_f64()));
        cells.push(Cell::plain(words(&gpu["name"])));
        table.row(cells, gpu["reason"].as_str().map(str::to_string));
    }
    section(text, &table, screen);
    if list(&gpus["gpus"]).count() == 0 {
        let why = format!("no GPU: {}", words(&gpus["driver"]["reason"]));
        text.push('\n');
        for line in wrapped(&clean(&why), screen.width) {
            text.push_str(&format!("{}\n", screen.paint(Tone::Faint, &line)));
        }
    }
}

/// The cells MEMORY, USED, BUSY and TEMP, from bytes, percent and degrees Celsius.
fn use_of_gpu(
    used: Option<f64>,
    total: Option<f64>,
    busy_percent: Option<f64>,
    celsius: Option<f64>,
) -> [Cell; 4] {
    let or_dash = |text: Option<String>| Cell::plain(text.unwrap_or_else(|| "-".to_string()));
    let share = used.zip(total).filter(|(_, total)| *total > 0.0).map(|(used, total)| used / total);
    [
        Cell::plain(match used {
            Some(used) => format!("{} of {}", gibibytes(Some(used)), gibibytes(total)),
            None => gibibytes(total),
        }),
        or_dash(share.map(|share| bar(share, BAR))),
        or_dash(busy_percent.map(|percent| format!("{percent:.0} %"))),
        or_dash(celsius.map(|celsius| format!("{celsius:.0} °C"))),
    ]
}

/// `[####......]`
pub(super) fn bar(share: f64, width: usize) -> String {
    let full = ((share.clamp(0.0, 1.0) * width as f64).round() as usize).min(width);
    format!("[{}{}]", "#".repeat(full), ".".repeat(width - full))
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().map_or(&[][..], Vec::as_slice).iter()
}

/// A value as people read it; `-` for none.
pub(super) fn words(value: &Value) -> String {
    match value {
        Value::Null => "-".to_string(),
        Value::String(text) if text.is_empty() => "-".to_string(),
        Value::String(text) => clean(text),
        other => other.to_string(),
    }
}

fn named(models: &[String]) -> String {
    match models {
        [] => "-".to_string(),
        few if few.len() <= MODELS_NAMED => few.join(", "),
        many => format!("{}, and {} more", many[..MODELS_NAMED].join(", "), many.len() - MODELS_NAMED),
    }
}

fn gibibytes(bytes: Option<f64>) -> String {
    match bytes {
        None => "-".to_string(),
        Some(bytes) => format!("{:.1} GiB", bytes / f64::from(1 << 30)),
    }
}

/// How long ago, in the largest unit that fits.
pub(super) fn since(at_ms: &Value, now_ms: u64) -> String {
    match at_ms.as_u64() {
        None | Some(0) => "-".to_string(),
        Some(at) => duration(now_ms.saturating_sub(at)),
    }
}

/// `41s`, `12m`, `5h`, `9d`
pub(super) fn duration(ms: u64) -> String {
    match ms / 1000 {
        seconds @ 0..120 => format!("{seconds}s"),
        seconds @ 120..7_200 => format!("{}m", seconds / 60),
        seconds @ 7_200..172_800 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_shown_for_people() {
        assert_eq!(duration(119_999), "119s");
        assert_eq!(
            (duration(120_000), duration(7_200_000), duration(999_999_999)),
            ("2m".into(), "2h".into(), "11d".into())
        );
        assert_eq!(
            (bar(0.0, 4), bar(0.5, 4), bar(7.0, 4)),
            ("[....]".into(), "[##..]".into(), "[####]".into())
        );
        let models: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        assert_eq!((named(&models[..2]), named(&models)), ("a, b".into(), "a, b, and 1 more".into()));
        assert_eq!(value_of("# TYPE a gauge\na_b 9\na 3\n", "a"), json!(3));
        assert_eq!(value_of("", "a"), Value::Null);
    }

    #[test]
    fn gpus_of_an_agent_have_bars_and_reasons() {
        let status = json!({"service": "pool-managerd", "version": "1", "ready": true,
            "node": {"node_id": "n", "version": "1", "pools": []}, "drains": [], "handoffs": {"files": []},
            "gpus": {"gpus": [{"index": 1, "state": "faulty", "reason": "XID 79", "name": "H100",
                "memory_used_bytes": 1u64 << 30, "memory_total_bytes": 4u64 << 30, "utilization_ratio": 0.5,
                "temperature_celsius": 61}]}});
        let screen = Screen { is_terminal: false, coloured: false, width: 80 };
        let shown = text(&status, "http://h", 0, &screen);
        for part in ["1.0 GiB of 4.0 GiB", "[###.......]", "50 %", "61 °C", "    XID 79", "faulty"] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
    }
}
