//! How much of each GPU is taken, as a node's agent reads it from the driver.
//!
//! It goes with registrations, heartbeats and answers to polls, beside what the machine has, because it changes
//! all the time and is news for nobody: no message is sent for its sake. A GPU that cannot be read now is left
//! out, and so is the whole list where there is none.

use serde::{Deserialize, Serialize};

/// Most GPUs of a node; machines have up to 16, partitioned ones seven times as many.
pub const GPU_LOADS_MAX: usize = 256;

/// How one GPU is used. What its driver does not tell is absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GpuLoad {
    /// Index, as in a device mask.
    #[serde(default)]
    pub device_id: u32,
    /// Memory, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vram_total_bytes: Option<u64>,
    /// Free memory, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vram_free_bytes: Option<u64>,
    /// Share of time in which it computed, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub utilization_percent: Option<u32>,
    /// Temperature, in degrees Celsius.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature_celsius: Option<u32>,
}

impl GpuLoad {
    /// All of its memory and the free part of it, in bytes, where both are told and fit together.
    #[must_use]
    pub fn memory(&self) -> Option<(u64, u64)> {
        self.vram_total_bytes.zip(self.vram_free_bytes).filter(|(total, free)| *total > 0 && free <= total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::node::{Heartbeat, RegisterRequest};
    use crate::wire::pool::AgentReport;

    #[test]
    fn what_is_not_told_is_not_written() {
        let load = GpuLoad { device_id: 3, utilization_percent: Some(0), ..GpuLoad::default() };
        let text = serde_json::to_string(&load).expect("JSON");
        assert_eq!(text, r#"{"device_id":3,"utilization_percent":0}"#);
        assert_eq!(serde_json::from_str::<GpuLoad>(&text).expect("itself"), load);
    }

    #[test]
    fn messages_without_it_are_what_they_were() {
        let register = r#"{"node_id":"n","address":"http://h:9200"}"#;
        let register: RegisterRequest = serde_json::from_str(register).expect("a registration");
        let beat: Heartbeat = serde_json::from_str(r#"{"pools":[]}"#).expect("a heartbeat");
        let report: AgentReport = serde_json::from_str(r#"{"node_id":"n"}"#).expect("a report");
        assert!(register.gpu_loads.is_empty() && beat.gpu_loads.is_empty() && report.gpu_loads.is_empty());
        for text in [
            serde_json::to_string(&register).expect("JSON"),
            serde_json::to_string(&beat).expect("JSON"),
            serde_json::to_string(&report).expect("JSON"),
        ] {
            assert!(!text.contains("gpu_loads"), "{text}");
        }
    }

    #[test]
    fn memory_that_cannot_be_is_not_told() {
        let of =
            |total, free| GpuLoad { vram_total_bytes: total, vram_free_bytes: free, ..GpuLoad::default() };
        assert_eq!(of(Some(10), Some(0)).memory(), Some((10, 0)));
        for (total, free) in [(Some(10), Some(11)), (Some(0), Some(0)), (None, Some(1)), (Some(1), None)] {
            assert_eq!(of(total, free).memory(), None, "{total:?} {free:?}");
        }
    }
}
