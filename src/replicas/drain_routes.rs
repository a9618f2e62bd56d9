//! Drains as operators ask for them: paths and bodies that both daemons serve alike. Pure.
//!
//! Below `/v2`: `drains`, and `drain` and `resume` of `node`, `gpus/{n}`, `pools/{pool}` and
//! `pools/{pool}/replicas/{replica}`.

use serde_json::{Value, json};

use super::drains::DRAIN_DEADLINE_MS_MAX;
use super::registry::Registry;
use crate::wire::drain::Scope;
use crate::wire::id::{NodeId, PoolId, ReplicaId, ReplicaKey};

/// What a client is told whose request is cut.
pub const CUT_REASON: &str = "cut: this replica is being drained and the drain's deadline has passed";
/// Highest GPU index that can be drained: what a handoff can name.
const GPU_INDEX_MAX: u32 = u16::MAX as u32;
/// Longest value that an error repeats, in characters.
const SHOWN_CHARS_MAX: usize = 80;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainOrder {
    /// How far a drain has come.
    Show(Scope),
    /// No new work for a scope; what still runs after so many milliseconds is cut.
    Drain(Scope, Option<u64>),
    /// Work again for a scope.
    Resume(Scope),
}

/// Why that makes no sense.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DrainRefused {
    /// The path or the body; the text says what is wrong.
    Invalid(String),
    /// The scope does not exist.
    NotFound(String),
    /// There are as many drains as may be.
    TooMany(String),
    /// The path serves other methods.
    Method(&'static str),
}

/// Reads a request whose path ends in `drain` or `resume`; `None` where it is none. `is_expected`: of a pool
/// without replicas, whether it may be named all the same.
#[must_use]
pub fn read(
    segments: &[&str],
    method: &str,
    body: &[u8],
    replicas: &Registry,
    is_expected: impl Fn(&PoolId) -> bool,
) -> Option<Result<DrainOrder, DrainRefused>> {
    let [of @ .., verb @ ("drain" | "resume")] = segments else { return None };
    let scope = match scope(of, replicas, is_expected)? {
        Ok(scope) => scope,
        Err(refused) => return Some(Err(refused)),
    };
    Some(match (*verb, method) {
        ("drain", "GET" | "HEAD") => Ok(DrainOrder::Show(scope)),
        ("drain", "POST") => deadline_ms(body).and_then(|deadline_ms| {
            let room = replicas.can_drain(&scope).map_err(|why| DrainRefused::TooMany(why.to_string()));
            room.map(|()| DrainOrder::Drain(scope, deadline_ms))
        }),
        ("resume", "POST") => Ok(DrainOrder::Resume(scope)),
        ("drain", _) => Err(DrainRefused::Method("GET, POST")),
        _ => Err(DrainRefused::Method("POST")),
    })
}

/// How far the drain of a scope has come, if there is one.
#[must_use]
pub fn progress(replicas: &Registry, scope: &Scope) -> Value {
    match replicas.drain_status(scope) {
        Some(progress) => json!(progress),
        None => json!({"scope": scope, "draining": false}),
    }
}

/// Every drain of a node.
#[must_use]
pub fn list(replicas: &Registry, node: &NodeId) -> Value {
    json!({"node_id": node, "drains": replicas.drains().collect::<Vec<_>>()})
}

/// The pool in a path.
///
/// # Errors
/// [`DrainRefused::Invalid`] where it is no id.
pub fn pool_id(text: &str) -> Result<PoolId, DrainRefused> {
    PoolId::new(text).map_err(|why| DrainRefused::Invalid(format!("`pool_id`: {why}")))
}

/// The replica in a path.
///
/// # Errors
/// [`DrainRefused::Invalid`] where it is no id.
pub fn replica_key(pool: &str, replica: &str) -> Result<ReplicaKey, DrainRefused> {
    let pool = pool_id(pool)?;
    let replica =
        ReplicaId::new(replica).map_err(|why| DrainRefused::Invalid(format!("`replica_id`: {why}")))?;
    Ok(ReplicaKey { pool, replica })
}

/// The scope that a path names; `None` where it names none.
fn scope(
    segments: &[&str],
    replicas: &Registry,
    is_expected: impl Fn(&PoolId) -> bool,
) -> Option<Result<Scope, DrainRefused>> {
    Some(match segments {
        ["node"] => Ok(Scope::Node),
        ["gpus", index] => match index.parse::<u32>().ok().filter(|index| *index <= GPU_INDEX_MAX) {
            Some(index) => Ok(Scope::Gpu { index }),
            None => Err(DrainRefused::Invalid(format!(
                "the GPU's index must be a whole number from 0 to {GPU_INDEX_MAX}, found {:?}",
                shown(index)
            ))),
        },
        ["pools", pool] => pool_id(pool).and_then(|pool| {
            let scope = Scope::pool(&pool);
            let has_replicas = || replicas.engines().any(|(key, ..)| key.pool == pool);
            let known = replicas.drain_status(&scope).is_some() || is_expected(&pool) || has_replicas();
            known.then_some(scope).ok_or_else(|| DrainRefused::NotFound(format!("pool {pool} not found")))
        }),
        ["pools", pool, "replicas", replica] => replica_key(pool, replica).and_then(|key| {
            let scope = Scope::replica(&key);
            let known = replicas.handoff(&key).is_some() || replicas.drain_status(&scope).is_some();
            known.then_some(scope).ok_or_else(|| DrainRefused::NotFound(format!("replica {key} not found")))
        }),
        _ => return None,
    })
}

/// Until when a drain waits, in milliseconds from now, as its body says; `None` for ever.
///
/// # Errors
/// [`DrainRefused::Invalid`] where it says something else.
pub fn deadline_ms(body: &[u8]) -> Result<Option<u64>, DrainRefused> {
    if body.trim_ascii().is_empty() {
        return Ok(None);
    }
    let Ok(Value::Object(fields)) = serde_json::from_slice::<Value>(body) else {
        let expected = "the body must be empty or a JSON object such as {\"deadline_ms\": 60000}";
        return Err(DrainRefused::Invalid(expected.into()));
    };
    match fields.get("deadline_ms") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().filter(|ms| *ms <= DRAIN_DEADLINE_MS_MAX) {
            Some(ms) => Ok(Some(ms)),
            None => Err(DrainRefused::Invalid(format!(
                "`deadline_ms` must be a whole number from 0 to {DRAIN_DEADLINE_MS_MAX}, found {}",
                shown(&value.to_string())
            ))),
        },
    }
}

/// A caller's text, shortened for an error.
fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replicas::{AllowList, EnginePolicy};

    #[test]
    fn deadlines_are_optional_and_checked() {
        for absent in ["", " \n", "{}", r#"{"deadline_ms":null}"#, r#"{"other":1}"#] {
            assert_eq!(deadline_ms(absent.as_bytes()), Ok(None), "{absent}");
        }
        assert_eq!(deadline_ms(br#"{"deadline_ms":0}"#), Ok(Some(0)));
        assert_eq!(deadline_ms(br#"{"deadline_ms":86400000}"#), Ok(Some(86_400_000)));
        for (wrong, names) in [
            ("[]", "JSON object"),
            ("{", "JSON object"),
            (r#"{"deadline_ms":-1}"#, "`deadline_ms`"),
            (r#"{"deadline_ms":1.5}"#, "`deadline_ms`"),
            (r#"{"deadline_ms":"1"}"#, "`deadline_ms`"),
            (r#"{"deadline_ms":86400001}"#, "`deadline_ms`"),
        ] {
            match deadline_ms(wrong.as_bytes()) {
                Err(DrainRefused::Invalid(text)) => assert!(text.contains(names), "{wrong}: {text}"),
                other => panic!("{wrong}: {other:?}"),
            }
        }
    }

    #[test]
    fn paths_name_scopes_and_methods_say_what_is_asked() {
        let policy = EnginePolicy::new(Vec::new(), None, AllowList::default(), "");
        let replicas = Registry::new(policy, 1);
        let read = |path: &str, method: &str| {
            let segments: Vec<&str> = path.split('/').collect();
            read(&segments, method, b"{\"deadline_ms\":7}", &replicas, |pool| pool.as_str() == "p")
        };
        let pool = Scope::pool(&PoolId::new("p").expect("an id"));
        assert_eq!(read("node/drain", "POST"), Some(Ok(DrainOrder::Drain(Scope::Node, Some(7)))));
        assert_eq!(read("gpus/3/resume", "POST"), Some(Ok(DrainOrder::Resume(Scope::Gpu { index: 3 }))));
        assert_eq!(read("pools/p/drain", "HEAD"), Some(Ok(DrainOrder::Show(pool))));
        assert_eq!(read("node/drain", "PUT"), Some(Err(DrainRefused::Method("GET, POST"))));
        assert_eq!(read("node/resume", "GET"), Some(Err(DrainRefused::Method("POST"))));
        assert_eq!(read("nodes/drain", "POST"), None);
        assert_eq!(read("node", "POST"), None);
        for (path, invalid) in
            [("pools/q/drain", false), ("pools/p/replicas/r/drain", false), ("gpus/x/drain", true)]
        {
            match read(path, "POST") {
                Some(Err(DrainRefused::Invalid(_))) if invalid => {}
                Some(Err(DrainRefused::NotFound(_))) if !invalid => {}
                other => panic!("{path}: {other:?}"),
            }
        }
    }
}
