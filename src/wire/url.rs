//! Absolute http(s) URLs of engines, nodes and control planes.
//!
//! Only what such a URL may say: scheme, host, port and a base path. Credentials, a query or a
//! fragment in one is a mistake, and refused rather than dropped.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Longest URL accepted, in bytes.
pub const URL_BYTES_MAX: usize = 2048;

/// A checked `http://host:port/base` or its https form.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct BaseUrl {
    https: bool,
    host: String,
    port: u16,
    /// Empty, or `/` followed by at least one character, without a trailing `/`.
    path: String,
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
        let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() {
            return error("it names no host");
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
        Ok(BaseUrl {
            https,
            host: host.to_ascii_lowercase(),
            port,
            path: uri.path().trim_end_matches('/').to_string(),
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
        self.https
    }

    /// Host name or IP literal, lower case, without brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Port, the scheme's own where none was written.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Base path without a trailing slash; often empty.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The host as an address, where it is a literal. `localhost` counts as 127.0.0.1 (RFC 6761).
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        if self.host == "localhost" || self.host.ends_with(".localhost") {
            return Some(IpAddr::from([127, 0, 0, 1]));
        }
        self.host.parse().ok()
    }

    /// Whether the host is this machine's loopback.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        self.ip().is_some_and(|ip| ip.is_loopback())
    }

    /// `host:port`, as a `Host` header carries it.
    #[must_use]
    pub fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", if self.https { "https" } else { "http" }, self.authority(), self.path)
    }
}

impl fmt::Debug for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl TryFrom<String> for BaseUrl {
    type Error = UrlError;
    fn try_from(text: String) -> Result<Self, UrlError> {
        BaseUrl::lenient(&text)
    }
}

impl From<BaseUrl> for String {
    fn from(url: BaseUrl) -> String {
        url.to_string()
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
        ] {
            let error = BaseUrl::new(bad).expect_err(bad).to_string();
            assert!(error.contains(reason), "{bad:?}: {error}");
            assert!(!error.contains("u:p"), "a password was repeated: {error}");
        }
    }
}
