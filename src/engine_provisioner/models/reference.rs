//! What a model reference says. PURE.
//!
//! A reference is what an operator writes: a path, `file:` and a path, `hf:org/repo` with perhaps a
//! revision, a file or a quantisation, or an http(s) URL. Reading one decides only what is meant;
//! whether it exists is found out by whoever resolves it. A reference is shown in logs and kept in the
//! catalogue, so whatever in it may be a secret is refused (user names in URLs) or left out when it is
//! shown (queries, which carry the signatures of signed URLs).

use std::fmt;
use std::path::PathBuf;

/// Longest reference, in bytes: paths and signed URLs are shorter.
pub const REFERENCE_BYTES_MAX: usize = 4096;
/// The revision of a repository that is meant where none is written.
pub const REVISION_DEFAULT: &str = "main";

/// A model, as an operator names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A file or directory of this machine.
    Local(PathBuf),
    /// Something in a repository of a model hub.
    Hub(HubReference),
    /// One file behind an http(s) URL.
    Url(String),
}

/// `hf:org/repo[@revision][/file]` or `hf:org/repo[@revision]:QUANTISATION`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubReference {
    /// `org/repo`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// Which of its files.
    pub pick: Pick,
}

/// Which files of a repository are the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Its only GGUF, or all that an engine reads where it has none.
    Any,
    /// This file, and the further parts of it where its name says `-00001-of-00003`.
    File(String),
    /// The GGUF whose name says this quantisation, such as `Q4_K_M`.
    Quantisation(String),
}

/// Why a text is no reference: one line that says what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReferenceError(String);

impl fmt::Display for ReferenceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ReferenceError {}

fn refuse<T>(text: &str, why: &str) -> Result<T, ReferenceError> {
    // What stands before an @ may be a password, what follows a ? a signature.
    let before_query = text.split('?').next().unwrap_or_default();
    let hidden = text.starts_with("http") && before_query.contains('@');
    let shown: String = if hidden { "(hidden)".into() } else { before_query.chars().take(200).collect() };
    Err(ReferenceError(format!(
        "{shown:?} names no model: {why}; allowed are a path, file:PATH, hf:ORG/REPO, hf:ORG/REPO/FILE, \
         hf:ORG/REPO:QUANTISATION and http(s)://HOST/FILE"
    )))
}

impl Reference {
    /// Reads what an operator wrote.
    ///
    /// # Errors
    /// [`ReferenceError`] with the rule that `text` breaks.
    pub fn parse(text: &str) -> Result<Reference, ReferenceError> {
        let text = text.trim();
        if text.is_empty() {
            return refuse(text, "it is empty");
        }
        if text.len() > REFERENCE_BYTES_MAX {
            return refuse(text, "it is longer than 4096 bytes");
        }
        if text.chars().any(char::is_control) {
            return refuse(text, "it has control characters");
        }
        if let Some(path) = text.strip_prefix("file:") {
            return local(text, path);
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return hub(text, rest.strip_prefix("//").unwrap_or(rest)).map(Reference::Hub);
        }
        if text.starts_with("http:") || text.starts_with("https:") {
            return url(text);
        }
        match text.split_once("://") {
            Some((scheme, _)) if !scheme.contains('/') => refuse(text, "its scheme is not known"),
            _ => Ok(Reference::Local(text.into())),
        }
    }

    /// One name for each thing that is meant, fit to be shown, logged and kept: a URL without its query.
    #[must_use]
    pub fn shown(&self) -> String {
        match self {
            Reference::Local(path) => format!("file:{}", path.display()),
            Reference::Hub(hub) => hub.to_string(),
            Reference::Url(url) => shown_url(url).to_string(),
        }
    }
}

impl fmt::Display for HubReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repo)?;
        if self.revision != REVISION_DEFAULT {
            write!(f, "@{}", self.revision)?;
        }
        match &self.pick {
            Pick::Any => Ok(()),
            Pick::File(file) => write!(f, "/{file}"),
            Pick::Quantisation(name) => write!(f, ":{name}"),
        }
    }
}

/// A URL as it may be shown: its query may be a signature.
#[must_use]
pub fn shown_url(url: &str) -> &str {
    url.split(['?', '#']).next().unwrap_or_default()
}

fn local(text: &str, path: &str) -> Result<Reference, ReferenceError> {
    let path = match path.strip_prefix("//") {
        Some(rest) => match rest.strip_prefix("localhost").unwrap_or(rest) {
            absolute if absolute.starts_with('/') => absolute,
            _ => {
                return refuse(
                    text,
                    "a file URL names a path of this machine, as file:///models/a.gguf does",
                );
            }
        },
        None => path,
    };
    if path.is_empty() { refuse(text, "the path is missing") } else { Ok(Reference::Local(path.into())) }
}

fn hub(text: &str, rest: &str) -> Result<HubReference, ReferenceError> {
    let Some((org, rest)) = rest.split_once('/') else {
        return refuse(text, "a repository is ORG/REPO");
    };
    // The repository's name ends where its revision, a quantisation or a file begins.
    let end = rest.find(['/', ':', '@']).unwrap_or(rest.len());
    let (name, mut rest) = rest.split_at(end);
    if !is_name(org) || !is_name(name) {
        return refuse(text, "a repository is ORG/REPO of A-Z a-z 0-9 . _ -");
    }
    let mut revision = REVISION_DEFAULT;
    if let Some(after) = rest.strip_prefix('@') {
        let end = after.find(['/', ':']).unwrap_or(after.len());
        (revision, rest) = after.split_at(end);
        if !is_name(revision) {
            return refuse(text, "a revision is a branch, tag or commit of A-Z a-z 0-9 . _ -");
        }
    }
    let pick = match (rest.strip_prefix('/'), rest.strip_prefix(':')) {
        (Some(""), _) | (None, None) => Pick::Any,
        (Some(file), _) if is_relative_file(file) => Pick::File(file.into()),
        (None, Some(name)) if is_name(name) => Pick::Quantisation(name.into()),
        (Some(_), _) => return refuse(text, "a file is a relative path without . and .. in it"),
        (None, Some(_)) => return refuse(text, "a quantisation is a word such as Q4_K_M"),
    };
    Ok(HubReference { repo: format!("{org}/{name}"), revision: revision.into(), pick })
}

fn url(text: &str) -> Result<Reference, ReferenceError> {
    let Ok(uri) = text.parse::<http::Uri>() else { return refuse(text, "it does not parse as a URL") };
    let Some(authority) = uri.authority() else { return refuse(text, "the URL names no host") };
    if authority.as_str().contains('@') {
        return refuse(text, "the URL holds a user name or password");
    }
    if uri.host().is_none_or(str::is_empty) {
        return refuse(text, "the URL names no host");
    }
    Ok(Reference::Url(text.into()))
}

fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    (1..=128).contains(&text.len()) && text.bytes().all(allowed) && text != "." && text != ".."
}

/// Whether a path, from an operator or from a hub's listing, stays below the directory that it is
/// joined to and can be written there as it is.
#[must_use]
pub fn is_relative_file(path: &str) -> bool {
    let good = |part: &str| {
        !part.is_empty() && part.len() <= 255 && part != "." && part != ".." && !part.contains('\\')
    };
    path.len() <= 1024 && !path.chars().any(char::is_control) && path.split('/').all(good)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hub_reference(repo: &str, revision: &str, pick: Pick) -> Reference {
        Reference::Hub(HubReference { repo: repo.into(), revision: revision.into(), pick })
    }

    #[test]
    fn every_shape_is_read_as_it_is_meant() {
        let file = |name: &str| Pick::File(name.into());
        for (text, meant) in [
            ("/m/a.gguf", Reference::Local("/m/a.gguf".into())),
            ("m/a.gguf", Reference::Local("m/a.gguf".into())),
            ("file:a.gguf", Reference::Local("a.gguf".into())),
            ("file:/m/a.gguf", Reference::Local("/m/a.gguf".into())),
            ("file:///m/a.gguf", Reference::Local("/m/a.gguf".into())),
            ("file://localhost/m/a", Reference::Local("/m/a".into())),
            ("hf:o/r", hub_reference("o/r", "main", Pick::Any)),
            ("hf://o/r/", hub_reference("o/r", "main", Pick::Any)),
            ("hf:o/r/a.gguf", hub_reference("o/r", "main", file("a.gguf"))),
            ("hf:o/r/q4/a.gguf", hub_reference("o/r", "main", file("q4/a.gguf"))),
            ("hf:o/r@v1/a.gguf", hub_reference("o/r", "v1", file("a.gguf"))),
            ("hf:o/r:Q4_K_M", hub_reference("o/r", "main", Pick::Quantisation("Q4_K_M".into()))),
            ("hf:o/r@v1:Q8_0", hub_reference("o/r", "v1", Pick::Quantisation("Q8_0".into()))),
            ("https://h/a.gguf?sig=1", Reference::Url("https://h/a.gguf?sig=1".into())),
        ] {
            assert_eq!(Reference::parse(text), Ok(meant), "{text}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_the_rule_and_without_secrets() {
        for (text, why) in [
            ("", "empty"),
            ("a\nb", "control"),
            ("file:", "path is missing"),
            ("file://host/a", "path of this machine"),
            ("hf:repo", "ORG/REPO"),
            ("hf:../r/a", "ORG/REPO"),
            ("hf:o/r/../../etc/passwd", "without . and .."),
            ("hf:o/r//a", "without . and .."),
            ("hf:o/r@/a", "revision"),
            ("hf:o/r:", "quantisation"),
            ("s3://bucket/a", "scheme"),
            ("http://", "URL"),
            ("https://user:secret@h/a", "password"),
        ] {
            let error = Reference::parse(text).expect_err(text).to_string();
            assert!(error.contains(why), "{text}: {error}");
            assert!(!error.contains("secret"), "{error}");
        }
        let signed = Reference::parse("https://h/a?signature=secret").expect("a URL");
        assert_eq!(signed.shown(), "https://h/a");
    }

    proptest! {
        #[test]
        fn nothing_panics_and_what_is_shown_means_the_same(text in ".{0,60}|hf:[a-c./:@-]{0,20}") {
            if let Ok(reference) = Reference::parse(&text) {
                let again = Reference::parse(&reference.shown());
                match &reference {
                    Reference::Url(_) => prop_assert!(again.is_ok()),
                    Reference::Local(path) if path.as_os_str().to_string_lossy().starts_with("//") => {}
                    _ => prop_assert_eq!(again, Ok(reference)),
                }
            }
        }

        #[test]
        fn no_file_of_a_repository_leaves_its_directory(path in "[a./\\\\]{0,12}") {
            if is_relative_file(&path) {
                let joined = std::path::Path::new("/root").join(&path);
                prop_assert!(joined.starts_with("/root"));
                prop_assert!(joined.components().all(|c| c != std::path::Component::ParentDir));
            }
        }
    }
}
