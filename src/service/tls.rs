//! Certificates and keys of a daemon: which files, what is made of them, and when they are read again.
//!
//! Three pairs of roles: what this process shows to those who connect (`--tls-cert`, `--tls-key`), whose
//! certificates it accepts from them (`--tls-client-ca`), and what it does as a client itself (`--tls-ca`,
//! `--tls-client-cert`, `--tls-client-key`). Nothing of TLS is built where none of it is configured, until
//! the first `https` URL is dialled.
//!
//! The files are read again on SIGHUP, and when something changes in their directories. New ones take
//! effect for connections from then on, all together and only if all can be used; else the old ones stay,
//! and the log names the file.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use crate::metrics::Scrape;
use crate::net::Net;
use crate::net::tls::ClientTls;
use crate::reactor::Registry;
use crate::reactor::dirwatch::FileWatch;
use crate::reactor::token::{Kind, Token};
use crate::settings::{Exit, Setting, Settings};
use crate::time::{Mono, Now, Wall, earliest};
use crate::wire::certificate::Certificate;

pub mod blocking;

/// Largest file that is read, in bytes: a system's bundle of roots has a quarter of that.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// After a change in a directory the files are read so much later, in milliseconds: a pair is written in two
/// steps.
const SETTLE_MS: u64 = 250;
/// A certificate that ends within this time draws a warning, in seconds: two weeks.
const EXPIRY_WARNING_S: i64 = 14 * 86_400;
/// How often it is looked for, in milliseconds: every day.
const EXPIRY_CHECK_MS: u64 = 86_400_000;
/// Where distributions keep the roots that they trust, the first that exists counts.
const SYSTEM_ROOTS: [&str; 5] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
    "/var/lib/ca-certificates/ca-bundle.pem",
];

/// The certificate that a daemon shows.
#[must_use]
pub const fn cert_setting(env: &'static str) -> Setting {
    Setting {
        flag: "tls-cert",
        env,
        aliases: &[],
        default: None,
        value: "FILE",
        help: "Listen with TLS: the certificate and those between it and its root, in PEM; read again on change and SIGHUP",
    }
}

/// Its key.
#[must_use]
pub const fn key_setting(env: &'static str) -> Setting {
    Setting {
        flag: "tls-key",
        env,
        aliases: &[],
        default: None,
        value: "FILE",
        help: "The private key of --tls-cert, in PEM; only its owner should be able to read it",
    }
}

/// Whose clients it knows.
#[must_use]
pub const fn client_ca_setting(env: &'static str, help: &'static str) -> Setting {
    Setting { flag: "tls-client-ca", env, aliases: &[], default: None, value: "FILE", help }
}

/// Whom a daemon believes as a client.
pub const CA_SETTING: Setting = Setting {
    flag: "tls-ca",
    env: "LLORCH_TLS_CA",
    aliases: &[],
    default: None,
    value: "FILE",
    help: "Roots, in PEM, that https servers must come from; the system's if absent",
};

/// What it shows as a client.
pub const CLIENT_CERT_SETTING: Setting = Setting {
    flag: "tls-client-cert",
    env: "LLORCH_TLS_CLIENT_CERT",
    aliases: &[],
    default: None,
    value: "FILE",
    help: "Certificate that https servers are shown if they ask for one; --tls-cert if absent",
};

/// The key of that.
pub const CLIENT_KEY_SETTING: Setting = Setting {
    flag: "tls-client-key",
    env: "LLORCH_TLS_CLIENT_KEY",
    aliases: &[],
    default: None,
    value: "FILE",
    help: "The private key of --tls-client-cert",
};

/// A file, and the name of the setting for error texts.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Named {
    setting: &'static str,
    path: PathBuf,
}

/// Which files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    server: Option<(Named, Named)>,
    client_ca: Option<Named>,
    ca: Option<Named>,
    client: Option<(Named, Named)>,
}

impl Files {
    /// Reads the six settings; `cert`, `key` and `client_ca` are the variables of this program's own.
    ///
    /// # Errors
    /// [`Exit`] where one of two that belong together is missing.
    pub fn from_settings(settings: &Settings, own: [&'static str; 3]) -> Result<Files, Exit> {
        let named = |flag: &str, setting| {
            let path = settings.get(flag, |text| Ok(PathBuf::from(text)))?;
            Ok::<_, Exit>(path.map(|path| Named { setting, path }))
        };
        let pair = |cert: (&'static str, &'static str), key: (&'static str, &'static str)| match (
            named(cert.0, cert.1)?,
            named(key.0, key.1)?,
        ) {
            (Some(cert), Some(key)) => Ok(Some((cert, key))),
            (None, None) => Ok(None),
            (Some(_), None) => Err(Exit::config(format!("{} is set, but {} is not", cert.1, key.1))),
            (None, Some(_)) => Err(Exit::config(format!("{} is set, but {} is not", key.1, cert.1))),
        };
        let server = pair(("tls-cert", own[0]), ("tls-key", own[1]))?;
        let client =
            pair(("tls-client-cert", CLIENT_CERT_SETTING.env), ("tls-client-key", CLIENT_KEY_SETTING.env))?;
        let client_ca = named("tls-client-ca", own[2])?;
        if client_ca.is_some() && server.is_none() {
            return Err(Exit::config(format!("{} is set, but {} is not", own[2], own[0])));
        }
        Ok(Files {
            client: client.or_else(|| server.clone()),
            server,
            client_ca,
            ca: named("tls-ca", CA_SETTING.env)?,
        })
    }

    /// The files of a program that is a client only.
    #[must_use]
    pub fn of_client(ca: Option<PathBuf>, pair: Option<(PathBuf, PathBuf)>) -> Files {
        let named = |setting| move |path| Named { setting, path };
        Files {
            ca: ca.map(named("tls_ca")),
            client: pair.map(|(cert, key)| (named("tls_client_cert")(cert), named("tls_client_key")(key))),
            ..Files::default()
        }
    }

    /// Whether those who connect speak TLS.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.server.is_some()
    }

    /// Whether those who connect may have to show a certificate.
    #[must_use]
    pub fn knows_clients(&self) -> bool {
        self.client_ca.is_some()
    }

    fn all(&self) -> impl Iterator<Item = &Named> {
        let pairs = [&self.server, &self.client].into_iter().flatten().flat_map(|(cert, key)| [cert, key]);
        pairs.chain(&self.client_ca).chain(&self.ca)
    }

    /// How this process is a client, read now or, where nothing is configured, when it first is one.
    ///
    /// # Errors
    /// A sentence that names the file and what is wrong with it.
    pub fn client(&self) -> Result<ClientTls, String> {
        if self.ca.is_none() && self.client.is_none() {
            return Ok(ClientTls::new(|| client_config(None, None)));
        }
        if self.ca.is_none() {
            // The system's roots are many: they are read when they are needed.
            let identity = self.client.as_ref().map(|(cert, key)| Identity::read(cert, key)).transpose()?;
            return Ok(ClientTls::new(move || client_config(None, identity.as_ref())));
        }
        let identity = self.client.as_ref().map(|(cert, key)| Identity::read(cert, key)).transpose()?;
        let config = client_config(self.ca.as_ref(), identity.as_ref())?;
        Ok(ClientTls::new(move || Ok(config.clone())))
    }

    fn server(&self) -> Result<Option<Shown>, String> {
        let Some((cert, key)) = &self.server else { return Ok(None) };
        let identity = Identity::read(cert, key)?;
        let leaf = identity.chain.first().and_then(|leaf| Certificate::read(leaf));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?;
        let builder = match &self.client_ca {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let roots = Arc::new(roots(file)?);
                // Which requests need a certificate is decided with the request; one that is shown must
                // be good in any case.
                let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                    .allow_unauthenticated()
                    .build()
                    .map_err(|error| file.complain(&error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let mut config = builder
            .with_single_cert(identity.chain, identity.key)
            .map_err(|error| cert.complain(&fit(key, &error)))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        // Every connection proves anew who it is: nothing outlives the files that are in force.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Some((Arc::new(config), leaf)))
    }
}

/// What those who connect are shown: the configuration, and what can be read of its certificate.
type Shown = (Arc<ServerConfig>, Option<Certificate>);

/// Why a certificate and its key cannot be used.
fn fit(key: &Named, error: &rustls::Error) -> String {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            format!("it does not belong to the key in {}={}", key.setting, key.path.display())
        }
        error => format!("with {}={}: {error}", key.setting, key.path.display()),
    }
}

impl Named {
    fn complain(&self, why: &str) -> String {
        format!("{}={}: {why}", self.setting, self.path.display())
    }

    fn read(&self) -> Result<Vec<u8>, String> {
        let read = || {
            let mut bytes = Vec::new();
            fs::File::open(&self.path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
            Ok::<_, std::io::Error>(bytes)
        };
        let bytes = read().map_err(|error| self.complain(&format!("cannot be read: {error}")))?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(self.complain(&format!("it is larger than {FILE_BYTES_MAX} bytes")));
        }
        Ok(bytes)
    }

    fn certificates(&self) -> Result<Vec<CertificateDer<'static>>, String> {
        let read: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&self.read()?).collect();
        match read {
            Ok(found) if found.is_empty() => Err(self.complain("it holds no certificate in PEM")),
            Ok(found) => Ok(found),
            Err(error) => Err(self.complain(&format!("it is no PEM: {error}"))),
        }
    }
}

/// A certificate, those above it, and its key.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    files: (Named, Named),
}

impl Identity {
    fn read(cert: &Named, key: &Named) -> Result<Identity, String> {
        let chain = cert.certificates()?;
        let found = PrivateKeyDer::from_pem_slice(&key.read()?)
            .map_err(|_| key.complain("it holds no private key in PEM without a passphrase"))?;
        Ok(Identity { chain, key: found, files: (cert.clone(), key.clone()) })
    }
}

fn roots(file: &Named) -> Result<RootCertStore, String> {
    let mut store = RootCertStore::empty();
    let (added, _) = store.add_parsable_certificates(file.certificates()?);
    if added == 0 {
        return Err(file.complain("none of its certificates can be a root"));
    }
    Ok(store)
}

/// The roots that this system trusts.
fn system_roots() -> Result<Named, String> {
    let found = SYSTEM_ROOTS.iter().map(Path::new).find(|path| path.exists());
    let path = found
        .ok_or_else(|| format!("this system has no roots at {}; set {}", SYSTEM_ROOTS[0], CA_SETTING.env))?;
    Ok(Named { setting: "the system's roots", path: path.to_path_buf() })
}

fn client_config(ca: Option<&Named>, identity: Option<&Identity>) -> Result<Arc<ClientConfig>, String> {
    let store = match ca {
        Some(file) => roots(file)?,
        None => roots(&system_roots()?)?,
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(store);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(Identity { chain, key, files }) => builder
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|error| files.0.complain(&fit(&files.1, &error)))?,
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// What is in force, and the watch on its files.
#[derive(Debug)]
pub struct Tls {
    files: Files,
    watch: FileWatch,
    /// Digests of what the files held when they were last read.
    contents: Vec<Option<u64>>,
    leaf: Option<Certificate>,
    read_at: Option<Mono>,
    check_at: Option<Mono>,
    reloads: u64,
    reloads_failed: u64,
}

impl Tls {
    /// Reads everything that is configured, and sets `net` up with it.
    ///
    /// # Errors
    /// [`Exit`] that names the file that cannot be used, and why.
    pub fn start(files: Files, net: &mut Net, registry: &Registry, now: Now) -> Result<Tls, Exit> {
        let mut tls = Tls {
            watch: FileWatch::new(
                files.all().map(|file| file.path.as_path()),
                Token::only(Kind::Certificates),
            ),
            contents: Vec::new(),
            leaf: None,
            read_at: None,
            check_at: None,
            reloads: 0,
            reloads_failed: 0,
            files,
        };
        // Armed before the files are read: what changes in between is seen.
        tls.arm(registry);
        tls.contents = tls.read_contents();
        tls.apply(net, now).map_err(Exit::config)?;
        tls.warn_of_readable_keys();
        Ok(tls)
    }

    fn arm(&mut self, registry: &Registry) {
        for (directory, error) in self.watch.renew(registry) {
            log::warn!(
                "{}: changes of certificates are not noticed there ({error}); send SIGHUP after one",
                directory.display()
            );
        }
    }

    fn read_contents(&self) -> Vec<Option<u64>> {
        let digest = |bytes: Vec<u8>| {
            let mut hasher = DefaultHasher::new();
            hasher.write(&bytes);
            hasher.finish()
        };
        self.files.all().map(|file| file.read().ok().map(digest)).collect()
    }

    fn apply(&mut self, net: &mut Net, now: Now) -> Result<(), String> {
        let client = self.files.client()?;
        let server = self.files.server()?;
        net.set_client_tls(client);
        if let Some((config, leaf)) = server {
            net.set_server_tls(Some(config));
            self.leaf = leaf;
            self.check_expiry(now);
        }
        Ok(())
    }

    fn warn_of_readable_keys(&self) {
        let keys: BTreeSet<(&Path, &str)> = [&self.files.server, &self.files.client]
            .into_iter()
            .flatten()
            .map(|(_, key)| (key.path.as_path(), key.setting))
            .collect();
        for (path, setting) in keys {
            let mode = fs::metadata(path).map(|metadata| metadata.permissions().mode());
            if mode.is_ok_and(|mode| mode & 0o007 != 0) {
                log::warn!("{setting}={}: everybody on this machine can read this key", path.display());
            }
        }
    }

    fn check_expiry(&mut self, now: Now) {
        self.check_at = Some(now.mono.plus_ms(EXPIRY_CHECK_MS));
        let (Some(leaf), Some((cert, _))) = (&self.leaf, &self.files.server) else { return };
        if let Some(warning) = expiry_warning(leaf, now.wall) {
            log::warn!("{}", cert.complain(&warning));
        }
    }

    /// Something happened in one of the directories.
    pub fn changed(&mut self, registry: &Registry, now: Mono) {
        self.arm(registry);
        self.read_at = Some(now.plus_ms(SETTLE_MS));
    }

    /// When [`Tls::turn`] must run at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Mono> {
        earliest(self.read_at, self.check_at)
    }

    /// Reads the files again where it is time and they differ.
    pub fn turn(&mut self, net: &mut Net, now: Now) {
        if self.read_at.is_some_and(|at| at <= now.mono) {
            self.read_at = None;
            let contents = self.read_contents();
            if contents != self.contents {
                self.contents = contents;
                self.replace(net, now);
            }
        }
        if self.check_at.is_some_and(|at| at <= now.mono) {
            self.check_expiry(now);
        }
    }

    /// Reads the files again, after SIGHUP, and looks at their directories anew.
    pub fn reload(&mut self, net: &mut Net, registry: &Registry, now: Now) {
        if self.files.all().next().is_some() {
            self.arm(registry);
            self.contents = self.read_contents();
            self.replace(net, now);
        }
    }

    /// Puts what the files hold in force; on any error everything stays as it was.
    fn replace(&mut self, net: &mut Net, now: Now) {
        match self.apply(net, now) {
            Ok(()) => {
                self.reloads += 1;
                self.warn_of_readable_keys();
                log::info!("certificates and keys of TLS were read again");
            }
            Err(why) => {
                self.reloads_failed += 1;
                log::warn!("TLS goes on with the old certificates and keys: {why}");
            }
        }
    }

    /// Whether those who connect may have to show a certificate.
    #[must_use]
    pub fn knows_clients(&self) -> bool {
        self.files.knows_clients()
    }

    /// What is counted of TLS, for a scrape.
    #[must_use]
    pub fn meters(&self, net: &Net) -> Option<Meters> {
        self.files.serves().then(|| Meters {
            not_after_s: self.leaf.as_ref().map(|leaf| leaf.not_after_s),
            handshakes: net.handshake_counts(),
            unfinished: net.handshakes_unfinished(),
            reloads: (self.reloads, self.reloads_failed),
        })
    }
}

fn expiry_warning(leaf: &Certificate, now: Wall) -> Option<String> {
    let now_s = i64::try_from(now.unix_ms() / 1000).unwrap_or(i64::MAX);
    let left_s = leaf.not_after_s.saturating_sub(now_s);
    if left_s < 0 {
        Some("this certificate has EXPIRED: nobody who checks it connects any more".into())
    } else if now_s < leaf.not_before_s {
        Some("this certificate does not hold yet: is the clock right?".into())
    } else if left_s < EXPIRY_WARNING_S {
        Some(format!("this certificate expires in {} days", left_s / 86_400))
    } else {
        None
    }
}

/// What is counted of TLS.
#[derive(Clone, Copy, Debug)]
pub struct Meters {
    not_after_s: Option<i64>,
    handshakes: crate::net::tls::Counts,
    unfinished: usize,
    reloads: (u64, u64),
}

impl Meters {
    /// Writes it out under `prefix`.
    pub fn scrape(&self, prefix: &str, scrape: &mut Scrape) {
        if let Some(at) = self.not_after_s {
            scrape.gauge(
                &format!("{prefix}_tls_certificate_expiry_timestamp_seconds"),
                "When the certificate that is shown ends, in seconds since the epoch.",
                &[("", at as f64)],
            );
        }
        scrape.gauge(
            &format!("{prefix}_tls_handshakes_unfinished"),
            "Handshakes of clients that are not complete.",
            &[("", self.unfinished as f64)],
        );
        let counts = self.handshakes;
        scrape.counter(
            &format!("{prefix}_tls_handshakes_total"),
            "Handshakes of clients, by outcome.",
            &[
                ("outcome=\"completed\"", counts.completed),
                ("outcome=\"failed\"", counts.failed),
                ("outcome=\"expired\"", counts.expired),
                ("outcome=\"crowded_out\"", counts.crowded_out),
                ("outcome=\"clear_text\"", counts.clear_text),
            ],
        );
        scrape.counter(
            &format!("{prefix}_tls_reloads_total"),
            "Times that certificates and keys were read again.",
            &[("outcome=\"ok\"", self.reloads.0), ("outcome=\"failed\"", self.reloads.1)],
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(directory: &Path) -> Files {
        let named = |setting, name| Named { setting, path: directory.join(name) };
        Files { server: Some((named("CERT", "cert.pem"), named("KEY", "key.pem"))), ..Files::default() }
    }

    fn pair() -> (String, String) {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["localhost".to_string()]).expect("a name");
        (params.self_signed(&key).expect("a certificate").pem(), key.serialize_pem())
    }

    #[test]
    fn what_cannot_be_used_is_named_with_the_reason() {
        let directory = tempfile::tempdir().expect("a directory");
        let ((cert, key), (_, other_key)) = (pair(), pair());
        for (cert_text, key_text, file, why) in [
            (None, Some(key.as_str()), "CERT=", "cannot be read"),
            (Some(cert.as_str()), None, "KEY=", "cannot be read"),
            (Some("nonsense"), Some(key.as_str()), "CERT=", "no certificate"),
            (Some(cert.as_str()), Some("nonsense"), "KEY=", "no private key"),
            (Some(cert.as_str()), Some(other_key.as_str()), "CERT=", "does not belong to the key in KEY="),
        ] {
            for (name, text) in [("cert.pem", cert_text), ("key.pem", key_text)] {
                let path = directory.path().join(name);
                match text {
                    Some(text) => fs::write(path, text).expect("written"),
                    None => drop(fs::remove_file(path)),
                }
            }
            let error = files(directory.path()).server().map(|_| ()).expect_err(why);
            assert!(error.starts_with(file) && error.contains(why), "{error}");
        }
        fs::write(directory.path().join("key.pem"), &key).expect("written");
        let (_, leaf) = files(directory.path()).server().expect("usable").expect("configured");
        assert_eq!(leaf.map(|leaf| leaf.is_of("localhost")), Some(true));
    }

    #[test]
    fn a_certificate_warns_of_its_end() {
        let leaf = Certificate { names: Vec::new(), not_before_s: 1_000, not_after_s: 10_000_000 };
        let warning = |s: u64| expiry_warning(&leaf, Wall(s * 1_000_000_000));
        assert_eq!(warning(1_000), None);
        assert!(warning(999).is_some_and(|text| text.contains("not hold yet")));
        assert_eq!(warning(10_000_000 - 14 * 86_400), None);
        assert_eq!(
            warning(10_000_000 - 13 * 86_400 - 5).as_deref(),
            Some("this certificate expires in 13 days")
        );
        assert!(warning(10_000_001).is_some_and(|text| text.contains("EXPIRED")));
    }
}
