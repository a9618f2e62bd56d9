//! Heartbeats on a thread of their own. When which call is made, [`Plane`] decides; here it is made.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::pool_managerd::core::CallBody;
use crate::pool_managerd::membership::{Answer, Call, Note, Plane, PlaneState};
use crate::pool_registry_types::PoolStatus;
use crate::reactor::{Waker, now};
use crate::time::Now;
use crate::wire::node::{Heartbeat, PoolBeat};

use super::line::{Line, Sent};
use super::{Life, Plan, RegistrationError};

/// Running heartbeats. Dropping it ends them too.
#[derive(Debug)]
pub struct HeartbeatHandle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Where the node stands with its control plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeartbeatStatus {
    /// A member: the control plane knows the node, as far as this side can tell.
    pub is_registered: bool,
    /// `unregistered`, `registering`, `registered`, or `stepped-back` where another program owns the node
    /// id; `ended` once heartbeats have ended.
    pub state: &'static str,
    /// Why, for people.
    pub reason: String,
    /// Heartbeats that were confirmed.
    pub heartbeats: u64,
    /// Heartbeats that failed since the last one that was confirmed.
    pub failures: u32,
    /// Interval of heartbeats in use, in milliseconds; `None` while not registered.
    pub interval_ms: Option<u64>,
}

impl fmt::Display for HeartbeatStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.state, self.reason)
    }
}

impl HeartbeatHandle {
    /// Something has changed: the next heartbeat leaves now, not at the next interval. Many calls at once
    /// become one heartbeat.
    pub fn beat_now(&self) {
        self.shared.revision.fetch_add(1, Ordering::Release);
        self.shared.wake();
    }

    /// Where the node stands.
    #[must_use]
    pub fn status(&self) -> HeartbeatStatus {
        self.shared.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends heartbeats and waits until their thread has ended: at once, also while a call hangs. A closure
    /// that runs is waited for. The node stays registered until its lease ends, or until
    /// [`NodeRegistration::deregister`](super::NodeRegistration::deregister).
    pub fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            // A closure's panic was reported by its own thread.
            let _ = thread.join();
        }
    }
}

impl Drop for HeartbeatHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// What the thread and its handle share.
#[derive(Debug)]
pub(super) struct Shared {
    stop: AtomicBool,
    /// Grows with every change that the program announces.
    revision: AtomicU64,
    status: Mutex<HeartbeatStatus>,
    waker: Waker,
}

impl Shared {
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        // Should that fail, the thread looks at the flags at its next turn in any case.
        let _ = self.waker.wake();
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    fn show(&self, status: HeartbeatStatus) {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }
}

/// Starts the thread for the incarnation that `life` begins. Only one runs at a time.
pub(super) fn spawn<F>(
    plan: &Arc<Plan>,
    life: &Arc<Mutex<Life>>,
    pools: F,
) -> Result<HeartbeatHandle, RegistrationError>
where
    F: FnMut() -> Vec<PoolStatus> + Send + 'static,
{
    let line = Line::open(plan)?;
    let at = now();
    let mut plane = Plane::new(plan.control_plane.clone(), plan.interval_ms, at);
    let mut begun = life.lock().unwrap_or_else(PoisonError::into_inner);
    if begun.heartbeats.is_some() {
        return Err(RegistrationError::AlreadyBeating { node_id: plan.node_id.to_string() });
    }
    let incarnation = begun.incarnation(at.wall);
    if let Some(answer) = begun.registered.take()
        && let Some(order) = plane.poll(at)
    {
        // It was registered already: the first call is a heartbeat.
        plane.answered(order.call, answer, at, &mut jitter, &mut Vec::new());
    }
    let shared = Arc::new(Shared {
        stop: AtomicBool::new(false),
        revision: AtomicU64::new(0),
        status: Mutex::new(status_of(&plane, 0)),
        waker: line.waker.clone(),
    });
    begun.heartbeats = Some(shared.clone());
    drop(begun);
    let end = End { life: life.clone(), shared: shared.clone() };
    let mut beating = Beating {
        plan: plan.clone(),
        shared: shared.clone(),
        incarnation,
        pools,
        plane,
        line,
        sent: None,
        confirmed: 0,
        replicas: 0,
        refused: None,
    };
    let run = move || {
        let _end = end;
        if let Err(error) = beating.run() {
            log::error!("{}: heartbeats ended: {error}", beating.plan.control_plane);
        }
    };
    let thread = std::thread::Builder::new().name("node-heartbeat".into()).spawn(run);
    Ok(HeartbeatHandle { shared, thread: Some(thread.map_err(RegistrationError::System)?) })
}

/// Says that heartbeats have ended, also where the closure panicked.
struct End {
    life: Arc<Mutex<Life>>,
    shared: Arc<Shared>,
}

impl Drop for End {
    fn drop(&mut self) {
        let reason = if self.shared.is_stopped() { "stopped" } else { "its thread failed; see the log" };
        let mut status = self.shared.status.lock().unwrap_or_else(PoisonError::into_inner);
        *status = HeartbeatStatus {
            is_registered: false,
            state: "ended",
            reason: reason.into(),
            interval_ms: None,
            ..status.clone()
        };
        drop(status);
        let mut life = self.life.lock().unwrap_or_else(PoisonError::into_inner);
        // Others may have begun since.
        if life.heartbeats.as_ref().is_some_and(|shared| Arc::ptr_eq(shared, &self.shared)) {
            life.heartbeats = None;
            life.is_over = true;
        }
    }
}

struct Beating<F> {
    plan: Arc<Plan>,
    shared: Arc<Shared>,
    incarnation: u64,
    pools: F,
    plane: Plane,
    line: Line,
    sent: Option<Sent>,
    confirmed: u64,
    /// In the last heartbeat.
    replicas: usize,
    /// What was wrong with the closure's pools, as the log was told.
    refused: Option<String>,
}

impl<F: FnMut() -> Vec<PoolStatus>> Beating<F> {
    fn run(&mut self) -> io::Result<()> {
        let mut now = now();
        while !self.shared.is_stopped() {
            self.take_answer(now);
            self.plane.on_change(self.shared.revision.load(Ordering::Acquire), self.replicas, now);
            self.call(now);
            self.shared.show(status_of(&self.plane, self.confirmed));
            now = self.line.turn(self.plane.deadline())?;
        }
        Ok(())
    }

    fn take_answer(&mut self, now: Now) {
        let Some(sent) = &self.sent else { return };
        let Some(answer) = self.line.take(&self.plan, sent) else { return };
        let call = sent.call;
        self.sent = None;
        if matches!((call, &answer), (Call::Heartbeat { .. }, Answer::Ok { .. })) {
            self.confirmed += 1;
        }
        let mut notes = Vec::new();
        self.plane.answered(call, answer, now, &mut jitter, &mut notes);
        notes.iter().for_each(tell);
    }

    fn call(&mut self, now: Now) {
        let Some(order) = self.plane.poll(now) else { return };
        let body = match order.call {
            Call::Heartbeat { seq } => self.heartbeat(seq),
            _ => self.plan.introduction(self.incarnation),
        };
        if self.shared.is_stopped() {
            return;
        }
        // The closure may have taken its time, which is not the control plane's.
        let at = crate::reactor::now();
        self.sent = Some(self.line.send(&self.plan, self.incarnation, order, &body, at));
    }

    fn heartbeat(&mut self, seq: u64) -> CallBody {
        let mut refused = None;
        let pools: Vec<PoolBeat> = (self.pools)()
            .into_iter()
            .filter_map(|pool| PoolBeat::try_from(pool).map_err(|why| refused = Some(why.to_string())).ok())
            .collect();
        if refused != self.refused
            && let Some(why) = &refused
        {
            log::warn!("a pool is left out of heartbeats: {why}");
        }
        self.refused = refused;
        self.replicas = pools.iter().map(|pool| pool.replicas.as_ref().map_or(1, Vec::len)).sum();
        CallBody::Heartbeat(Box::new(Heartbeat {
            timestamp: Some(now().wall.rfc3339()),
            pools,
            incarnation: Some(self.incarnation),
            boot_id: self.plan.boot_id.clone(),
            seq: Some(seq),
            draining: false,
            preparation: Vec::new(),
            gpu_loads: Vec::new(),
        }))
    }
}

fn status_of(plane: &Plane, heartbeats: u64) -> HeartbeatStatus {
    let (is_registered, failures, interval_ms) = match plane.state() {
        PlaneState::Registered { failures, interval_ms, .. } => (true, *failures, Some(*interval_ms)),
        _ => (false, 0, None),
    };
    let (state, reason) = (plane.state().as_str(), plane.reason().to_string());
    HeartbeatStatus { is_registered, state, reason, heartbeats, failures, interval_ms }
}

fn tell(note: &Note) {
    if note.is_warning {
        log::warn!("{note}");
    } else {
        log::info!("{note}");
    }
}

fn jitter(below: u64) -> u64 {
    fastrand::u64(..below)
}
