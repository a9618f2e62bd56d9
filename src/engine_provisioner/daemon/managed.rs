//! The loop's part of orders for managed pools: another model, or an engine that was prepared elsewhere.
//!
//! An order changes what is wanted of one pool, as if its file said so; getting that ready and replacing engines
//! go their usual ways. What fails is taken back: the engine that served before goes on.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::json;

use super::Daemon;
use crate::engine_provisioner::control::{Order, PreparedEngine};
use crate::engine_provisioner::models::Digest;
use crate::engine_provisioner::plan::{Config, HEALTH_EVERY_MS_MIN, Lease, device_mask, text};
use crate::engine_provisioner::steps::Kind;
use crate::engine_provisioner::supervision::{Input, SpecId, Told};
use crate::settings::Exit;
use crate::time::Mono;
use crate::wire::id::{PoolId, ReplicaKey};

/// What was ordered beside what the file or the command line says.
#[derive(Clone, Debug, Default)]
pub(in crate::engine_provisioner) struct Orders {
    models: BTreeMap<PoolId, String>,
    engines: BTreeMap<ReplicaKey, Config>,
}

impl Orders {
    /// Changes what is wanted accordingly.
    pub(in crate::engine_provisioner) fn apply(&self, configs: &mut Vec<Config>) {
        for config in configs.iter_mut() {
            if let Some(model) = self.models.get(&config.pool_id) {
                config.model = Some(model.clone());
                // Both were the other model's.
                (config.digest, config.model_name) = (None, None);
            }
        }
        configs.retain(|config| !self.engines.contains_key(&config.key()));
        configs.extend(self.engines.values().cloned());
    }
}

/// The order that is under way.
pub(super) struct Managed {
    pool: PoolId,
    /// The engine that was prepared elsewhere, if that is what was ordered.
    preloaded: Option<ReplicaKey>,
    began: Mono,
    /// What was ordered before, for the case that it fails.
    before: Orders,
    /// Engines that have to serve yet, with what they were.
    pending: BTreeMap<ReplicaKey, Option<SpecId>>,
}

impl Daemon {
    /// Takes an order where nothing else is being got ready.
    pub(super) fn take_order(&mut self, now: Mono) {
        if self.preparing.is_some() || self.managed.is_some() || !self.has_begun || self.core.is_stopping() {
            return;
        }
        let Some(order) = self.control.as_ref().and_then(|control| control.next()) else { return };
        let pool = order.pool().clone();
        let before = self.orders.clone();
        let mut preloaded = None;
        match order {
            Order::Reload(pool, model) => {
                log::info!("pool {pool} is to serve {model}");
                self.orders.models.insert(pool, model);
            }
            Order::Preload(engine) => match self.prepared_config(*engine) {
                Ok(config) => {
                    preloaded = Some(config.key());
                    self.orders.engines.insert(config.key(), config);
                }
                Err(exit) => {
                    let reason = format!("preload failed: {}", exit.message);
                    let outcome = json!({"success": false, "rolled_back": true, "reason": reason});
                    return self.book.ended(&pool, outcome);
                }
            },
        }
        self.managed = Some(Managed { pool, preloaded, began: now, before, pending: BTreeMap::new() });
        if let Err(exit) = self.prepare() {
            self.order_failed(&exit.message, now);
        }
    }

    fn prepared_config(&self, engine: PreparedEngine) -> Result<Config, Exit> {
        let mut command = vec![engine.binary_path.into()];
        if engine.model_path.is_some() {
            command.extend(["--model".into(), "{model}".into()]);
        }
        command.extend(["--host", "{host}", "--port", "{port}"].map(Into::into));
        command.extend(engine.flags.into_iter().map(Into::into));
        let handoff_dir: PathBuf = self.options.handoff_dir.clone();
        let mask = engine.device_mask.map(|mask| device_mask(&mask)).transpose().map_err(Exit::config)?;
        let config = Config {
            log_file: self.options.directories().log_file(&engine.pool_id, &engine.replica_id),
            handoff_dir,
            slots: None,
            engine: text(engine.engine.as_deref().unwrap_or("llamacpp")).map_err(Exit::config)?,
            engine_version: engine.engine_version.or(engine.build_ref),
            model: engine.model_path,
            model_name: None,
            digest: engine.digest.as_deref().map(Digest::parse).transpose().map_err(Exit::config)?,
            model_file: None,
            lease: Lease::default(),
            source: None,
            program: None,
            is_made: false,
            port: engine.port,
            health_path: "/health".into(),
            health_timeout_ms: None,
            health_every_ms: HEALTH_EVERY_MS_MIN.max(5_000),
            health_failures: 3,
            drain_ms: 30_000,
            stop_ms: 4_000,
            restart: true,
            device_mask: mask,
            tensor_split: Vec::new(),
            container: None,
            auth_file: None,
            env: BTreeMap::new(),
            command,
            pool_id: engine.pool_id,
            replica_id: engine.replica_id,
        };
        config.check_command()?;
        Ok(config)
    }

    /// What an order needs is there: these engines are about to be changed.
    pub(super) fn order_prepared(&mut self, configs: &[Config]) {
        let Some(managed) = &mut self.managed else { return };
        for config in configs.iter().filter(|config| config.pool_id == managed.pool) {
            let key = config.key();
            let before = self.newest.get(&key).copied();
            let is_same =
                before.and_then(|spec| self.specs.get(&spec)).is_some_and(|before| **before == *config);
            if !is_same {
                managed.pending.insert(key, before);
            }
        }
    }

    /// Looks whether an order has come to its end.
    pub(super) fn look_after_order(&mut self, now: Mono) {
        let is_over = self.managed.as_ref().is_some_and(|managed| managed.pending.is_empty());
        if !is_over || self.preparing.is_some() {
            return;
        }
        let Some(managed) = self.managed.take() else { return };
        let config = self.specs.values().rev().find(|config| config.pool_id == managed.pool);
        log::info!("pool {}: what was ordered is done", managed.pool);
        let mut outcome = json!({
            "success": true, "rolled_back": false, "duration_ms": now.ms_since(managed.began),
            "new_engine_version": config.and_then(|config| config.engine_version.clone()),
        });
        let is_it = |key: &ReplicaKey| Some(key) == managed.preloaded.as_ref();
        let mut serving = self.running.values().rev().filter(|running| running.published.is_some());
        if let Some(running) = serving.find(|running| is_it(&running.config.key())) {
            outcome["pid"] = json!(running.handoff.pid);
            // Whoever reads it may stand in another directory.
            outcome["handoff_path"] = json!(std::path::absolute(&running.plan.handoff_file).ok());
        }
        self.book.ended(&managed.pool, outcome);
    }

    /// An engine is told of: perhaps one that an order waits for.
    pub(super) fn order_told(&mut self, key: &ReplicaKey, told: &Told, now: Mono) {
        match told {
            Told::Serving(_) => self.book.steps.end(Kind::PoolWarmup, key, Ok(())),
            Told::Failed { .. } => self.book.steps.end(Kind::PoolWarmup, key, Err(&told.to_string())),
            Told::KeptOld(why) => self.book.steps.end(Kind::PoolWarmup, key, Err(why)),
            _ => {}
        }
        let Some(managed) = &mut self.managed else { return };
        let Some(before) = managed.pending.get(key).copied() else { return };
        match told {
            Told::Serving(_) => {
                managed.pending.remove(key);
            }
            Told::KeptOld(why) => {
                if let Some(before) = before {
                    self.newest.insert(key.clone(), before);
                }
                self.to_retry.remove(key);
                let why = match managed.preloaded {
                    Some(_) => format!("health check failed: {why}"),
                    None => why.clone(),
                };
                self.order_failed(&why, now);
            }
            Told::Failed { reason, .. } if before.is_none() => {
                self.newest.remove(key);
                let reason = format!("health check failed: {reason}");
                self.effects_unwant(key, now);
                self.order_failed(&reason, now);
            }
            _ => {}
        }
    }

    fn effects_unwant(&mut self, key: &ReplicaKey, now: Mono) {
        let mut out = Vec::new();
        self.core.handle(Input::Unwant(key.clone()), now, &mut out);
        self.effects.extend(out);
    }

    /// An order failed: what was wanted before is wanted again.
    pub(super) fn order_failed(&mut self, why: &str, now: Mono) {
        let Some(managed) = self.managed.take() else { return };
        log::error!("pool {}: what was ordered failed, what was there before goes on: {why}", managed.pool);
        self.orders = managed.before;
        let why = match managed.preloaded {
            Some(_) => format!("preload failed: {why}"),
            None => why.to_string(),
        };
        self.book.ended(
            &managed.pool,
            json!({
                "success": false, "rolled_back": true, "reason": why, "new_engine_version": null,
                "duration_ms": now.ms_since(managed.began),
            }),
        );
        if !managed.pending.is_empty() {
            // Others of the pool may serve the new model already.
            if let Err(exit) = self.prepare() {
                log::error!("{exit}");
            }
        }
    }
}
