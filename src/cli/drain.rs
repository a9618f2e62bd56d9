//! `llorch drain` and `llorch resume`: no new work for a machine, a GPU, a pool or a replica; progress until
//! nothing runs there any more; and work again.
//!
//! Drains live in the agents, and in a control plane that watches its own machine. Where the daemon that is
//! asked is a control plane of nodes, their agents are asked instead, each at its address. A drain stays when
//! this command ends: it is the agents', not ours.

use std::ffi::OsString;

use serde_json::{Value, json};

use crate::reactor;
use crate::service::credentials;
use crate::settings::{Exit, Setting, Settings, Words, boolean, flag, number};
use crate::wire::id::{PoolId, ReplicaId};
use crate::wire::url::BaseUrl;

use super::remote::{self, EXIT_NOT_FOUND, EXIT_REFUSED, Remote, Service};
use super::status::{bar, duration, words};
use super::terminal::{Interrupt, Screen, Tone, clean};

/// How often progress is asked, in milliseconds.
const LOOK_MS: u64 = 250;
/// Widths of the progress bar, in characters: what the numbers beside it leave of the terminal's.
const BAR: std::ops::RangeInclusive<usize> = 6..=24;

pub(super) static DRAIN_TABLE: &[Setting] = &[
    remote::URL,
    credentials::API_TOKEN,
    credentials::API_TOKEN_FILE,
    credentials::ADMIN_TOKEN,
    credentials::ADMIN_TOKEN_FILE,
    remote::TLS_CA,
    remote::TLS_CERT,
    remote::TLS_KEY,
    remote::TIMEOUT,
    flag("node", None, "NODE", "Of a control plane's nodes only this one; all that are concerned otherwise"),
    flag("deadline-ms", None, "MS", "What still runs then is cut, never with a clean end; 0 to 86400000"),
    flag("no-wait", Some("false"), "BOOL", "Return as soon as the drain is in force"),
];
pub(super) static RESUME_TABLE: &[Setting] = &[
    remote::URL,
    credentials::API_TOKEN,
    credentials::API_TOKEN_FILE,
    credentials::ADMIN_TOKEN,
    credentials::ADMIN_TOKEN_FILE,
    remote::TLS_CA,
    remote::TLS_CERT,
    remote::TLS_KEY,
    remote::TIMEOUT,
    flag("node", None, "NODE", "Of a control plane's nodes only this one; all that are concerned otherwise"),
];
pub(super) const DRAIN_ABOUT: &str =
    "Take no new work on a machine, GPU, pool or replica, and wait until nothing runs";
pub(super) const RESUME_ABOUT: &str = "Take work again on a machine, GPU, pool or replica";
pub(super) const SCOPE: Words =
    Words::Given { name: "SCOPE", help: "node, gpu N, pool POOL, or replica POOL/REPLICA", min: 1, max: 2 };

/// What is drained, as the API's paths name it.
#[derive(Debug, PartialEq, Eq)]
enum Scope {
    Node,
    Gpu(u32),
    Pool(PoolId),
    Replica(PoolId, ReplicaId),
}

impl Scope {
    fn read(words: &[OsString]) -> Result<Scope, Exit> {
        let words: Vec<String> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let pool = |text: &str| PoolId::new(text).map_err(|why| Exit::usage(why.to_string()));
        match words.as_slice() {
            ["node"] => Ok(Scope::Node),
            ["gpu", index] => index.parse().map(Scope::Gpu).map_err(|_| {
                Exit::usage(format!("gpu {index:?}: a GPU is named by its number, such as gpu 0"))
            }),
            ["pool", name] => pool(name).map(Scope::Pool),
            ["replica", name] => match name.split_once('/') {
                Some((first, second)) => Ok(Scope::Replica(
                    pool(first)?,
                    ReplicaId::new(second).map_err(|why| Exit::usage(why.to_string()))?,
                )),
                None => Err(Exit::usage(format!("replica {name:?}: a replica is named POOL/REPLICA"))),
            },
            _ => Err(Exit::usage(format!(
                "{:?} is no scope: there are node, gpu N, pool POOL and replica POOL/REPLICA",
                words.join(" ")
            ))),
        }
    }

    fn path(&self) -> String {
        match self {
            Scope::Node => "/v2/node".to_string(),
            Scope::Gpu(index) => format!("/v2/gpus/{index}"),
            Scope::Pool(pool) => format!("/v2/pools/{pool}"),
            Scope::Replica(pool, replica) => format!("/v2/pools/{pool}/replicas/{replica}"),
        }
    }
}

impl std::fmt::Display for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Scope::Node => f.write_str("node"),
            Scope::Gpu(index) => write!(f, "gpu {index}"),
            Scope::Pool(pool) => write!(f, "pool {pool}"),
            Scope::Replica(pool, replica) => write!(f, "replica {pool}/{replica}"),
        }
    }
}

/// Runs `llorch drain`.
pub(super) fn run_drain(args: Vec<OsString>) -> Result<(), Exit> {
    let env = |name: &str| std::env::var_os(name);
    let settings = Settings::read_words("llorch drain", DRAIN_ABOUT, DRAIN_TABLE, SCOPE, args, env)?;
    let scope = Scope::read(&settings.rest)?;
    let deadline_ms = settings.get("deadline-ms", number(0, 86_400_000))?;
    let no_wait = settings.need("no-wait", boolean)?;
    let remote = Remote::from_settings(&settings)?;
    let node = settings.get("node", |text| Ok(text.to_string()))?;
    let of_node = node.as_deref().map_or(String::new(), |node| format!(" --node {node}"));
    let agents = agents(&remote, &scope, node)?;
    let interrupt = Interrupt::watch()?;
    let body = json!({ "deadline_ms": deadline_ms });
    let path = format!("{}/drain", scope.path());
    let mut progress = Vec::new();
    for (name, agent) in &agents {
        let begun = agent.post(&path, Some(&body)).map_err(|exit| match progress.len() {
            0 => on(name, exit),
            others => on(
                name,
                Exit { message: format!("{}; {others} other nodes drain already", exit.message), ..exit },
            ),
        });
        progress.push(begun?);
    }
    let screen = Screen::new();
    if no_wait {
        screen.write(&format!("{scope}: takes no new work ({})\n", tally(&progress)));
        return Ok(());
    }
    let is_drained = |progress: &[Value]| progress.iter().all(|one| one["drained"] == true);
    let mut said = String::new();
    while !is_drained(&progress) {
        show(&screen, &scope, &progress, &mut said);
        if interrupt.pause(LOOK_MS) {
            finish(&screen);
            return Err(Exit::runtime(format!(
                "interrupted: {scope} goes on draining, with {}; `llorch resume {scope}{of_node}` ends that",
                tally(&progress)
            )));
        }
        for ((name, agent), one) in agents.iter().zip(&mut progress) {
            *one = agent.get(&path).map_err(|exit| {
                finish(&screen);
                on(name, Exit { message: format!("{}; the drain stays in force", exit.message), ..exit })
            })?;
            if one["draining"] != true {
                finish(&screen);
                return Err(Exit::runtime(format!("{name}{scope}: somebody else resumed it meanwhile")));
            }
        }
    }
    if screen.is_terminal {
        show(&screen, &scope, &progress, &mut said);
    }
    finish(&screen);
    screen.write(&format!(
        "{}\n",
        screen.paint(Tone::Good, &format!("{scope}: drained ({})", tally(&progress)))
    ));
    Ok(())
}

/// Runs `llorch resume`.
pub(super) fn run_resume(args: Vec<OsString>) -> Result<(), Exit> {
    let env = |name: &str| std::env::var_os(name);
    let settings = Settings::read_words("llorch resume", RESUME_ABOUT, RESUME_TABLE, SCOPE, args, env)?;
    let scope = Scope::read(&settings.rest)?;
    let remote = Remote::from_settings(&settings)?;
    let agents = agents(&remote, &scope, settings.get("node", |text| Ok(text.to_string()))?)?;
    for (name, agent) in &agents {
        agent.post(&format!("{}/resume", scope.path()), None).map_err(|exit| on(name, exit))?;
    }
    Screen::new().write(&format!("{scope}: takes work again\n"));
    Ok(())
}

fn on(name: &str, exit: Exit) -> Exit {
    Exit { message: format!("{name}{}", exit.message), ..exit }
}

/// The agents to ask, each with what stands before its messages.
fn agents(remote: &Remote, scope: &Scope, node: Option<String>) -> Result<Vec<(String, Remote)>, Exit> {
    if remote.service()?.0 == Service::Agent {
        return Ok(vec![(String::new(), remote.at(remote.url().clone()))]);
    }
    // A control plane that watches its own machine is the agent of that, and shows no nodes.
    let nodes = match remote.list("/v2/nodes", "nodes") {
        Err(exit) if exit.code == EXIT_REFUSED && remote.get("/v2/drains").is_ok() => {
            return Ok(vec![(String::new(), remote.at(remote.url().clone()))]);
        }
        other => other?,
    };
    let all = |node: &Value, name: &str| node[name].as_array().cloned().unwrap_or_default();
    let concerned = |node: &Value| match scope {
        Scope::Node | Scope::Gpu(_) => true,
        Scope::Pool(pool) => all(node, "pools").iter().any(|known| *known == pool.as_str()),
        Scope::Replica(pool, replica) => all(node, "replicas")
            .iter()
            .any(|known| known["pool_id"] == pool.as_str() && known["replica_id"] == replica.as_str()),
    };
    let wanted: Vec<&Value> = nodes
        .iter()
        .filter(|known| node.as_deref().is_none_or(|name| known["node_id"] == name))
        .filter(|known| concerned(known))
        .collect();
    if node.is_none() && matches!(scope, Scope::Node | Scope::Gpu(_)) && wanted.len() != 1 {
        return Err(Exit::usage(format!(
            "{scope} of which node? Say --node: there are {} at {}",
            wanted.len(),
            remote.url()
        )));
    }
    if wanted.is_empty() {
        let of = node.map_or(String::new(), |node| format!(" on node {node}"));
        return Err(Exit {
            code: EXIT_NOT_FOUND,
            message: format!("{}: there is no {scope}{of}", remote.url()),
        });
    }
    wanted
        .into_iter()
        .map(|node| {
            let name = words(&node["node_id"]);
            // Where no agent is, the control plane itself is asked.
            let url = match node["address"].as_str() {
                None if node["via"] == "local" => Some(remote.url().clone()),
                address => address.and_then(|url| BaseUrl::lenient(url).ok()),
            };
            let url = url.ok_or_else(|| {
                Exit::runtime(format!(
                    "node {name} tells no address of its agent: ask that directly with --url"
                ))
            })?;
            Ok((format!("node {name}: "), remote.at(url)))
        })
        .collect()
}

fn sum(progress: &[Value], name: &str) -> u64 {
    progress.iter().map(|one| one[name].as_u64().unwrap_or(0)).sum()
}

fn tally(progress: &[Value]) -> String {
    let (running, finished, cut) =
        (sum(progress, "in_flight"), sum(progress, "finished"), sum(progress, "cut"));
    let mut text = format!("{running} running, {finished} finished");
    if cut > 0 {
        text.push_str(&format!(", {cut} cut"));
    }
    text
}

/// One line: redrawn on a terminal, printed when it changed elsewhere.
fn show(screen: &Screen, scope: &Scope, progress: &[Value], said: &mut String) {
    let (running, ended) = (sum(progress, "in_flight"), sum(progress, "finished") + sum(progress, "cut"));
    let share = if running == 0 { 1.0 } else { ended as f64 / (running + ended) as f64 };
    let left = deadline(progress).map_or(String::new(), |text| format!(", {text}"));
    if screen.is_terminal {
        let (name, numbers) = (scope.to_string(), format!("{}{left}", tally(progress)));
        // Two gaps and the bar's own ends stand between them.
        let room = screen.width.saturating_sub(name.chars().count() + numbers.chars().count() + 6);
        let bar = bar(share, room.clamp(*BAR.start(), *BAR.end()));
        let line = format!("{name}  {bar}  {numbers}");
        let line: String = clean(&line).chars().take(screen.width).collect();
        screen.write(&format!("\r{line}\x1b[K"));
    } else {
        let line = format!("{scope}: {}\n", tally(progress));
        if line != *said {
            screen.write(&line);
            *said = line;
        }
    }
}

/// When the first of the deadlines comes.
fn deadline(progress: &[Value]) -> Option<String> {
    let at_ms = progress.iter().filter_map(|one| one["deadline_at_ms"].as_u64()).min()?;
    let now_ms = reactor::now().wall.unix_ms();
    Some(match at_ms.checked_sub(now_ms) {
        Some(left) => format!("cut in {}", duration(left)),
        None => "its deadline has passed".to_string(),
    })
}

fn finish(screen: &Screen) {
    if screen.is_terminal {
        screen.write("\n");
    }
}

/// A drain in force, for `llorch status`.
pub(super) fn sentence(drain: &Value, now_ms: u64) -> String {
    let scope = &drain["scope"];
    let name = match scope["kind"].as_str() {
        Some("gpu") => format!("gpu {}", words(&scope["index"])),
        Some("pool") => format!("pool {}", words(&scope["pool_id"])),
        Some("replica") => format!("replica {}/{}", words(&scope["pool_id"]), words(&scope["replica_id"])),
        _ => words(&scope["kind"]),
    };
    let state = match drain["drained"].as_bool() {
        Some(true) => "drained".to_string(),
        _ => format!("draining, {} running", words(&drain["in_flight"])),
    };
    format!("{name}: {state}, since {}", super::status::since(&drain["since_ms"], now_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope(text: &str) -> Result<Scope, Exit> {
        Scope::read(&text.split(' ').map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn scopes_are_read_and_others_are_told_which_there_are() {
        for (text, path) in [
            ("node", "/v2/node"),
            ("gpu 3", "/v2/gpus/3"),
            ("pool p", "/v2/pools/p"),
            ("replica p/r0", "/v2/pools/p/replicas/r0"),
        ] {
            let scope = scope(text).expect(text);
            assert_eq!((scope.path().as_str(), scope.to_string().as_str()), (path, text));
        }
        for (text, part) in [
            ("gpu x", "number"),
            ("replica p", "POOL/REPLICA"),
            ("pool a/b", "a/b"),
            ("all", "there are node"),
        ] {
            let exit = scope(text).expect_err(text);
            assert!(exit.code == 2 && exit.message.contains(part), "{text}: {exit}");
        }
    }
}
