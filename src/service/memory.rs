//! What a daemon may hold of other people's bytes, so that all of it fits into the memory that it is given. Pure,
//! but for one function that asks the kernel.
//!
//! Four things grow with what peers do: connections, the bodies of requests (with what has come of their heads),
//! exchanges with engines, whose two directions are buffered, and all else that has a limit of its own: tables,
//! queues, the program itself. Their limits are known, so the sum is too:
//!
//! ```text
//! memory * 7/8  >=  fixed + connections * bytes each + bodies + exchanges * bytes each
//! ```
//!
//! An eighth is left to the allocator and to what nobody counts. Where the sum is larger, limits are lowered:
//! a quarter of what is left beside the fixed part is for connections, a quarter for bodies, and exchanges have
//! the rest. What then finds no room is refused with 503, which is better than the kernel's choice of what to
//! kill. Where not even the least fits, the daemon does not start.

use std::fmt;
use std::path::Path;

use crate::net::Limits;
use crate::net::budget::{SMALL_BODY_BYTES, large_share};
use crate::settings::{Exit, Setting, Settings};

/// One connection in the clear, its buffers at rest: 3 KiB were measured, and the kernel's part, which counts
/// for a control group, is as much again.
pub const CONNECTION_BYTES: usize = 8 * 1024;
/// What TLS adds: 9 KiB at rest, 10 KiB during the handshake.
pub const TLS_BYTES: usize = 12 * 1024;
/// One exchange: 64 KiB a direction, and two heads of 32 KiB in part.
pub const EXCHANGE_BYTES: usize = 160 * 1024;
/// Least of connections and of exchanges with which a daemon is of any use.
const COUNT_MIN: usize = 16;
/// Least room for bodies: some heartbeats or chats at once.
const BODIES_MIN_BYTES: usize = 16 * SMALL_BODY_BYTES;

/// `--memory-max`.
#[must_use]
pub const fn setting(env: &'static str) -> Setting {
    Setting {
        flag: "memory-max",
        env,
        aliases: &[],
        default: None,
        value: "BYTES",
        help: "Memory to get by with, such as 512M or 2G: limits are lowered until all fits, and what finds no room is refused with 503; max for no limit; that of the control group if absent",
    }
}

/// The memory that a daemon is given, in bytes, and who says so; `None` where nobody does.
///
/// # Errors
/// [`Exit`] for a bad value.
pub fn given(settings: &Settings) -> Result<Option<Given>, Exit> {
    Ok(match settings.get("memory-max", bytes)? {
        Some(given) => given.map(|bytes| Given { bytes, by: "--memory-max" }),
        None => {
            let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
            let bytes = of_control_group(&groups, Path::new("/sys/fs/cgroup"));
            bytes.map(|bytes| Given { bytes, by: "the control group" })
        }
    })
}

/// Memory that was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Given {
    /// In bytes.
    pub bytes: usize,
    /// Who says so.
    pub by: &'static str,
}

/// `512M`, `2G`, a number of bytes, or `max`.
fn bytes(text: &str) -> Result<Option<usize>, String> {
    if text == "max" {
        return Ok(None);
    }
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = Some(digits).filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
    let number = number.and_then(|digits| digits.parse::<usize>().ok()?.checked_mul(1 << shift));
    number
        .map(Some)
        .ok_or_else(|| "allowed is a number of bytes, also with K, M or G behind it, or max".into())
}

/// The least limit on memory of a process's control groups, as `/proc/self/cgroup` lists them, and of those around
/// them. Of version 2, and of version 1, which names its controllers and writes a very large number for no limit.
fn of_control_group(groups: &str, root: &Path) -> Option<usize> {
    const NO_LIMIT: usize = 1 << 60;
    let of_line = |line: &str| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?.trim_start_matches('/'));
        let (root, file) = match controllers {
            "" => (root.to_path_buf(), "memory.max"),
            _ if controllers.split(',').any(|name| name == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let limit =
            |group: &Path| std::fs::read_to_string(root.join(group).join(file)).ok()?.trim().parse().ok();
        Path::new(path).ancestors().filter_map(limit).min()
    };
    groups.lines().filter_map(of_line).filter(|bytes| *bytes < NO_LIMIT).min()
}

/// What counts beside [`Limits`].
#[derive(Clone, Copy, Debug)]
pub struct Fixed {
    /// The program, its tables and its queues, in bytes.
    pub bytes: usize,
    /// Clients speak TLS.
    pub tls: bool,
}

/// What all of it may take, by part, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sum {
    fixed: usize,
    clients: usize,
    client_bytes: usize,
    bodies: usize,
    exchanges: usize,
}

impl Sum {
    /// What these limits come to.
    #[must_use]
    pub fn of(limits: &Limits, fixed: Fixed) -> Sum {
        Sum {
            fixed: fixed.bytes,
            clients: limits.clients_max,
            client_bytes: CONNECTION_BYTES + if fixed.tls { TLS_BYTES } else { 0 },
            bodies: limits.bodies_bytes_max,
            exchanges: limits.exchanges_max,
        }
    }

    /// In bytes.
    #[must_use]
    pub fn total(&self) -> usize {
        let each = self.clients.saturating_mul(self.client_bytes);
        let exchanges = self.exchanges.saturating_mul(EXCHANGE_BYTES);
        self.fixed.saturating_add(each).saturating_add(self.bodies).saturating_add(exchanges)
    }
}

impl fmt::Display for Sum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} MiB for program and tables + {} connections of {} KiB + {} MiB for bodies + {} exchanges of {} KiB = {} MiB",
            self.fixed >> 20,
            self.clients,
            self.client_bytes >> 10,
            self.bodies >> 20,
            self.exchanges,
            EXCHANGE_BYTES >> 10,
            self.total().div_ceil(1 << 20)
        )
    }
}

/// Lowers `limits` until they fit. Returns what to say of that, if anything was lowered.
///
/// # Errors
/// [`Exit`] with the sum where not even the least fits.
pub fn fit(limits: &mut Limits, fixed: Fixed, given: Option<Given>) -> Result<Option<String>, Exit> {
    let Some(Given { bytes, by }) = given else { return Ok(None) };
    let usable = bytes / 8 * 7;
    let wanted = Sum::of(limits, fixed);
    if wanted.total() <= usable {
        return Ok(None);
    }
    let least = Sum { clients: COUNT_MIN, bodies: BODIES_MIN_BYTES, exchanges: COUNT_MIN, ..wanted };
    let left = usable.saturating_sub(fixed.bytes);
    // Each part gets its quarter at least, so the quarters must hold the least too.
    let most = (least.clients * least.client_bytes).max(least.bodies).max(least.exchanges * EXCHANGE_BYTES);
    if usable < least.total() || left / 4 < most {
        let needed = fixed.bytes.saturating_add(4 * most).max(least.total()).div_ceil(7).saturating_mul(8);
        return Err(Exit::config(format!(
            "{by} gives {} MiB of memory, and at least {} MiB are needed: {least}, at most 7/8 of what is given, and a quarter of what is left beside the first part for each of the others; give more, or set --memory-max=max to go without limits",
            bytes >> 20,
            needed.div_ceil(1 << 20)
        )));
    }
    limits.clients_max = limits.clients_max.min(left / 4 / wanted.client_bytes);
    limits.bodies_bytes_max = limits.bodies_bytes_max.min(left / 4);
    limits.body_bytes_max = limits.body_bytes_max.min(large_share(limits.bodies_bytes_max));
    let others = limits.clients_max * wanted.client_bytes + limits.bodies_bytes_max;
    limits.exchanges_max = limits.exchanges_max.min((left - others) / EXCHANGE_BYTES);
    let fitted = Sum::of(limits, fixed);
    Ok(Some(format!(
        "limits are lowered to fit into 7/8 of the {} MiB that {by} gives, from {wanted}, to {fitted}; the largest body is {} KiB",
        bytes >> 20,
        limits.body_bytes_max >> 10
    )))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FIXED: Fixed = Fixed { bytes: 24 << 20, tls: false };

    fn by(bytes: usize) -> Option<Given> {
        Some(Given { bytes, by: "a test" })
    }

    #[test]
    fn values_are_read_as_systemd_writes_them() {
        assert_eq!(bytes("max"), Ok(None));
        for (text, expected) in [("4096", 4096), ("64K", 64 << 10), ("256M", 256 << 20), ("2g", 2 << 30)] {
            assert_eq!(bytes(text), Ok(Some(expected)));
        }
        for text in ["", "M", "-1", "+1M", "1.5G", "1T", "99999999999999999999", "18446744073709551615G"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_control_group_that_gives_least_counts() {
        let root = tempfile::tempdir().expect("a directory");
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
            std::fs::write(path, format!("{text}\n")).expect("written");
        };
        let of = |groups: &str| of_control_group(groups, root.path());
        assert_eq!(of("0::/a.slice/b.service\n"), None, "nothing is mounted");
        write("a.slice/b.service/memory.max", "max");
        assert_eq!(of("0::/a.slice/b.service\n"), None);
        write("a.slice/memory.max", "536870912");
        assert_eq!(of("0::/a.slice/b.service\n"), Some(512 << 20), "of the one around it");
        write("a.slice/b.service/memory.max", "268435456");
        assert_eq!(of("0::/a.slice/b.service\n"), Some(256 << 20));
        // Within a container the path is the host's, and its own group is mounted at the top.
        write("memory.max", "134217728");
        assert_eq!(of("0::/docker/1f\n"), Some(128 << 20));
        write("memory/docker/2f/memory.limit_in_bytes", "9223372036854771712");
        let version_1 = "9:name=systemd:/x\n4:cpu,memory:/docker/2f\n2:memoryless:/docker\n";
        assert_eq!(of(version_1), None, "no limit");
        write("memory/docker/memory.limit_in_bytes", "1048576");
        assert_eq!(of(version_1), Some(1 << 20));
        for nonsense in ["", "0", "0:", "::", "0::\n\n", "x:y:z"] {
            let found = of(nonsense);
            assert!(found.is_none_or(|bytes| bytes == 128 << 20), "{nonsense:?}: {found:?}");
        }
    }

    #[test]
    fn what_fits_is_left_alone_and_the_least_is_named() {
        let mut limits = Limits::default();
        assert_eq!(fit(&mut limits, FIXED, None), Ok(None));
        assert_eq!(fit(&mut limits, FIXED, by(16 << 30)), Ok(None));
        let exit = fit(&mut limits, FIXED, by(30 << 20)).expect_err("not enough");
        assert_eq!(exit.code, 78);
        for part in ["30 MiB", "24 MiB for program", "16 connections of 8 KiB", "16 exchanges of 160 KiB"] {
            assert!(exit.message.contains(part), "{part}: {exit}");
        }
        assert_eq!((limits.clients_max, limits.exchanges_max), (24_576, 24_576), "a refusal changes nothing");
    }

    proptest! {
        /// Whatever is given: all fits, something is left of everything, and more memory never means less.
        #[test]
        fn the_sum_never_passes_what_is_given(
            mib in 1usize..8192, more in 0usize..1024, fixed in 1usize..64, tls in any::<bool>(),
        ) {
            let fixed = Fixed { bytes: fixed << 20, tls };
            let fitted = |mib: usize| {
                let mut limits = Limits::default();
                fit(&mut limits, fixed, by(mib << 20)).map(|said| (limits, said))
            };
            let Ok((limits, said)) = fitted(mib) else { return Ok(()) };
            prop_assert!(Sum::of(&limits, fixed).total() <= (mib << 20) / 8 * 7);
            prop_assert!(limits.clients_max >= COUNT_MIN && limits.exchanges_max >= COUNT_MIN);
            prop_assert!(limits.bodies_bytes_max >= BODIES_MIN_BYTES);
            prop_assert!(limits.body_bytes_max <= large_share(limits.bodies_bytes_max));
            prop_assert_eq!(said.is_none(), limits.exchanges_max == Limits::default().exchanges_max);
            let (larger, _) = fitted(mib + more).expect("more is enough too");
            prop_assert!(larger.clients_max >= limits.clients_max);
            prop_assert!(larger.bodies_bytes_max >= limits.bodies_bytes_max);
        }

        /// What is said to be needed is enough.
        #[test]
        fn the_least_is_enough(fixed in 1usize..256, tls in any::<bool>()) {
            let fixed = Fixed { bytes: fixed << 20, tls };
            let exit = fit(&mut Limits::default(), fixed, by(1 << 20)).expect_err("1 MiB is nothing");
            let needed = exit.message.split("at least ").nth(1).expect("a number");
            let mib: usize = needed.split(' ').next().expect("a number").parse().expect("a number");
            prop_assert!(fit(&mut Limits::default(), fixed, by(mib << 20)).is_ok(), "{}", exit);
        }
    }
}
