//! A control plane with engines beside it (HOME) or behind a node's agent (CLOUD), for tests that must see
//! the same in both.

use std::path::PathBuf;

use crate::harness::{ORCHESTRATORD, POOL_MANAGERD, Process, free_port, get, hand_over, metric, until};

pub(crate) struct Plane {
    pub(crate) port: u16,
    pub(crate) control: Process,
    pub(crate) agent: Option<Process>,
    pub(crate) agent_port: u16,
    pub(crate) directory: tempfile::TempDir,
}

impl Plane {
    pub(crate) fn start(cloud: bool, env: &[(&str, &str)]) -> Plane {
        let directory = tempfile::tempdir().expect("a directory");
        let port = free_port();
        let address = format!("127.0.0.1:{port}");
        let profile = if cloud { "true" } else { "false" };
        let own = [("ORCHESTRATORD_ADDR", address.as_str()), ("ORCHESTRATORD_CLOUD_PROFILE", profile)];
        let control = Process::start(ORCHESTRATORD, &[], &[&own[..], env].concat(), directory.path());
        let ready = || get(port, "/health").filter(|answer| answer.status == 200);
        until("orchestratord", ready);
        let agent_port = free_port();
        let agent = cloud.then(|| {
            let (addr, url) = (format!("127.0.0.1:{agent_port}"), format!("http://127.0.0.1:{port}"));
            let address = format!("http://{addr}");
            let env = [
                ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
                ("POOL_MANAGERD_NODE_ID", "node"),
                ("POOL_MANAGERD_ADDRESS", &address),
                ("ORCHESTRATORD_URL", &url),
                ("POOL_MANAGERD_ADDR", &addr),
            ];
            let agent = Process::start(POOL_MANAGERD, &[], &env, directory.path());
            until("the agent", || get(agent_port, "/health").filter(|answer| answer.status == 200));
            agent
        });
        Plane { port, control, agent, agent_port, directory }
    }

    /// Announces a replica that serves a model of its own name.
    pub(crate) fn announce(&self, name: &str, url: &str, slots: u32) {
        let text = format!(
            r#"{{"pool_id":"pool-0","replica_id":"{name}","url":"{url}","slots":{slots},"model":"{name}"}}"#
        );
        hand_over(&self.engines(), &format!("{name}.json"), &text);
    }

    pub(crate) fn engines(&self) -> PathBuf {
        self.directory.path().join(".runtime/engines")
    }

    /// Waits until so many replicas take work.
    pub(crate) fn until_routable(&self, count: usize) {
        let ready = || metric(self.port, "orchestratord_replicas_routable").filter(|n| *n == count as f64);
        until("replicas", ready);
    }

    /// Waits until so many slots are free.
    pub(crate) fn until_free(&self, slots: usize) {
        until("free slots", || metric(self.port, "orchestratord_slots_free").filter(|n| *n == slots as f64));
    }
}
