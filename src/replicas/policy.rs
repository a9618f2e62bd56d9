//! Which hosts an engine URL may name.
//!
//! Whoever can write a handoff decides where prompts go, so by default a URL may only name this
//! machine: loopback or one of its own addresses. The operator may allow more, by host name or CIDR.
//! Some targets stay refused whatever is allowed, because no engine lives there: unspecified and
//! multicast addresses, link-local ones (cloud metadata services), and our own port, which would be
//! a relay loop.
//!
//! A host name is judged as it is written. Once it is resolved, [`EnginePolicy::check_address`]
//! holds the address against the rules that know no exception.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::wire::url::BaseUrl;

/// Most entries of an allow list: every handoff is held against all of them.
pub const ALLOW_ENTRIES_MAX: usize = 256;

/// AWS's metadata service over IPv6: a unique local address that a wide allow list would cover.
const METADATA_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

/// Hosts and networks that are allowed beside this machine itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList(Vec<Allowed>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Allowed {
    /// Lower case.
    Host(String),
    /// Network address and prefix length in bits.
    Network(IpAddr, u8),
}

/// The rules for engine URLs on this machine.
#[derive(Clone, Debug)]
pub struct EnginePolicy {
    own: Vec<IpAddr>,
    own_port: Option<u16>,
    allow: AllowList,
    variable: &'static str,
}

impl AllowList {
    /// Reads a comma list of hosts, addresses and CIDRs; blanks around entries do not matter.
    ///
    /// # Errors
    /// What is wrong with the first bad entry, and what is expected.
    pub fn parse(text: &str) -> Result<AllowList, String> {
        let mut list = Vec::new();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            if list.len() == ALLOW_ENTRIES_MAX {
                return Err(format!("at most {ALLOW_ENTRIES_MAX} entries are allowed"));
            }
            list.push(Allowed::parse(entry)?);
        }
        Ok(AllowList(list))
    }

    fn covers(&self, host: &str, ip: Option<IpAddr>) -> bool {
        self.0.iter().any(|allowed| match allowed {
            Allowed::Host(name) => name == host,
            Allowed::Network(network, bits) => ip.is_some_and(|ip| prefix(ip, *bits) == Some(*network)),
        })
    }
}

impl Allowed {
    fn parse(entry: &str) -> Result<Allowed, String> {
        let expected = "expected a host name, an address, or a CIDR such as 10.0.0.0/8";
        let bare = entry.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(entry);
        if let Ok(ip) = bare.parse::<IpAddr>() {
            let ip = ip.to_canonical();
            return Ok(Allowed::Network(ip, if ip.is_ipv4() { 32 } else { 128 }));
        }
        if let Some((address, bits)) = entry.split_once('/') {
            let ip: IpAddr = address
                .parse()
                .map_err(|_| format!("{entry:?}: {address:?} is no IP address; {expected}"))?;
            let bits_max = if ip.is_ipv4() { 32 } else { 128 };
            let bits: u8 = bits.parse().ok().filter(|bits| *bits <= bits_max).ok_or_else(|| {
                format!("{entry:?}: the prefix length must be a whole number from 0 to {bits_max}")
            })?;
            let network = prefix(ip, bits).unwrap_or(ip);
            if network != ip {
                return Err(format!("{entry:?} has bits set after its prefix: {network}/{bits} is meant"));
            }
            return Ok(Allowed::Network(network, bits));
        }
        if entry.contains('*') {
            return Err(format!(
                "{entry:?}: wildcards are not supported; 0.0.0.0/0 and ::/0 mean any address"
            ));
        }
        if entry.contains(':') {
            return Err(format!("{entry:?}: entries name no port and no scheme; {expected}"));
        }
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if entry.len() > 253 || !entry.bytes().all(allowed) {
            return Err(format!("{entry:?} is no host name; {expected}"));
        }
        Ok(Allowed::Host(entry.to_ascii_lowercase()))
    }
}

impl EnginePolicy {
    /// `own`: this machine's addresses, beside loopback. `own_port`: where this process listens.
    /// `variable`: the setting that fills `allow`, as error texts name it.
    #[must_use]
    pub fn new(
        own: Vec<IpAddr>,
        own_port: Option<u16>,
        allow: AllowList,
        variable: &'static str,
    ) -> EnginePolicy {
        let own = own.into_iter().map(|ip| ip.to_canonical()).collect();
        EnginePolicy { own, own_port, allow, variable }
    }

    /// Whether an engine may be looked for at `url`.
    ///
    /// # Errors
    /// A sentence that names the URL, the rule, and what would allow it where anything would.
    pub fn check(&self, url: &BaseUrl) -> Result<(), String> {
        let ip = url.ip().map(|ip| ip.to_canonical());
        if let Some(ip) = ip {
            self.check_address(url, ip)?;
            if self.is_own(ip) {
                return Ok(());
            }
        }
        if self.allow.covers(url.host(), ip) {
            return Ok(());
        }
        Err(format!(
            "{url}: {} is not this machine; {} would have to name it",
            url.host(),
            if self.variable.is_empty() { "the allow list" } else { self.variable }
        ))
    }

    /// The rules without exception, for an address that `url` names or resolved to.
    ///
    /// # Errors
    /// A sentence that names the URL and the rule.
    pub fn check_address(&self, url: &BaseUrl, ip: IpAddr) -> Result<(), String> {
        let ip = ip.to_canonical();
        let why = if ip.is_unspecified() || matches!(ip, IpAddr::V4(v4) if v4.octets()[0] == 0) {
            "is no address that can be dialled"
        } else if ip.is_multicast() || ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
            "is a multicast or broadcast address"
        } else if is_link_local(ip) {
            "is link-local, where metadata services live"
        } else if self.own_port == Some(url.port()) && self.is_own(ip) {
            "with this port is this very process: requests would go round in a circle"
        } else {
            return Ok(());
        };
        Err(format!("{url}: {ip} {why}; no setting allows it"))
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.own.contains(&ip)
    }
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.segments()[0] & 0xffc0 == 0xfe80 || v6 == METADATA_V6,
    }
}

/// The first `bits` of `ip`, the others 0. `None` where `ip` has fewer.
fn prefix(ip: IpAddr, bits: u8) -> Option<IpAddr> {
    match ip {
        IpAddr::V4(v4) => {
            let host_bits = 32u32.checked_sub(u32::from(bits))?;
            Some(Ipv4Addr::from(v4.to_bits() & u32::MAX.checked_shl(host_bits).unwrap_or(0)).into())
        }
        IpAddr::V6(v6) => {
            let host_bits = 128u32.checked_sub(u32::from(bits))?;
            Some(Ipv6Addr::from(v6.to_bits() & u128::MAX.checked_shl(host_bits).unwrap_or(0)).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(allow: &str) -> EnginePolicy {
        let own = vec!["192.168.1.5".parse().expect("an address"), "fd00::5".parse().expect("an address")];
        let allow = AllowList::parse(allow).expect(allow);
        EnginePolicy::new(own, Some(9200), allow, "POOL_MANAGERD_ALLOW_ENGINE_HOSTS")
    }

    fn verdict(policy: &EnginePolicy, url: &str) -> Result<(), String> {
        policy.check(&BaseUrl::new(url).expect(url))
    }

    #[test]
    fn by_default_only_this_machine_is_allowed() {
        let policy = policy("");
        for good in [
            "http://localhost:8081",
            "http://127.0.0.9:1",
            "https://127.0.0.1:8081",
            "http://[::1]:8081",
            "http://192.168.1.5:8081",
            "http://[fd00::5]:8081",
            "http://[::ffff:127.0.0.1]:8081",
        ] {
            assert_eq!(verdict(&policy, good), Ok(()), "{good}");
        }
        for bad in
            ["http://192.168.1.6:8081", "http://gpu-1:8081", "http://2130706433:80", "http://[fd00::6]:1"]
        {
            let error = verdict(&policy, bad).expect_err(bad);
            assert!(error.contains(bad) && error.contains("POOL_MANAGERD_ALLOW_ENGINE_HOSTS"), "{error}");
        }
    }

    #[test]
    fn the_operator_allows_hosts_addresses_and_networks() {
        let policy = policy(" 10.0.0.0/8, GPU-1.local,[fd00:1::2] ,172.16.0.0/12,fd12::/16");
        for good in [
            "http://10.255.0.1:8081",
            "http://gpu-1.LOCAL:8081",
            "http://[fd00:1::2]:1",
            "http://172.31.0.1:1",
            "http://[fd12:ffff::1]:1",
            "http://[::ffff:10.0.0.1]:1",
        ] {
            assert_eq!(verdict(&policy, good), Ok(()), "{good}");
        }
        for bad in
            ["http://11.0.0.1:1", "http://x.gpu-1.local:1", "http://172.32.0.1:1", "http://[fd13::1]:1"]
        {
            assert!(verdict(&policy, bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn some_targets_are_refused_whatever_is_allowed() {
        let policy = policy("0.0.0.0/0,::/0,metadata");
        for (bad, why) in [
            ("http://169.254.169.254:80", "link-local"),
            ("http://[::ffff:169.254.169.254]:80", "link-local"),
            ("http://[fe80::1]:80", "link-local"),
            ("http://[fd00:ec2::254]:80", "link-local"),
            ("http://0.0.0.0:8081", "can be dialled"),
            ("http://[::]:8081", "can be dialled"),
            ("http://224.0.0.1:1", "multicast"),
            ("http://255.255.255.255:1", "multicast"),
            ("http://[ff02::1]:1", "multicast"),
            ("http://localhost:9200", "circle"),
            ("http://192.168.1.5:9200", "circle"),
            ("https://169.254.169.254", "link-local"),
        ] {
            let error = verdict(&policy, bad).expect_err(bad);
            assert!(error.contains(why), "{bad}: {error}");
        }
        // A port like ours on another machine is no loop, and an allowed name is judged again once
        // it is resolved.
        assert_eq!(verdict(&policy, "http://10.0.0.1:9200"), Ok(()));
        let named = BaseUrl::new("http://metadata:80").expect("a URL");
        assert_eq!(policy.check(&named), Ok(()));
        assert!(policy.check_address(&named, "169.254.169.254".parse().expect("an address")).is_err());
    }

    #[test]
    fn a_bad_entry_is_named_with_what_is_expected() {
        for (bad, why) in [
            ("10.0.0.0/33", "from 0 to 32"),
            ("::/129", "from 0 to 128"),
            ("10.0.0.0/", "from 0 to 32"),
            ("host/8", "no IP address"),
            ("10.1.2.3/8", "10.0.0.0/8 is meant"),
            ("*.local", "wildcards"),
            ("gpu:8080", "no port"),
            ("http://gpu", "no IP address"),
            ("a b", "no host name"),
        ] {
            let error = AllowList::parse(&format!("ok.local,{bad}")).expect_err(bad);
            assert!(error.contains(why) && error.contains(bad), "{bad}: {error}");
        }
        assert!(AllowList::parse(&"a,".repeat(ALLOW_ENTRIES_MAX + 1)).is_err());
        assert_eq!(AllowList::parse(" , "), Ok(AllowList::default()));
    }

    proptest::proptest! {
        /// A network covers exactly the addresses that share its leading bits.
        #[test]
        fn a_network_covers_by_prefix(base: u32, bits in 0u8..=32, other: u32) {
            let network = prefix(Ipv4Addr::from(base).into(), bits).expect("at most 32 bits");
            let list = AllowList::parse(&format!("{network}/{bits}")).expect("a network");
            let shares = bits == 0 || (base ^ other) >> (32 - u32::from(bits)) == 0;
            proptest::prop_assert_eq!(list.covers("", Some(Ipv4Addr::from(other).into())), shares);
            proptest::prop_assert!(list.covers("", Some(Ipv4Addr::from(base).into())));
        }
    }
}
