//! Routes by table. Pure.
//!
//! A program lists its routes once: method, path, who may call it, and what it leads to. The policy is a
//! field of the row, so that a route without one does not compile; what is in no row is for nobody who
//! shows no token. Paths are compared as they were sent, a part at a time: nothing is decoded or tidied
//! up, so no two spellings can lead to one route under two policies.
//!
//! ```
//! use llama_orch::service::{auth::Policy, routes::Route};
//!
//! const TABLE: &[Route<()>] = &[Route { method: "GET", path: "/v2/secrets", policy: Policy::Admin, to: () }];
//! ```
//!
//! The same row without its policy is refused by the compiler, and nothing else is missing from it:
//!
//! ```compile_fail,E0063
//! use llama_orch::service::{auth::Policy, routes::Route};
//!
//! const TABLE: &[Route<()>] = &[Route { method: "GET", path: "/v2/secrets", to: () }];
//! ```
//!
//! Neither is there a policy to fall back on:
//!
//! ```compile_fail,E0277
//! use llama_orch::service::{auth::Policy, routes::Route};
//!
//! const TABLE: &[Route<Option<u8>>] =
//!     &[Route { method: "GET", path: "/v2/secrets", to: None, ..Default::default() }];
//! ```

use crate::http::head::RequestHead;

use super::auth::Policy;

/// One route. `E` is what the program knows it by.
#[derive(Clone, Copy, Debug)]
pub struct Route<E: 'static> {
    /// Its method, or [`ANY_METHOD`]. `GET` serves `HEAD` too.
    pub method: &'static str,
    /// Its path. A part in braces stands for any one part, and one that ends with `...` for all that are
    /// left, if any.
    pub path: &'static str,
    /// Who may call it.
    pub policy: Policy,
    /// Where it leads.
    pub to: E,
}

/// A route's method where it takes all of them.
pub const ANY_METHOD: &str = "*";

/// What a request leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<'p, E> {
    /// A route, with what stands in the place of its parts in braces; what is left is one of them.
    Route(E, Vec<&'p str>),
    /// The path serves other methods, these.
    Method(String),
    /// Nothing.
    Nothing,
}

/// Finds where `path` leads: `head`'s own, or a part of it.
#[must_use]
pub fn find<'p, E: Copy>(
    table: &'static [Route<E>],
    head: &RequestHead,
    path: &'p str,
) -> (Found<'p, E>, Policy, &'static str) {
    let method = match head.method() {
        "HEAD" => "GET",
        method => method,
    };
    let mut allowed: Vec<&str> = Vec::new();
    let mut known = "";
    let is_plain = !path.contains('{');
    for route in table {
        // Most differ within their first parts.
        if is_plain && differ_before_braces(route.path, path) {
            continue;
        }
        let Some(parts) = parts(route.path, path) else { continue };
        if route.method == method || route.method == ANY_METHOD {
            return (Found::Route(route.to, parts), route.policy, route.path);
        }
        known = route.path;
        if !allowed.contains(&route.method) {
            allowed.push(route.method);
        }
    }
    match allowed.is_empty() {
        true => (Found::Nothing, Policy::Any, "an unknown path"),
        false => (Found::Method(allowed.join(", ")), Policy::Any, known),
    }
}

/// Whether a pattern and a path without braces differ in a byte before all of the pattern's parts in braces.
fn differ_before_braces(pattern: &str, path: &str) -> bool {
    let mut pairs = pattern.bytes().zip(path.bytes());
    pairs.find(|(a, b)| a != b).is_some_and(|(a, _)| a != b'{')
}

/// What stands in the place of a pattern's parts in braces, if `path` fits.
fn parts<'p>(pattern: &str, path: &'p str) -> Option<Vec<&'p str>> {
    if !pattern.contains('{') {
        return (pattern == path).then(Vec::new);
    }
    let mut found = Vec::new();
    let mut rest = Some(path.strip_prefix('/')?);
    for wanted in pattern.trim_start_matches('/').split('/') {
        if wanted.ends_with("...}") {
            found.push(rest.unwrap_or_default());
            return Some(found);
        }
        let (part, behind) = match rest?.split_once('/') {
            Some((part, behind)) => (part, Some(behind)),
            None => (rest?, None),
        };
        if wanted.starts_with('{') {
            found.push(part);
        } else if wanted != part {
            return None;
        }
        rest = behind;
    }
    rest.is_none().then_some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::parse_request;

    const TABLE: &[Route<u8>] = &[
        Route { method: "GET", path: "/a", policy: Policy::Public, to: 1 },
        Route { method: "POST", path: "/a/{b}/c", policy: Policy::Node, to: 2 },
        Route { method: "DELETE", path: "/a/{b}/c", policy: Policy::Admin, to: 3 },
        Route { method: "GET", path: "/m/{name...}", policy: Policy::Client, to: 4 },
        Route { method: ANY_METHOD, path: "/e/{x}/{rest...}", policy: Policy::Node, to: 5 },
    ];

    fn found(line: &str) -> (Option<(u8, Vec<String>)>, Policy, String) {
        let head = parse_request(format!("{line} HTTP/1.1\r\nHost: h\r\n\r\n").as_bytes()).expect("a head");
        let (found, policy, _) = find(TABLE, &head, head.path());
        match found {
            Found::Route(to, parts) => {
                let parts = parts.into_iter().map(str::to_string).collect();
                (Some((to, parts)), policy, String::new())
            }
            Found::Method(allow) => (None, policy, allow),
            Found::Nothing => (None, policy, "nothing".into()),
        }
    }

    #[test]
    fn parts_are_taken_as_they_were_sent() {
        let route = |line: &str| found(line).0.unwrap_or_else(|| panic!("{line} leads somewhere"));
        assert_eq!(route("HEAD /a?x=/b"), (1, vec![]));
        assert_eq!(route("POST /a/%2Fb/c"), (2, vec!["%2Fb".into()]));
        assert_eq!(route("GET /m/org/model"), (4, vec!["org/model".into()]));
        assert_eq!((route("GET /m/"), route("GET /m")), ((4, vec![String::new()]), (4, vec![String::new()])));
        assert_eq!(route("BREW /e/1/v1//x"), (5, vec!["1".into(), "v1//x".into()]));
    }

    #[test]
    fn other_spellings_and_methods_lead_nowhere_and_need_a_token() {
        for line in ["GET //a", "GET /a/", "GET /A", "GET /%61", "GET /a/../a", "POST /a/b/c/", "GET /"] {
            let (to, policy, _) = found(line);
            assert_eq!((to, policy), (None, Policy::Any), "{line}");
        }
        let (to, policy, allow) = found("PUT /a/b/c");
        assert_eq!((to, policy, allow.as_str()), (None, Policy::Any, "POST, DELETE"));
    }
}
