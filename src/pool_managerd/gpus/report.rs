//! The GPUs as others see them: `GET /v2/gpus` and the metrics. Pure.

use serde_json::{Value, json};

use super::gpu::Gpu;
use super::xid::Class;
use super::{Binding, DriverState, GpuId, GpuState, Gpus, Process};
use crate::metrics::{Scrape, label_value};
use crate::wire::id::ReplicaKey;

impl Gpus {
    /// The answer to `GET /v2/gpus`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let unmapped: Vec<Value> = self
            .bindings
            .iter()
            .filter(|(_, binding)| !binding.missing.is_empty())
            .map(|(key, binding)| {
                let mut replica = name(key, binding);
                replica["reason"] = json!(self.why_missing(binding));
                replica
            })
            .collect();
        json!({
            "driver": {
                "state": self.driver.state.as_str(),
                "reason": self.driver.reason,
                "since_ms": self.driver.since.unix_ms(),
                "version": self.driver.version,
            },
            "read_at_ms": self.read_at.map(crate::time::Wall::unix_ms),
            "kernel_log": match &self.kernel_log {
                Ok(()) => "ok",
                Err(reason) => reason,
            },
            "count": self.gpus.len(),
            "gpus": self.gpus.iter().map(|gpu| self.gpu(gpu)).collect::<Vec<_>>(),
            "unmapped": unmapped,
        })
    }

    /// One GPU as [`Gpus::to_json`] shows it; `null` where it is not known.
    #[must_use]
    pub fn gpu_json(&self, id: GpuId) -> Value {
        self.gpus.iter().find(|gpu| gpu.id == id).map_or(Value::Null, |gpu| self.gpu(gpu))
    }

    /// Writes the metrics.
    pub fn scrape(&self, scrape: &mut Scrape) {
        let is = |state| f64::from(u8::from(self.driver.state == state));
        scrape.gauge(
            "pool_managerd_gpu_driver_up",
            "Whether the NVIDIA driver answers.",
            &[("", is(DriverState::Ok))],
        );
        scrape.gauge(
            "pool_managerd_gpu_driver_hanging",
            "Whether a reading of the NVIDIA driver takes too long.",
            &[("", is(DriverState::Hanging))],
        );
        scrape.gauge("pool_managerd_gpus", "GPUs that are known.", &[("", self.gpus.len() as f64)]);
        let labels: Vec<String> = self.gpus.iter().map(labels).collect();
        // Old values would look like new ones.
        let is_fresh = self.driver.state == DriverState::Ok;
        let mut gauge = |name, help, value: &dyn Fn(&Gpu) -> Option<f64>| {
            let told = labels.iter().zip(&self.gpus).filter(|_| is_fresh);
            let told = told.filter_map(|(label, gpu)| Some((label, value(gpu)?)));
            let samples: Vec<(&str, f64)> = told.map(|(label, value)| (label.as_str(), value)).collect();
            scrape.gauge(name, help, &samples);
        };
        let memory = |gpu: &Gpu| gpu.current()?.memory;
        gauge("pool_managerd_gpu_memory_total_bytes", "Memory of a GPU.", &|gpu| {
            Some(memory(gpu)?.total_bytes as f64)
        });
        gauge("pool_managerd_gpu_memory_used_bytes", "Memory of a GPU that is taken.", &|gpu| {
            Some(memory(gpu)?.used_bytes as f64)
        });
        gauge("pool_managerd_gpu_utilization_ratio", "Share of time in which a GPU computed.", &|gpu| {
            Some(f64::from(gpu.current()?.utilization_percent?) / 100.0)
        });
        gauge("pool_managerd_gpu_temperature_celsius", "Temperature of a GPU.", &|gpu| {
            Some(f64::from(gpu.current()?.temperature_celsius?))
        });
        gauge("pool_managerd_gpu_power_watts", "Power that a GPU draws.", &|gpu| {
            Some(f64::from(gpu.current()?.power_milliwatts?) / 1000.0)
        });
        gauge(
            "pool_managerd_gpu_orphans",
            "Processes that hold memory of a GPU and belong to no replica.",
            &|gpu| Some(gpu.current()?.processes.iter().filter(|p| self.owner(p).is_none()).count() as f64),
        );
        let states: Vec<(String, f64)> = labels
            .iter()
            .zip(&self.gpus)
            .flat_map(|(label, gpu)| {
                GpuState::ALL.map(|state| {
                    let label = format!("{label},state=\"{}\"", state.as_str());
                    (label, f64::from(u8::from(gpu.state() == state)))
                })
            })
            .collect();
        let samples: Vec<(&str, f64)> =
            states.iter().map(|(label, value)| (label.as_str(), *value)).collect();
        scrape.gauge("pool_managerd_gpu_state", "1 for the state in which a GPU is.", &samples);
        let classes = Class::ALL.map(|class| format!("class=\"{}\"", class.as_str()));
        let samples: Vec<(&str, u64)> =
            classes.iter().map(String::as_str).zip(self.xids_by_class.iter().copied()).collect();
        scrape.counter("pool_managerd_gpu_xids_total", "XIDs, by what they say about the GPU.", &samples);
    }

    fn gpu(&self, gpu: &Gpu) -> Value {
        let values = gpu.values.as_ref();
        let current = gpu.current();
        let memory = current.and_then(|values| values.memory);
        let processes = current.map_or(&[][..], |values| &values.processes);
        let (owned, orphans): (Vec<&Process>, Vec<&Process>) =
            processes.iter().partition(|process| self.owner(process).is_some());
        let replicas: Vec<Value> = self
            .bindings
            .iter()
            .filter(|(_, binding)| binding.gpus.contains(&gpu.id))
            .map(|(key, binding)| name(key, binding))
            .collect();
        let owned: Vec<Value> = owned
            .into_iter()
            .map(|process| {
                let owner = self.owner(process);
                let mut shown = shown(process);
                shown["pool_id"] = json!(owner.map(|key| &key.pool));
                shown["replica_id"] = json!(owner.map(|key| &key.replica));
                shown
            })
            .collect();
        json!({
            "index": gpu.index,
            "uuid": values.map(|values| &values.uuid),
            "pci_bus_id": gpu.pci().map(|pci| pci.to_string()),
            "name": values.map(|values| &values.name),
            "state": gpu.state().as_str(),
            "reason": Some(gpu.reason()).filter(|reason| !reason.is_empty()),
            "since_ms": gpu.since.unix_ms(),
            "compute_capability": values.and_then(|values| values.compute_capability.as_ref()),
            "memory_total_bytes": memory.map(|memory| memory.total_bytes),
            "memory_used_bytes": memory.map(|memory| memory.used_bytes),
            "memory_free_bytes": memory.map(|memory| memory.free_bytes),
            "utilization_ratio": current.and_then(|v| v.utilization_percent).map(|n| f64::from(n) / 100.0),
            "temperature_celsius": current.and_then(|values| values.temperature_celsius),
            "power_watts": current.and_then(|v| v.power_milliwatts).map(|n| f64::from(n) / 1000.0),
            "mig_enabled": values.and_then(|values| values.mig_enabled),
            "xids": gpu.xids.iter().map(|(n, count)| (n.to_string(), json!(count))).collect::<serde_json::Map<_, _>>(),
            "replicas": replicas,
            "processes": owned,
            "orphans": orphans.into_iter().map(shown).collect::<Vec<_>>(),
        })
    }

    /// The replica to which a process belongs.
    fn owner(&self, process: &Process) -> Option<&ReplicaKey> {
        let owns = |binding: &Binding| binding.pid.is_some_and(|pid| process.descends_from(pid));
        self.bindings.iter().find(|(_, binding)| owns(binding)).map(|(key, _)| key)
    }

    fn why_missing(&self, binding: &Binding) -> String {
        match self.has_answered {
            true => binding.missing.join("; "),
            false => format!("no GPU is known: {}", self.driver.reason),
        }
    }
}

impl Gpu {
    /// What was read last, unless the GPU is gone since.
    pub(super) fn current(&self) -> Option<&super::Values> {
        self.values.as_ref().filter(|_| self.lost.is_none())
    }
}

fn name(key: &ReplicaKey, binding: &Binding) -> Value {
    json!({"pool_id": key.pool, "replica_id": key.replica, "device_mask": binding.mask})
}

fn shown(process: &Process) -> Value {
    json!({"pid": process.pid, "name": process.name, "memory_bytes": process.memory_bytes})
}

fn labels(gpu: &Gpu) -> String {
    format!("gpu=\"{}\",uuid=\"{}\"", gpu.index, label_value(gpu.uuid().unwrap_or("")))
}
