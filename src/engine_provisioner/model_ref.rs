//! Where a model that is named by a reference lies on this machine.
//!
//! A reference is a path (absolute, or one that begins with `./` or `../`, or ends in `.gguf`) or
//! `file:PATH`. Anything else is a name, which engines know by themselves (`org/model` for vLLM).

use std::fs;
use std::path::{Path, PathBuf};

/// Schemes that say where to fetch a model.
const REMOTE: [&str; 3] = ["hf:", "http:", "https:"];

/// Whether a text refers to a model's file, and does not only name it.
#[must_use]
pub fn is_reference(text: &str) -> bool {
    let is_path = ["/", "./", "../"].iter().any(|start| text.starts_with(start)) || text.ends_with(".gguf");
    is_path || text.starts_with("file:") || REMOTE.iter().any(|scheme| text.starts_with(scheme))
}

/// The path of the model that `reference` names, and its size in bytes, all its parts together. Relative
/// paths count from `base`.
///
/// # Errors
/// Why there is none, and what to do.
pub fn resolve(reference: &str, base: &Path) -> Result<(PathBuf, u64), String> {
    if REMOTE.iter().any(|scheme| reference.starts_with(scheme)) {
        return Err(format!("model {reference:?} is not on this machine: fetch it, and give its path"));
    }
    let path = base.join(reference.strip_prefix("file:").unwrap_or(reference));
    let metadata = fs::metadata(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            format!("model {} does not exist: check the path, or fetch it first", path.display())
        }
        std::io::ErrorKind::PermissionDenied => {
            format!("model {} may not be read by this user: change its mode or owner", path.display())
        }
        _ => format!("model {} cannot be read: {error}", path.display()),
    })?;
    if metadata.is_dir() {
        let files = fs::read_dir(&path).into_iter().flatten().flatten();
        let bytes = files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum();
        return Ok((path, bytes));
    }
    fs::File::open(&path).map_err(|error| {
        format!("model {} may not be read by this user ({error}): change its mode or owner", path.display())
    })?;
    if metadata.len() == 0 {
        return Err(format!("model {} is empty: fetch it again", path.display()));
    }
    let bytes = parts(&path)?.iter().filter_map(|part| fs::metadata(part).ok()).map(|m| m.len()).sum();
    Ok((path, bytes))
}

/// The parts of a model that was split: `name-00001-of-00003.gguf` and its like.
fn parts(path: &Path) -> Result<Vec<PathBuf>, String> {
    let one = || Ok(vec![path.to_path_buf()]);
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return one() };
    let Some(stem) = name.strip_suffix(".gguf") else { return one() };
    let Some((rest, count)) = stem.rsplit_once("-of-") else { return one() };
    let Some((start, first)) = rest.rsplit_once('-') else { return one() };
    let Some(number) = count.parse::<u32>().ok().filter(|n| first.len() == 5 && (1..=999).contains(n)) else {
        return one();
    };
    let all: Vec<PathBuf> =
        (1..=number).map(|n| path.with_file_name(format!("{start}-{n:05}-of-{count}.gguf"))).collect();
    match all.iter().find(|part| !part.exists()) {
        Some(missing) => Err(format!("a part of the model is missing: {}; fetch it too", missing.display())),
        None => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_is_told_from_a_name() {
        for (text, expected) in [
            ("/m/a.gguf", true),
            ("./a", true),
            ("a.gguf", true),
            ("file:a", true),
            ("hf:org/repo", true),
            ("Qwen/Qwen2-7B", false),
            ("demo", false),
        ] {
            assert_eq!(is_reference(text), expected, "{text}");
        }
    }

    #[test]
    fn a_model_is_all_its_parts_and_a_refusal_says_what_to_do() {
        let root = tempfile::tempdir().expect("a directory");
        for n in 1..=2 {
            fs::write(root.path().join(format!("m-0000{n}-of-00002.gguf")), "12345").expect("written");
        }
        let first = root.path().join("m-00001-of-00002.gguf");
        assert_eq!(resolve("m-00001-of-00002.gguf", root.path()), Ok((first.clone(), 10)));
        assert_eq!(resolve(&format!("file:{}", first.display()), Path::new("/")), Ok((first, 10)));
        fs::remove_file(root.path().join("m-00002-of-00002.gguf")).expect("removed");
        fs::write(root.path().join("empty.gguf"), "").expect("written");
        for (reference, why) in [
            ("m-00001-of-00002.gguf", "fetch it too"),
            ("empty.gguf", "fetch it again"),
            ("none.gguf", "check the path"),
            ("hf:org/repo", "give its path"),
        ] {
            let error = resolve(reference, root.path()).expect_err(reference);
            assert!(error.contains(why), "{error}");
        }
    }
}
