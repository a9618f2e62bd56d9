//! `llorch demo-engine`: a demonstration engine, a process of its own. **It holds no model.**
//!
//! It speaks llama-server's dialects, so that the daemons can be tried, tested and measured on a
//! machine without GPU and model: health while loading, slots that fill up and make further requests
//! wait in silence, answers streamed at a set pace, a disconnect that frees its slot. What it says is
//! the prompt's own words, shuffled, behind the marker `[demo]`, and `/props` says what it is: nobody
//! should take it for a model.
//!
//! One thread a connection, blocking sockets. A signal ends the process at once. `http` moves bytes,
//! `answers` decides what is said, and this file has the state (slots, start of the process) and the
//! pace.

use std::ffi::OsString;
use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::settings::{Exit, Setting, Settings, number};
use answers::{Answer, Ask, Dialect, Progress, Refusal, error_body};
use http::{Connection, Ended, Request};

mod answers;
mod http;

/// Most connections at a time, each with its thread; the next one is answered 503 and closed.
const CONNECTIONS_MAX: usize = 256;
/// Stack of a connection's thread, in bytes: JSON of the deepest nesting allowed fits many times.
const STACK_BYTES: usize = 512 * 1024;
/// How often a request that waits for a slot or for its next token looks whether its client is there.
const CLIENT_CHECK: Duration = Duration::from_millis(20);
/// Lag from which the pace starts anew instead of catching up, as after a client that did not read.
const LAG_MAX: Duration = Duration::from_millis(100);
/// Pause after an accept that failed, mostly for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

static TABLE: &[Setting] = &[
    flag("port", None, "PORT", "Port to listen on; 0 takes a free one"),
    flag("host", Some("127.0.0.1"), "IP", "Address to listen on"),
    flag("slots", Some("4"), "N", "Requests served at once, 1 to 256; further ones wait"),
    flag("tokens-per-second", Some("50"), "N", "Pace of one answer; 0 is as fast as possible"),
    flag("prefill-ms", Some("20"), "MS", "Time from a slot to the first token, 0 to 600000 milliseconds"),
    flag("load-ms", Some("0"), "MS", "Time after the start in which every path answers 503"),
    flag("ctx", Some("4096"), "TOKENS", "Context size in words, 16 to 1048576"),
    flag("model", Some("llorch-demo"), "NAME", "Model name that is shown"),
];

const fn flag(
    flag: &'static str,
    default: Option<&'static str>,
    value: &'static str,
    help: &'static str,
) -> Setting {
    Setting { flag, env: "", aliases: &[], default, value, help }
}

/// Serves until a signal ends the process; `args` are those behind `demo-engine`.
///
/// # Errors
/// [`Exit`] for settings that are not usable and an address that cannot be listened on.
pub fn run(args: Vec<OsString>) -> Result<(), Exit> {
    let settings = Settings::read(
        "llorch demo-engine",
        "A demonstration engine without a model: speaks llama-server's API, answers with the prompt's words",
        TABLE,
        None,
        args,
        |_| None,
    )?;
    let host = settings.need("host", |text| {
        text.parse::<IpAddr>().map_err(|_| "allowed is an IP address such as 127.0.0.1".to_string())
    })?;
    let port = settings.need("port", number(0, u16::MAX.into()))?;
    let address = SocketAddr::new(host, u16::try_from(port).unwrap_or_default());
    let slots = usize::try_from(settings.need("slots", number(1, 256))?).unwrap_or(1);
    let tokens_per_second = settings.need("tokens-per-second", number(0, 1_000_000))?;
    let engine = Engine {
        slots: Slots { busy: Mutex::new(vec![false; slots]), freed: Condvar::new() },
        gap: Duration::from_nanos(1_000_000_000u64.checked_div(tokens_per_second).unwrap_or(0)),
        prefill: Duration::from_millis(settings.need("prefill-ms", number(0, 600_000))?),
        ready_at: Instant::now() + Duration::from_millis(settings.need("load-ms", number(0, 86_400_000))?),
        context: settings.need("ctx", number(16, 1 << 20))?,
        model: settings.need("model", |text| Ok(text.to_string()))?,
    };
    let listener = TcpListener::bind(address)
        .map_err(|error| Exit::runtime(format!("cannot listen on {address}: {error}")))?;
    let address = listener.local_addr().unwrap_or(address);
    let _ = writeln!(io::stdout(), "demonstration engine (no model) listening on http://{address}");
    accept(&listener, &Arc::new(engine))
}

fn accept(listener: &TcpListener, engine: &Arc<Engine>) -> ! {
    // Every connection's thread holds one more reference to this.
    let open = Arc::new(());
    loop {
        let Ok((stream, _)) = listener.accept() else {
            thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        let Ok(mut connection) = Connection::new(stream) else { continue };
        if Arc::strong_count(&open) > CONNECTIONS_MAX {
            let body = error_body(503, "unavailable_error", "Too many connections");
            let _ = connection.respond(503, &body, false);
            continue;
        }
        let (engine, held) = (Arc::clone(engine), Arc::clone(&open));
        let serve = move || {
            engine.serve(&mut connection);
            drop(held);
        };
        if thread::Builder::new().stack_size(STACK_BYTES).spawn(serve).is_err() {
            thread::sleep(ACCEPT_PAUSE);
        }
    }
}

struct Engine {
    slots: Slots,
    /// Between two tokens of one answer.
    gap: Duration,
    prefill: Duration,
    ready_at: Instant,
    /// In words, prompt and answer together.
    context: u64,
    model: String,
}

impl Engine {
    fn serve(&self, connection: &mut Connection) {
        loop {
            match connection.read_request() {
                Ok(request) => {
                    if !self.answer(connection, &request).unwrap_or(false) {
                        return;
                    }
                }
                Err(Ended::Refused(status, reason)) => {
                    let body = error_body(status, "invalid_request_error", reason);
                    if connection.respond(status, &body, false).is_ok() {
                        connection.linger();
                    }
                    return;
                }
                Err(Ended::Closed) => return,
            }
        }
    }

    /// Whether the connection goes on. An error means that the client has left.
    fn answer(&self, connection: &mut Connection, request: &Request) -> io::Result<bool> {
        if Instant::now() < self.ready_at {
            let body = error_body(503, "unavailable_error", "Loading model");
            return connection.respond(503, &body, request.keep_alive);
        }
        let generated = match (request.method.as_str(), request.path.as_str()) {
            ("POST", "/v1/chat/completions" | "/chat/completions") => {
                self.generate(connection, request, Dialect::Chat)
            }
            ("POST", "/v1/completions") => self.generate(connection, request, Dialect::Completion),
            ("POST", "/completion" | "/completions") => self.generate(connection, request, Dialect::Native),
            ("POST", "/v1/embeddings" | "/embeddings") => self.embed(connection, request),
            ("GET", path) => match self.page(path) {
                Some(body) => connection.respond(200, &body, request.keep_alive).map_err(Refused::Left),
                None => Err(Refused::By(Refusal::not_found())),
            },
            _ => Err(Refused::By(Refusal::not_found())),
        };
        match generated {
            Ok(goes_on) => Ok(goes_on),
            Err(Refused::By(Refusal { status, kind, message })) => {
                connection.respond(status, &error_body(status, kind, &message), request.keep_alive)
            }
            Err(Refused::Left(error)) => Err(error),
        }
    }

    fn page(&self, path: &str) -> Option<Value> {
        Some(match path {
            "/health" | "/v1/health" => json!({"status": "ok"}),
            "/props" => json!({
                "default_generation_settings": {"n_ctx": self.context},
                "total_slots": self.slots.lock().len(),
                "model_alias": self.model,
                "model_path": "demonstration engine: no model",
                "build_info": concat!("llorch demo-engine ", env!("CARGO_PKG_VERSION")),
            }),
            "/slots" => {
                let busy = self.slots.lock();
                let slot = |(id, busy): (usize, &bool)| json!({"id": id, "n_ctx": self.context, "is_processing": busy});
                busy.iter().enumerate().map(slot).collect()
            }
            "/v1/models" | "/models" => json!({
                "object": "list",
                "data": [{
                    "id": self.model, "object": "model", "created": unix_s(), "owned_by": "llorch-demo",
                    "meta": {"n_ctx_train": self.context},
                }],
            }),
            _ => return None,
        })
    }

    fn generate(
        &self,
        connection: &mut Connection,
        request: &Request,
        dialect: Dialect,
    ) -> Result<bool, Refused> {
        let ask = Ask::read(dialect, &request.body, self.context, &self.model)?;
        let slot = self.slots.take(connection)?;
        let answer = Answer::new(ask, slot.id, answer_id(), unix_s());
        let started = Instant::now();
        if answer.ask.stream {
            connection.start_stream()?;
            if let Some(event) = answer.opening() {
                connection.write_chunk(&event)?;
            }
        }
        let mut due = started + self.prefill;
        pace(connection, due)?;
        let first_token = Instant::now();
        let mut text = String::new();
        for index in 0..answer.ask.tokens {
            if index > 0 {
                due = (due + self.gap).max(Instant::now().checked_sub(LAG_MAX).unwrap_or(due));
                pace(connection, due)?;
            }
            let token = answer.token(index);
            if answer.ask.stream {
                connection.write_chunk(&answer.token_event(index, &token))?;
            } else {
                text.push_str(&token);
            }
        }
        let progress = Progress {
            prompt_ms: first_token.duration_since(started).as_secs_f64() * 1e3,
            predicted_ms: first_token.elapsed().as_secs_f64() * 1e3,
        };
        if answer.ask.stream {
            // The slot is free by the time that the client knows of the end.
            drop(slot);
            connection.write_chunk(&answer.closing(&progress))?;
            connection.end_stream()?;
            // As llama-server does after a stream, though it says so beforehand.
            return Ok(false);
        }
        drop(slot);
        Ok(connection.respond(200, &answer.whole(&text, &progress), request.keep_alive)?)
    }

    fn embed(&self, connection: &mut Connection, request: &Request) -> Result<bool, Refused> {
        let body = answers::embeddings(&request.body, self.context, &self.model)?;
        let slot = self.slots.take(connection)?;
        pace(connection, Instant::now() + self.prefill)?;
        drop(slot);
        Ok(connection.respond(200, &body, request.keep_alive)?)
    }
}

/// Why a request got no answer.
enum Refused {
    By(Refusal),
    /// The client did not wait for it.
    Left(io::Error),
}

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Refused {
        Refused::By(refusal)
    }
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Refused {
        Refused::Left(error)
    }
}

/// Sleeps until `due`, with an eye on the client.
fn pace(connection: &Connection, due: Instant) -> io::Result<()> {
    loop {
        connection.check_client()?;
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        thread::sleep(left.min(CLIENT_CHECK));
    }
}

/// What is served at once. Who finds none free waits, in no particular order, as long as its client
/// does; the bound on connections bounds the waiters.
struct Slots {
    busy: Mutex<Vec<bool>>,
    freed: Condvar,
}

/// A slot that is taken; dropping it frees it.
struct Slot<'a> {
    slots: &'a Slots,
    id: usize,
}

impl Slots {
    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<bool>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, connection: &Connection) -> io::Result<Slot<'_>> {
        let mut busy = self.lock();
        loop {
            if let Some(id) = busy.iter().position(|busy| !busy) {
                busy[id] = true;
                return Ok(Slot { slots: self, id });
            }
            let waited = self.freed.wait_timeout(busy, CLIENT_CHECK);
            busy = waited.unwrap_or_else(PoisonError::into_inner).0;
            connection.check_client()?;
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.slots.lock()[self.id] = false;
        self.slots.freed.notify_one();
    }
}

fn unix_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn answer_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}
