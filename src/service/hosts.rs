//! Which names this server goes by, and which web pages may use it. Pure.
//!
//! A web page whose name suddenly leads to this machine (DNS rebinding) is, for a browser, of one origin
//! with this server, and may read its answers. It gives itself away by the `Host` that the browser sends:
//! a name that is none of this server's. An address that is written out cannot be rebound, so addresses
//! pass.
//!
//! Pages of other origins may use this server only where the operator lists them: without a list there
//! are no CORS fields, and a page can neither read an answer nor, where no token is set, make this server
//! do anything.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use crate::http::fields::FieldLines;
use crate::http::head::{Fields, RequestHead};

/// Most entries of either list: each request may be held against all of them.
const ENTRIES_MAX: usize = 256;
/// How long a browser may keep the answer to a preflight, in seconds: less than browsers cap it at.
const PREFLIGHT_SECONDS: &str = "600";
/// Methods that a page may use.
const METHODS: &str = "GET, HEAD, POST, DELETE";

/// The names of this server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hosts {
    any: bool,
    /// In lower case, without a dot at the end.
    names: BTreeSet<String>,
}

impl Hosts {
    /// Reads a comma list of host names; `*` stands for all.
    ///
    /// # Errors
    /// What is wrong with the first bad entry.
    pub fn parse(text: &str) -> Result<Hosts, String> {
        let mut hosts = Hosts::default();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            if hosts.names.len() == ENTRIES_MAX {
                return Err(format!("at most {ENTRIES_MAX} entries are allowed"));
            }
            match entry {
                "*" => hosts.any = true,
                _ if is_name(entry) || literal(entry).is_some() => hosts.add(entry),
                _ => return Err(format!("{entry:?} is no host name; names stand without scheme and port")),
            }
        }
        Ok(hosts)
    }

    /// Adds a name.
    pub fn add(&mut self, name: &str) {
        self.names.insert(tidy(name));
    }

    /// Whether a `Host` field names this server. Its port does not matter. Who sends none is no browser.
    #[must_use]
    pub fn admit(&self, fields: &Fields) -> bool {
        let Some(host) = fields.get("host") else { return true };
        let name = without_port(host);
        self.any || literal(name).is_some() || is_localhost(name) || self.names.contains(&tidy(name))
    }
}

/// Origins of web pages that may use this server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Origins {
    any: bool,
    listed: BTreeSet<String>,
}

impl Origins {
    /// Reads a comma list such as `https://chat.example,http://localhost:3000`; `*` stands for all.
    ///
    /// # Errors
    /// What is wrong with the first bad entry.
    pub fn parse(text: &str) -> Result<Origins, String> {
        let mut origins = Origins::default();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            if origins.listed.len() == ENTRIES_MAX {
                return Err(format!("at most {ENTRIES_MAX} entries are allowed"));
            }
            match entry.split_once("://") {
                None if entry == "*" => origins.any = true,
                Some((scheme, host)) if is_origin(scheme, host) => {
                    origins.listed.insert(entry.to_ascii_lowercase());
                }
                _ => {
                    return Err(format!(
                        "{entry:?} is no origin; allowed are * and https://NAME or http://NAME:PORT"
                    ));
                }
            }
        }
        Ok(origins)
    }

    /// Whether a page may be told anything at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.any && self.listed.is_empty()
    }

    fn admit(&self, origin: &str) -> bool {
        self.any || self.listed.contains(&origin.to_ascii_lowercase())
    }

    /// Whether the request was made by a page of another origin that is not listed.
    #[must_use]
    pub fn is_foreign(&self, fields: &Fields) -> bool {
        let Some(origin) = fields.value("origin") else { return false };
        let Ok(origin) = std::str::from_utf8(origin) else { return true };
        let host = origin.split_once("://").map(|(_, host)| host);
        let same =
            host.is_some_and(|host| fields.get("host").is_some_and(|own| own.eq_ignore_ascii_case(host)));
        !same && !self.admit(origin)
    }

    /// Fields that an answer to this request gets, so that its page may read it.
    #[must_use]
    pub fn answer_fields(&self, fields: &Fields) -> FieldLines {
        let mut added = FieldLines::new();
        if self.is_empty() {
            return added;
        }
        added.push("Vary", "Origin");
        if let Some(origin) = fields.get("origin").filter(|origin| self.admit(origin)) {
            added.push("Access-Control-Allow-Origin", origin);
            added.push("Access-Control-Expose-Headers", "*");
        }
        added
    }

    /// The fields of the answer to a preflight; `None` where it is none, or its page is not listed.
    #[must_use]
    pub fn preflight(&self, head: &RequestHead) -> Option<Vec<(&'static str, String)>> {
        let fields = &head.fields;
        let origin = fields.get("origin").filter(|origin| self.admit(origin))?;
        let asks = head.method() == "OPTIONS" && fields.get("access-control-request-method").is_some();
        let wanted = fields.get("access-control-request-headers").filter(|list| is_field_list(list));
        asks.then(|| {
            let mut answer = vec![
                ("Access-Control-Allow-Origin", origin.to_string()),
                ("Access-Control-Allow-Methods", METHODS.to_string()),
                ("Access-Control-Max-Age", PREFLIGHT_SECONDS.to_string()),
                ("Vary", "Origin, Access-Control-Request-Headers".to_string()),
            ];
            answer.extend(wanted.map(|list| ("Access-Control-Allow-Headers", list.to_string())));
            answer
        })
    }
}

fn is_field_list(list: &str) -> bool {
    list.len() <= 1024
        && list.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b',' | b' '))
}

fn is_origin(scheme: &str, host: &str) -> bool {
    let scheme_good =
        !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b));
    let name = without_port(host);
    scheme_good && !host.contains(['/', '@', '?', '#']) && (is_name(name) || literal(name).is_some())
}

fn is_name(name: &str) -> bool {
    let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !name.is_empty() && name.len() <= 253 && name.bytes().all(good)
}

/// RFC 6761: these names lead to loopback, whoever is asked.
fn is_localhost(name: &str) -> bool {
    let name = tidy(name);
    name == "localhost" || name.ends_with(".localhost")
}

fn tidy(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !inside_brackets(name) => name,
        _ => host,
    }
}

/// `[::1` of `[::1]`: what was cut off was no port.
fn inside_brackets(name: &str) -> bool {
    name.starts_with('[') && !name.ends_with(']')
}

/// An address as a `Host` writes it.
fn literal(host: &str) -> Option<IpAddr> {
    match host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
        None => host.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::parse_request;

    fn head(fields: &str) -> RequestHead {
        parse_request(format!("POST / HTTP/1.1\r\n{fields}\r\n").as_bytes()).expect("a head")
    }

    #[test]
    fn names_are_compared_without_case_port_and_dot() {
        let hosts = Hosts::parse("gpu-1, LLM.example").expect("names");
        for good in [
            "gpu-1",
            "GPU-1:9200",
            "llm.example.",
            "llm.example.:80",
            "localhost:8080",
            "x.localhost",
            "127.0.0.1",
            "127.0.0.1:8080",
            "[::1]:8080",
            "[::1]",
            "203.0.113.9:1",
        ] {
            assert!(hosts.admit(&head(&format!("Host: {good}\r\n")).fields), "{good}");
        }
        for bad in [
            "evil.example",
            "evil.example:8080",
            "gpu-1.evil.example",
            "xgpu-1",
            "localhost.evil",
            "127.0.0.1.nip.io",
            "[::1",
            "0x7f.1",
            "2130706433",
            "127.1",
            "gpu-1:80:80",
            "[evil]",
        ] {
            assert!(!hosts.admit(&head(&format!("Host: {bad}\r\n")).fields), "{bad}");
        }
        assert!(Hosts::parse("*").expect("all").admit(&head("Host: evil.example\r\n").fields));
        for bad in ["http://a", "a:80", "a/b", "*.a"] {
            assert!(Hosts::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_listed_pages_are_answered() {
        let origins = Origins::parse("https://Chat.example, http://localhost:3000").expect("origins");
        let asked = |origin: &str| head(&format!("Host: llm\r\nOrigin: {origin}\r\n"));
        for good in ["https://chat.example", "http://localhost:3000"] {
            assert!(!origins.is_foreign(&asked(good).fields), "{good}");
            let fields = origins.answer_fields(&asked(good).fields);
            assert_eq!(fields.get("Access-Control-Allow-Origin"), Some(good.as_bytes()), "{fields:?}");
        }
        for bad in [
            "https://evil.example",
            "http://chat.example",
            "null",
            "http://localhost:3001",
            "https://chat.example.evil",
        ] {
            assert!(origins.is_foreign(&asked(bad).fields), "{bad}");
            assert_eq!(origins.answer_fields(&asked(bad).fields).as_bytes(), b"Vary: Origin\r\n", "{bad}");
        }
        // A page of this server itself.
        assert!(!Origins::default().is_foreign(&asked("http://llm").fields));
        assert!(
            Origins::default().answer_fields(&asked("https://chat.example").fields).as_bytes().is_empty()
        );
        for bad in ["chat.example", "https://", "https://a/b", "https://u@a", "https://a b"] {
            assert!(Origins::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_preflight_is_answered_for_listed_pages_only() {
        let origins = Origins::parse("https://chat.example").expect("an origin");
        let options = |origin: &str, more: &str| {
            let text = format!("OPTIONS /v1/models HTTP/1.1\r\nHost: l\r\nOrigin: {origin}\r\n{more}\r\n");
            parse_request(text.as_bytes()).expect("a head")
        };
        let asks =
            "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization,x-a\r\n";
        let answer = origins.preflight(&options("https://chat.example", asks)).expect("an answer");
        assert!(answer.contains(&("Access-Control-Allow-Headers", "authorization,x-a".into())), "{answer:?}");
        assert_eq!(origins.preflight(&options("https://evil.example", asks)), None);
        assert_eq!(origins.preflight(&options("https://chat.example", "")), None);
        assert_eq!(Origins::default().preflight(&options("https://chat.example", asks)), None);
    }
}
