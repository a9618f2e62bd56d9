//! State directories are one daemon's at a time: a second one says who has it and ends, and one that was killed
//! locks nobody out.

#[path = "daemons/harness.rs"]
#[allow(dead_code, reason = "shared with other tests, which use other parts")]
mod harness;

use std::path::Path;

use harness::{ORCHESTRATORD, POOL_MANAGERD, Process, free_port, get, until};

fn start(program: &str, prefix: &str, port: u16, directory: &Path) -> Process {
    let (addr, profile) = (format!("{prefix}_ADDR"), format!("{prefix}_CLOUD_PROFILE"));
    // Agents keep their state in both profiles; in this one they need no control plane.
    let cloud = if program == ORCHESTRATORD { "true" } else { "false" };
    let address = format!("127.0.0.1:{port}");
    Process::start(program, &[], &[(&addr, &address), (&profile, cloud)], directory)
}

#[test]
fn a_state_directory_is_one_daemons_until_that_ends_however_it_does() {
    for (program, prefix, name) in
        [(ORCHESTRATORD, "ORCHESTRATORD", "orchestratord"), (POOL_MANAGERD, "POOL_MANAGERD", "pool-managerd")]
    {
        let directory = tempfile::tempdir().expect("a directory");
        let is_up = |port| until(name, || get(port, "/health").filter(|answer| answer.status == 200));
        let port = free_port();
        let mut first = start(program, prefix, port, directory.path());
        is_up(port);
        let mut second = start(program, prefix, free_port(), directory.path());
        assert_eq!(second.end(), Some(1), "{}", second.log());
        let told = second.log();
        let owner = format!("another {name} (pid {}) keeps its state in .runtime/state", first.pid());
        assert!(told.contains(&owner) && told.contains(&format!("set {prefix}_STATE_DIR")), "{told}");
        // Killed, it could not have tidied up.
        first.kill();
        let port = free_port();
        let _third = start(program, prefix, port, directory.path());
        is_up(port);
    }
}

#[test]
fn without_nodes_there_is_no_state_to_fight_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let ports = [free_port(), free_port()];
    let planes = ports.map(|port| {
        let address = format!("127.0.0.1:{port}");
        Process::start(ORCHESTRATORD, &[], &[("ORCHESTRATORD_ADDR", &address)], directory.path())
    });
    for port in ports {
        until("both", || get(port, "/health").filter(|answer| answer.status == 200));
    }
    drop(planes);
}
