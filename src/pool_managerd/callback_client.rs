//! Posts notices to callbacks, on helper threads of its own: a receiver that hangs delays nothing but its
//! helper. Threads are started when they are first needed.

use std::io;
use std::time::Duration;

use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};

use crate::reactor::Waker;
use crate::reactor::offload::Offload;
use crate::wire::url::BaseUrl;

use super::callbacks::{DELIVERIES_MAX, Delivery, Policy};

/// What looking a name up or connecting may take: receivers are in the same networks.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// What a whole delivery may take: a receiver only has to note it.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(5);

/// The outcome of a delivery: callback, event, and what became of it.
pub(super) type Delivered = (u64, u64, Result<(), String>);

/// The helpers.
pub(super) struct CallbackClient {
    policy: Policy,
    waker: Waker,
    helpers: Vec<Helper>,
}

struct Helper {
    thread: Offload<Job, Delivered>,
    is_busy: bool,
}

struct Job {
    delivery: Box<Delivery>,
    bearer: Option<String>,
}

impl CallbackClient {
    /// No helper yet.
    pub(super) fn new(policy: Policy, waker: Waker) -> CallbackClient {
        CallbackClient { policy, waker, helpers: Vec::new() }
    }

    /// Begins a delivery. `bearer` is sent to trusted receivers only.
    ///
    /// # Errors
    /// The delivery's outcome where it cannot even begin.
    pub(super) fn submit(
        &mut self,
        delivery: Box<Delivery>,
        bearer: Option<String>,
    ) -> Result<(), Delivered> {
        let failed = (delivery.callback, delivery.event);
        let idle = match self.helpers.iter().position(|helper| !helper.is_busy) {
            Some(idle) => idle,
            None if self.helpers.len() < DELIVERIES_MAX => match self.start() {
                Ok(thread) => {
                    self.helpers.push(Helper { thread, is_busy: false });
                    self.helpers.len() - 1
                }
                Err(error) => return Err((failed.0, failed.1, Err(format!("no helper thread: {error}")))),
            },
            None => return Err((failed.0, failed.1, Err("every helper is busy".into()))),
        };
        let bearer = bearer.filter(|_| delivery.is_trusted);
        let helper = &mut self.helpers[idle];
        helper.is_busy = helper.thread.submit(Job { delivery, bearer }).is_ok();
        if helper.is_busy {
            Ok(())
        } else {
            Err((failed.0, failed.1, Err("the helper thread has ended".into())))
        }
    }

    /// The next outcome, if there is one.
    pub(super) fn take(&mut self) -> Option<Delivered> {
        self.helpers.iter_mut().find_map(|helper| {
            let done = helper.thread.take()?;
            helper.is_busy = false;
            Some(done)
        })
    }

    fn start(&self) -> io::Result<Offload<Job, Delivered>> {
        let agent = agent(self.policy.clone());
        Offload::spawn("callback", 1, self.waker.clone(), move |job: Job| {
            (job.delivery.callback, job.delivery.event, post(&agent, &job))
        })
    }
}

fn agent(policy: Policy) -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(false)
        .max_idle_connections(0)
        .timeout_resolve(Some(CONNECT_TIMEOUT))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_send_request(Some(DELIVERY_TIMEOUT))
        .timeout_send_body(Some(DELIVERY_TIMEOUT))
        .timeout_recv_response(Some(DELIVERY_TIMEOUT))
        .timeout_recv_body(Some(DELIVERY_TIMEOUT))
        .timeout_global(Some(DELIVERY_TIMEOUT))
        .user_agent(concat!("pool-managerd/", env!("CARGO_PKG_VERSION")))
        .build();
    let judge = Judge { policy, inner: DefaultResolver::default() };
    ureq::Agent::with_parts(config, DefaultConnector::default(), judge)
}

fn post(agent: &ureq::Agent, job: &Job) -> Result<(), String> {
    let mut request = agent
        .post(job.delivery.url.to_string())
        .header("Content-Type", "application/json")
        .header("Idempotency-Key", &job.delivery.event_id);
    if let Some(bearer) = &job.bearer {
        request = request.header("Authorization", bearer);
    }
    let response = request.send(&job.delivery.body).map_err(|error| error.to_string())?;
    let status = response.status();
    if status.is_success() { Ok(()) } else { Err(format!("status {}", status.as_u16())) }
}

/// Looks names up and lets only those addresses pass that the policy allows: what is dialled is what was
/// judged.
#[derive(Debug)]
struct Judge {
    policy: Policy,
    inner: DefaultResolver,
}

impl Resolver for Judge {
    fn resolve(
        &self,
        uri: &Uri,
        config: &ureq::config::Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let refused = |why: String| ureq::Error::Io(io::Error::other(why));
        let url = BaseUrl::new(&uri.to_string()).map_err(|error| refused(error.to_string()))?;
        let found = self.inner.resolve(uri, config, timeout)?;
        let mut allowed = self.empty();
        let mut why = String::new();
        for address in found.iter() {
            match self.policy.check_address(&url, address.ip()) {
                Ok(()) => allowed.push(*address),
                Err(refusal) => why = refusal,
            }
        }
        if allowed.is_empty() { Err(refused(why)) } else { Ok(allowed) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::thread;

    use super::*;
    use crate::replicas::{AllowList, EnginePolicy};

    fn told(url: &str) -> Result<(), String> {
        let rules = EnginePolicy::new(Vec::new(), None, AllowList::default(), "");
        let delivery = Box::new(Delivery {
            callback: 1,
            event: 1,
            url: BaseUrl::new(url).expect("a URL"),
            event_id: "n-1-1".into(),
            is_trusted: false,
            body: "{}".into(),
        });
        post(&agent(Policy::new(rules, Vec::new())), &Job { delivery, bearer: None })
    }

    #[test]
    fn what_a_name_resolves_to_is_judged_before_it_is_dialled() {
        for (url, why) in [
            ("http://169.254.169.254/latest", "link-local"),
            ("http://8.8.8.8:9", "neither on this machine"),
            // Names for addresses that only the resolver understands.
            ("http://134744072:9", "neither on this machine"),
            ("http://0xa9fea9fe:9", "link-local"),
        ] {
            let error = told(url).expect_err(url);
            assert!(error.contains(why), "{url}: {error}");
        }
    }

    #[test]
    fn redirects_are_failures_and_not_followed() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let served = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut bytes = [0; 4096];
            let length = stream.read(&mut bytes).expect("a request");
            write!(
                stream,
                "HTTP/1.1 307 X\r\nLocation: http://127.0.0.1:{port}/other\r\nContent-Length: 0\r\n\r\n"
            )
            .expect("sent");
            String::from_utf8_lossy(&bytes[..length]).into_owned()
        });
        assert_eq!(told(&format!("http://localhost:{port}/x")), Err("status 307".into()));
        let request = served.join().expect("served");
        assert!(request.starts_with("POST /x HTTP/1.1\r\n"), "{request}");
        assert!(request.to_ascii_lowercase().contains("\r\nidempotency-key: n-1-1\r\n"), "{request}");
    }
}
