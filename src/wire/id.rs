//! Names of nodes, pools and replicas: checked once where they enter, trusted everywhere after.
//!
//! An id becomes a path segment, a file name and a metric label, so its alphabet is narrow:
//! 1 to 128 of `[A-Za-z0-9._-]`, and neither `.` nor `..`.

use std::fmt;
use std::sync::Arc;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest id, in bytes.
pub const ID_BYTES_MAX: usize = 128;

/// Why a string is no id. Names the rule, so that the message can be shown as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdError {
    found: String,
}

impl fmt::Display for IdError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is not an id: 1 to {ID_BYTES_MAX} of A-Z a-z 0-9 . _ - are allowed, but not \".\" or \"..\"",
            self.found
        )
    }
}

impl std::error::Error for IdError {}

fn check(id: &str) -> Result<(), IdError> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let good = (1..=ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(allowed) && id != "." && id != "..";
    if good { Ok(()) } else { Err(IdError { found: id.chars().take(ID_BYTES_MAX + 1).collect() }) }
}

/// Reads a checked text where it stands. A refusal then has the place of the text itself, which it would
/// not have after a conversion.
pub(super) struct Text<T, E> {
    pub(super) what: &'static str,
    pub(super) read: fn(&str) -> Result<T, E>,
}

impl<T, E: fmt::Display> Visitor<'_> for Text<T, E> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.what)
    }

    fn visit_str<F: de::Error>(self, text: &str) -> Result<T, F> {
        (self.read)(text).map_err(F::custom)
    }
}

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks `id` against the rules of this file.
            ///
            /// # Errors
            /// [`IdError`] with the offending text.
            pub fn new(id: &str) -> Result<Self, IdError> {
                check(id)?;
                Ok($name(id.into()))
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str(Text { what: "an id", read: $name::new })
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id_type!(
    /// One machine that runs engines, as its agent registers it.
    NodeId
);
id_type!(
    /// A group of replicas that serve the same thing. Not unique across nodes: two nodes may both
    /// own `pool-0`.
    PoolId
);
id_type!(
    /// One engine process within a pool.
    ReplicaId
);

/// A replica as its own node names it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaKey {
    /// The pool that it belongs to.
    pub pool: PoolId,
    /// Its name within the pool.
    pub replica: ReplicaId,
}

impl fmt::Display for ReplicaKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.replica)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_blanks_and_escapes_are_no_ids() {
        for bad in
            ["", ".", "..", "../../etc/passwd", "a b", "a/b", "a\n", "\u{1b}[31m", "ä", &"x".repeat(129)]
        {
            assert!(PoolId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["pool-0", "r0", "a.b_c-D9", "...", &"x".repeat(128)] {
            assert!(PoolId::new(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn a_bad_id_in_json_is_refused_with_the_rule() {
        let error = serde_json::from_str::<NodeId>("\"a/b\"").expect_err("a slash is not allowed");
        assert!(error.to_string().contains("\"a/b\" is not an id"), "{error}");
    }
}
