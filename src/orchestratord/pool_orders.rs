//! Orders about a pool that its nodes' agents carry out: what is asked of each, and what their answers are
//! together. Pure.
//!
//! Every agent of the pool is asked, some at a time, and the client is answered after the last one. An order
//! stands where any agent took it; whoever failed is named, and the order may be given again: each says what
//! is to be, not what is to change.

use serde_json::{Map, Value, json};

use crate::http::server::Response;
use crate::wire::drain::Scope;
use crate::wire::id::{NodeId, PoolId};
use crate::wire::url::BaseUrl;

/// Agents that are asked at once by one order: more would crowd out clients' exchanges.
pub const AGENTS_AT_ONCE: usize = 64;
/// Bytes of answers that one order keeps: some 10,000 of usual drains. Of later ones it keeps the status.
const ANSWERS_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Nodes that a failure names: enough to look for a common cause.
const NAMED_MAX: usize = 5;

/// What is asked of agents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolOrder {
    /// Another model.
    Reload,
    /// No new work.
    Drain,
    /// Work again.
    Resume,
    /// How far a drain has come.
    ShowDrain,
}

impl PoolOrder {
    /// Method and last part of the path.
    #[must_use]
    pub fn request(self) -> (&'static str, &'static str) {
        match self {
            PoolOrder::Reload => ("POST", "reload"),
            PoolOrder::Drain => ("POST", "drain"),
            PoolOrder::Resume => ("POST", "resume"),
            PoolOrder::ShowDrain => ("GET", "drain"),
        }
    }

    /// What an agent answers that takes it.
    fn taken(self) -> u16 {
        match self {
            PoolOrder::Reload | PoolOrder::Drain => 202,
            PoolOrder::Resume | PoolOrder::ShowDrain => 200,
        }
    }
}

/// What came of asking one agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AgentSaid {
    /// It answered.
    Answered {
        /// Status.
        status: u16,
        /// Body.
        body: Vec<u8>,
    },
    /// It could not be asked, or its answer broke off; why.
    Failed(String),
    /// It did not answer in time; why that was known.
    Late(String),
}

/// An order under way.
#[derive(Debug)]
pub struct PoolCall {
    order: PoolOrder,
    pool: PoolId,
    waiting: Vec<(NodeId, BaseUrl)>,
    under_way: usize,
    answers: Vec<Map<String, Value>>,
    answers_bytes: usize,
}

impl PoolCall {
    /// To be asked of these agents.
    #[must_use]
    pub fn new(order: PoolOrder, pool: PoolId, mut agents: Vec<(NodeId, BaseUrl)>) -> PoolCall {
        agents.reverse();
        PoolCall { order, pool, waiting: agents, under_way: 0, answers: Vec::new(), answers_bytes: 0 }
    }

    /// What is asked.
    #[must_use]
    pub fn order(&self) -> PoolOrder {
        self.order
    }

    /// The pool that it is about.
    #[must_use]
    pub fn pool(&self) -> &PoolId {
        &self.pool
    }

    /// The next agent to ask, if one may be asked now.
    pub fn next_agent(&mut self) -> Option<(NodeId, BaseUrl)> {
        let next = if self.under_way < AGENTS_AT_ONCE { self.waiting.pop() } else { None };
        self.under_way += usize::from(next.is_some());
        next
    }

    /// Takes what came of asking one agent. True if it took the order.
    pub fn answered(&mut self, node: &NodeId, said: AgentSaid) -> bool {
        self.under_way = self.under_way.saturating_sub(1);
        let (status, mut answer) = match said {
            AgentSaid::Answered { status, body } => {
                self.answers_bytes += body.len();
                let kept = Some(body).filter(|_| self.answers_bytes <= ANSWERS_BYTES_MAX);
                let read = kept.map(|body| serde_json::from_slice(&body));
                (
                    status,
                    match read {
                        Some(Ok(Value::Object(fields))) => fields,
                        Some(_) => Map::from_iter([("error".into(), json!("its answer is no JSON"))]),
                        None => Map::new(),
                    },
                )
            }
            AgentSaid::Failed(why) => (502, Map::from_iter([("error".into(), json!(why))])),
            AgentSaid::Late(why) => (504, Map::from_iter([("error".into(), json!(why))])),
        };
        answer.insert("status".into(), json!(status));
        answer.insert("node_id".into(), json!(node));
        self.answers.push(answer);
        status == self.order.taken()
    }

    /// Whether all have answered.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.waiting.is_empty() && self.under_way == 0
    }

    /// What the client is told, once all have answered.
    #[must_use]
    pub fn response(mut self) -> Response {
        let by_node =
            |answer: &Map<String, Value>| answer["node_id"].as_str().unwrap_or_default().to_string();
        self.answers.sort_by_cached_key(by_node);
        match self.order {
            PoolOrder::Reload => {
                let any = |status: &u16| self.answers.iter().any(|answer| answer["status"] == *status);
                let status = [202, 409, 400, 404].into_iter().find(any).unwrap_or(502);
                Response::json(status, &json!({"pool_id": self.pool, "nodes": self.answers}))
            }
            _ => self.drain_response(),
        }
    }

    /// Of drains, which must be in force on every node: one that fails would go on taking work. A node whose
    /// agent does not know the pool any more has nothing to drain.
    fn drain_response(self) -> Response {
        let of = |answer: &Map<String, Value>| answer["status"].as_u64().unwrap_or_default();
        let taken = u64::from(self.order.taken());
        let failed: Vec<&Map<String, Value>> =
            self.answers.iter().filter(|answer| of(answer) != taken && of(answer) != 404).collect();
        let asked = self.answers.len();
        if failed.is_empty() {
            if self.answers.iter().all(|answer| of(answer) == 404) {
                let told = format!("pool {} is not found by the agents of its nodes", self.pool);
                return self.refused(404, "NOT_FOUND", &told, false);
            }
            return Response::json(self.order.taken(), &self.together(taken));
        }
        let late = failed.iter().all(|answer| of(answer) == 504);
        let why = |answer: &&Map<String, Value>| {
            let node = answer["node_id"].as_str().unwrap_or_default();
            let message = answer.get("message").or(answer.get("error")).and_then(Value::as_str);
            format!("{node}: {} ({})", message.unwrap_or("it refused"), of(answer))
        };
        let named: Vec<String> = failed.iter().take(NAMED_MAX).map(why).collect();
        let more = failed.len().saturating_sub(NAMED_MAX);
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        let told = format!("{} of {asked} agents did not take it: {}{more}", failed.len(), named.join("; "));
        let (status, code) = if late { (504, "AGENT_TIMEOUT") } else { (502, "AGENT_FAILED") };
        self.refused(status, code, &told, true)
    }

    fn refused(self, status: u16, code: &str, told: &str, retriable: bool) -> Response {
        let body = json!({"code": code, "message": told, "error": told, "retriable": retriable,
            "pool_id": self.pool, "nodes": self.answers});
        Response::json(status, &body)
    }

    /// The progress of all agents as that of one drain, with each agent's own beside it.
    fn together(&self, taken: u64) -> Value {
        let mut whole = json!({"scope": Scope::pool(&self.pool)});
        let took: Vec<_> = self.answers.iter().filter(|answer| answer["status"] == taken).collect();
        let numbers = |name: &'static str| took.iter().filter_map(move |answer| answer.get(name)?.as_u64());
        let is = |answer: &&Map<String, Value>, name: &str| answer.get(name) == Some(&json!(true));
        let draining = took.iter().all(|answer| is(answer, "draining"));
        whole["draining"] = json!(draining);
        if draining {
            whole["drained"] = json!(took.iter().all(|answer| is(answer, "drained")));
            whole["overdue"] = json!(took.iter().any(|answer| is(answer, "overdue")));
            for name in ["in_flight", "finished", "cut"] {
                whole[name] = json!(numbers(name).fold(0, u64::saturating_add));
            }
            let times = [("since_ms", numbers("since_ms").min())];
            let last = ["deadline_at_ms", "drained_at_ms"].map(|name| (name, numbers(name).max()));
            for (name, time) in times.into_iter().chain(last) {
                if let Some(time) = time.filter(|_| name != "drained_at_ms" || whole["drained"] == true) {
                    whole[name] = json!(time);
                }
            }
        }
        whole["nodes"] = json!(self.answers);
        whole
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(order: PoolOrder, nodes: usize) -> PoolCall {
        let url = BaseUrl::lenient("http://10.0.0.1:9200").expect("a URL");
        let agent = |n| (NodeId::new(&format!("n{n:03}")).expect("an id"), url.clone());
        PoolCall::new(order, PoolId::new("p").expect("an id"), (0..nodes).map(agent).collect())
    }

    fn said(status: u16, body: Value) -> AgentSaid {
        AgentSaid::Answered { status, body: body.to_string().into_bytes() }
    }

    /// Asks them all; what each says is up to its number.
    fn outcome(order: PoolOrder, says: &[AgentSaid]) -> (u16, Value) {
        let mut call = call(order, says.len());
        for says in says {
            let (node, _) = call.next_agent().expect("another agent");
            call.answered(&node, says.clone());
        }
        assert!(call.is_over() && call.next_agent().is_none());
        let response = call.response();
        (response.status, serde_json::from_slice(&response.body).expect("JSON"))
    }

    #[test]
    fn so_many_are_asked_at_once_and_all_in_the_end() {
        let mut call = call(PoolOrder::Drain, 3 * AGENTS_AT_ONCE + 1);
        let (mut open, mut asked) = (Vec::new(), 0);
        while !call.is_over() {
            while let Some((node, _)) = call.next_agent() {
                open.push(node);
                asked += 1;
            }
            assert!(open.len() <= AGENTS_AT_ONCE);
            let node = open.pop().expect("somebody is asked");
            assert!(call.answered(&node, said(202, json!({"draining": true}))));
        }
        assert_eq!((asked, open.len(), call.response().status), (3 * AGENTS_AT_ONCE + 1, 0, 202));
    }

    #[test]
    fn a_drain_is_in_force_everywhere_or_whoever_failed_is_named() {
        let drains = |in_flight: u64, drained: bool, since: u64| {
            said(
                202,
                json!({"draining": true, "drained": drained, "in_flight": in_flight, "finished": 1,
                "cut": 0, "overdue": false, "since_ms": since, "drained_at_ms": since}),
            )
        };
        let unknown = || said(404, json!({"message": "pool p not found"}));
        let (status, told) = outcome(PoolOrder::Drain, &[drains(2, false, 7), drains(0, true, 5), unknown()]);
        assert_eq!((status, &told["scope"]["pool_id"]), (202, &json!("p")), "{told}");
        assert_eq!(
            (&told["in_flight"], &told["finished"], &told["since_ms"]),
            (&json!(2), &json!(2), &json!(5))
        );
        assert_eq!((&told["drained"], told.get("drained_at_ms")), (&json!(false), None), "{told}");
        assert_eq!(told["nodes"].as_array().map(Vec::len), Some(3));
        let (_, told) = outcome(PoolOrder::Drain, &[drains(0, true, 7), drains(0, true, 5)]);
        assert_eq!((&told["drained"], &told["drained_at_ms"]), (&json!(true), &json!(7)), "{told}");
        let late = AgentSaid::Late("no answer in 5000 ms".into());
        let (status, told) = outcome(PoolOrder::Drain, &[drains(0, true, 1), late.clone()]);
        assert_eq!((status, &told["retriable"]), (504, &json!(true)), "{told}");
        let message = told["message"].as_str().expect("a message");
        assert!(message.starts_with("1 of 2 agents") && message.contains("n001: no answer in 5000 ms"));
        let denied = said(403, json!({"message": "not with this token"}));
        let (status, told) = outcome(PoolOrder::Resume, &[denied, late]);
        assert_eq!(status, 502);
        assert!(told["error"].as_str().is_some_and(|why| why.contains("n000: not with this token (403)")));
        assert_eq!(outcome(PoolOrder::ShowDrain, &[unknown(), unknown()]).0, 404);
    }

    #[test]
    fn a_drain_of_some_nodes_is_none_of_the_pool() {
        let shown = |draining: bool| said(200, json!({"draining": draining, "drained": draining}));
        let (status, told) = outcome(PoolOrder::ShowDrain, &[shown(true), shown(false)]);
        assert_eq!((status, &told["draining"], told.get("drained")), (200, &json!(false), None), "{told}");
        assert_eq!(told["nodes"][0]["draining"], true, "{told}");
    }

    #[test]
    fn a_reload_stands_where_any_agent_took_it_and_answers_are_limited() {
        let taken = || said(202, json!({"pool_id": "p"}));
        let failed = AgentSaid::Failed("refused".into());
        assert_eq!(outcome(PoolOrder::Reload, &[failed.clone(), taken()]).0, 202);
        assert_eq!(outcome(PoolOrder::Reload, &[failed.clone(), said(409, json!([]))]).0, 409);
        assert_eq!(outcome(PoolOrder::Reload, &[failed]).0, 502);
        let large = said(202, json!({"x": "x".repeat(ANSWERS_BYTES_MAX / 3)}));
        let (status, told) = outcome(PoolOrder::Reload, &vec![large; 5]);
        assert!(status == 202 && told.to_string().len() < ANSWERS_BYTES_MAX + 1_000);
        assert_eq!(told["nodes"][4], json!({"node_id": "n004", "status": 202}));
    }
}
