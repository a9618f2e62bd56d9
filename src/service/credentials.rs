//! Where tokens come from, and how they are replaced while the daemon runs.
//!
//! Each kind of token is given by a flag or a variable, by a file, or by systemd (`LoadCredential`), whose
//! directory is looked into for `llorch-api-token` and its kin. Files are looked at when anything changes
//! in their directory, every few seconds in any case (a link may lead elsewhere, and not every file system
//! tells), and on SIGHUP. A file may be written in place, renamed over, or reached by a link that is
//! swapped, as Kubernetes does. A file that is of no use leaves the tokens as they are, and is named once.
//!
//! A new token is accepted at once. It is shown to peers only after a while, as long as they may be
//! expected to take the one before: they read their own files at times of their own.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::metrics::Scrape;
use crate::reactor::Registry;
use crate::reactor::dirwatch::FileWatch;
use crate::reactor::token::{Kind, Token};
use crate::settings::{Alias, Exit, Setting, Settings};
use crate::time::Mono;

use super::auth::{Given, Keys, Scope, Tokens};

/// Largest token file, in bytes: two tokens as long as a request can carry them.
const FILE_BYTES_MAX: u64 = 16 * 1024;
/// How often files are looked at without an event, in milliseconds: a look is one `stat` each.
const LOOK_EVERY_MS: u64 = 5_000;
/// How long a file that is of no use has time to become better before it is named, in milliseconds: some
/// are written in place.
const SETTLE_MS: u64 = 250;
/// How long peers are still shown the previous token, in milliseconds, while it is accepted: the kubelet
/// takes up to about two minutes to bring a new secret to all nodes.
const SHOW_NEW_AFTER_MS: u64 = 150_000;

const fn token(flag: &'static str, env: &'static str, help: &'static str) -> Setting {
    Setting { flag, env, aliases: &[], default: None, value: "TOKEN", help }
}

const fn file(flag: &'static str, env: &'static str, help: &'static str) -> Setting {
    Setting { flag, env, aliases: &[], default: None, value: "FILE", help }
}

/// The token itself.
pub const API_TOKEN: Setting = Setting {
    aliases: &[Alias::same("AUTH_TOKEN")],
    ..token(
        "api-token",
        "LLORCH_API_TOKEN",
        "Bearer token that callers need and that peers are sent; prefer the variable or the file, a command line is public",
    )
};
/// Its file.
pub const API_TOKEN_FILE: Setting = file(
    "api-token-file",
    "LLORCH_API_TOKEN_FILE",
    "File with the token, and on a second line the previous one; read again when it changes, and on SIGHUP",
);
/// The clients' own.
pub const CLIENT_TOKEN: Setting = token(
    "client-token",
    "LLORCH_CLIENT_TOKEN",
    "Token of its own for those who send prompts: /v1, tasks, sessions",
);
/// Its file.
pub const CLIENT_TOKEN_FILE: Setting = file(
    "client-token-file",
    "LLORCH_CLIENT_TOKEN_FILE",
    "File with the clients' token, as --api-token-file",
);
/// The nodes' own.
pub const NODE_TOKEN: Setting = token(
    "node-token",
    "LLORCH_NODE_TOKEN",
    "Token of its own for control planes and nodes among themselves: registration, heartbeats, relay",
);
/// Its file.
pub const NODE_TOKEN_FILE: Setting =
    file("node-token-file", "LLORCH_NODE_TOKEN_FILE", "File with the nodes' token, as --api-token-file");
/// The operators' own.
pub const ADMIN_TOKEN: Setting = token(
    "admin-token",
    "LLORCH_ADMIN_TOKEN",
    "Token of its own for operators: nodes, pools, drains, events, explain, GPUs",
);
/// Its file.
pub const ADMIN_TOKEN_FILE: Setting = file(
    "admin-token-file",
    "LLORCH_ADMIN_TOKEN_FILE",
    "File with the operators' token, as --api-token-file",
);
/// Whether a crash may write the process's memory to disk although there are tokens in it.
pub const CORE_DUMPS: Setting = Setting {
    flag: "core-dumps",
    env: "LLORCH_CORE_DUMPS",
    aliases: &[],
    default: Some("false"),
    value: "BOOL",
    help: "Allow core dumps although a token is set, which they would contain",
};

/// Every variable that gives a token or names its file.
pub const VARIABLES: [&str; 9] = [
    API_TOKEN.env,
    API_TOKEN_FILE.env,
    CLIENT_TOKEN.env,
    CLIENT_TOKEN_FILE.env,
    NODE_TOKEN.env,
    NODE_TOKEN_FILE.env,
    ADMIN_TOKEN.env,
    ADMIN_TOKEN_FILE.env,
    "AUTH_TOKEN",
];

/// A kind of token: whose it is, and the settings that give it.
struct Kindred {
    scope: Option<Scope>,
    setting: &'static Setting,
    file: &'static Setting,
    /// Its name among systemd's credentials.
    credential: &'static str,
}

static KINDS: [Kindred; 4] = [
    Kindred { scope: None, setting: &API_TOKEN, file: &API_TOKEN_FILE, credential: "llorch-api-token" },
    Kindred {
        scope: Some(Scope::Client),
        setting: &CLIENT_TOKEN,
        file: &CLIENT_TOKEN_FILE,
        credential: "llorch-client-token",
    },
    Kindred {
        scope: Some(Scope::Node),
        setting: &NODE_TOKEN,
        file: &NODE_TOKEN_FILE,
        credential: "llorch-node-token",
    },
    Kindred {
        scope: Some(Scope::Admin),
        setting: &ADMIN_TOKEN,
        file: &ADMIN_TOKEN_FILE,
        credential: "llorch-admin-token",
    },
];

/// One kind of token that is given.
#[derive(Clone, Debug)]
struct Source {
    scope: Option<Scope>,
    from: From,
}

#[derive(Clone, Debug)]
enum From {
    Setting(Tokens),
    File {
        /// What operators know it by.
        name: &'static str,
        path: PathBuf,
    },
}

/// What tells one content of a file from another without reading it.
type Stamp = Option<[i64; 7]>;

/// All tokens, and what it takes to keep them up to date.
#[derive(Debug, Default)]
pub struct Credentials {
    sources: Vec<Source>,
    served: Vec<Scope>,
    keys: Keys,
    /// The `Authorization` value that peers were shown so far, and until when.
    earlier: Option<(String, Mono)>,
    watch: Option<FileWatch>,
    /// The files whose content is in force, or was found to be of no use and named.
    settled: Option<Vec<Stamp>>,
    unsettled: Option<Vec<Stamp>>,
    look_at: Mono,
    /// Reloads that worked, and that did not.
    reloads: (u64, u64),
}

impl Credentials {
    /// Reads the tokens as they are given now. `served` are the scopes that the program has routes for;
    /// `systemd` is its directory of credentials.
    ///
    /// # Errors
    /// [`Exit`] that names the source, never the token.
    pub fn read(
        settings: &Settings,
        systemd: Option<OsString>,
        served: &[Scope],
        notes: &mut Vec<String>,
    ) -> Result<Credentials, Exit> {
        let mut sources = Vec::new();
        for kind in &KINDS {
            let given = settings.secret(kind.setting.flag, Tokens::parse)?;
            let path = settings.get(kind.file.flag, |path| Ok(PathBuf::from(path)))?;
            if given.is_some() && settings.on_command_line(kind.setting.flag) {
                notes.push(format!(
                    "--{} stands on the command line, where every user of this machine can read it: use {}",
                    kind.setting.flag, kind.file.env
                ));
            }
            let credential = systemd.as_ref().map(|directory| Path::new(directory).join(kind.credential));
            let from = match (path, given) {
                (Some(path), also) => {
                    if also.is_some() {
                        notes.push(format!("{} counts, {} does not", kind.file.env, kind.setting.env));
                    }
                    From::File { name: kind.file.env, path }
                }
                (None, Some(tokens)) => From::Setting(tokens),
                (None, None) => match credential.filter(|path| path.exists()) {
                    Some(path) => From::File { name: kind.credential, path },
                    None => continue,
                },
            };
            if let From::File { path, .. } = &from
                && path.metadata().is_ok_and(|metadata| metadata.mode() & 0o004 != 0)
            {
                notes.push(format!("{} can be read by every user of this machine", path.display()));
            }
            sources.push(Source { scope: kind.scope, from });
        }
        let mut credentials = Credentials { sources, served: served.to_vec(), ..Credentials::default() };
        credentials.settled = Some(credentials.stamps());
        credentials.keys = credentials.read_all().map_err(Exit::config)?;
        Ok(credentials)
    }

    /// The tokens in force.
    #[must_use]
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// The `Authorization` value that peers are shown, if there is a token. A secret.
    #[must_use]
    pub fn bearer(&self, now: Mono) -> Option<String> {
        match &self.earlier {
            Some((earlier, until)) if now < *until => Some(earlier.clone()),
            _ => self.keys.of(Scope::Node).bearer(),
        }
    }

    /// A peer does not take what it was shown: the token before is not waited with any longer.
    pub fn was_refused(&mut self) {
        self.earlier = None;
    }

    /// When [`Credentials::turn`] is to be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        self.has_files().then_some(self.look_at)
    }

    /// Looks at the files if it is time to, or if a watch has reported something.
    pub fn turn(&mut self, changed: bool, now: Mono, registry: &Registry) {
        if !self.has_files() || (!changed && now < self.look_at) {
            return;
        }
        self.look_at = now.plus_ms(LOOK_EVERY_MS);
        // Armed before the look: what changes in between is reported.
        self.watch(registry);
        self.look(now);
    }

    /// Reads everything again, as SIGHUP asks for.
    pub fn reload(&mut self, now: Mono) {
        if !self.has_files() {
            return log::info!("SIGHUP: nothing to read again, no token comes from a file");
        }
        let stamps = self.stamps();
        match self.read_all() {
            Ok(keys) => self.take(keys, stamps, now),
            Err(why) => self.keep(&why, stamps),
        }
    }

    /// Writes the metrics; `program` is their prefix.
    pub fn scrape(&self, program: &str, scrape: &mut Scrape) {
        scrape.counter(
            &format!("{program}_token_reloads_total"),
            "Times that token files had changed, by whether they were of use.",
            &[("outcome=\"ok\"", self.reloads.0), ("outcome=\"failed\"", self.reloads.1)],
        );
    }

    fn has_files(&self) -> bool {
        self.files().next().is_some()
    }

    fn files(&self) -> impl Iterator<Item = &Path> {
        self.sources.iter().filter_map(|source| match &source.from {
            From::File { path, .. } => Some(path.as_path()),
            From::Setting(_) => None,
        })
    }

    /// Keeps a watch on every directory in which a file lies.
    fn watch(&mut self, registry: &Registry) {
        // Where it cannot be done the files are looked at now and then all the same.
        if self.watch.is_none() {
            let files: Vec<PathBuf> = self.files().map(Path::to_path_buf).collect();
            let files = files.iter().map(PathBuf::as_path);
            self.watch = Some(FileWatch::new(files, Token::only(Kind::Credentials)));
        }
        if let Some(watch) = &mut self.watch {
            watch.renew(registry);
        }
    }

    fn look(&mut self, now: Mono) {
        let stamps = self.stamps();
        if self.settled.as_ref() == Some(&stamps) {
            return;
        }
        match self.read_all() {
            Ok(keys) => self.take(keys, stamps, now),
            Err(why) if self.unsettled.as_ref() == Some(&stamps) => self.keep(&why, stamps),
            Err(_) => {
                self.unsettled = Some(stamps);
                self.look_at = now.plus_ms(SETTLE_MS);
            }
        }
    }

    fn take(&mut self, keys: Keys, stamps: Vec<Stamp>, now: Mono) {
        self.reloads.0 += 1;
        (self.settled, self.unsettled) = (Some(stamps), None);
        let shown = self.bearer(now);
        let (old, new) = (self.keys.of(Scope::Node), keys.of(Scope::Node));
        if old != new {
            let kept =
                shown.filter(|shown| new.accepts_bearer(shown) && new.bearer().as_ref() != Some(shown));
            self.earlier = kept.map(|shown| (shown, now.plus_ms(SHOW_NEW_AFTER_MS)));
        }
        log::info!("tokens: read again{}", if keys == self.keys { ", they are the same" } else { "" });
        if Scope::ALL.iter().any(|scope| keys.of(*scope).is_short()) {
            log::warn!("tokens: one is shorter than the advised 32 characters");
        }
        self.keys = keys;
    }

    fn keep(&mut self, why: &str, stamps: Vec<Stamp>) {
        self.reloads.1 += 1;
        (self.settled, self.unsettled) = (Some(stamps), None);
        log::warn!("tokens: they stay as they are: {why}");
    }

    fn stamps(&self) -> Vec<Stamp> {
        let stamp = |m: Metadata| {
            let (device, inode, bytes) =
                (m.dev().cast_signed(), m.ino().cast_signed(), m.size().cast_signed());
            [device, inode, bytes, m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()]
        };
        self.files().map(|path| path.metadata().ok().map(stamp)).collect()
    }

    fn read_all(&self) -> Result<Keys, String> {
        let mut given = Given::default();
        for Source { scope, from } in &self.sources {
            let tokens = match from {
                From::Setting(tokens) => tokens.clone(),
                From::File { name, path } => {
                    read_file(path).map_err(|why| format!("{name}={}: {why}", path.display()))?
                }
            };
            match scope {
                None => given.all = tokens,
                Some(scope) => given.own[*scope as usize] = tokens,
            }
        }
        Keys::resolve(given, &self.served)
    }
}

fn read_file(path: &Path) -> Result<Tokens, String> {
    use rustix::fs::{Mode, OFlags};
    // Without blocking: a FIFO of that name must not stop the loop.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let cannot = |error: std::io::Error| format!("it cannot be read: {error}");
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| cannot(error.into()))?;
    let file = File::from(file);
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err("it is no file".into());
    }
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("it is larger than {FILE_BYTES_MAX} bytes"));
    }
    let text = String::from_utf8(bytes).map_err(|_| "it is not text".to_string())?;
    Tokens::parse(&text)
}

/// Keeps crashes of this process from writing its memory, tokens included, to disk.
pub fn forbid_core_dumps() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if let Err(error) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        log::warn!("core dumps cannot be turned off: {error}: a crash may write tokens to disk");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::head::parse_request;
    use crate::reactor::Reactor;
    use crate::service::auth::Policy;
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::symlink;

    static TABLE: &[Setting] = &[API_TOKEN, API_TOKEN_FILE, NODE_TOKEN, NODE_TOKEN_FILE];

    fn read(env: &[(&str, &Path)], systemd: Option<&Path>) -> Result<(Credentials, Vec<String>), Exit> {
        let env: BTreeMap<String, OsString> = env.iter().map(|(k, v)| (k.to_string(), (*v).into())).collect();
        let settings = Settings::read("t", "about", TABLE, None, [], |name| env.get(name).cloned())?;
        let mut notes = Vec::new();
        let systemd = systemd.map(|path| path.as_os_str().to_owned());
        let credentials = Credentials::read(&settings, systemd, &[Scope::Node, Scope::Admin], &mut notes)?;
        Ok((credentials, notes))
    }

    fn opens(credentials: &Credentials, token: &str) -> bool {
        let head = format!("GET / HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer {token}\r\n\r\n");
        let head = parse_request(head.as_bytes()).expect("a head");
        credentials.keys().check(Policy::Node, &head.fields).is_ok()
    }

    fn at(ms: u64) -> Mono {
        Mono(1).plus_ms(ms)
    }

    #[test]
    fn every_way_of_replacing_a_file_is_seen_and_bad_files_change_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        fs::write(&path, "one").expect("written");
        let (mut credentials, _) = read(&[("LLORCH_API_TOKEN_FILE", &path)], None).expect("a token");
        let reactor = Reactor::new().expect("a reactor");
        let registry = reactor.registry().expect("a registry");
        let mut clock = 0;
        let mut settle = |credentials: &mut Credentials| {
            // Twice, so that what is of no use has had its time.
            for _ in 0..2 {
                clock += LOOK_EVERY_MS;
                credentials.turn(false, at(clock), &registry);
            }
        };
        settle(&mut credentials);
        fs::write(&path, "two\none").expect("written in place");
        settle(&mut credentials);
        assert!(opens(&credentials, "one") && opens(&credentials, "two"));
        fs::write(directory.path().join("new"), "three\n").expect("written");
        fs::rename(directory.path().join("new"), &path).expect("renamed");
        settle(&mut credentials);
        assert!(opens(&credentials, "three") && !opens(&credentials, "two"));
        let bad: [(&str, &[u8]); 4] =
            [("empty", b""), ("blank", b"\n"), ("garbage", b"\xff\xfe"), ("large", &[b'x'; 20_000])];
        for (what, bytes) in bad {
            let failed = credentials.reloads.1;
            fs::write(&path, bytes).expect("written");
            settle(&mut credentials);
            assert!(opens(&credentials, "three"), "{what}");
            settle(&mut credentials);
            assert_eq!(credentials.reloads.1, failed + 1, "{what} is named once");
        }
        fs::remove_file(&path).expect("removed");
        settle(&mut credentials);
        fs::create_dir(&path).expect("a directory of that name");
        settle(&mut credentials);
        fs::remove_dir(&path).expect("removed");
        assert!(opens(&credentials, "three"));
        // As the kubelet does: the file is a link through a link that is swapped.
        for (version, token) in [("..1", "four"), ("..2", "five")] {
            fs::create_dir(directory.path().join(version)).expect("a version");
            fs::write(directory.path().join(version).join("token"), token).expect("written");
            symlink(version, directory.path().join("..tmp")).expect("a link");
            fs::rename(directory.path().join("..tmp"), directory.path().join("..data")).expect("swapped");
            if !path.is_symlink() {
                symlink("..data/token", &path).expect("a link");
            }
            settle(&mut credentials);
            assert!(opens(&credentials, token), "{token}");
        }
        assert!(!opens(&credentials, "three"));
    }

    #[test]
    fn peers_are_shown_a_new_token_once_they_may_know_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        fs::write(&path, "old").expect("written");
        let (mut credentials, _) = read(&[("LLORCH_NODE_TOKEN_FILE", &path)], None).expect("a token");
        fs::write(&path, "new\nold").expect("written");
        credentials.reload(at(0));
        assert_eq!(credentials.bearer(at(1)).as_deref(), Some("Bearer old"));
        // Another reload in between does not start the wait anew.
        credentials.reload(at(SHOW_NEW_AFTER_MS / 2));
        assert_eq!(credentials.bearer(at(SHOW_NEW_AFTER_MS)).as_deref(), Some("Bearer new"));
        fs::write(&path, "newer\nnew").expect("written");
        credentials.reload(at(SHOW_NEW_AFTER_MS));
        assert_eq!(credentials.bearer(at(SHOW_NEW_AFTER_MS)).as_deref(), Some("Bearer new"));
        credentials.was_refused();
        assert_eq!(credentials.bearer(at(SHOW_NEW_AFTER_MS)).as_deref(), Some("Bearer newer"));
        fs::write(&path, "other").expect("written");
        credentials.reload(at(SHOW_NEW_AFTER_MS));
        assert_eq!(credentials.bearer(at(SHOW_NEW_AFTER_MS)).as_deref(), Some("Bearer other"));
    }

    #[test]
    fn the_file_beats_the_variable_which_beats_systemd() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("token");
        fs::write(&path, "from-file").expect("written");
        fs::write(directory.path().join("llorch-api-token"), "from-systemd").expect("written");
        let (given, systemd) = (Path::new("from-variable"), Some(directory.path()));
        let both = [("LLORCH_API_TOKEN", given), ("LLORCH_API_TOKEN_FILE", path.as_path())];
        let (credentials, notes) = read(&both, systemd).expect("tokens");
        assert!(opens(&credentials, "from-file") && !opens(&credentials, "from-variable"));
        assert!(notes.iter().any(|note| note.contains("LLORCH_API_TOKEN_FILE counts")), "{notes:?}");
        assert!(opens(&read(&both[..1], systemd).expect("tokens").0, "from-variable"));
        assert!(opens(&read(&[], systemd).expect("tokens").0, "from-systemd"));
        assert!(read(&[], None).expect("nothing").0.keys().is_empty());
        let missing = directory.path().join("missing");
        let exit = read(&[("LLORCH_API_TOKEN_FILE", &missing)], None).expect_err("no such file");
        assert!(exit.code == 78 && exit.message.contains("LLORCH_API_TOKEN_FILE="), "{exit}");
    }
}
