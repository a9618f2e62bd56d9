//! Asks a server for a span of a file, and follows it to where the file is.
//!
//! Blocking, for helper threads: `ureq` with every limit set, and with redirects followed here rather
//! than there, so that a token never leaves the origin it is meant for. A watchdog thread ends what
//! blocks when the caller asks to stop. Certificates are checked against the system's own bundle.

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderMap;
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};

use super::answer::{self, Answer};
use super::digest::Digest;
use super::error::ModelError;

/// Hops from what was asked for to where it is: hubs need two or three.
const REDIRECTS_MAX: usize = 10;
/// Connecting, name resolution included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// From a request to the head of its answer: a hub may have to look for the file.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// How long one request may take in all; what has arrived by then is kept and the rest asked for anew.
const BODY_TIMEOUT: Duration = Duration::from_secs(3600);
/// What is read from a connection at once, in bytes.
const READ_BYTES: usize = 256 << 10;
/// How soon a stop is noticed while a connection blocks.
const WATCHDOG_PAUSE: Duration = Duration::from_millis(50);
/// Largest answer that is read as text, in bytes: the list of a large repository's files.
const TEXT_BYTES_MAX: u64 = 16 << 20;
/// Largest bundle of certificates, in bytes; usual ones have 200 KB.
const BUNDLE_BYTES_MAX: u64 = 8 << 20;
/// Where systems keep the certificates that they trust.
const BUNDLES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// A token for a hub. Never shown: neither by `Debug` nor in errors.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Reads a token as a file or variable holds it.
    ///
    /// # Errors
    /// What is allowed; never the text.
    pub fn parse(text: &str) -> Result<Secret, String> {
        let text = text.trim();
        let good = (1..=1024).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if good {
            Ok(Secret(text.to_string()))
        } else {
            Err("allowed is one word of visible ASCII characters".into())
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum Trouble {
    /// It may work later.
    Network(String),
    /// It will not.
    Fatal(String),
    /// The caller asked to stop.
    Cancelled,
}

/// Where a file is, and whether a token may be sent there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) url: String,
    pub(super) token: Option<Secret>,
}

/// An answer whose body was not read yet.
pub(super) struct Opened {
    pub(super) answer: Answer,
    pub(super) headers: HeaderMap,
    pub(super) body: ureq::Body,
    /// Where it came from in the end.
    pub(super) place: Place,
    /// What the hub says about the file on the way to it.
    pub(super) linked: (Option<Digest>, Option<u64>),
}

/// Connections to servers of models.
pub(super) struct Client {
    agent: Mutex<ureq::Agent>,
    config: ureq::config::Config,
    cancel: Arc<AtomicBool>,
}

impl Client {
    /// With `stall` as the longest silence in the middle of an answer.
    pub(super) fn new(stall: Duration, cancel: Arc<AtomicBool>) -> Result<Client, ModelError> {
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .root_certs(RootCerts::Specific(Arc::new(trusted()?)))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let config = ureq::Agent::config_builder()
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_send_request(Some(HEAD_TIMEOUT))
            .timeout_recv_response(Some(HEAD_TIMEOUT))
            .timeout_recv_body(Some(BODY_TIMEOUT))
            .timeout_per_read(Some(stall))
            .timeout_per_write(Some(stall))
            .input_buffer_size(READ_BYTES)
            .max_redirects(0)
            .http_status_as_error(false)
            .user_agent(concat!("llama-orch/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .tls_config(tls)
            .build();
        Ok(Client { agent: Mutex::new(config.new_agent()), config, cancel })
    }

    pub(super) fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// Runs `work` with a watchdog that interrupts what blocks in it once the caller asked to stop.
    pub(super) fn watched<T>(&self, work: impl FnOnce() -> T) -> T {
        thread::scope(|scope| {
            let (done, over) = mpsc::channel::<()>();
            scope.spawn(move || {
                while let Err(mpsc::RecvTimeoutError::Timeout) = over.recv_timeout(WATCHDOG_PAUSE) {
                    if self.cancelled() {
                        self.interrupt();
                    }
                }
            });
            let result = work();
            drop(done);
            result
        })
    }

    /// Ends every connection; requests that are running fail, later ones work.
    pub(super) fn interrupt(&self) {
        let fresh = self.config.new_agent();
        let old = std::mem::replace(&mut *self.agent.lock().unwrap_or_else(PoisonError::into_inner), fresh);
        old.shutdown();
    }

    /// Asks `place` for `asked`, or for all of it, and follows redirects.
    pub(super) fn open(&self, place: &Place, asked: Option<&Range<u64>>) -> Result<Opened, Trouble> {
        let mut place = place.clone();
        let mut linked = (None, None);
        for _ in 0..=REDIRECTS_MAX {
            if self.cancelled() {
                return Err(Trouble::Cancelled);
            }
            let agent = self.agent.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let mut request = agent.get(&place.url);
            if let Some(asked) = asked {
                request = request.header("range", format!("bytes={}-{}", asked.start, asked.end - 1));
            }
            if let Some(Secret(token)) = &place.token {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| self.trouble(&error))?;
            let (head, body) = response.into_parts();
            let (digest, bytes) = answer::linked(&head.headers);
            linked.0 = linked.0.or(digest.and_then(|hex| Digest::parse(&hex).ok()));
            linked.1 = linked.1.or(bytes);
            match answer::read(head.status.as_u16(), &head.headers, asked, unix_s()) {
                Answer::Redirect(to) => {
                    let target =
                        answer::redirect(&place.url, &to).map_err(|bad| Trouble::Fatal(bad.to_string()))?;
                    let token = place.token.filter(|_| target.same_origin);
                    place = Place { url: target.url, token };
                }
                answer => return Ok(Opened { answer, headers: head.headers, body, place, linked }),
            }
        }
        Err(Trouble::Fatal(format!("more than {REDIRECTS_MAX} redirects, perhaps in a circle")))
    }

    /// A whole answer as text.
    pub(super) fn text(&self, opened: Opened) -> Result<String, Trouble> {
        let mut bytes = Vec::new();
        let read = opened.body.into_reader().take(TEXT_BYTES_MAX + 1).read_to_end(&mut bytes);
        read.map_err(|error| self.read_trouble(&error))?;
        if bytes.len() as u64 > TEXT_BYTES_MAX {
            return Err(Trouble::Fatal("the answer is larger than 16 MiB".into()));
        }
        String::from_utf8(bytes).map_err(|_| Trouble::Fatal("the answer is not UTF-8".into()))
    }

    /// An error in the middle of a body.
    pub(super) fn read_trouble(&self, error: &io::Error) -> Trouble {
        if self.cancelled() {
            return Trouble::Cancelled;
        }
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                Trouble::Network("the server went silent in the middle of the file".into())
            }
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                Trouble::Network("the connection ended in the middle of the file".into())
            }
            _ => Trouble::Network(format!("reading failed: {error}")),
        }
    }

    fn trouble(&self, error: &ureq::Error) -> Trouble {
        use ureq::Error as E;
        if self.cancelled() {
            return Trouble::Cancelled;
        }
        match error {
            E::HostNotFound => Trouble::Network("the server's name is not known".into()),
            E::ConnectionFailed => Trouble::Network("cannot connect to the server".into()),
            E::Timeout(what) => Trouble::Network(format!("the server did not answer in time ({what})")),
            E::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Trouble::Network("nothing listens at the server's address (connection refused)".into())
            }
            // A certificate is not better at the next attempt.
            E::Io(error) if is_certificate(error) => Trouble::Fatal(format!(
                "the server's certificate is not trusted ({error}); for one of your own name its bundle in SSL_CERT_FILE"
            )),
            E::Rustls(_) | E::Tls(_) | E::Pem(_) => Trouble::Fatal(format!("TLS failed: {error}")),
            E::BadUri(_) | E::Http(_) | E::InvalidProxyUrl => {
                Trouble::Fatal("the URL cannot be asked for".into())
            }
            other => Trouble::Network(format!("the request failed: {other}")),
        }
    }
}

fn is_certificate(error: &io::Error) -> bool {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    matches!(inner, Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented))
}

/// The system's certificates, or those of `SSL_CERT_FILE`. None are no error: plain http needs none,
/// and https then says that its certificate is not trusted.
fn trusted() -> Result<Vec<Certificate<'static>>, ModelError> {
    let named = std::env::var_os("SSL_CERT_FILE").filter(|name| !name.is_empty());
    let pem = match &named {
        Some(file) => read_bundle(file.as_ref()).map_err(|error| {
            ModelError::Setup(format!(
                "SSL_CERT_FILE={file:?} cannot be read: {error}: name a PEM file, or unset it"
            ))
        })?,
        None => BUNDLES.iter().find_map(|path| read_bundle(path.as_ref()).ok()).unwrap_or_default(),
    };
    let found: Vec<Certificate<'static>> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    match named {
        Some(file) if found.is_empty() => Err(ModelError::Setup(format!(
            "SSL_CERT_FILE={file:?} holds no certificate: name a PEM file, or unset it"
        ))),
        _ => Ok(found),
    }
}

fn read_bundle(path: &std::path::Path) -> io::Result<Vec<u8>> {
    let mut pem = Vec::new();
    fs::File::open(path)?.take(BUNDLE_BYTES_MAX).read_to_end(&mut pem)?;
    Ok(pem)
}

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn unix_s() -> i64 {
    i64::try_from(unix_ms() / 1000).unwrap_or(i64::MAX)
}
