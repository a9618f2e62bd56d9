//! Absolute http(s) URLs of engines, nodes and control planes.
//!
//! Only what such a URL may say: scheme, host, port and a base path. Credentials, a query or a
//! fragment in one is a mistake, and refused rather than dropped.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::id::Text;

/// Longest URL accepted, in bytes.
pub const URL_BYTES_MAX: usize = 2048;

/// A checked `http://host:port/base` or its https form. One allocation that clones share: a control
/// plane keeps one for every engine.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BaseUrl {
    /// As it is displayed: lower case up to the path, always with a port. The path is empty, or `/`
    /// followed by at least one character, without a trailing `/`.
    text: Arc<str>,
    /// Where the host begins and ends in it, without brackets.
    host: (u16, u16),
    /// Where the path begins.
    path: u16,
    port: u16,
    /// The host, where it is such an address: engines mostly are, and are dialled often.
    ipv4: Option<Ipv4Addr>,
}

/// Why a string is no [`BaseUrl`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrlError {
    found: String,
    reason: &'static str,
}

impl fmt::Display for UrlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not a usable URL: {}; expected http://HOST:PORT with an optional path",
            self.found, self.reason
        )
    }
}

impl std::error::Error for UrlError {}

impl BaseUrl {
    /// Checks `text`, which must name its scheme.
    ///
    /// # Errors
    /// [`UrlError`] with the rule that `text` breaks. Text that might hold a password is not
    /// repeated in the error.
    pub fn new(text: &str) -> Result<BaseUrl, UrlError> {
        let shown: String =
            if text.contains('@') { "(hidden)".into() } else { text.chars().take(200).collect() };
        let error = |reason| Err(UrlError { found: shown.clone(), reason });
        if text.len() > URL_BYTES_MAX {
            return error("it is longer than 2048 bytes");
        }
        if text.contains('#') {
            return error("it has a fragment");
        }
        if text.contains('@') {
            return error("it holds a user name or password");
        }
        let Ok(uri) = text.parse::<::http::Uri>() else { return error("it does not parse") };
        let https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            Some(_) => return error("its scheme is neither http nor https"),
            None => return error("it has no scheme"),
        };
        if uri.query().is_some() {
            return error("it has a query");
        }
        let written = uri.host().unwrap_or_default();
        let literal = written.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let host = literal.unwrap_or(written);
        if host.is_empty() {
            return error("it names no host");
        }
        // It goes into `Host` fields, and is what rules about addresses are held against.
        let is_letter = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
        if literal.map_or(!host.bytes().all(is_letter), |literal| literal.parse::<Ipv6Addr>().is_err()) {
            return error("its host is neither a name nor an address");
        }
        // `http://host:` and ports above 65535 leave no port behind although a colon was written.
        let authority = uri.authority().map_or("", |a| a.as_str());
        let wrote_port = authority.rsplit_once(':').is_some_and(|(_, after)| !after.contains(']'));
        let port = match uri.port_u16() {
            Some(0) => return error("port 0 cannot be dialled"),
            Some(port) => port,
            None if wrote_port => return error("its port is not a number from 1 to 65535"),
            None if https => 443,
            None => 80,
        };
        let host = host.to_ascii_lowercase();
        let scheme = if https { "https://" } else { "http://" };
        let (open, close) = if host.contains(':') { ("[", "]") } else { ("", "") };
        let path = uri.path().trim_end_matches('/');
        let whole = format!("{scheme}{open}{host}{close}:{port}{path}");
        // All of these are below the limit on the length and a port's digits.
        let at = |index: usize| u16::try_from(index).unwrap_or(u16::MAX);
        let begins = scheme.len() + open.len();
        Ok(BaseUrl {
            host: (at(begins), at(begins + host.len())),
            path: at(whole.len() - path.len()),
            port,
            ipv4: host.parse().ok(),
            text: whole.into(),
        })
    }

    /// As [`BaseUrl::new`], but `host:port` without a scheme is read as http: node addresses are
    /// often written so.
    ///
    /// # Errors
    /// As [`BaseUrl::new`].
    pub fn lenient(text: &str) -> Result<BaseUrl, UrlError> {
        if text.contains("://") { BaseUrl::new(text) } else { BaseUrl::new(&format!("http://{text}")) }
    }

    /// Whether TLS is asked for.
    #[must_use]
    pub fn https(&self) -> bool {
        self.text.starts_with("https")
    }

    /// Host name or IP literal, lower case, without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.text[usize::from(self.host.0)..usize::from(self.host.1)]
    }

    /// Port, the scheme's own where none was written.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Base path without a trailing slash; often empty.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.text[usize::from(self.path)..]
    }

    /// The host as an address, where it is a literal. `localhost` counts as 127.0.0.1 (RFC 6761).
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        if let Some(ipv4) = self.ipv4 {
            return Some(ipv4.into());
        }
        let host = self.host();
        if host == "localhost" || host.ends_with(".localhost") {
            return Some(IpAddr::from([127, 0, 0, 1]));
        }
        host.parse().ok()
    }

    /// Whether the host is this machine's loopback.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.ip().is_some_and(|ip| ip.is_loopback())
    }

    /// `host:port`, as a `Host` header carries it.
    #[must_use]
    pub fn authority(&self) -> &str {
        let begins = if self.https() { "https://".len() } else { "http://".len() };
        &self.text[begins..usize::from(self.path)]
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl<'de> Deserialize<'de> for BaseUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<BaseUrl, D::Error> {
        deserializer.deserialize_str(Text { what: "an absolute URL", read: BaseUrl::lenient })
    }
}

impl Serialize for BaseUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_normalised() {
        let url = BaseUrl::new("http://LocalHost:8081/base/").expect("a URL");
        assert_eq!(
            (url.host(), url.port(), url.path(), url.is_loopback()),
            ("localhost", 8081, "/base", true)
        );
        assert_eq!(url.to_string(), "http://localhost:8081/base");
        assert_eq!(
            BaseUrl::new("https://example.org").expect("a URL").to_string(),
            "https://example.org:443"
        );
        assert_eq!(BaseUrl::new("http://[::1]:9").expect("a URL").to_string(), "http://[::1]:9");
        assert_eq!(BaseUrl::lenient("gpu-1:9200").expect("a URL").to_string(), "http://gpu-1:9200");
    }

    #[test]
    fn what_is_not_a_plain_base_url_is_refused_with_the_reason() {
        for (bad, reason) in [
            ("", "does not parse"),
            ("/etc/passwd", "no scheme"),
            ("localhost:80", "no scheme"),
            ("ftp://h:1", "neither http"),
            ("http://u:p@h:1", "password"),
            ("http://h:1/?q", "query"),
            ("http://h:1/#f", "fragment"),
            ("http://h:0", "port 0"),
            ("http://h:", "not a number"),
            ("http://h:99999", "not a number"),
            ("http://:80", "no host"),
            ("http://h h/", "does not parse"),
            ("http://127[1,null]/", "neither a name nor an address"),
            ("http://[127.0.0.1]/", "neither a name nor an address"),
            ("http://a,b/", "neither a name nor an address"),
            ("http://a%41/", "does not parse"),
        ] {
            let error = BaseUrl::new(bad).expect_err(bad).to_string();
            assert!(error.contains(reason), "{bad:?}: {error}");
            assert!(!error.contains("u:p"), "a password was repeated: {error}");
        }
    }
}
