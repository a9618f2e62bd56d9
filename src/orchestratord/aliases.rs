//! Other names of models: who asks for `gpt-4o` may be served by what an engine calls `qwen3`. Pure.
//!
//! An alias is resolved before placement, and the body that goes to the engine says the engine's name:
//! the bytes of that one string are replaced, and no other byte of the body changes. An alias hides a
//! model of the same name.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::peek::MODEL_BYTES_MAX;

/// Most aliases: a list that people wrote, searched for every request.
const ALIASES_MAX: usize = 1_024;

/// Aliases, each with the model that it finally stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Aliases {
    models: BTreeMap<String, String>,
}

impl Aliases {
    /// Reads `a=b,c=a`: an alias may stand for another one. The first `=` divides.
    ///
    /// # Errors
    /// What is wrong with the list: a part that is no pair, a name given twice, a circle.
    pub fn parse(text: &str) -> Result<Aliases, String> {
        let mut given: BTreeMap<String, String> = BTreeMap::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let pair = part.split_once('=').map(|(alias, model)| (alias.trim(), model.trim()));
            let good = |name: &str| (1..=MODEL_BYTES_MAX).contains(&name.len());
            let Some((alias, model)) = pair.filter(|(alias, model)| good(alias) && good(model)) else {
                return Err(format!("{part:?} is not ALIAS=MODEL"));
            };
            if given.insert(alias.to_string(), model.to_string()).is_some_and(|before| before != model) {
                return Err(format!("{alias:?} is given two meanings"));
            }
        }
        if given.len() > ALIASES_MAX {
            return Err(format!("it names {} aliases; allowed are {ALIASES_MAX}", given.len()));
        }
        let mut models = BTreeMap::new();
        for alias in given.keys() {
            let (mut name, mut passed) = (alias, BTreeSet::new());
            while let Some(next) = given.get(name) {
                if !passed.insert(name) {
                    return Err(format!("{alias:?} ends in a circle"));
                }
                name = next;
            }
            models.insert(alias.clone(), name.clone());
        }
        Ok(Aliases { models })
    }

    /// The model that `name` stands for, if it is an alias.
    #[must_use]
    pub fn resolve(&self, name: &str) -> Option<&str> {
        self.models.get(name).map(String::as_str)
    }

    /// Every alias with its model, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.models.iter().map(|(alias, model)| (alias.as_str(), model.as_str()))
    }
}

/// A string in a body that is to be replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// Where it is, quotes included.
    pub span: Range<usize>,
    /// What it shall say.
    pub text: String,
}

impl Rewrite {
    /// Replaces it, in place.
    pub fn apply(&self, body: &mut Vec<u8>) {
        debug_assert!(self.span.end <= body.len(), "of this body");
        if self.span.end <= body.len() {
            let quoted = serde_json::Value::from(self.text.as_str()).to_string();
            body.splice(self.span.clone(), quoted.into_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::orchestratord::peek::peek;
    use proptest::prelude::*;

    #[test]
    fn aliases_of_aliases_end_at_a_model() {
        let aliases = Aliases::parse(" gpt-4o=org/qwen , small=gpt-4o,,x=a=b, small=gpt-4o").expect("usable");
        assert_eq!(aliases.resolve("small"), Some("org/qwen"));
        assert_eq!((aliases.resolve("x"), aliases.resolve("org/qwen")), (Some("a=b"), None));
        assert_eq!(Aliases::parse(""), Ok(Aliases::default()));
    }

    #[test]
    fn circles_and_riddles_are_refused() {
        for (bad, why) in [
            ("a=a", "circle"),
            ("a=b,b=c,c=a", "circle"),
            ("x=a,a=b,b=a", "circle"),
            ("a", "not ALIAS=MODEL"),
            ("=b", "not ALIAS=MODEL"),
            ("a=", "not ALIAS=MODEL"),
            ("a=b,a=c", "two meanings"),
        ] {
            let error = Aliases::parse(bad).expect_err(bad);
            assert!(error.contains(why), "{bad}: {error}");
        }
    }

    proptest! {
        /// Only the name changes.
        #[test]
        fn the_rest_of_the_body_stays(
            before in "( |\"a\":\\[1\\.50,  \"model\"\\],|\"m\":\\{\"model\":1\\},){0,3}",
            after in "(,\"z\": \"\\\\u00e9\"| |,\"b\":null){0,3}",
            old in "[a-zé/]{1,9}",
            new in any::<String>(),
        ) {
            let old = serde_json::to_string(&old).expect("encodes");
            let mut body = format!("{{{before}\"model\" : {old}{after}}}").into_bytes();
            let span = peek(&body).expect("usable").model_span.expect("a model");
            Rewrite { span, text: new.clone() }.apply(&mut body);
            let new = serde_json::to_string(&new).expect("encodes");
            let wanted = format!("{{{before}\"model\" : {new}{after}}}");
            prop_assert_eq!(String::from_utf8(body).expect("text"), wanted);
        }
    }
}
