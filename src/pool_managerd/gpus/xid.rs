//! XIDs: how the NVIDIA driver tells, in the kernel's log and through NVML, that something went wrong
//! on a GPU. Pure.
//!
//! ```text
//! 4,1234,98765,-;NVRM: Xid (PCI:0000:65:00): 79, pid=17, name=engine, GPU has fallen off the bus.
//! ```
//!
//! Some of them are a program's own mistakes (a wild pointer, a killed process); they leave the GPU
//! sound. All others are taken as a fault of the GPU. What follows from that is decided one level up.

use std::fmt;

/// Longest detail of an XID that is shown, in characters: enough for the driver's own sentence.
const DETAIL_CHARS_MAX: usize = 200;
/// XIDs taken from one record: a record is one line of the kernel's log, more are a flood.
const XIDS_PER_RECORD_MAX: usize = 64;
/// What a line of the driver about an XID contains.
const MARK: &str = "NVRM: Xid (";
/// XIDs that a program causes, as NVIDIA's own device plugin for Kubernetes counts them.
const APPLICATION: [u32; 6] = [13, 31, 43, 45, 68, 109];
/// The XID that only says which recovery the driver now recommends.
const RECOVERY_ACTION_CHANGED: u32 = 154;

/// Where a GPU sits on the PCI bus. Its function is always 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pci {
    /// PCI domain.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device.
    pub device: u8,
}

impl Pci {
    /// Reads `0000:65:00`, `00000000:65:00.0` and `PCI:0000:65:00`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Pci> {
        let text = text.trim().strip_prefix("PCI:").unwrap_or(text.trim());
        let mut parts = text.split('.').next()?.split(':');
        let (domain, bus, device) = (parts.next()?, parts.next()?, parts.next()?);
        let pci = Pci {
            domain: u32::from_str_radix(domain, 16).ok()?,
            bus: u8::from_str_radix(bus, 16).ok()?,
            device: u8::from_str_radix(device, 16).ok()?,
        };
        parts.next().is_none().then_some(pci)
    }
}

impl fmt::Display for Pci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}", self.domain, self.bus, self.device)
    }
}

/// Who told of an XID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The kernel's log.
    KernelLog,
    /// An event of NVML.
    Nvml,
}

/// One XID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xid {
    /// The GPU.
    pub pci: Pci,
    /// Its number in NVIDIA's catalogue.
    pub number: u32,
    /// What the driver says beside the number; empty from NVML.
    pub detail: String,
    /// Who told.
    pub source: Source,
}

/// What an XID says about its GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// A program's mistake; the GPU is sound.
    Application,
    /// No error at all.
    Information,
    /// The GPU cannot be relied on.
    Fault,
}

impl Class {
    /// Every class, in the order of the metrics.
    pub const ALL: [Class; 3] = [Class::Application, Class::Information, Class::Fault];

    /// The class as metrics and the API spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Application => "application",
            Class::Information => "information",
            Class::Fault => "fault",
        }
    }
}

impl Xid {
    /// What it says about its GPU.
    #[must_use]
    pub fn class(&self) -> Class {
        match self.number {
            number if APPLICATION.contains(&number) => Class::Application,
            // "... changed from 0x1 (GPU Reset Required) to 0x0 (None)".
            RECOVERY_ACTION_CHANGED if self.detail.contains("to 0x0 (None)") => Class::Information,
            _ => Class::Fault,
        }
    }
}

/// `XID 79 (the GPU has fallen off the bus)`
impl fmt::Display for Xid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match meaning(self.number) {
            Some(meaning) => write!(f, "XID {} ({meaning})", self.number),
            None => write!(f, "XID {}", self.number),
        }
    }
}

/// What the commonest numbers of NVIDIA's catalogue mean.
fn meaning(number: u32) -> Option<&'static str> {
    Some(match number {
        13 => "graphics engine exception",
        31 => "GPU memory page fault",
        43 => "the GPU stopped processing a program's work",
        45 => "cleanup after a program ended early",
        48 => "double-bit ECC error",
        61 | 62 => "the GPU's micro-controller halted",
        63 => "memory row remapped or page retired",
        64 => "memory row could not be remapped or page retired",
        68 => "video decoder exception",
        69 => "graphics engine class error",
        74 => "NVLink error",
        79 => "the GPU has fallen off the bus",
        92 => "high rate of single-bit ECC errors",
        94 => "contained ECC error",
        95 => "uncontained ECC error",
        109 => "context switch timeout",
        119 => "the GPU's system processor does not answer",
        120 => "error in the GPU's system processor",
        140 => "ECC error that was not recovered from",
        RECOVERY_ACTION_CHANGED => "the driver recommends a recovery",
        _ => return None,
    })
}

/// The XIDs that a record of the kernel's log tells of; none for a record about something else.
/// Several lines may stand in one record.
#[must_use]
pub fn parse(record: &[u8]) -> Vec<Xid> {
    let lines = record.split(|byte| *byte == b'\n').filter(|line| line.len() > MARK.len());
    lines.filter_map(|line| parse_line(&String::from_utf8_lossy(line))).take(XIDS_PER_RECORD_MAX).collect()
}

fn parse_line(line: &str) -> Option<Xid> {
    let (_, rest) = line.split_once(MARK)?;
    let (pci, rest) = rest.split_once(')')?;
    let rest = rest.strip_prefix(':')?.trim_start();
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = rest.split_at(digits);
    if !rest.chars().next().is_none_or(|c| c == ',' || c.is_whitespace()) {
        return None;
    }
    let detail = rest.trim_start_matches(',').trim().chars().filter(|c| !c.is_control());
    Some(Xid {
        pci: Pci::parse(pci)?,
        number: number.parse().ok()?,
        detail: detail.take(DETAIL_CHARS_MAX).collect(),
        source: Source::KernelLog,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(line: &str) -> Xid {
        let mut found = parse(line.as_bytes());
        assert_eq!(found.len(), 1, "{line}: {found:?}");
        found.remove(0)
    }

    #[test]
    fn the_drivers_lines_are_read() {
        let lost = one(
            "4,1201,98765432,-;NVRM: Xid (PCI:0000:65:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.\n SUBSYSTEM=pci\n DEVICE=+pci:0000:65:00.0\n",
        );
        assert_eq!((lost.pci, lost.number), (Pci { domain: 0, bus: 0x65, device: 0 }, 79));
        assert_eq!(lost.detail, "pid='<unknown>', name=<unknown>, GPU has fallen off the bus.");
        assert_eq!(lost.to_string(), "XID 79 (the GPU has fallen off the bus)");
        let old = one("NVRM: Xid (0000:03:00): 14, Channel 00000001");
        assert_eq!((old.pci.bus, old.number, old.detail.as_str()), (3, 14, "Channel 00000001"));
        let grace = one("6,1,2,-;[x] NVRM: Xid (PCI:0009:01:00.0): 31");
        assert_eq!((grace.pci.to_string().as_str(), grace.number), ("0009:01:00", 31));
        let two = parse(b"NVRM: Xid (PCI:0:1:0): 31, a\nnothing\nNVRM: Xid (PCI:0:2:0): 48, b\n");
        assert_eq!(two.iter().map(|xid| xid.number).collect::<Vec<_>>(), [31, 48]);
    }

    #[test]
    fn other_lines_are_not() {
        for line in [
            "NVRM: GPU at PCI:0000:65:00: GPU-b850f46d",
            "NVRM: Xid (PCI:0000:65:00) 79, x",
            "NVRM: Xid (PCI:0000:65:00): 79x",
            "NVRM: Xid (PCI:0000:65:00): , x",
            "NVRM: Xid (PCI:0000:65:00): 99999999999",
            "NVRM: Xid (PCI:0000:65): 79",
            "NVRM: Xid (PCI:0000:65:00:00:1): 79",
            "NVRM: Xid (PCI:0000:165:00): 79",
            "NVRM: Xid (",
            "",
        ] {
            assert_eq!(parse(line.as_bytes()), [], "{line}");
        }
    }

    #[test]
    fn a_programs_mistakes_are_told_from_the_gpus() {
        let xid = |number, detail: &str| Xid {
            pci: Pci { domain: 0, bus: 1, device: 0 },
            number,
            detail: detail.into(),
            source: Source::Nvml,
        };
        for number in [13, 31, 43, 45, 68, 109] {
            assert_eq!(xid(number, "").class(), Class::Application, "{number}");
        }
        for number in [48, 63, 64, 74, 79, 94, 95, 119, 120, 999] {
            assert_eq!(xid(number, "").class(), Class::Fault, "{number}");
        }
        let worse = "GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)";
        let better = "GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)";
        assert_eq!(xid(154, worse).class(), Class::Fault);
        assert_eq!(xid(154, better).class(), Class::Information);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_without_panic_and_within_limits(
            parts in proptest::collection::vec(proptest::prop_oneof![
                proptest::collection::vec(proptest::num::u8::ANY, 0..20),
                proptest::sample::select(vec![
                    b"NVRM: Xid (".to_vec(), b"PCI:0000:65:00".to_vec(), b"): ".to_vec(), b"79".to_vec(),
                    b", ".to_vec(), b"\n".to_vec(), "\u{e4}".as_bytes().to_vec(),
                ]),
            ], 0..60),
        ) {
            for xid in parse(&parts.concat()) {
                proptest::prop_assert!(xid.detail.chars().count() <= DETAIL_CHARS_MAX);
                proptest::prop_assert!(!xid.detail.contains(char::is_control));
            }
        }

        #[test]
        fn what_the_driver_writes_comes_back(domain in 0u32..0x10000, bus: u8, device in 0u8..32, number in 0u32..1000) {
            let pci = Pci { domain, bus, device };
            let found = parse(format!("3,1,2,-;NVRM: Xid (PCI:{pci}): {number}, pid=1, x").as_bytes());
            proptest::prop_assert_eq!(found.len(), 1);
            proptest::prop_assert_eq!((found[0].pci, found[0].number), (pci, number));
        }
    }
}
