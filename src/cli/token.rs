//! `llorch token new` and `llorch completions`: what is printed for somebody else to read, on stdout and
//! nothing beside it.

use std::ffi::OsString;
use std::io::{self, Write};

use clap_complete::Shell;

use crate::settings::{Exit, Setting, Settings, Words};

/// Bytes of a token: 256 bits, which nobody guesses.
const TOKEN_BYTES: usize = 32;

pub(super) static TABLE: &[Setting] = &[];
pub(super) const TOKEN_ABOUT: &str = "Print a new token: 256 random bits, URL-safe, on stdout only";
pub(super) const NEW: Words = Words::Given { name: "new", help: "The word new", min: 1, max: 1 };
pub(super) const COMPLETIONS_ABOUT: &str = "Print what a shell needs to complete llorch's command lines";
pub(super) const SHELL: Words =
    Words::Given { name: "SHELL", help: "bash, elvish, fish, powershell or zsh", min: 1, max: 1 };

/// Runs `llorch token`.
pub(super) fn run_token(args: Vec<OsString>) -> Result<(), Exit> {
    let settings = Settings::read_words("llorch token", TOKEN_ABOUT, TABLE, NEW, args, |_| None)?;
    if settings.rest[0] != "new" {
        return Err(Exit::usage(format!("{:?}: there is only `llorch token new`", settings.rest[0])));
    }
    let mut bytes = [0; TOKEN_BYTES];
    getrandom::fill(&mut bytes)
        .map_err(|error| Exit::runtime(format!("the kernel gives no random bytes: {error}")))?;
    print(format!("{}\n", base64url(&bytes)).as_bytes())
}

/// Runs `llorch completions` for the commands of `whole`.
pub(super) fn run_completions(mut whole: clap::Command, args: Vec<OsString>) -> Result<(), Exit> {
    let settings =
        Settings::read_words("llorch completions", COMPLETIONS_ABOUT, TABLE, SHELL, args, |_| None)?;
    let name = settings.rest[0].to_string_lossy().into_owned();
    let shell: Shell = name
        .parse()
        .map_err(|_| Exit::usage(format!("{name:?}: there are bash, elvish, fish, powershell and zsh")))?;
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut whole, "llorch", &mut text);
    print(&text)
}

fn print(bytes: &[u8]) -> Result<(), Exit> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| Exit::runtime(format!("stdout: {error}")))
}

/// RFC 4648, section 5, without padding.
fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..=chunk.len() {
            let six = word >> (18 - 6 * place) & 0x3f;
            text.push(char::from(ALPHABET[six as usize]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64url_is_that_of_its_standard() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg"),
            ("fo", "Zm8"),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64url(bytes.as_bytes()), text);
        }
        assert_eq!(base64url(&[0xfb, 0xff, 0xfe]), "-__-");
        assert_eq!(base64url(&[7; TOKEN_BYTES]).len(), 43);
    }
}
