//! Which files of a hub's repository are the model, and where they are. PURE.
//!
//! A repository often holds one model in a dozen quantisations, each of which may be split into parts.
//! What is meant is either said or the only one; guessing would load the wrong one for hours.

use serde::Deserialize;

use super::digest::Digest;
use super::reference::{HubReference, Pick, is_relative_file};

/// Most files of one model: the largest known ones have some 200 parts.
pub const FILES_MAX: usize = 512;
/// Names that an error lists.
const NAMES_SHOWN: usize = 20;
/// What engines read of a repository that has no GGUF.
const SNAPSHOT_ENDINGS: [&str; 6] = [".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken"];

/// One file that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Path within the repository.
    pub name: String,
    /// What the hub says that it is.
    pub digest: Option<Digest>,
    /// How long the hub says that it is.
    pub bytes: Option<u64>,
}

/// What a hub says about a repository; fields that are not used are ignored.
#[derive(Debug, Deserialize)]
pub struct Listing {
    /// The commit that the revision stands for.
    pub sha: Option<String>,
    siblings: Vec<Sibling>,
}

#[derive(Debug, Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Deserialize)]
struct Lfs {
    sha256: Option<String>,
    size: Option<u64>,
}

/// The URL of the listing.
#[must_use]
pub fn listing_url(endpoint: &str, hub: &HubReference) -> String {
    format!("{endpoint}/api/models/{}/revision/{}?blobs=true", hub.repo, hub.revision)
}

/// The URL of a file.
#[must_use]
pub fn file_url(endpoint: &str, repo: &str, revision: &str, file: &str) -> String {
    let mut url = format!("{endpoint}/{repo}/resolve/{revision}/");
    for byte in file.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            url.push(char::from(byte));
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
    }
    url
}

/// The files of a named file: itself, or all parts of a split one.
#[must_use]
pub fn parts_of(file: &str) -> Vec<String> {
    match split(file) {
        Some((stem, 1, count)) => (1..=count).map(|n| format!("{stem}-{n:05}-of-{count:05}.gguf")).collect(),
        _ => vec![file.to_string()],
    }
}

/// `stem-00002-of-00003.gguf`: stem, number, count.
fn split(file: &str) -> Option<(&str, u32, u32)> {
    let (stem, count) = file.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (stem, number) = stem.rsplit_once('-')?;
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let (number, count) =
        (digits(number).then(|| number.parse().ok())??, digits(count).then(|| count.parse().ok())??);
    ((1..=count).contains(&number) && (1..=FILES_MAX as u32).contains(&count))
        .then_some((stem, number, count))
}

/// Chooses the files that `hub` means. They come in order: an engine is given the first.
///
/// # Errors
/// One line that lists what there is to choose from.
pub fn choose(hub: &HubReference, listing: &Listing) -> Result<Vec<Wanted>, String> {
    let all: Vec<&Sibling> = listing.siblings.iter().filter(|s| is_relative_file(&s.rfilename)).collect();
    let is_model = |name: &str| {
        let lower = name.to_ascii_lowercase();
        lower.ends_with(".gguf")
            && !lower.contains("mmproj")
            && split(name).is_none_or(|(_, number, _)| number == 1)
    };
    let models: Vec<&str> = all.iter().map(|s| s.rfilename.as_str()).filter(|name| is_model(name)).collect();
    let fitting: Vec<&str> = match &hub.pick {
        Pick::Any => models.clone(),
        Pick::Quantisation(wanted) => models.iter().copied().filter(|name| says(name, wanted)).collect(),
        Pick::File(file) => vec![file],
    };
    let names = match fitting.as_slice() {
        [only] => parts_of(only),
        [] if models.is_empty() && hub.pick == Pick::Any => snapshot(&all),
        [] if models.is_empty() => return Err(format!("{hub}: the repository has no GGUF file")),
        [] => return Err(format!("{hub} fits none of its files: name one of {}", list(hub, &models))),
        several => return Err(format!("{hub} could be several: name one of {}", list(hub, several))),
    };
    if names.is_empty() {
        return Err(format!(
            "{hub}: the repository has neither GGUF nor safetensors files: name another one"
        ));
    }
    if names.len() > FILES_MAX {
        return Err(format!(
            "{hub}: the repository has more than {FILES_MAX} files that could be meant: name one"
        ));
    }
    let wanted = |name: String| {
        let Some(found) = all.iter().find(|s| s.rfilename == name) else {
            return Err(format!("{hub}: the repository lacks {name}: name a complete model"));
        };
        let lfs = found.lfs.as_ref();
        let digest = lfs.and_then(|lfs| Digest::parse(lfs.sha256.as_deref()?).ok());
        Ok(Wanted { name, digest, bytes: lfs.and_then(|lfs| lfs.size).or(found.size) })
    };
    names.into_iter().map(wanted).collect()
}

/// What an engine that reads no GGUF needs: weights, configuration, tokenizer.
fn snapshot(all: &[&Sibling]) -> Vec<String> {
    let is_wanted =
        |name: &str| !name.contains('/') && SNAPSHOT_ENDINGS.iter().any(|ending| name.ends_with(ending));
    let mut names: Vec<String> =
        all.iter().map(|s| s.rfilename.clone()).filter(|name| is_wanted(name)).collect();
    names.sort();
    if names.iter().any(|name| name.ends_with(".safetensors")) { names } else { Vec::new() }
}

/// Whether a file's name says a quantisation, as a word of its own.
fn says(name: &str, quantisation: &str) -> bool {
    let (name, wanted) = (name.to_ascii_lowercase(), quantisation.to_ascii_lowercase());
    let of_word = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
    name.match_indices(&wanted).any(|(at, found)| {
        !of_word(name[..at].chars().next_back()) && !of_word(name[at + found.len()..].chars().next())
    })
}

fn list(hub: &HubReference, names: &[&str]) -> String {
    let shown: Vec<String> =
        names.iter().take(NAMES_SHOWN).map(|name| format!("hf:{}/{name}", hub.repo)).collect();
    let more = names.len().saturating_sub(NAMES_SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine_provisioner::models::reference::Reference;
    use proptest::prelude::*;

    fn chosen(reference: &str, files: &[&str]) -> Result<Vec<String>, String> {
        let Ok(Reference::Hub(hub)) = Reference::parse(reference) else { panic!("{reference}") };
        let siblings: Vec<_> =
            files.iter().map(|name| serde_json::json!({"rfilename": name, "size": 7})).collect();
        let listing = serde_json::json!({"sha": "c0ffee", "siblings": siblings}).to_string();
        let listing = serde_json::from_str(&listing).expect("a listing");
        choose(&hub, &listing).map(|wanted| wanted.into_iter().map(|w| w.name).collect())
    }

    #[test]
    fn the_only_model_or_the_one_that_is_said() {
        let several = ["README.md", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "mmproj-f16.gguf", "m-IQ4_K_M.gguf"];
        assert_eq!(chosen("hf:o/r", &["a.gguf", "README.md"]), Ok(vec!["a.gguf".into()]));
        assert_eq!(chosen("hf:o/r:q4_k_m", &several), Ok(vec!["m-Q4_K_M.gguf".into()]));
        let error = chosen("hf:o/r", &several).expect_err("three of them");
        assert!(error.contains("hf:o/r/m-Q4_K_M.gguf") && !error.contains("mmproj"), "{error}");
        assert!(chosen("hf:o/r:Q8_0", &several).expect_err("none").contains("fits none"));
        assert!(chosen("hf:o/r", &["README.md"]).expect_err("none").contains("neither"));
    }

    #[test]
    fn a_split_model_is_all_of_its_parts() {
        let parts = ["q/m-Q8_0-00002-of-00002.gguf", "q/m-Q8_0-00001-of-00002.gguf"];
        let all = vec![parts[1].to_string(), parts[0].to_string()];
        assert_eq!(chosen("hf:o/r", &parts), Ok(all.clone()));
        assert_eq!(parts_of(parts[1]), all);
        assert!(chosen("hf:o/r", &parts[1..]).expect_err("incomplete").contains("lacks"));
    }

    #[test]
    fn without_a_gguf_it_is_what_engines_read() {
        let files =
            ["model-2.safetensors", "config.json", "pytorch_model.bin", "model-1.safetensors", "onnx/m.json"];
        let expected =
            ["config.json", "model-1.safetensors", "model-2.safetensors"].map(String::from).to_vec();
        assert_eq!(chosen("hf:o/r", &files), Ok(expected));
        assert!(chosen("hf:o/r", &["../../etc/passwd.json", "a.safetensors"]).expect("one").len() == 1);
    }

    #[test]
    fn a_files_name_is_escaped() {
        assert_eq!(
            file_url("https://h", "o/r", "main", "a b/ä?.gguf"),
            "https://h/o/r/resolve/main/a%20b/%C3%A4%3F.gguf"
        );
    }

    proptest! {
        #[test]
        fn no_listing_panics(names in proptest::collection::vec(".{0,12}|m-[0-9]{5}-of-[0-9]{5}.gguf", 0..6)) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let _ = chosen("hf:o/r", &names);
            let _ = chosen("hf:o/r:Q4", &names);
        }
    }
}
