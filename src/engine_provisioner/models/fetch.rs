//! One file from a server into a part file, hashed on the way.
//!
//! Each of a few threads asks for a missing span, writes it where it belongs, and asks for the next;
//! the calling thread hashes what is there from the beginning on, tells how far it is, and notes it
//! down. A server that does not know ranges sends everything to one thread. Whatever goes wrong with a
//! connection is tried again with growing pauses, as long as bytes arrive in between; what says that the
//! file is another one than before starts it over; what will not change ends it.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::answer::{Answer, RETRY_AFTER_MAX, Validator};
use super::client::{Client, Opened, Place, Trouble};
use super::digest::{Digest, Hasher};
use super::error::ModelError;
use super::part::Part;
use super::progress::Progress;
use super::ranges::Ranges;

/// What one request asks for, in bytes: large enough that a round trip does not matter, small enough
/// that the hash, which needs them in order, is not far behind.
const SPAN_BYTES: u64 = 16 << 20;
/// What is read and written at once, in bytes.
const BUFFER_BYTES: usize = 256 << 10;
/// Longest pause between attempts.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// How often a file may turn out to be another one before that is given up.
const RESTARTS_MAX: u32 = 4;
/// How often progress is told.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// How often what is there is noted down: what a SIGKILL loses at most.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// What to fetch.
pub(super) struct Job<'a> {
    /// For people.
    pub(super) name: &'a str,
    pub(super) place: Place,
    /// What the whole has to be, where somebody said so.
    pub(super) expected: Option<Digest>,
    /// How long it has to be, where somebody said so.
    pub(super) bytes: Option<u64>,
    /// Whether a hub's token would help.
    pub(super) hub: bool,
}

/// How hard to try.
#[derive(Clone, Copy, Debug)]
pub(super) struct Effort {
    /// Connections at once.
    pub(super) connections: usize,
    /// Failures in a row, without a byte in between.
    pub(super) failures_max: u32,
    /// Pause after the first of them; doubles.
    pub(super) pause_first: Duration,
}

/// Asks whether there is room for this many more bytes.
pub(super) type Admit<'a> = dyn FnMut(u64) -> Result<(), ModelError> + 'a;
/// Hears how it goes.
pub(super) type Tell<'a> = dyn FnMut(Progress<'_>) + 'a;

/// What a run of the threads came to.
enum End {
    /// All is there.
    Whole(Digest),
    /// The file is another one than before.
    Changed,
    /// The connections are used up and something is missing: what is there stays.
    Short,
    /// It has to begin anew, for lack of ranges, after a pause.
    Again(String, Option<Duration>),
}

/// Fetches into `part`. Ends with all of it there, its digest checked where one is expected.
///
/// # Errors
/// [`ModelError`]; what arrived stays in `part` unless it is wrong.
pub(super) fn fetch(
    client: &Client,
    job: &Job<'_>,
    effort: Effort,
    part: &mut Part,
    admit: &mut Admit<'_>,
    tell: &mut Tell<'_>,
) -> Result<Digest, ModelError> {
    let mut failures = Failures { count: 0, effort };
    let mut restarts = 0;
    let mut ranges_work = true;
    loop {
        let before = part.done.bytes();
        let asked = if ranges_work {
            part.done.first_missing(part.total.unwrap_or(u64::MAX), SPAN_BYTES)
        } else {
            None
        };
        let opened = match (&asked, part.total) {
            // Everything was there, but for the digest.
            (None, Some(total)) if part.done.prefix_end() >= total => None,
            _ => match open(client, job, asked.as_ref(), &mut failures, before, tell)? {
                Some(opened) => Some(opened),
                None => {
                    ranges_work = false;
                    part.reset()?;
                    continue;
                }
            },
        };
        let expected = job.expected.or(opened.as_ref().and_then(|opened| opened.linked.0));
        let end = match opened {
            Some(opened) => match accept(opened, job, part, expected.is_some(), before, admit)? {
                First::Work(work) => run(client, job, effort, &mut failures, part, *work, tell)?,
                First::Changed => End::Changed,
                First::WholeOnly => {
                    ranges_work = false;
                    part.reset()?;
                    continue;
                }
            },
            None => run(client, job, effort, &mut failures, part, Work::nothing(job), tell)?,
        };
        match end {
            End::Whole(found) => {
                return match expected.filter(|expected| *expected != found) {
                    Some(expected) => Err(ModelError::Digest { name: job.name.into(), expected, found }),
                    None => Ok(found),
                };
            }
            End::Changed => {
                restarts += 1;
                if restarts > RESTARTS_MAX {
                    return Err(ModelError::Changing(job.name.into()));
                }
                tell(Progress::Note("the file changed on the server: starting over"));
                part.reset()?;
            }
            End::Short => {
                failures.pause(client, job, part.done.bytes(), "a part was left over", None, tell)?
            }
            End::Again(why, after) => {
                part.reset()?;
                failures.pause(client, job, 0, &why, after, tell)?;
            }
        }
    }
}

/// Fetches a small answer as text, with the same patience.
///
/// # Errors
/// [`ModelError`].
pub(super) fn text(
    client: &Client,
    job: &Job<'_>,
    effort: Effort,
    tell: &mut Tell<'_>,
) -> Result<String, ModelError> {
    let mut failures = Failures { count: 0, effort };
    loop {
        let opened = open(client, job, None, &mut failures, 0, tell)?;
        let read = match opened {
            Some(opened) if matches!(opened.answer, Answer::Whole { .. }) => client.text(opened),
            _ => Err(Trouble::Fatal("the server sent no list of files".into())),
        };
        match read {
            Ok(text) => return Ok(text),
            Err(trouble) => {
                let why = transient(job, trouble)?;
                failures.pause(client, job, 0, &why, None, tell)?;
            }
        }
    }
}

/// Failures in a row.
struct Failures {
    count: u32,
    effort: Effort,
}

impl Failures {
    /// Counts one more and waits, unless it was one too many.
    fn pause(
        &mut self,
        client: &Client,
        job: &Job<'_>,
        kept_bytes: u64,
        why: &str,
        after: Option<Duration>,
        tell: &mut Tell<'_>,
    ) -> Result<(), ModelError> {
        self.count += 1;
        let pause = self.next_pause(after).ok_or_else(|| network(job, why, after, kept_bytes))?;
        tell(Progress::Retrying { why, pause });
        if rest(pause, || client.cancelled()) { Ok(()) } else { Err(ModelError::Cancelled) }
    }

    /// `None` where it is not worth waiting any more.
    fn next_pause(&self, after: Option<Duration>) -> Option<Duration> {
        if self.count > self.effort.failures_max {
            return None;
        }
        match after {
            Some(after) if after > RETRY_AFTER_MAX => None,
            Some(after) => Some(after),
            None => {
                let doubled = self.effort.pause_first.saturating_mul(1 << (self.count.clamp(1, 16) - 1));
                // Many machines that lost the same server do not come back in step.
                Some(doubled.min(PAUSE_MAX).mul_f64(0.5 + fastrand::f64() / 2.0))
            }
        }
    }
}

fn network(job: &Job<'_>, why: &str, after: Option<Duration>, kept_bytes: u64) -> ModelError {
    let last = match after {
        Some(after) if after > RETRY_AFTER_MAX => format!("{why} and asks to wait {} s", after.as_secs()),
        _ => why.to_string(),
    };
    ModelError::Network { name: job.name.into(), last, kept_bytes }
}

/// Waits, and says whether it waited to the end.
fn rest(pause: Duration, stop: impl Fn() -> bool) -> bool {
    let until = Instant::now() + pause;
    loop {
        if stop() {
            return false;
        }
        match until.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => thread::sleep(left.min(Duration::from_millis(50))),
            _ => return true,
        }
    }
}

/// The first answer, however long the server needs to give a usable one. `None` where ranges do not
/// work there.
fn open(
    client: &Client,
    job: &Job<'_>,
    asked: Option<&Range<u64>>,
    failures: &mut Failures,
    kept_bytes: u64,
    tell: &mut Tell<'_>,
) -> Result<Option<Opened>, ModelError> {
    loop {
        let (why, after) = match client.open(&job.place, asked) {
            Ok(opened) => match &opened.answer {
                Answer::Part { .. } | Answer::Whole { .. } | Answer::NotSatisfiable => {
                    return Ok(Some(opened));
                }
                Answer::Nonsense(what) if asked.is_some() => {
                    tell(Progress::Note(what));
                    return Ok(None);
                }
                answer => classify(job, answer, opened.place.token.is_some())?,
            },
            Err(trouble) => (transient(job, trouble)?, None),
        };
        failures.pause(client, job, kept_bytes, &why, after, tell)?;
    }
}

/// What to wait for, or why not.
fn classify(
    job: &Job<'_>,
    answer: &Answer,
    token_sent: bool,
) -> Result<(String, Option<Duration>), ModelError> {
    let name = job.name.to_string();
    match answer {
        Answer::Later { status: 429, after } => {
            Ok(("the server asks for fewer requests (429)".into(), *after))
        }
        Answer::Later { status, after } => Ok((format!("the server is in trouble ({status})"), *after)),
        Answer::Denied(status) if job.hub => Err(ModelError::Denied { name, status: *status, token_sent }),
        Answer::Denied(status) => Err(ModelError::Server {
            name,
            what: format!(
                "the server wants credentials (status {status}), and tokens are sent for hf: references only"
            ),
        }),
        Answer::Missing(status) => Err(ModelError::NotFound { name, status: *status }),
        Answer::Nonsense(what) => Err(ModelError::Server { name, what: format!("the server sent {what}") }),
        Answer::Refused(status) => {
            Err(ModelError::Server { name, what: format!("the server refuses (status {status})") })
        }
        Answer::NotSatisfiable => Err(ModelError::Server { name, what: "the file is empty".into() }),
        Answer::Part { .. } | Answer::Whole { .. } | Answer::Redirect(_) => Ok((String::new(), None)),
    }
}

fn transient(job: &Job<'_>, trouble: Trouble) -> Result<String, ModelError> {
    match trouble {
        Trouble::Network(why) => Ok(why),
        Trouble::Fatal(what) => Err(ModelError::Server { name: job.name.into(), what }),
        Trouble::Cancelled => Err(ModelError::Cancelled),
    }
}

/// What the threads begin with.
struct Work {
    first: Option<(Opened, Range<u64>)>,
    /// Where to ask on.
    place: Place,
    /// Whether it can be asked for in spans.
    ranged: bool,
    total: Option<u64>,
    /// Whether a digest will be held against the whole.
    digest_known: bool,
}

impl Work {
    fn nothing(job: &Job<'_>) -> Work {
        Work { first: None, place: job.place.clone(), ranged: true, total: None, digest_known: false }
    }
}

/// What the first answer is good for.
enum First {
    /// To go on with.
    Work(Box<Work>),
    /// Nothing: the file is another one than before.
    Changed,
    /// Nothing: parts of it could not be told from parts of another state of the file.
    WholeOnly,
}

/// Holds the first answer against what is there and what is expected, and makes room.
fn accept(
    opened: Opened,
    job: &Job<'_>,
    part: &mut Part,
    digest_known: bool,
    before: u64,
    admit: &mut Admit<'_>,
) -> Result<First, ModelError> {
    let validator = Validator::of(&opened.headers);
    let (span, total, ranged) = match &opened.answer {
        Answer::Part { span, total } => {
            let joins = part.total.is_none_or(|known| known == *total)
                && part.validator.joins(&validator, digest_known);
            if before > 0 && !joins {
                return Ok(First::Changed);
            }
            if !validator.joins(&validator, digest_known) && span.end < *total {
                return Ok(First::WholeOnly);
            }
            (span.clone(), Some(*total), validator.joins(&validator, digest_known))
        }
        Answer::NotSatisfiable if before > 0 => return Ok(First::Changed),
        Answer::Whole { total } => {
            part.reset()?;
            (0..total.unwrap_or(u64::MAX), *total, false)
        }
        other => {
            classify(job, other, false)?;
            return Ok(First::Changed);
        }
    };
    let told = job.bytes.or(opened.linked.1);
    if let (Some(told), Some(total)) = (told, total)
        && told != total
    {
        let what = format!("the server has {total} bytes where {told} were announced");
        return Err(ModelError::Server { name: job.name.into(), what });
    }
    if total == Some(0) {
        return Err(ModelError::Server { name: job.name.into(), what: "the file is empty".into() });
    }
    admit(total.or(told).unwrap_or(0).saturating_sub(part.done.bytes()))?;
    if let Some(total) = total {
        part.reserve(total)?;
    }
    // Without ranges nothing can be continued, so there is nothing to note.
    part.validator = if ranged { validator } else { Validator::default() };
    let place = opened.place.clone();
    Ok(First::Work(Box::new(Work { first: Some((opened, span)), place, ranged, total, digest_known })))
}

/// What the threads share.
struct State {
    done: Ranges,
    /// One a connection that is at work.
    running: Vec<Range<u64>>,
    total: Option<u64>,
    place: Place,
    connections: usize,
    failures: u32,
    pauses: Vec<(String, Duration)>,
    ended: Option<Result<End, ModelError>>,
}

struct Shared<'a> {
    client: &'a Client,
    job: &'a Job<'a>,
    effort: Effort,
    file: &'a File,
    path: &'a Path,
    validator: &'a Validator,
    ranged: bool,
    digest_known: bool,
    state: Mutex<State>,
    moved: Condvar,
}

impl Shared<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.client.cancelled() || self.state().ended.is_some()
    }

    fn end(&self, how: Result<End, ModelError>) {
        let mut state = self.state();
        state.ended.get_or_insert(how);
        self.moved.notify_all();
    }

    /// The next span that nobody has asked for.
    fn claim(&self) -> Option<Range<u64>> {
        let mut state = self.state();
        if state.ended.is_some() {
            return None;
        }
        let mut taken = state.done.clone();
        state.running.iter().for_each(|span| taken.add(span.clone()));
        let span = taken.first_missing(state.total?, SPAN_BYTES)?;
        state.running.push(span.clone());
        Some(span)
    }

    fn release(&self, span: &Range<u64>) {
        let mut state = self.state();
        if let Some(at) = state.running.iter().position(|running| running == span) {
            state.running.swap_remove(at);
        }
        self.moved.notify_all();
    }

    /// One connection: span after span until nothing is left.
    fn work(&self, number: usize, first: Option<(Opened, Range<u64>)>) {
        let mut next = first.map(|(opened, span)| (Some(opened), span));
        loop {
            let (opened, span) = match next.take() {
                Some(next) => next,
                None => match self.claim() {
                    Some(span) => (None, span),
                    None => return,
                },
            };
            let result = self.transfer(opened, span.clone());
            self.release(&span);
            match result {
                Ok(()) => {}
                Err(_) if self.stopped() => return,
                Err(Failure::Fatal(error)) => return self.end(Err(error)),
                Err(Failure::Changed) => return self.end(Ok(End::Changed)),
                Err(Failure::Transient(why, after)) if !self.ranged => {
                    return self.end(Ok(End::Again(why, after)));
                }
                Err(Failure::Transient(why, after)) => {
                    if !self.pause(why, after) {
                        return;
                    }
                }
            }
            if number >= self.state().connections {
                return;
            }
        }
    }

    /// Counts a failure and waits. False where it is over.
    fn pause(&self, why: String, after: Option<Duration>) -> bool {
        let pause = {
            let mut state = self.state();
            state.failures += 1;
            // Perhaps the way there may have changed, as signed URLs do when they expire.
            state.place = self.job.place.clone();
            if after.is_some() {
                state.connections = (state.connections / 2).max(1);
            }
            let failures = Failures { count: state.failures, effort: self.effort };
            match failures.next_pause(after) {
                Some(pause) => {
                    state.pauses.push((why, pause));
                    pause
                }
                None => {
                    let error = network(self.job, &why, after, state.done.bytes());
                    state.ended.get_or_insert(Err(error));
                    self.moved.notify_all();
                    return false;
                }
            }
        };
        self.moved.notify_all();
        rest(pause, || self.stopped())
    }

    fn transfer(&self, opened: Option<Opened>, span: Range<u64>) -> Result<(), Failure> {
        let (opened, end) = match opened {
            Some(opened) => {
                let end = if let Answer::Part { span, .. } = &opened.answer { span.end } else { span.end };
                (opened, end)
            }
            None => self.ask(&span)?,
        };
        let mut body = opened.body.into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        let mut at = span.start;
        while at < end {
            let room = usize::try_from(end - at).unwrap_or(BUFFER_BYTES).min(BUFFER_BYTES);
            let read = match body.read(&mut buffer[..room]) {
                Ok(0) if end == u64::MAX => {
                    // A body of unknown length is over when it is.
                    let mut state = self.state();
                    state.total = Some(at);
                    self.moved.notify_all();
                    return Ok(());
                }
                Ok(0) => return Err(Failure::cut()),
                Ok(read) => read,
                Err(error) => {
                    return match self.client.read_trouble(&error) {
                        Trouble::Network(why) | Trouble::Fatal(why) => Err(Failure::Transient(why, None)),
                        Trouble::Cancelled => Err(Failure::Fatal(ModelError::Cancelled)),
                    };
                }
            };
            self.file
                .write_all_at(&buffer[..read], at)
                .map_err(|error| Failure::Fatal(ModelError::file(self.path, "write", error)))?;
            let mut state = self.state();
            state.done.add(at..at + read as u64);
            // What has to begin anew after a failure gets nowhere by arriving.
            if self.ranged {
                state.failures = 0;
            }
            at += read as u64;
            if state.ended.is_some() {
                return Err(Failure::Fatal(ModelError::Cancelled));
            }
            self.moved.notify_all();
        }
        // Reading the end of the body too lets the connection be used again.
        let _ = body.read(&mut buffer[..1]);
        // A shorter part than was asked for: the rest is claimed again.
        Ok(())
    }

    /// A further span: it has to be of the same state of the same file.
    fn ask(&self, span: &Range<u64>) -> Result<(Opened, u64), Failure> {
        let place = self.state().place.clone();
        let opened = self.client.open(&place, Some(span)).map_err(|trouble| match trouble {
            Trouble::Network(why) => Failure::Transient(why, None),
            other => match transient(self.job, other) {
                Ok(why) => Failure::Transient(why, None),
                Err(error) => Failure::Fatal(error),
            },
        })?;
        match &opened.answer {
            Answer::Part { span: found, total } => {
                let known = self.state().total;
                let validator = Validator::of(&opened.headers);
                let same = known == Some(*total) && self.validator.joins(&validator, self.digest_known);
                if !same {
                    return Err(Failure::Changed);
                }
                let end = found.end;
                self.state().place = opened.place.clone();
                Ok((opened, end))
            }
            Answer::Whole { .. } | Answer::NotSatisfiable => Err(Failure::Changed),
            Answer::Nonsense(what) => Err(Failure::Transient(format!("the server sent {what}"), None)),
            // What the redirect led to has expired, perhaps: the way there is asked for again.
            Answer::Denied(status) | Answer::Missing(status) if place != self.job.place => {
                Err(Failure::Transient(format!("the server refuses (status {status})"), None))
            }
            answer => match classify(self.job, answer, opened.place.token.is_some()) {
                Ok((why, after)) => Err(Failure::Transient(why, after)),
                Err(error) => Err(Failure::Fatal(error)),
            },
        }
    }
}

enum Failure {
    Transient(String, Option<Duration>),
    Fatal(ModelError),
    Changed,
}

impl Failure {
    fn cut() -> Failure {
        Failure::Transient("the connection ended in the middle of the file".into(), None)
    }
}

/// Lets the threads work, and hashes what they bring.
fn run(
    client: &Client,
    job: &Job<'_>,
    effort: Effort,
    failures: &mut Failures,
    part: &mut Part,
    work: Work,
    tell: &mut Tell<'_>,
) -> Result<End, ModelError> {
    let total = work.total.or(part.total);
    tell(Progress::Started { name: job.name, total_bytes: total, kept_bytes: part.done.bytes() });
    let missing = total.unwrap_or(0).saturating_sub(part.done.bytes());
    let wanted = usize::try_from(missing.div_ceil(SPAN_BYTES)).unwrap_or(usize::MAX);
    let connections = match (&work.first, work.ranged) {
        (None, _) => 0,
        (Some(_), false) => 1,
        (Some(_), true) => effort.connections.min(wanted).max(1),
    };
    let shared = Shared {
        client,
        job,
        effort,
        file: &part.file,
        path: part.path(),
        validator: &part.validator,
        ranged: work.ranged,
        digest_known: work.digest_known,
        state: Mutex::new(State {
            done: part.done.clone(),
            running: work.first.iter().map(|(_, span)| span.clone()).collect(),
            total,
            place: work.place,
            connections,
            failures: failures.count,
            pauses: Vec::new(),
            ended: None,
        }),
        moved: Condvar::new(),
    };
    let end = thread::scope(|scope| {
        let mut first = work.first;
        let workers: Vec<_> = (0..connections)
            .map(|number| {
                let (first, shared) = (first.take(), &shared);
                scope.spawn(move || shared.work(number, first))
            })
            .collect();
        let end = follow(&shared, part, tell, || workers.iter().all(thread::ScopedJoinHandle::is_finished));
        // Threads that still wait for a server that no longer matters.
        if !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
            shared.end(Ok(End::Changed));
            client.interrupt();
        }
        end
    });
    let state = shared.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    failures.count = state.failures;
    part.done = state.done;
    if work.ranged {
        // Not being able to note it down costs fetching it again, nothing else.
        let _ = part.save(&part.done);
    }
    end
}

/// Hashes in order what the threads write in any order, until all is hashed or something ended it.
fn follow(
    shared: &Shared<'_>,
    part: &Part,
    tell: &mut Tell<'_>,
    all_left: impl Fn() -> bool,
) -> Result<End, ModelError> {
    let mut hasher = Hasher::new();
    let (mut told, mut saved) = (Instant::now(), Instant::now());
    loop {
        let mut state = shared.state();
        if shared.client.cancelled() {
            return Err(ModelError::Cancelled);
        }
        if let Some(ended) = state.ended.take() {
            return ended;
        }
        let (prefix, total, bytes) = (state.done.prefix_end(), state.total, state.done.bytes());
        let pauses = std::mem::take(&mut state.pauses);
        if total.is_some_and(|total| hasher.done_bytes() >= total) {
            drop(state);
            tell(Progress::Bytes { done_bytes: bytes, total_bytes: total });
            return Ok(End::Whole(hasher.finish()));
        }
        if hasher.done_bytes() >= prefix && pauses.is_empty() {
            if all_left() && state.running.is_empty() && total.is_none_or(|total| prefix < total) {
                if shared.ranged {
                    return Ok(End::Short);
                }
                return Ok(End::Again("the connection ended in the middle of the file".into(), None));
            }
            drop(shared.moved.wait_timeout(state, TELL_EVERY).unwrap_or_else(PoisonError::into_inner));
        } else {
            drop(state);
            hasher
                .advance(&part.file, prefix)
                .map_err(|error| ModelError::file(part.path(), "read", error))?;
        }
        for (why, pause) in pauses {
            tell(Progress::Retrying { why: &why, pause });
        }
        if told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            tell(Progress::Bytes { done_bytes: bytes, total_bytes: total });
        }
        if shared.ranged && saved.elapsed() >= SAVE_EVERY {
            saved = Instant::now();
            let done = shared.state().done.clone();
            let _ = part.save(&done);
        }
    }
}
