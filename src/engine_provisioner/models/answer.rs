//! What a server's answer to a request for bytes means. PURE.
//!
//! One request asks for one span of a file. The answer is that span, or the whole file because the
//! server does not know ranges, or a way to go, or a reason to wait, or a refusal. Everything that a
//! server may get wrong about it is checked here: a span other than the one asked for is no answer.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use http::{HeaderMap, Uri};

/// Longest pause that a server's `Retry-After` can ask for. One that asks for more does not want to be
/// waited for.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);

/// An answer, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The span that was asked for; the file's whole length where the server tells.
    Part {
        /// The first byte and the end (exclusive) of what the body holds.
        span: Range<u64>,
        /// Length of the whole file.
        total: u64,
    },
    /// The whole file: ranges are not known, or what was asked for is no longer what is there.
    Whole {
        /// Its length, where the server tells.
        total: Option<u64>,
    },
    /// It is elsewhere.
    Redirect(String),
    /// Nothing begins there: the file is shorter than was thought.
    NotSatisfiable,
    /// It may work later.
    Later {
        /// Status code.
        status: u16,
        /// How long the server asks to wait.
        after: Option<Duration>,
    },
    /// Credentials are missing or not enough.
    Denied(u16),
    /// There is no such file.
    Missing(u16),
    /// Anything else: asking again will not help.
    Refused(u16),
    /// The server broke the protocol.
    Nonsense(&'static str),
}

/// Reads an answer to a request for `asked` (`None`: for the whole file).
#[must_use]
pub fn read(status: u16, headers: &HeaderMap, asked: Option<&Range<u64>>, unix_s: i64) -> Answer {
    match status {
        200 => Answer::Whole { total: length(headers) },
        206 => part(headers, asked),
        301 | 302 | 303 | 307 | 308 => match text(headers, "location") {
            Some(to) => Answer::Redirect(to.to_string()),
            None => Answer::Nonsense("a redirect without a place to go to"),
        },
        401 | 403 => Answer::Denied(status),
        404 | 410 => Answer::Missing(status),
        416 => Answer::NotSatisfiable,
        408 | 425 | 429 | 500 | 502 | 503 | 504 => {
            Answer::Later { status, after: text(headers, "retry-after").and_then(|t| retry_after(t, unix_s)) }
        }
        _ => Answer::Refused(status),
    }
}

fn part(headers: &HeaderMap, asked: Option<&Range<u64>>) -> Answer {
    let Some(asked) = asked else { return Answer::Nonsense("a part, although the whole was asked for") };
    let Some((span, total)) = text(headers, "content-range").and_then(content_range) else {
        return Answer::Nonsense("a part that does not say which (Content-Range)");
    };
    let wanted_end = asked.end.min(total);
    if span.start != asked.start || span.end > wanted_end || span.is_empty() {
        return Answer::Nonsense("another part than the one that was asked for");
    }
    if length(headers).is_some_and(|length| length != span.end - span.start) {
        return Answer::Nonsense("a part whose Content-Length and Content-Range differ");
    }
    Answer::Part { span, total }
}

/// `bytes 0-99/1234`.
fn content_range(text: &str) -> Option<(Range<u64>, u64)> {
    let (span, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = span.split_once('-')?;
    let (first, last, total) = (number(first)?, number(last)?, number(total)?);
    (first <= last && last < total).then(|| (first..last + 1, total))
}

fn length(headers: &HeaderMap) -> Option<u64> {
    text(headers, "content-length").and_then(number)
}

/// Digits only: `parse` alone would also take a sign.
fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Seconds, or a date.
fn retry_after(text: &str, unix_s: i64) -> Option<Duration> {
    let seconds = match number(text) {
        Some(seconds) => seconds,
        None => {
            let date = jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(text.trim()).ok()?;
            u64::try_from(date.as_second().saturating_sub(unix_s)).unwrap_or(0)
        }
    };
    Some(Duration::from_secs(seconds))
}

/// What identifies one state of a file: two answers with different ones are parts of different files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Validator {
    /// A strong `ETag`; weak ones do not promise equal bytes.
    pub etag: Option<String>,
    /// `Last-Modified`, as it was written.
    pub last_modified: Option<String>,
}

impl Validator {
    /// From an answer's headers.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Validator {
        let kept = |name| text(headers, name).filter(|text| text.len() <= 512).map(str::to_string);
        let etag = kept("etag").filter(|tag| tag.starts_with('"'));
        Validator { etag, last_modified: kept("last-modified") }
    }

    /// Whether bytes under the one may be joined with bytes under the other. Without anything to
    /// compare they may not, unless a digest will be held against the whole.
    #[must_use]
    pub fn joins(&self, other: &Validator, digest_known: bool) -> bool {
        match (&self.etag, &other.etag) {
            (Some(a), Some(b)) => a == b,
            (None, None) => match (&self.last_modified, &other.last_modified) {
                (Some(a), Some(b)) => a == b,
                (None, None) => digest_known,
                _ => false,
            },
            _ => false,
        }
    }
}

/// The SHA-256 that a hub tells of a file in large file storage, and its length.
#[must_use]
pub fn linked(headers: &HeaderMap) -> (Option<String>, Option<u64>) {
    let digest = text(headers, "x-linked-etag").map(|tag| tag.trim_matches('"').to_ascii_lowercase());
    let digest = digest.filter(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()));
    (digest, text(headers, "x-linked-size").and_then(number))
}

/// Where a redirect leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Absolute.
    pub url: String,
    /// Whether it is the same scheme, host and port: only then may a token go along.
    pub same_origin: bool,
}

/// Why a redirect is not followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRedirect {
    /// It is no http(s) URL.
    NoUrl,
    /// From https to http: anybody on the way could exchange the file.
    Downgrade,
}

impl fmt::Display for BadRedirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BadRedirect::NoUrl => "it redirects to something that is no http(s) URL",
            BadRedirect::Downgrade => "it redirects from https to plain http",
        })
    }
}

/// Follows `location`, which may be relative, from `from`.
///
/// # Errors
/// [`BadRedirect`].
pub fn redirect(from: &str, location: &str) -> Result<Target, BadRedirect> {
    let base: Uri = from.parse().map_err(|_| BadRedirect::NoUrl)?;
    let (scheme, authority) =
        (base.scheme_str().unwrap_or("http"), base.authority().map_or("", |a| a.as_str()));
    // A fragment is for whoever shows a document.
    let location = location.split('#').next().unwrap_or_default();
    let url = if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.contains("://") {
        location.to_string()
    } else {
        let path = base.path();
        let directory = path.rfind('/').map_or("/", |end| &path[..=end]);
        format!("{scheme}://{authority}{directory}{location}")
    };
    let target: Uri = url.parse().map_err(|_| BadRedirect::NoUrl)?;
    let http = matches!(target.scheme_str(), Some("http" | "https"));
    if !http
        || target.host().is_none_or(str::is_empty)
        || target.authority().is_some_and(|a| a.as_str().contains('@'))
    {
        return Err(BadRedirect::NoUrl);
    }
    if base.scheme_str() == Some("https") && target.scheme_str() == Some("http") {
        return Err(BadRedirect::Downgrade);
    }
    Ok(Target { same_origin: origin(&base) == origin(&target), url })
}

fn origin(uri: &Uri) -> (Option<&str>, Option<String>, u16) {
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    (uri.scheme_str(), uri.host().map(str::to_ascii_lowercase), port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(k, v)| (k.parse().expect("a name"), v.parse().expect("a value"))).collect()
    }

    #[test]
    fn a_part_is_only_the_part_that_was_asked_for() {
        let asked = 10..20;
        let read = |range: &str, length: &str| {
            read(206, &headers(&[("content-range", range), ("content-length", length)]), Some(&asked), 0)
        };
        assert_eq!(read("bytes 10-19/100", "10"), Answer::Part { span: 10..20, total: 100 });
        assert_eq!(read("bytes 10-14/15", "5"), Answer::Part { span: 10..15, total: 15 });
        for (range, length) in [
            ("bytes 0-9/100", "10"),
            ("bytes 10-29/100", "20"),
            ("bytes 10-19/100", "11"),
            ("bytes 19-10/100", "10"),
            ("bytes 10-19/*", "10"),
            ("bytes 10-19/5", "10"),
            ("bytes +10-19/100", "10"),
            ("10-19/100", "10"),
            ("", "10"),
        ] {
            assert!(matches!(read(range, length), Answer::Nonsense(_)), "{range}: {:?}", read(range, length));
        }
    }

    #[test]
    fn waiting_is_as_long_as_the_server_says() {
        let after = |text: &str| read(429, &headers(&[("retry-after", text)]), None, 784_111_770);
        let later = |after| Answer::Later { status: 429, after };
        assert_eq!(after("7"), later(Some(Duration::from_secs(7))));
        assert_eq!(after("Sun, 06 Nov 1994 08:49:37 GMT"), later(Some(Duration::from_secs(7))));
        assert_eq!(after("Tue, 06 Nov 1990 08:49:37 GMT"), later(Some(Duration::ZERO)));
        assert_eq!(after("soon"), later(None));
    }

    #[test]
    fn a_token_goes_along_within_one_origin_only() {
        for (from, to, url, same) in [
            ("http://h/a/b", "c", "http://h/a/c", true),
            ("http://h/a/b?q", "/c?x=1#f", "http://h/c?x=1", true),
            ("https://h/a", "//other/c", "https://other/c", false),
            ("http://h/a", "http://H:80/c", "http://H:80/c", true),
            ("http://h/a", "http://h:81/c", "http://h:81/c", false),
            ("http://h/a", "https://h/c", "https://h/c", false),
        ] {
            let target = redirect(from, to).expect(to);
            assert_eq!((target.url.as_str(), target.same_origin), (url, same), "{from} -> {to}");
        }
        assert_eq!(redirect("https://h/a", "http://h/a"), Err(BadRedirect::Downgrade));
        for bad in ["ftp://h/a", "file:///etc/passwd", "http://", "http://u:p@h/"] {
            assert_eq!(redirect("http://h/a", bad), Err(BadRedirect::NoUrl), "{bad}");
        }
    }

    #[test]
    fn parts_of_different_states_are_not_joined() {
        let of = |pairs: &[(&'static str, &str)]| Validator::of(&headers(pairs));
        let (a, b) = (of(&[("etag", "\"a\"")]), of(&[("etag", "\"b\"")]));
        assert!(a.joins(&a, false) && !a.joins(&b, true));
        let (weak, none) = (of(&[("etag", "W/\"a\"")]), of(&[]));
        assert!(!weak.joins(&weak, false) && none.joins(&none, true) && !a.joins(&none, true));
        let monday = of(&[("last-modified", "Mon")]);
        assert!(monday.joins(&monday, false) && !monday.joins(&of(&[("last-modified", "Tue")]), true));
    }

    proptest! {
        #[test]
        fn whatever_a_server_says_nothing_panics(
            status in 100u16..600, range in "bytes [0-9*-]{0,12}/[0-9*]{0,24}|.{0,20}", length in ".{0,24}",
            start in any::<u64>(), more in 1u64..1000, location in "\\PC{0,40}",
        ) {
            let asked = start..start.saturating_add(more);
            let mut all = HeaderMap::new();
            for (name, text) in [("content-range", &range), ("content-length", &length), ("location", &location)] {
                if let Ok(value) = text.parse::<http::HeaderValue>() {
                    all.insert(name, value);
                }
            }
            if let Answer::Part { span, total } = read(status, &all, Some(&asked), 0) {
                prop_assert!(span.start == asked.start && span.end <= asked.end && span.end <= total);
            }
            if let Ok(target) = redirect("https://h/a/b", &location) {
                prop_assert!(target.url.starts_with("https://"), "{}", target.url);
            }
        }
    }
}
