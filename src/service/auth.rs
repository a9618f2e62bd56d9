//! Bearer tokens: who may call which routes, and the token that this process shows to others.
//!
//! Every route has a [`Policy`], which names the scopes whose tokens open it; [`Keys`] are the tokens of
//! each scope. A scope without a token of its own is opened by the installation's one token. Once any
//! token is set, every route that is not explicitly public needs one, from loopback too.
//!
//! A presented token is hashed, and its digest is compared in constant time with the digests of all that
//! are accepted, whichever of them it might be. Nothing here shows a token: [`Tokens`] prints as a count,
//! and what was presented in vain is told by a [`Fingerprint`].

use std::fmt;
use std::net::SocketAddr;

use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::http::head::Fields;
use crate::settings::Exit;

/// Longest `Authorization` value that is looked at, in bytes.
const HEADER_BYTES_MAX: usize = 8 * 1024;
/// Tokens of one scope that hold at once: the current and the previous one.
const TOKENS_MAX: usize = 2;
/// Tokens shorter than this draw a warning.
pub const TOKEN_BYTES_ADVISED: usize = 32;

/// Whose routes they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Those who send prompts.
    Client,
    /// Control planes and nodes among themselves.
    Node,
    /// Operators.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Scope; 3] = [Scope::Client, Scope::Node, Scope::Admin];

    /// In lower case, as settings name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Scope::Client => "client",
            Scope::Node => "node",
            Scope::Admin => "admin",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Which tokens open a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// None is needed, and by whatever name this server was reached: probes know no names.
    Public,
    /// None is needed, but the server must have been reached by a name of its own: for browsers.
    Page,
    /// The clients'.
    Client,
    /// The nodes'.
    Node,
    /// The operators'.
    Admin,
    /// The nodes' and the operators'.
    NodeOrAdmin,
    /// Any: for what says nothing but that nothing is there.
    Any,
}

impl Policy {
    const fn bits(self) -> u8 {
        match self {
            Policy::Public | Policy::Page => 0,
            Policy::Client => Scope::Client.bit(),
            Policy::Node => Scope::Node.bit(),
            Policy::Admin => Scope::Admin.bit(),
            Policy::NodeOrAdmin => Scope::Node.bit() | Scope::Admin.bit(),
            Policy::Any => Scope::Client.bit() | Scope::Node.bit() | Scope::Admin.bit(),
        }
    }

    /// Whether no token is needed.
    #[must_use]
    pub fn is_open(self) -> bool {
        matches!(self, Policy::Public | Policy::Page)
    }

    /// Whether the token of `scope` opens it.
    #[must_use]
    pub fn admits(self, scope: Scope) -> bool {
        self.is_open() || self.bits() & scope.bit() != 0
    }
}

/// The beginning of a token's SHA-256: tells attempts apart in a log, and clients in a queue, without
/// telling the token.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 3]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Why a request may not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// No `Authorization`, or not one `Bearer`.
    Missing,
    /// A token that is not accepted.
    Bad(Fingerprint),
    /// A token of another scope.
    Scope,
}

impl Denied {
    /// What `WWW-Authenticate` says of it (RFC 6750, 3).
    #[must_use]
    pub fn challenge(self) -> &'static str {
        match self {
            Denied::Missing => "Bearer",
            Denied::Bad(_) => "Bearer error=\"invalid_token\"",
            Denied::Scope => "Bearer error=\"insufficient_scope\"",
        }
    }
}

#[derive(Clone, PartialEq, Eq)]
struct Secret {
    text: String,
    digest: Digest,
}

impl Secret {
    fn new(text: &str) -> Secret {
        Secret { text: text.to_string(), digest: Digest::of(text.as_bytes()) }
    }
}

/// A SHA-256, in words: these are compared eight bytes at a time.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Digest([u64; 4]);

impl Digest {
    fn of(bytes: &[u8]) -> Digest {
        let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(digest.as_ref().chunks_exact(8)) {
            *word = bytes.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
        }
        Digest(words)
    }

    fn fingerprint(&self) -> Fingerprint {
        let [a, b, c, ..] = self.0[0].to_be_bytes();
        Fingerprint([a, b, c])
    }
}

impl ConstantTimeEq for Digest {
    /// Looks at every word, whatever those before it said.
    fn ct_eq(&self, other: &Digest) -> Choice {
        let differ = self.0.iter().zip(&other.0).fold(0, |differ, (a, b)| differ | (a ^ b));
        differ.ct_eq(&0)
    }
}

/// The tokens of one scope; the first is the one that this process shows.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Tokens(Vec<Secret>);

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
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        if lines.is_empty() {
            return Err("it holds no token".into());
        }
        if lines.len() > TOKENS_MAX {
            return Err("it holds more than two lines: the current and the previous token are allowed".into());
        }
        if !lines.iter().all(|token| token.bytes().all(|b| b.is_ascii_graphic())) {
            return Err("a token may only hold visible ASCII characters, without blanks".into());
        }
        // No caller could show a longer one.
        if lines.iter().any(|token| token.len() + "Bearer ".len() > HEADER_BYTES_MAX) {
            return Err(format!(
                "a token may have {} characters at most",
                HEADER_BYTES_MAX - "Bearer ".len()
            ));
        }
        Ok(Tokens(lines.into_iter().map(Secret::new).collect()))
    }

    /// Whether no token is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether one of them is shorter than advised.
    #[must_use]
    pub fn is_short(&self) -> bool {
        self.0.iter().any(|token| token.text.len() < TOKEN_BYTES_ADVISED)
    }

    /// The `Authorization` value that this process sends, if a token is set. A secret.
    #[must_use]
    pub fn bearer(&self) -> Option<String> {
        self.0.first().map(|token| format!("Bearer {}", token.text))
    }

    /// Whether `bearer`, an `Authorization` value that was sent earlier, is still accepted.
    #[must_use]
    pub fn accepts_bearer(&self, bearer: &str) -> bool {
        bearer.strip_prefix("Bearer ").is_some_and(|token| self.opens(&Digest::of(token.as_bytes())).into())
    }

    /// Every token is compared, so that the time does not tell which one was near.
    fn opens(&self, digest: &Digest) -> Choice {
        self.0.iter().fold(Choice::from(0), |good, accepted| good | accepted.digest.ct_eq(digest))
    }
}

/// Tokens as they were given: for everything, and for each scope its own.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// For every scope that has none of its own.
    pub all: Tokens,
    /// By scope, in the order of [`Scope::ALL`].
    pub own: [Tokens; 3],
}

/// The tokens of every scope.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Keys([Tokens; 3]);

impl Keys {
    /// Resolves which tokens open what: a scope's own, else the one for all, else the only one that was
    /// given. `served` are the scopes that this program has routes for.
    ///
    /// # Errors
    /// A scope of `served` that no token would open, although there are some.
    pub fn resolve(given: Given, served: &[Scope]) -> Result<Keys, String> {
        let Given { all, own } = given;
        let kinds = own.iter().filter(|tokens| !tokens.is_empty()).count() + usize::from(!all.is_empty());
        let fallback = match kinds {
            1 if all.is_empty() => own.iter().find(|tokens| !tokens.is_empty()).cloned().unwrap_or_default(),
            _ => all,
        };
        let keys = own.map(|tokens| if tokens.is_empty() { fallback.clone() } else { tokens });
        for scope in served {
            if kinds > 0 && keys[*scope as usize].is_empty() {
                let name = scope.as_str();
                return Err(format!(
                    "no token opens the {name} routes: set LLORCH_{}_TOKEN_FILE, or LLORCH_API_TOKEN_FILE for all that have none of their own",
                    name.to_ascii_uppercase()
                ));
            }
        }
        Ok(Keys(keys))
    }

    /// One set of tokens for everything.
    #[must_use]
    pub fn one(tokens: &Tokens) -> Keys {
        Keys(Scope::ALL.map(|_| tokens.clone()))
    }

    /// Whether no token is set: everything is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(Tokens::is_empty)
    }

    /// The tokens of a scope.
    #[must_use]
    pub fn of(&self, scope: Scope) -> &Tokens {
        &self.0[scope as usize]
    }

    /// Whether a request with these fields may use a route of this policy, and the token that opened it,
    /// where one was needed.
    ///
    /// # Errors
    /// [`Denied`].
    pub fn check(&self, policy: Policy, fields: &Fields) -> Result<Option<Fingerprint>, Denied> {
        if policy.is_open() || self.is_empty() {
            return Ok(None);
        }
        let shown = Digest::of(presented(fields).ok_or(Denied::Missing)?.as_bytes());
        let opened = Scope::ALL.iter().fold(0, |opened, scope| {
            let more = opened | scope.bit();
            u8::conditional_select(&opened, &more, self.of(*scope).opens(&shown))
        });
        match opened {
            0 => Err(Denied::Bad(shown.fingerprint())),
            bits if bits & policy.bits() == 0 => Err(Denied::Scope),
            _ => Ok(Some(shown.fingerprint())),
        }
    }
}

/// The token of the one `Authorization: Bearer`. Schemes have no case (RFC 9110, 11.1).
fn presented(fields: &Fields) -> Option<&str> {
    let mut given = fields.iter().filter(|(name, _)| name.eq_ignore_ascii_case("authorization"));
    let (Some((_, value)), None) = (given.next(), given.next()) else { return None };
    let value = std::str::from_utf8(value).ok().filter(|value| value.len() <= HEADER_BYTES_MAX)?;
    let (scheme, token) = value.trim().split_once(' ')?;
    let token = token.trim();
    let good = scheme.eq_ignore_ascii_case("bearer")
        && !token.is_empty()
        && token.bytes().all(|b| b.is_ascii_graphic());
    good.then_some(token)
}

/// Refuses, or warns of, a daemon that anybody on the network may command.
///
/// # Errors
/// [`Exit`] when a token is required and there is none.
pub fn check_exposure(
    addr: SocketAddr,
    keys: &Keys,
    required: bool,
    prefix: &str,
    notes: &mut Vec<String>,
) -> Result<(), Exit> {
    if keys.is_empty() && required {
        return Err(Exit::config(format!(
            "{prefix}_REQUIRE_AUTH=true, but there is no token: set LLORCH_API_TOKEN_FILE or LLORCH_API_TOKEN"
        )));
    }
    if keys.is_empty() && !addr.ip().is_loopback() {
        notes.push(format!(
            "NO TOKEN IS SET and {addr} is reachable from other machines: anybody there can use and command this daemon; set LLORCH_API_TOKEN_FILE"
        ));
    }
    if Scope::ALL.iter().any(|scope| keys.of(*scope).is_short()) {
        notes.push(format!(
            "a token is shorter than the advised {TOKEN_BYTES_ADVISED} characters: `llorch token new` prints a good one"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::parse_request;

    fn tokens(text: &str) -> Tokens {
        if text.is_empty() { Tokens::default() } else { Tokens::parse(text).expect("tokens") }
    }

    fn keys(all: &str, client: &str, node: &str, admin: &str) -> Result<Keys, String> {
        let own = [client, node, admin].map(tokens);
        Keys::resolve(Given { all: tokens(all), own }, &Scope::ALL)
    }

    fn ask(keys: &Keys, policy: Policy, authorization: &str) -> Result<(), Denied> {
        let head = format!("GET / HTTP/1.1\r\nHost: h\r\n{authorization}\r\n");
        keys.check(policy, &parse_request(head.as_bytes()).expect("a request").fields).map(|_| ())
    }

    fn shown(keys: &Keys, policy: Policy, token: &str) -> Result<(), Denied> {
        ask(keys, policy, &format!("Authorization: Bearer {token}\r\n"))
    }

    #[test]
    fn current_and_previous_token_pass_and_nothing_else() {
        let both = keys("new-token\nold-token\n", "", "", "").expect("keys");
        for good in ["new-token", "old-token", " new-token "] {
            assert_eq!(shown(&both, Policy::Admin, good), Ok(()), "{good}");
        }
        assert_eq!(ask(&both, Policy::Any, "authorization: bEARER old-token\r\n"), Ok(()));
        for bad in ["other", "new-toke", "new-tokenn", "new-token\told-token", "NEW-TOKEN"] {
            assert!(shown(&both, Policy::Admin, bad).is_err(), "{bad}");
        }
        let twice = "Authorization: Bearer new-token\r\nAuthorization: Bearer new-token\r\n";
        let long = format!("Authorization: Bearer {}\r\n", "x".repeat(HEADER_BYTES_MAX));
        for missing in [
            "",
            "Authorization: Basic new-token\r\n",
            "Authorization: new-token\r\n",
            "Authorization: Bearer\r\n",
            "Authorization: Bearer \r\n",
            "Authorization: Bearer new-token old-token\r\n",
            "Authorization: Bearer new-tok\u{e9}n\r\n",
            "Proxy-Authorization: Bearer new-token\r\n",
            twice,
            &long,
        ] {
            assert_eq!(ask(&both, Policy::Admin, missing), Err(Denied::Missing), "{missing}");
            assert_eq!(ask(&both, Policy::Public, missing), Ok(()), "{missing}");
        }
    }

    #[test]
    fn each_scope_is_opened_by_its_own_token_alone() {
        let keys = keys("all", "cli", "", "adm").expect("keys");
        for (policy, token, outcome) in [
            (Policy::Client, "cli", Ok(())),
            (Policy::Node, "all", Ok(())),
            (Policy::Admin, "adm", Ok(())),
            (Policy::NodeOrAdmin, "adm", Ok(())),
            (Policy::NodeOrAdmin, "all", Ok(())),
            (Policy::NodeOrAdmin, "cli", Err(Denied::Scope)),
            (Policy::Client, "all", Err(Denied::Scope)),
            (Policy::Client, "adm", Err(Denied::Scope)),
            (Policy::Admin, "all", Err(Denied::Scope)),
            (Policy::Any, "cli", Ok(())),
        ] {
            assert_eq!(shown(&keys, policy, token), outcome, "{policy:?} {token}");
        }
        assert!(matches!(shown(&keys, Policy::Any, "x"), Err(Denied::Bad(_))));
    }

    #[test]
    fn one_token_serves_all_and_a_scope_without_any_is_an_error() {
        for only in [("t", "", "", ""), ("", "t", "", ""), ("", "", "t", ""), ("", "", "", "t")] {
            let keys = keys(only.0, only.1, only.2, only.3).expect("keys");
            for policy in [Policy::Client, Policy::Node, Policy::Admin] {
                assert_eq!(shown(&keys, policy, "t"), Ok(()), "{only:?}");
            }
        }
        let error = keys("", "c", "n", "").expect_err("nothing opens the admin routes");
        assert!(error.contains("LLORCH_ADMIN_TOKEN_FILE"), "{error}");
        let open = keys("", "", "", "").expect("nothing is set");
        assert_eq!(ask(&open, Policy::Admin, ""), Ok(()));
    }

    #[test]
    fn token_files_are_checked_without_being_repeated() {
        let long = "cret".repeat(HEADER_BYTES_MAX);
        for bad in ["", "\n \n", "a\nb\nc", "se cret", "s\u{e9}cret", "se\0cret", &long] {
            let error = Tokens::parse(bad).expect_err(bad);
            assert!(!error.contains("cret"), "{error}");
        }
        let given = Given { all: tokens("secret"), own: Default::default() };
        assert!(!format!("{given:?}").contains("secret"));
        assert!(!format!("{:?}", Keys::resolve(given, &Scope::ALL)).contains("secret"));
    }

    #[test]
    fn fingerprints_are_the_beginning_of_a_sha_256() {
        let keys = keys("t", "", "", "").expect("keys");
        // printf %s abc | sha256sum
        let Err(Denied::Bad(fingerprint)) = shown(&keys, Policy::Node, "abc") else { panic!("it is bad") };
        assert_eq!(fingerprint.to_string(), "ba7816");
    }
}
