//! Orders for managed pools: handed to the engine-provisioner of this machine that keeps the pool, and asked for
//! how far they have come.
//!
//! Provisioners listen on sockets in a directory beside the handoffs. Several may run; the one that knows a pool
//! is meant. Talking to them blocks, and is done on a helper thread; an order is only accepted there, so that
//! an answer takes milliseconds, whatever it starts.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::operations::PoolOrder;
use crate::wire::id::PoolId;
use crate::wire::pool::PROVISIONER_DIRECTORY;
use crate::wire::preparation::{POOL_STEPS_MAX, PREPARED_POOLS_MAX, PoolPreparation};

/// How long one provisioner may take: it answers from memory.
const TALK: Duration = Duration::from_secs(2);
/// Largest answer, in bytes: the steps of the most engines.
const ANSWER_BYTES_MAX: u64 = 4 << 20;
/// Most sockets that are tried: a provisioner may be run for each engine.
const SOCKETS_MAX: usize = 256;

/// Hands an order over, or asks for a pool's: status code and body of the answer.
pub(crate) fn ask(runtime_dir: &Path, order: &PoolOrder) -> (u16, Value) {
    let pool = order.pool();
    let sockets = sockets(runtime_dir);
    let status = json!({"op": "status", "pool": pool}).to_string();
    let mut living: Vec<&PathBuf> = Vec::new();
    let mut keeper = None;
    for socket in &sockets {
        let Ok(answer) = talk(socket, &status) else { continue };
        living.push(socket);
        if answer["status"] == 200 {
            keeper = Some((socket, answer));
            break;
        }
    }
    let line = match order {
        PoolOrder::Status(_) => {
            return keeper.map_or_else(|| nobody(pool, living.len()), |(_, answer)| (200, answer));
        }
        PoolOrder::Reload(_, model) => json!({"op": "reload", "pool": pool, "new_model_ref": model}),
        PoolOrder::Preload(_, prepared, _) => json!({"op": "preload", "prepared": prepared}),
    };
    let to = match (keeper, order, living.as_slice()) {
        (Some((socket, _)), ..) => socket,
        // A new pool goes to the only one that could keep it.
        (None, PoolOrder::Preload(..), [socket]) => socket,
        _ => return nobody(pool, living.len()),
    };
    match talk(to, &line.to_string()) {
        Ok(mut answer) => {
            let status = answer["status"].as_u64().and_then(|status| u16::try_from(status).ok());
            if let Some(answer) = answer.as_object_mut() {
                answer.remove("status");
                answer.insert("pool_id".into(), json!(pool));
            }
            (status.unwrap_or(502), answer)
        }
        Err(error) => {
            (503, json!({"error": format!("the engine-provisioner of pool {pool} went away: {error}")}))
        }
    }
}

/// The pools in which something is under way, as all provisioners of this machine tell it.
pub(crate) fn preparing(runtime_dir: &Path) -> Vec<PoolPreparation> {
    let mut pools: BTreeMap<PoolId, PoolPreparation> = BTreeMap::new();
    for socket in sockets(runtime_dir) {
        let told = talk(&socket, r#"{"op":"preparing"}"#).ok();
        // One that is older does not know the question.
        let told = told.and_then(|mut told| serde_json::from_value(told["pools"].take()).ok());
        let told: Vec<PoolPreparation> = told.unwrap_or_default();
        for mut pool in told {
            pool.steps.truncate(POOL_STEPS_MAX);
            pools.insert(pool.pool_id.clone(), pool);
        }
    }
    pools.into_values().take(PREPARED_POOLS_MAX).collect()
}

fn nobody(pool: &PoolId, living: usize) -> (u16, Value) {
    let why = match living {
        0 => "no engine-provisioner runs on this node, or it belongs to another user".to_string(),
        n => format!("none of the {n} engine-provisioners of this node keeps it"),
    };
    (404, json!({"error": format!("pool {pool} is not managed: {why}")}))
}

fn sockets(runtime_dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(runtime_dir.join(PROVISIONER_DIRECTORY)).into_iter().flatten().flatten();
    let is_socket =
        |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|file_type| file_type.is_socket());
    let mut all: Vec<PathBuf> = entries.filter(is_socket).map(|entry| entry.path()).collect();
    all.sort();
    all.truncate(SOCKETS_MAX);
    all
}

/// One line there, one line back.
fn talk(socket: &Path, line: &str) -> io::Result<Value> {
    // One that nobody listens on refuses at once.
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(TALK))?;
    stream.set_write_timeout(Some(TALK))?;
    let peer = rustix::net::sockopt::socket_peercred(&stream)?;
    if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    writeln!(stream, "{line}")?;
    let mut answer = String::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_line(&mut answer)?;
    serde_json::from_str(&answer).map_err(io::Error::other)
}
