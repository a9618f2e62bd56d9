//! Calls to one control plane, on a helper thread of its own: a control plane that hangs delays
//! nothing but itself.

use std::io;
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::reactor::Waker;
use crate::reactor::offload::Offload;
use crate::wire::id::NodeId;
use crate::wire::node::{HeartbeatReply, RegisterReply};
use crate::wire::url::BaseUrl;

use super::core::CallBody;
use super::membership::{Answer, Call, Order};

/// Calls that wait: a plane makes one at a time.
const QUEUE_MAX: usize = 2;
/// Largest answer that is read, in bytes.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// Kept connections outlive the longest interval between heartbeats.
const IDLE_AGE: Duration = Duration::from_secs(90);

/// The helper of one control plane.
pub(super) struct ControlClient {
    helper: Offload<Job, (Call, Answer)>,
}

struct Job {
    order: Order,
    body: CallBody,
    bearer: Option<String>,
}

impl ControlClient {
    /// Starts the helper.
    pub(super) fn start(url: &BaseUrl, node: &NodeId, waker: Waker) -> io::Result<ControlClient> {
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .proxy(None)
            .max_redirects(0)
            .http_status_as_error(false)
            .max_idle_connections(1)
            .max_idle_connections_per_host(1)
            .max_idle_age(IDLE_AGE)
            .user_agent(concat!("pool-managerd/", env!("CARGO_PKG_VERSION")))
            .build()
            .into();
        let base = format!("{url}/v2/nodes");
        let own = format!("{base}/{node}");
        let helper = Offload::spawn("control-plane", QUEUE_MAX, waker, move |job: Job| {
            let answer =
                call(&agent, &base, &own, &job).unwrap_or_else(|error| Answer::Failed(error.to_string()));
            (job.order.call, answer)
        })?;
        Ok(ControlClient { helper })
    }

    /// Makes a call. False if the helper still hangs in earlier ones.
    pub(super) fn submit(&self, order: Order, body: CallBody, bearer: Option<String>) -> bool {
        self.helper.submit(Job { order, body, bearer }).is_ok()
    }

    /// The next answer, if there is one.
    pub(super) fn take(&self) -> Option<(Call, Answer)> {
        self.helper.take()
    }
}

fn call(agent: &ureq::Agent, base: &str, own: &str, job: &Job) -> Result<Answer, ureq::Error> {
    let timeout = Some(Duration::from_millis(job.order.timeout_ms));
    let response = match &job.body {
        CallBody::Register(body) => {
            let request = agent.post(format!("{base}/register"));
            authorised(request, job).config().timeout_global(timeout).build().send(json(body))?
        }
        CallBody::Heartbeat(body) => {
            let request = agent.post(format!("{own}/heartbeat"));
            authorised(request, job).config().timeout_global(timeout).build().send(json(body))?
        }
        CallBody::Deregister { incarnation } => {
            let request = agent.delete(format!("{own}?incarnation={incarnation}"));
            authorised(request, job).config().timeout_global(timeout).build().call()?
        }
    };
    let status = response.status().as_u16();
    // Read to its end, so that the connection is kept.
    let text = response.into_body().with_config().limit(ANSWER_BYTES_MAX).read_to_string()?;
    Ok(understand(job.order.call, status, &text))
}

fn authorised<T>(request: ureq::RequestBuilder<T>, job: &Job) -> ureq::RequestBuilder<T> {
    let request = request.header("Content-Type", "application/json");
    match &job.bearer {
        Some(bearer) => request.header("Authorization", bearer),
        None => request,
    }
}

fn json(body: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(body).unwrap_or_default()
}

fn understand(call: Call, status: u16, text: &str) -> Answer {
    match (status, call) {
        (200..=299, Call::Register) => {
            let reply = read::<RegisterReply>(text);
            Answer::Ok {
                next_heartbeat_ms: reply.as_ref().and_then(|reply| reply.next_heartbeat_ms),
                ttl_ms: reply.as_ref().and_then(|reply| reply.ttl_ms),
                registry_epoch: reply.as_ref().and_then(|reply| reply.registry_epoch),
            }
        }
        (200..=299, _) => {
            let next_heartbeat_ms = read::<HeartbeatReply>(text).and_then(|reply| reply.next_heartbeat_ms);
            Answer::Ok { next_heartbeat_ms, ttl_ms: None, registry_epoch: None }
        }
        (404, _) => Answer::UnknownNode,
        (409, _) => Answer::Conflict(message(text)),
        (401 | 403, _) => Answer::Unauthorized,
        (503, _) if text.contains("CLOUD_DISABLED") || text.contains("ORCHESTRATORD_CLOUD_PROFILE") => {
            Answer::CloudDisabled
        }
        _ => Answer::Failed(format!("status {status}: {}", message(text))),
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_str(text).ok()
}

/// What an error body says to people, or its beginning.
fn message(text: &str) -> String {
    #[derive(Deserialize)]
    struct Body {
        message: String,
    }
    let said = read::<Body>(text).map_or_else(|| text.to_string(), |body| body.message);
    said.chars().filter(|c| !c.is_control()).take(200).collect()
}
