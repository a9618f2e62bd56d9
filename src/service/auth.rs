//! Bearer tokens: one secret for the whole installation, and the previous one while it is replaced.
//!
//! Once a token is set, every route that is not explicitly open needs it, from loopback too. Tokens
//! are compared in constant time and never shown: [`Tokens`] prints as a count.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;

use subtle::ConstantTimeEq;

use crate::http::head::Fields;
use crate::settings::{Alias, Exit, Setting, Settings};

/// Longest `Authorization` value that is looked at, in bytes.
const HEADER_BYTES_MAX: usize = 8 * 1024;
/// Tokens that hold at once: the current and the previous one.
const TOKENS_MAX: usize = 2;
/// Tokens shorter than this draw a warning.
pub const TOKEN_BYTES_ADVISED: usize = 32;

/// The setting that holds the token itself.
pub const TOKEN_SETTING: Setting = Setting {
    flag: "api-token",
    env: "LLORCH_API_TOKEN",
    aliases: &[Alias::same("AUTH_TOKEN")],
    default: None,
    value: "TOKEN",
    help: "Bearer token that callers need and that peers are sent; prefer the variable or the file, a command line is public",
};

/// The setting that names a file with the token.
pub const TOKEN_FILE_SETTING: Setting = Setting {
    flag: "api-token-file",
    env: "LLORCH_API_TOKEN_FILE",
    aliases: &[],
    default: None,
    value: "FILE",
    help: "File with the token, and on a second line the previous one; read again on SIGHUP",
};

/// The tokens that are accepted; the first is the one that this process sends.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Tokens(Vec<String>);

/// Why a request may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// No `Authorization`, or not one `Bearer`.
    Missing,
    /// A token that is not accepted.
    Bad,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({})", self.0.len())
    }
}

impl Tokens {
    /// Reads a token file's text: one token a line, the current one first.
    ///
    /// # Errors
    /// What is wrong with it, without repeating any of it.
    pub fn parse(text: &str) -> Result<Tokens, String> {
        let tokens: Vec<String> =
            text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_string).collect();
        if tokens.is_empty() {
            return Err("it holds no token".into());
        }
        if tokens.len() > TOKENS_MAX {
            return Err("it holds more than two lines: the current and the previous token are allowed".into());
        }
        if !tokens.iter().all(|token| token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err("a token may only hold visible ASCII characters, without blanks".into());
        }
        Ok(Tokens(tokens))
    }

    /// Whether no token is set: everything is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the current token is shorter than advised.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.0.first().is_some_and(|token| token.len() < TOKEN_BYTES_ADVISED)
    }

    /// The `Authorization` value that this process sends, if a token is set. A secret.
    #[must_use]
    pub fn bearer(&self) -> Option<String> {
        self.0.first().map(|token| format!("Bearer {token}"))
    }

    /// Whether a request may pass.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn check(&self, fields: &Fields) -> Result<(), Denied> {
        if self.0.is_empty() {
            return Ok(());
        }
        let given = fields.get("authorization").filter(|value| value.len() <= HEADER_BYTES_MAX);
        let (1, Some(given)) = (fields.count("authorization"), given) else { return Err(Denied::Missing) };
        let Some(("Bearer", token)) = given.trim().split_once(' ') else { return Err(Denied::Missing) };
        // Every accepted token is compared, so that the time does not tell which one was near.
        let good = self.0.iter().fold(subtle::Choice::from(0), |good, accepted| {
            good | accepted.as_bytes().ct_eq(token.trim().as_bytes())
        });
        if bool::from(good) { Ok(()) } else { Err(Denied::Bad) }
    }
}

/// The tokens from flag, variable or file.
///
/// # Errors
/// [`Exit`] that names the source, never the token.
pub fn from_settings(settings: &Settings, file: Option<&Path>) -> Result<Tokens, Exit> {
    match file {
        Some(file) => read_file(file).map_err(Exit::config),
        None => Ok(settings.secret("api-token", Tokens::parse)?.unwrap_or_default()),
    }
}

/// Reads a token file from disk.
///
/// # Errors
/// A sentence that names the file and what is wrong with it.
pub fn read_file(file: &Path) -> Result<Tokens, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("LLORCH_API_TOKEN_FILE={}: cannot be read: {error}", file.display()))?;
    Tokens::parse(&text).map_err(|why| format!("LLORCH_API_TOKEN_FILE={}: {why}", file.display()))
}

/// Refuses, or warns of, a daemon that anybody on the network may command.
///
/// # Errors
/// [`Exit`] when a token is required and there is none.
pub fn check_exposure(
    addr: SocketAddr,
    tokens: &Tokens,
    required: bool,
    prefix: &str,
    notes: &mut Vec<String>,
) -> Result<(), Exit> {
    if tokens.is_empty() && required {
        return Err(Exit::config(format!(
            "{prefix}_REQUIRE_AUTH=true, but there is no token: set LLORCH_API_TOKEN_FILE or LLORCH_API_TOKEN"
        )));
    }
    if tokens.is_empty() && !addr.ip().is_loopback() {
        notes.push(format!(
            "NO TOKEN IS SET and {addr} is reachable from other machines: anybody there can use and command this daemon; set LLORCH_API_TOKEN_FILE"
        ));
    }
    if tokens.is_short() {
        notes.push("the token is shorter than the advised 32 characters".into());
    }
    Ok(())
}

/// Warns where the service manager chose an address that is open while the configured one is not.
pub fn note_other_address(configured: SocketAddr, bound: SocketAddr, tokens: &Tokens) {
    if tokens.is_empty() && configured.ip().is_loopback() && !bound.ip().is_loopback() {
        log::warn!(
            "NO TOKEN IS SET and {bound} is reachable from other machines: anybody there can use and command this daemon; set LLORCH_API_TOKEN_FILE"
        );
    }
}

/// Reads the token file again, after SIGHUP; on any error the old tokens stay.
pub fn reload(file: Option<&Path>, tokens: &mut Tokens) {
    let Some(file) = file else {
        return log::info!("SIGHUP: nothing to read again, LLORCH_API_TOKEN_FILE is not set");
    };
    match read_file(file) {
        Ok(new) => {
            *tokens = new;
            log::info!("SIGHUP: tokens read again from {}", file.display());
        }
        Err(error) => log::warn!("SIGHUP: the tokens stay as they are: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::parse_request;

    fn check(tokens: &str, authorization: &str) -> Result<(), Denied> {
        let head = format!("GET / HTTP/1.1\r\nHost: h\r\n{authorization}\r\n");
        let head = parse_request(head.as_bytes()).expect("a request");
        Tokens::parse(tokens).expect("tokens").check(&head.fields)
    }

    #[test]
    fn current_and_previous_token_pass_and_nothing_else() {
        let both = "new-token\nold-token\n";
        assert_eq!(check(both, "Authorization: Bearer new-token\r\n"), Ok(()));
        assert_eq!(check(both, "Authorization: Bearer old-token\r\n"), Ok(()));
        assert_eq!(check(both, "Authorization: Bearer other\r\n"), Err(Denied::Bad));
        assert_eq!(check(both, "Authorization: Bearer new-toke\r\n"), Err(Denied::Bad));
        for missing in ["", "Authorization: Basic new-token\r\n", "Authorization: new-token\r\n"] {
            assert_eq!(check(both, missing), Err(Denied::Missing), "{missing}");
        }
        let twice = "Authorization: Bearer new-token\r\nAuthorization: Bearer new-token\r\n";
        assert_eq!(check(both, twice), Err(Denied::Missing));
    }

    #[test]
    fn token_files_are_checked_without_being_repeated() {
        for bad in ["", "\n \n", "a\nb\nc", "se cret"] {
            let error = Tokens::parse(bad).expect_err(bad);
            assert!(!error.contains("cret"), "{error}");
        }
        assert_eq!(format!("{:?}", Tokens::parse("secret").expect("a token")), "Tokens(1)");
    }
}
