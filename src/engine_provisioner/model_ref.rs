//! Which names of models refer to files, and which only engines understand. PURE.
//!
//! A reference is a path (absolute, or one that begins with `./` or `../`, or ends in `.gguf`), or has a
//! scheme: `file:`, `hf:`, `http:`, `https:`. Anything else is a name, which engines know by themselves
//! (`org/model` for vLLM).

/// Schemes of references.
const SCHEMES: [&str; 4] = ["file:", "hf:", "http:", "https:"];

/// Whether a text refers to a model's files, and does not only name it.
#[must_use]
pub fn is_reference(text: &str) -> bool {
    let is_path = ["/", "./", "../"].iter().any(|start| text.starts_with(start)) || text.ends_with(".gguf");
    is_path || SCHEMES.iter().any(|scheme| text.starts_with(scheme))
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
            ("https://h/a", true),
            ("Qwen/Qwen2-7B", false),
            ("demo", false),
        ] {
            assert_eq!(is_reference(text), expected, "{text}");
        }
    }
}
