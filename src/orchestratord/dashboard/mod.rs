//! The dashboard: a page of its own, and what it is told while somebody looks at it. Pure.
//!
//! The page is one file with its style and its script, the same for everybody: it holds nothing about this
//! installation, so that it needs no token. What it shows comes by `GET /v2/dashboard/events`, which does. Its
//! Content-Security-Policy lets nothing else in: the one script and the one style are named by their hashes,
//! it speaks with this server only, is in no frame, and texts never become markup.
//!
//! [`board`] decides what watchers are told, [`rows`] what of a node, [`history`] keeps the last minutes.

use std::sync::OnceLock;

use crate::http::server::Response;

pub mod board;
pub mod history;
pub mod rows;

/// The page.
pub const PAGE: &str = include_str!("page.html");

/// The answer to `GET /`.
#[must_use]
pub fn page() -> Response {
    Response {
        status: 200,
        content_type: "text/html; charset=utf-8",
        fields: vec![
            ("Content-Security-Policy", policy().to_string()),
            ("X-Content-Type-Options", "nosniff".into()),
            ("Referrer-Policy", "no-referrer".into()),
            ("Cross-Origin-Opener-Policy", "same-origin".into()),
            ("Cross-Origin-Resource-Policy", "same-origin".into()),
            ("X-Frame-Options", "DENY".into()),
            ("Cache-Control", "no-cache".into()),
        ],
        body: PAGE.as_bytes().to_vec(),
    }
}

/// What the page may do. Made once: the page does not change.
fn policy() -> &'static str {
    static POLICY: OnceLock<String> = OnceLock::new();
    POLICY.get_or_init(|| {
        let (style, script) = (hash(between("<style>", "</style>")), hash(between("<script>", "</script>")));
        format!(
            "default-src 'none'; script-src '{script}'; style-src '{style}'; connect-src 'self'; img-src data:; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; \
             trusted-types 'none'"
        )
    })
}

fn between(start: &str, end: &str) -> &'static str {
    let behind = PAGE.split_once(start).map_or("", |(_, behind)| behind);
    behind.split_once(end).map_or("", |(text, _)| text)
}

/// As a policy names what stands in a page: `sha256-` and base64.
fn hash(text: &str) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
    format!("sha256-{}", base64(digest.as_ref()))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for three in bytes.chunks(3) {
        let word = (0..3).fold(0u32, |word, n| word << 8 | u32::from(three.get(n).copied().unwrap_or(0)));
        for n in 0..4 {
            let digit = char::from(DIGITS[(word >> (18 - 6 * n)) as usize & 63]);
            text.push(if n <= three.len() { digit } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of RFC 4648, and the SHA-256 of nothing as browsers write it.
    #[test]
    fn hashes_are_as_policies_name_them() {
        let known = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (text, encoded) in known {
            assert_eq!(base64(text.as_bytes()), encoded);
        }
        assert_eq!(hash(""), "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=");
    }

    #[test]
    fn the_page_has_one_style_and_one_script_and_no_markup_that_needs_more() {
        for tag in ["<style>", "</style>", "<script>", "</script>"] {
            assert_eq!(PAGE.matches(tag).count(), 1, "{tag}");
        }
        for forbidden in
            [" style=", " onclick=", "innerHTML", "outerHTML", "insertAdjacentHTML", "eval(", "localStorage"]
        {
            assert!(!PAGE.contains(forbidden), "{forbidden}");
        }
        assert!(
            between("<script>", "</script>").len() > 1_000 && between("<style>", "</style>").len() > 1_000
        );
    }
}
