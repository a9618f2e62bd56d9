//! Asking a daemon: one request, one JSON answer, and what went wrong in words with the exit code that
//! scripts go by.

use std::cell::OnceCell;
use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;

use crate::service::auth::Scope;
use crate::service::credentials::Credentials;
use crate::service::tls::{Files, blocking};
use crate::settings::{Alias, EXIT_RUNTIME, Exit, Setting, Settings, number};
use crate::wire::url::BaseUrl;

/// Exit code where what was named does not exist.
pub const EXIT_NOT_FOUND: u8 = 3;
/// Exit code where nobody answers.
pub const EXIT_UNREACHABLE: u8 = 4;
/// Exit code where the daemon refuses, for lack of a token too.
pub const EXIT_REFUSED: u8 = 5;
/// Largest answer that is read, in bytes: a page of a thousand nodes is a megabyte or two.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// Pages that are read of one listing: a million entries.
const PAGES_MAX: usize = 1_000;

/// Which daemon to ask.
pub(super) const URL: Setting = Setting {
    flag: "url",
    env: "LLORCH_URL",
    aliases: &[Alias::same("ORCHESTRATORD_URL")],
    default: Some("http://127.0.0.1:8080"),
    value: "URL",
    help: "The daemon to ask, orchestratord or pool-managerd",
};

/// How long one answer may take.
pub(super) const TIMEOUT: Setting = Setting {
    flag: "timeout-ms",
    env: "LLORCH_TIMEOUT_MS",
    aliases: &[],
    default: Some("10000"),
    value: "MS",
    help: "How long one answer of a daemon may take; 100 to 600000",
};

/// Whose certificates are believed.
pub(super) const TLS_CA: Setting = blocking::CA;
/// The certificate that is shown: agents with a client CA serve nobody without.
pub(super) const TLS_CERT: Setting = blocking::CERT;
/// Its key.
pub(super) const TLS_KEY: Setting = blocking::KEY;

/// Which daemon answers at a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    /// `orchestratord`
    ControlPlane,
    /// `pool-managerd`
    Agent,
}

/// A daemon that is asked again and again.
pub(super) struct Remote {
    url: BaseUrl,
    bearer: Option<String>,
    agents: Rc<Agents>,
}

/// Connections in the clear, and within TLS from the first `https` URL on.
struct Agents {
    timeout: Duration,
    files: Files,
    clear: ureq::Agent,
    secured: OnceCell<ureq::Agent>,
}

impl Remote {
    pub(super) fn from_settings(settings: &Settings) -> Result<Remote, Exit> {
        let url = settings.need("url", |text| {
            // A list, as agents take it, names several: the first one is asked.
            let first = text.split(',').next().unwrap_or_default().trim();
            BaseUrl::lenient(first).map_err(|error| error.to_string())
        })?;
        let credentials = Credentials::read(settings, None, &[Scope::Admin], &mut Vec::new())?;
        let timeout = Duration::from_millis(settings.need("timeout-ms", number(100, 600_000))?);
        let agents = Agents::new(timeout, files(settings)?);
        // Files of no use are told before anybody is asked.
        agents.of(&url)?;
        Ok(Remote { url, bearer: credentials.keys().of(Scope::Admin).bearer(), agents: Rc::new(agents) })
    }

    /// The same installation's daemon at another URL.
    pub(super) fn at(&self, url: BaseUrl) -> Remote {
        Remote { url, bearer: self.bearer.clone(), agents: self.agents.clone() }
    }

    /// Something that is no daemon of ours, and is shown no token of ours.
    pub(super) fn stranger(url: BaseUrl, bearer: Option<String>, timeout: Duration, files: Files) -> Remote {
        Remote { url, bearer, agents: Rc::new(Agents::new(timeout, files)) }
    }

    pub(super) fn url(&self) -> &BaseUrl {
        &self.url
    }

    /// Which daemon this is, and its version.
    pub(super) fn service(&self) -> Result<(Service, String), Exit> {
        let health = self.get("/health")?;
        let version = health["version"].as_str().unwrap_or("?").to_string();
        match health["service"].as_str() {
            Some("orchestratord") => Ok((Service::ControlPlane, version)),
            Some("pool-managerd") => Ok((Service::Agent, version)),
            _ => Err(Exit::runtime(format!(
                "{}: what answers there is neither orchestratord nor pool-managerd; name one with --url or LLORCH_URL",
                self.url
            ))),
        }
    }

    /// Asks for what must be there.
    pub(super) fn get(&self, path: &str) -> Result<Value, Exit> {
        let (status, body) = self.ask("GET", path, None)?;
        self.judge(path, status, body)
    }

    /// Asks for something to be done.
    pub(super) fn post(&self, path: &str, body: Option<&Value>) -> Result<Value, Exit> {
        let (status, body) = self.ask("POST", path, body)?;
        self.judge(path, status, body)
    }

    /// All pages of a listing; `name` is the field with the entries.
    pub(super) fn list(&self, path: &str, name: &str) -> Result<Vec<Value>, Exit> {
        let (mut entries, mut after) = (Vec::new(), String::new());
        for _ in 0..PAGES_MAX {
            let query = if after.is_empty() { String::new() } else { format!("?after={after}") };
            let mut page = self.get(&format!("{path}{query}"))?;
            if let Value::Array(listed) = page[name].take() {
                entries.extend(listed);
            }
            match page["next"].as_str() {
                Some(next) => after = next.to_string(),
                None => break,
            }
        }
        Ok(entries)
    }

    /// One request and its answer, whatever its status. Text that is no JSON is a string.
    pub(super) fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Result<(u16, Value), Exit> {
        let text = body.map(Value::to_string).unwrap_or_default();
        let mut request = http::Request::builder().method(method).uri(format!("{}{path}", self.url));
        if let Some(bearer) = &self.bearer {
            request = request.header("Authorization", bearer);
        }
        if body.is_some() {
            request = request.header("Content-Type", "application/json");
        }
        let failed = |why: String| Exit { code: EXIT_UNREACHABLE, message: why };
        let agent = self.agents.of(&self.url)?;
        let answered = match method {
            "GET" | "HEAD" => request.body(()).map(|request| agent.run(request)),
            _ => request.body(text).map(|request| agent.run(request)),
        };
        let answered = answered.map_err(|error| failed(format!("{}{path}: {error}", self.url)))?;
        let mut answer = answered.map_err(|error| failed(self.unreached(&error)))?;
        let bytes = answer.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_vec();
        let bytes =
            bytes.map_err(|error| failed(format!("{}{path}: its answer broke off: {error}", self.url)))?;
        let value = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        Ok((answer.status().as_u16(), value))
    }

    /// Why there is no answer, and what may help.
    fn unreached(&self, error: &ureq::Error) -> String {
        let text = error.to_string();
        let about = ["certificate", "alert", "corrupt message", "InvalidContentType"];
        let advice = if self.url.https() && about.iter().any(|word| text.contains(word)) {
            "LLORCH_TLS_CA names the root of its certificate, LLORCH_TLS_CLIENT_CERT and LLORCH_TLS_CLIENT_KEY what it is shown, and http:// is for daemons without TLS"
        } else {
            "is the daemon running there? Name another one with --url or LLORCH_URL"
        };
        format!("cannot reach {}: {text}; {advice}", self.url)
    }

    fn judge(&self, path: &str, status: u16, body: Value) -> Result<Value, Exit> {
        let told = body["message"].as_str().map(super::terminal::clean);
        let told = told.unwrap_or_else(|| format!("{path} is answered {status}"));
        let (code, message) = match status {
            200..=299 => return Ok(body),
            403 if body["code"] == "CERTIFICATE_REQUIRED" => (
                EXIT_REFUSED,
                format!(
                    "{} wants a certificate: name one with LLORCH_TLS_CLIENT_CERT and LLORCH_TLS_CLIENT_KEY",
                    self.url
                ),
            ),
            401 | 403 if self.bearer.is_some() => (
                EXIT_REFUSED,
                format!(
                    "{} does not accept the token: compare LLORCH_API_TOKEN or the file in LLORCH_API_TOKEN_FILE with the daemon's",
                    self.url
                ),
            ),
            401 | 403 => (
                EXIT_REFUSED,
                format!(
                    "{} wants a token: set LLORCH_API_TOKEN_FILE to the file that holds it, or LLORCH_API_TOKEN",
                    self.url
                ),
            ),
            404 => (EXIT_NOT_FOUND, format!("{}: {told}", self.url)),
            400..=499 | 503 => (EXIT_REFUSED, format!("{} refuses: {told}", self.url)),
            _ => (EXIT_RUNTIME, format!("{} fails: {told}", self.url)),
        };
        Err(Exit { code, message })
    }
}

/// The files that settings name.
pub(super) fn files(settings: &Settings) -> Result<Files, Exit> {
    // A command serves nobody: there is nothing of its own to show instead.
    Files::from_settings(settings, [""; 3])
}

impl Agents {
    fn new(timeout: Duration, files: Files) -> Agents {
        Agents { clear: agent(timeout, None), secured: OnceCell::new(), timeout, files }
    }

    /// Those for a URL.
    fn of(&self, url: &BaseUrl) -> Result<&ureq::Agent, Exit> {
        if !url.https() {
            return Ok(&self.clear);
        }
        if let Some(agent) = self.secured.get() {
            return Ok(agent);
        }
        let tls = self.files.blocking_client().map_err(Exit::config)?;
        Ok(self.secured.get_or_init(|| agent(self.timeout, Some(tls))))
    }
}

fn agent(timeout: Duration, tls: Option<ureq::tls::TlsConfig>) -> ureq::Agent {
    let limit = Some(timeout);
    ureq::Agent::config_builder()
        .tls_config(tls.unwrap_or_default())
        .timeout_global(limit)
        .timeout_per_call(limit)
        .timeout_resolve(limit)
        .timeout_connect(limit)
        .timeout_send_request(limit)
        .timeout_send_body(limit)
        .timeout_recv_response(limit)
        .timeout_recv_body(limit)
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(false)
        .build()
        .new_agent()
}
