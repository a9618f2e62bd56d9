//! What a daemon reads of its machine once, at start: host name, boot, addresses, size.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::wire::node::Capabilities;

/// Where handoffs are unless somebody says otherwise, from where a program was started.
pub const RUNTIME_DIR: &str = ".runtime/engines";
/// Where they are on a machine that the package was installed on: what its units name.
const RUNTIME_DIR_OF_PACKAGE: &str = "/run/llama-orch/engines";

/// Where commands look for handoffs, and write them, if nobody says otherwise: [`RUNTIME_DIR`], or the
/// package's directory where that is there and the other one is not.
#[must_use]
pub fn runtime_dir() -> PathBuf {
    let (own, package) = (Path::new(RUNTIME_DIR), Path::new(RUNTIME_DIR_OF_PACKAGE));
    if !own.is_dir() && package.is_dir() { package.into() } else { own.into() }
}

/// The host name, `unknown-node` where there is none.
#[must_use]
pub fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().trim().to_string();
    if name.is_empty() { "unknown-node".into() } else { name }
}

/// The kernel's id of this boot.
#[must_use]
pub fn boot_id() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_string())
}

/// Whether `pid` has ended but was not reaped yet, and when it started, in clock ticks after boot.
#[must_use]
pub fn process(pid: u32) -> Option<(bool, u64)> {
    state_and_start(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 3 (zombie or not) and 22 of `/proc/PID/stat`. Field 2, the program's name in parentheses,
/// may hold blanks and parentheses itself, so counting starts at its last one.
fn state_and_start(stat: &str) -> Option<(bool, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let zombie = fields.next()? == "Z";
    Some((zombie, fields.nth(18)?.parse().ok()?))
}

/// The pid namespace of this process, by its inode: pids mean something within one only.
#[must_use]
pub fn pid_namespace() -> Option<u64> {
    fs::metadata("/proc/self/ns/pid").ok().map(|namespace| namespace.ino())
}

/// Processors and memory; GPUs are read elsewhere.
#[must_use]
pub fn capabilities() -> Capabilities {
    let memory = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    let cores = std::thread::available_parallelism().ok().and_then(|n| u32::try_from(n.get()).ok());
    Capabilities { gpus: Vec::new(), cpu_cores: cores, ram_total_bytes: memory.map(|kib| kib * 1024) }
}

/// Resident memory from the kernel's count of pages.
#[must_use]
pub fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// Ports of which free ones are chosen, where the kernel does not say which it gives to outgoing connections.
const FREE_PORTS: Range<u16> = 15_000..32_768;
/// Lowest port that is chosen: below are those of well-known services.
const FREE_PORT_MIN: u16 = 10_000;
/// Fewest ports to choose from that are worth it.
const FREE_PORTS_LEN_MIN: usize = 1_000;
/// Random ports that are tried before the kernel is asked for any.
const FREE_PORT_ATTEMPTS: usize = 64;

/// Listens on a free port of this machine's loopback, for a program that is told the port and listens
/// there in its turn.
///
/// # Errors
/// Where not even the kernel has one.
pub fn listen_on_free_port() -> io::Result<TcpListener> {
    let listen = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let outgoing = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let ports = free_ports(&outgoing);
    let mut chosen = (0..FREE_PORT_ATTEMPTS).map(|_| fastrand::u16(ports.clone()));
    chosen.find_map(|port| listen(port).ok()).map_or_else(|| listen(0), Ok)
}

/// Ports that no outgoing connection gets: one could otherwise take a port between its being chosen and its
/// being listened on by somebody else. `outgoing`: the kernel's range, "32768 60999" by default.
fn free_ports(outgoing: &str) -> Range<u16> {
    let mut bounds = outgoing.split_whitespace().map(str::parse::<u16>);
    let (Some(Ok(low)), Some(Ok(high))) = (bounds.next(), bounds.next()) else { return FREE_PORTS };
    let (below, above) = (FREE_PORT_MIN..low, high.saturating_add(1).max(FREE_PORT_MIN)..u16::MAX);
    let longer = if below.len() >= above.len() { below } else { above };
    if longer.len() >= FREE_PORTS_LEN_MIN { longer } else { FREE_PORTS }
}

/// Raises the soft limit on open descriptors to the hard one: a connection needs one, a relayed
/// request two, and the usual soft limit is 1,024. Returns the limit in force.
pub fn raise_descriptor_limit() -> Option<u64> {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        // A refusal leaves the old limit, with which everything works, only less of it.
        let _ = setrlimit(Resource::Nofile, limit);
    }
    getrlimit(Resource::Nofile).current
}

/// Descriptors that the kernel's table has room for from the start: 128 KiB of it. Beyond that each
/// doubling costs a pause, as [`prepare_descriptors`] says.
const DESCRIPTORS_PREPARED: u64 = 16 * 1024;

/// Makes the kernel's table of this process's descriptors large at once. It doubles while descriptors are
/// opened, and in a process with several threads each doubling waits until every processor has passed
/// through the scheduler: an `open` in the loop that takes 10 ms. To be called while there is one thread.
pub fn prepare_descriptors(limit: Option<u64>) {
    let most = limit.unwrap_or(u64::MAX).min(DESCRIPTORS_PREPARED);
    let last = i32::try_from(most.saturating_sub(1)).unwrap_or(i32::MAX);
    // Where it is refused the table grows later. The descriptor is closed at once, the room stays.
    let _ = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stderr(), last);
}

/// This machine's own addresses, from the kernel's tables.
#[must_use]
pub fn own_addresses() -> Vec<IpAddr> {
    let v4 = fs::read_to_string("/proc/net/fib_trie").unwrap_or_default();
    let v6 = fs::read_to_string("/proc/net/if_inet6").unwrap_or_default();
    let mut found: Vec<IpAddr> = local_v4(&v4).map(IpAddr::V4).collect();
    found.extend(local_v6(&v6).map(IpAddr::V6));
    found.sort_unstable();
    found.dedup();
    found
}

/// In `fib_trie` a leaf `|-- ADDRESS` is followed by the lines of its routes; `/32 host LOCAL` marks
/// an address of this machine.
fn local_v4(text: &str) -> impl Iterator<Item = Ipv4Addr> {
    let mut leaf = None;
    text.lines().filter_map(move |line| {
        let line = line.trim();
        if let Some(address) = line.strip_prefix("|-- ") {
            leaf = address.parse().ok();
            return None;
        }
        if line == "/32 host LOCAL" { leaf } else { None }
    })
}

fn local_v6(text: &str) -> impl Iterator<Item = Ipv6Addr> {
    text.lines()
        .filter_map(|line| u128::from_str_radix(line.split_whitespace().next()?, 16).ok())
        .map(Ipv6Addr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_ticks_are_found_behind_any_program_name() {
        let tail = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 987654 20 21";
        for name in ["(sh)", "(a b)", "(evil) S 1 2 3)", "())"] {
            assert_eq!(state_and_start(&format!("42 {name} {tail}")), Some((false, 987_654)), "{name}");
        }
        let dead = format!("42 (sh) {}", tail.replacen('S', "Z", 1));
        assert_eq!(state_and_start(&dead), Some((true, 987_654)));
        for broken in ["", "42", "42 (sh", "42 (sh) S 1 2"] {
            assert_eq!(state_and_start(broken), None, "{broken:?}");
        }
        assert_eq!(process(std::process::id()).map(|(zombie, _)| zombie), Some(false));
    }

    #[test]
    fn kernel_tables_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 10.0.0.0\n        /24 link UNICAST\n     |-- 10.0.0.7\n        /32 host LOCAL\n     |-- 10.0.0.255\n        /32 link BROADCAST\n";
        assert_eq!(local_v4(trie).collect::<Vec<_>>(), [Ipv4Addr::new(10, 0, 0, 7)]);
        let v6 = "00000000000000000000000000000001 01 80 10 80       lo\n";
        assert_eq!(local_v6(v6).collect::<Vec<_>>(), [Ipv6Addr::LOCALHOST]);
    }
    #[test]
    fn free_ports_are_none_that_outgoing_connections_get() {
        for (outgoing, ports) in [
            ("32768\t60999\n", 10_000..32_768),
            ("16000 65535", 10_000..16_000),
            ("1024 30000", 30_001..65_535),
            ("1024 65535", FREE_PORTS),
            ("60000 65535", 10_000..60_000),
            ("", FREE_PORTS),
            ("32768", FREE_PORTS),
            ("a b", FREE_PORTS),
        ] {
            assert_eq!(free_ports(outgoing), ports, "{outgoing:?}");
        }
    }
}
