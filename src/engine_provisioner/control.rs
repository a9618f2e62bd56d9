//! The local socket on which this machine's pool-managerd hands over what operators ask of managed pools.
//!
//! One socket a process, in a directory beside the handoffs that only its owner may enter; who connects must be
//! that user or root, which the kernel says. A thread takes one line of JSON a connection, and answers from
//! what it knows without waiting for the loop: an order is accepted, and how far it has come is asked for
//! again. One order a pool is under way at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::file::ENGINES_MAX;
use super::steps::Steps;
use crate::reactor::Waker;
use crate::wire::id::{PoolId, ReplicaId};
use crate::wire::pool::PROVISIONER_DIRECTORY;

/// How long a caller may take for its line, and for the answer: it is on this machine.
const TALK: Duration = Duration::from_secs(2);
/// Longest order, in bytes: flags of one engine.
const ORDER_BYTES_MAX: u64 = 64 << 10;

/// An engine that somebody else has prepared.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub(super) struct PreparedEngine {
    pub(super) binary_path: String,
    #[serde(default)]
    pub(super) flags: Vec<String>,
    #[serde(default)]
    pub(super) port: u16,
    pub(super) model_path: Option<String>,
    pub(super) engine_version: Option<String>,
    pub(super) pool_id: PoolId,
    pub(super) replica_id: ReplicaId,
    pub(super) device_mask: Option<String>,
    /// Kind of engine; llama.cpp's where it is not said.
    pub(super) engine: Option<String>,
    /// Of the model's file.
    pub(super) digest: Option<String>,
    /// What the program was built from: its version where no other is given.
    pub(super) build_ref: Option<String>,
}

/// What is to be done to a pool.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Order {
    /// Its engines get another model.
    Reload(PoolId, String),
    /// An engine is started in it, or takes the place of one.
    Preload(Box<PreparedEngine>),
}

impl Order {
    pub(super) fn pool(&self) -> &PoolId {
        match self {
            Order::Reload(pool, _) => pool,
            Order::Preload(engine) => &engine.pool_id,
        }
    }
}

/// One line of a caller.
#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Asked {
    Status { pool: PoolId },
    Preparing,
    Reload { pool: PoolId, new_model_ref: String },
    Preload { prepared: Box<PreparedEngine> },
}

/// What the thread and the loop both know.
#[derive(Debug, Default)]
struct Known {
    pools: BTreeSet<PoolId>,
    /// The last order of each pool.
    orders: BTreeMap<PoolId, Taken>,
    /// Number of the last order of all.
    last: u64,
}

/// An order that was accepted.
#[derive(Clone, Debug)]
struct Taken {
    number: u64,
    /// `None` while it is under way.
    outcome: Option<Value>,
}

/// What is answered from.
#[derive(Clone, Debug)]
pub(super) struct Book {
    known: Arc<Mutex<Known>>,
    pub(super) steps: Steps,
}

impl Book {
    pub(super) fn new(steps: Steps) -> Book {
        Book { known: Arc::default(), steps }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Known) -> T) -> T {
        change(&mut self.known.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// These are the pools now.
    pub(super) fn keeps(&self, pools: impl Iterator<Item = PoolId>) {
        self.with(|known| known.pools = pools.collect());
    }

    /// An order is over.
    pub(super) fn ended(&self, pool: &PoolId, outcome: Value) {
        self.with(|known| {
            if let Some(order) = known.orders.get_mut(pool) {
                order.outcome = Some(outcome);
            }
        });
    }

    fn status(&self, pool: &PoolId) -> Value {
        let (keeps, order) = self.with(|known| (known.pools.contains(pool), known.orders.get(pool).cloned()));
        if !keeps && order.is_none() && !self.steps.has(pool) {
            return json!({"status": 404, "error": format!("pool {pool} is not kept here")});
        }
        let state = match &order {
            None => "none",
            Some(Taken { outcome: None, .. }) => "running",
            Some(Taken { outcome: Some(_), .. }) => "ended",
        };
        json!({
            "status": 200, "state": state, "order": order.as_ref().map(|order| order.number),
            "outcome": order.and_then(|order| order.outcome),
            "preparation": {"steps": self.steps.of(pool)},
        })
    }

    /// Notes an order, unless another one is under way.
    fn accept(&self, order: &Order) -> Result<(), Value> {
        let pool = order.pool();
        self.with(|known| {
            if matches!(order, Order::Reload(..)) && !known.pools.contains(pool) {
                return Err(json!({"status": 404, "error": format!("pool {pool} is not kept here")}));
            }
            if known.orders.get(pool).is_some_and(|order| order.outcome.is_none()) {
                let error = format!("pool {pool} is being reloaded: wait until that has ended");
                return Err(json!({"status": 409, "error": error}));
            }
            if known.orders.len() >= ENGINES_MAX && !known.orders.contains_key(pool) {
                return Err(json!({"status": 503, "error": "too many pools"}));
            }
            known.last += 1;
            known.orders.insert(pool.clone(), Taken { number: known.last, outcome: None });
            Ok(())
        })
    }

    fn answer(&self, line: &str, orders: &SyncSender<Order>) -> Value {
        let order = match serde_json::from_str(line) {
            Err(error) => return json!({"status": 400, "error": error.to_string()}),
            Ok(Asked::Status { pool }) => return self.status(&pool),
            Ok(Asked::Preparing) => return json!({"status": 200, "pools": self.steps.under_way()}),
            Ok(Asked::Reload { pool, new_model_ref }) => Order::Reload(pool, new_model_ref),
            Ok(Asked::Preload { prepared }) => Order::Preload(prepared),
        };
        if let Err(refused) = self.accept(&order) {
            return refused;
        }
        let pool = order.pool().clone();
        self.steps.clear(&pool);
        if orders.try_send(order).is_err() {
            let error = "this provisioner is ending";
            self.ended(&pool, json!({"success": false, "reason": error}));
            return json!({"status": 503, "error": error});
        }
        let mut status = self.status(&pool);
        status["status"] = json!(202);
        status
    }
}

/// The socket; dropping it removes the file.
#[derive(Debug)]
pub(super) struct Control {
    path: PathBuf,
    orders: Receiver<Order>,
}

impl Control {
    /// Listens in the directory of handoffs.
    ///
    /// # Errors
    /// What the kernel says; a path that is too long for a socket is one of them.
    pub(super) fn listen(handoff_dir: &Path, book: Book, waker: Waker) -> io::Result<Control> {
        let directory = handoff_dir.join(PROVISIONER_DIRECTORY);
        let path = directory.join(format!("{}.sock", std::process::id()));
        let bind = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
            fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
            // Of an earlier process with this number.
            let _ = fs::remove_file(&path);
            UnixListener::bind(&path)
        };
        // Another provisioner that ends may just have taken the directory away.
        let listener = bind().or_else(|_| bind())?;
        book.steps.are_told_on(&path);
        let (sender, orders) = sync_channel(ENGINES_MAX);
        std::thread::Builder::new().name("control".into()).spawn(move || {
            for stream in listener.incoming().flatten() {
                // Who says nothing usable is not answered; there is nobody else to tell.
                let _ = converse(&stream, &book, &sender);
                let _ = waker.wake();
            }
        })?;
        Ok(Control { path, orders })
    }

    /// The next order.
    pub(super) fn next(&self) -> Option<Order> {
        self.orders.try_recv().ok()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // Only the last one finds it empty.
        let _ = self.path.parent().map(fs::remove_dir);
    }
}

fn converse(mut stream: &UnixStream, book: &Book, orders: &SyncSender<Order>) -> io::Result<()> {
    let peer = rustix::net::sockopt::socket_peercred(stream)?;
    if !peer.uid.is_root() && peer.uid != rustix::process::geteuid() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    stream.set_read_timeout(Some(TALK))?;
    stream.set_write_timeout(Some(TALK))?;
    let mut line = String::new();
    BufReader::new(stream.take(ORDER_BYTES_MAX)).read_line(&mut line)?;
    writeln!(stream, "{}", book.answer(&line, orders))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_order_a_pool_is_under_way_and_its_end_is_remembered() {
        let (sender, orders) = sync_channel(1);
        let book = Book::new(Steps::default());
        let pool = PoolId::new("p").expect("an id");
        let reload = r#"{"op":"reload","pool":"p","new_model_ref":"m"}"#;
        assert_eq!(book.answer(reload, &sender)["status"], 404);
        book.keeps(std::iter::once(pool.clone()));
        assert_eq!(book.answer(reload, &sender)["status"], 202);
        assert_eq!(orders.try_recv(), Ok(Order::Reload(pool.clone(), "m".into())));
        assert_eq!(book.answer(reload, &sender)["status"], 409);
        let status = r#"{"op":"status","pool":"p"}"#;
        assert_eq!(book.answer(status, &sender)["state"], "running");
        book.ended(&pool, json!({"success": true}));
        assert_eq!(book.answer(status, &sender)["outcome"]["success"], true);
        assert_eq!(book.answer(reload, &sender)["status"], 202);
        for line in ["", "{}", r#"{"op":"status","pool":"/"}"#, r#"{"op":"preload","prepared":{}}"#] {
            assert_eq!(book.answer(line, &sender)["status"], 400, "{line}");
        }
    }
}
