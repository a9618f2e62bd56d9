//! Commands that ask daemons over TLS: `llorch` a control plane and its agents, `engine-provisioner` the agent
//! that it notifies; whom they believe, what they show, and what they say where that is not enough.

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "daemons/harness.rs"]
mod harness;
mod tls_support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use harness::*;
use rustix::process::Signal;
use tls_support::Pki;

const LLORCH: &str = env!("CARGO_BIN_EXE_llorch");
const CA: (&str, &str) = ("LLORCH_TLS_CA", "ca.crt");
const CERT: (&str, &str) = ("LLORCH_TLS_CLIENT_CERT", "operator.crt");
const KEY: (&str, &str) = ("LLORCH_TLS_CLIENT_KEY", "operator.key");

/// A control plane, and an agent that serves nobody without a certificate, in one directory.
struct Installation {
    directory: tempfile::TempDir,
    control: u16,
    agent: u16,
    _daemons: [Process; 2],
}

impl Installation {
    fn start() -> Installation {
        let directory = tempfile::tempdir().expect("a directory");
        let pki = Pki::new();
        for names in [&["control-1", "localhost"][..], &["gpu-1", "localhost"], &["operator"]] {
            pki.issue(names).save(directory.path(), names[0]);
        }
        fs::write(directory.path().join("ca.crt"), &pki.ca_pem).expect("written");
        fs::write(directory.path().join("other.crt"), Pki::new().ca_pem).expect("written");
        let (control, agent) = (free_port(), free_port());
        let addr = [control, agent].map(|port| format!("127.0.0.1:{port}"));
        let url = [control, agent].map(|port| format!("https://localhost:{port}"));
        let orchestratord = [
            ("ORCHESTRATORD_CLOUD_PROFILE", "true"),
            ("ORCHESTRATORD_ADDR", &addr[0]),
            ("ORCHESTRATORD_TLS_CERT", "control-1.crt"),
            ("ORCHESTRATORD_TLS_KEY", "control-1.key"),
            ("ORCHESTRATORD_TLS_CLIENT_CA", "ca.crt"),
            CA,
        ];
        let pool_managerd = [
            ("POOL_MANAGERD_CLOUD_PROFILE", "true"),
            ("POOL_MANAGERD_NODE_ID", "gpu-1"),
            ("POOL_MANAGERD_ADDR", &addr[1]),
            ("POOL_MANAGERD_ADDRESS", &url[1]),
            ("ORCHESTRATORD_URL", &url[0]),
            ("POOL_MANAGERD_TLS_CERT", "gpu-1.crt"),
            ("POOL_MANAGERD_TLS_KEY", "gpu-1.key"),
            ("POOL_MANAGERD_TLS_CLIENT_CA", "ca.crt"),
            CA,
        ];
        let daemons = [
            Process::start(ORCHESTRATORD, &[], &orchestratord, directory.path()),
            Process::start(POOL_MANAGERD, &[], &pool_managerd, directory.path()),
        ];
        Installation { directory, control, agent, _daemons: daemons }
    }

    fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Exit code, and all that was printed.
    fn llorch(&self, words: &[&str], port: u16, env: &[(&str, &str)]) -> (Option<i32>, String) {
        let url = format!("https://localhost:{port}");
        let output = Command::new(LLORCH)
            .args(words)
            .args(["--url", &url])
            .env_clear()
            .envs(env.iter().copied())
            .current_dir(self.directory())
            .stdin(Stdio::null())
            .output()
            .expect("it runs");
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    }

    /// The same until it says something.
    fn until(&self, words: &[&str], port: u16, env: &[(&str, &str)], what: &str) -> String {
        until(what, || {
            let (code, said) = self.llorch(words, port, env);
            (code == Some(0) && said.contains(what)).then_some(said)
        })
    }
}

#[test]
fn llorch_asks_over_tls_and_shows_its_certificate() {
    let installation = Installation::start();
    let (control, agent) = (installation.control, installation.agent);
    let all = [CA, CERT, KEY];
    installation.until(&["status"], control, &[CA], "gpu-1");
    let engine = free_port();
    let _engine = demo_engine(engine, &[], installation.directory());
    hand_over(&installation.directory().join(".runtime/engines"), "r0.json", &handoff(engine, "r0", 2));
    installation.until(&["status"], control, &[CA], "routable");
    installation.until(&["status"], agent, &all, "pool-0");

    // Flags mean the same as variables.
    let flags =
        ["--tls-ca", "ca.crt", "--tls-client-cert", "operator.crt", "--tls-client-key", "operator.key"];
    let (code, said) = installation.llorch(&[&["events"][..], &flags].concat(), agent, &[]);
    assert!(code == Some(0) && said.contains("pool-0/r0"), "{said}");

    // The control plane names the node's address, and that is asked with the certificate.
    let (code, said) = installation.llorch(&["drain", "pool", "pool-0"], control, &all);
    assert!(code == Some(0) && said.contains("drained"), "{said}");
    let (code, said) = installation.llorch(&["resume", "pool", "pool-0"], control, &all);
    assert!(code == Some(0), "{said}");
    installation.until(&["status"], control, &[CA], "routable");
}

#[test]
fn llorch_says_what_is_missing() {
    let installation = Installation::start();
    let (control, agent) = (installation.control, installation.agent);
    installation.until(&["status"], control, &[CA], "gpu-1");
    let other = ("LLORCH_TLS_CA", "other.crt");
    let nowhere = ("LLORCH_TLS_CA", "nowhere.crt");
    let half = ("LLORCH_TLS_CLIENT_KEY", "gpu-1.key");
    for (port, env, code, why) in [
        (control, &[other][..], 4, "LLORCH_TLS_CA names the root"),
        (control, &[nowhere], 78, "LLORCH_TLS_CA=nowhere.crt: cannot be read"),
        (agent, &[CA], 5, "LLORCH_TLS_CLIENT_CERT"),
        (agent, &[CA, CERT], 78, "LLORCH_TLS_CLIENT_KEY is not"),
        (agent, &[CA, CERT, half], 78, "does not belong to the key in LLORCH_TLS_CLIENT_KEY=gpu-1.key"),
    ] {
        let (found, said) = installation.llorch(&["status"], port, env);
        assert!(found == Some(code) && said.contains(why), "{env:?}: {found:?} {said}");
        assert_eq!(said.trim_end().lines().count(), 1, "{said}");
    }
    let clear = format!("http://localhost:{control}");
    let output = Command::new(LLORCH).args(["status", "--url", &clear]).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("https"), "{said}");
}

#[test]
fn the_provisioner_notifies_and_asks_over_tls() {
    let installation = Installation::start();
    let all = [CA, CERT, KEY];
    installation.until(&["status"], installation.agent, &all, "gpu-1");
    let url = format!("https://localhost:{}", installation.agent);
    let words = [
        "run",
        "--handoff-dir=elsewhere",
        "--pool=far",
        "--notify",
        &url,
        "--pool-managerd",
        &url,
        "--",
        LLORCH,
        "demo-engine",
        "--port",
        "{port}",
    ];
    let program = env!("CARGO_BIN_EXE_engine-provisioner");
    let mut provisioner = Process::start(program, &words, &all, installation.directory());
    installation.until(&["status"], installation.control, &[CA], "far/r0");
    installation.until(&["status"], installation.control, &[CA], "routable");
    // Without a certificate of its own it would wait for what it cannot be told.
    provisioner.signal(Signal::TERM);
    assert_eq!(provisioner.end(), Some(0), "{}", provisioner.log());
    assert!(!provisioner.log().contains("WARN"), "{}", provisioner.log());
    until("the replica to be gone", || {
        let (code, said) = installation.llorch(&["status"], installation.control, &[CA]);
        (code == Some(0) && !said.contains("far/r0")).then_some(())
    });
}
