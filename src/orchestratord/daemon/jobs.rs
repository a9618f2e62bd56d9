//! The requests that the shell knows, from their arrival to their answer.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use crate::http::server::Request;
use crate::net::budget::BodyHold;
use crate::reactor::token::{NumberHasher, Token};
use crate::time::{Mono, Now};
use crate::wire::id::ReplicaKey;

use super::super::core::RequestId;

/// What a request is, until it is answered.
pub(super) struct Job {
    pub(super) front: Front,
    /// As long as it may have to be sent.
    pub(super) body: Option<Arc<Vec<u8>>>,
    /// Room for the body, as long as it may have to be sent once more.
    pub(super) room: Option<BodyHold>,
    pub(super) since: Mono,
    pub(super) attempts: u32,
    pub(super) exchange: Option<Token>,
    /// The replica and its generation that serve it.
    pub(super) on: Option<(ReplicaKey, u64)>,
    /// The session that it belongs to, until its part in that is over.
    pub(super) session: Option<Arc<str>>,
}

pub(super) enum Front {
    /// A node, waiting for the core's answer.
    Call(Token),
    /// A client whose request goes to an engine as it came; its body is the job's.
    Engine { client: Token, request: Box<Request> },
    /// A task: `creator` waits for its admission, `reader` streams its events; its engine is asked at
    /// `path`.
    Task { creator: Option<Token>, reader: Option<Token>, path: &'static str },
}

impl Job {
    pub(super) fn new(front: Front, body: Vec<u8>, now: Now) -> Job {
        Job {
            front,
            body: Some(Arc::new(body)),
            room: None,
            since: now.mono,
            attempts: 0,
            exchange: None,
            on: None,
            session: None,
        }
    }
}

/// Jobs by number.
#[derive(Default)]
pub(super) struct Jobs {
    by_number: HashMap<RequestId, Box<Job>, BuildHasherDefault<NumberHasher>>,
}

impl Jobs {
    pub(super) fn insert(&mut self, request: RequestId, job: Job) {
        self.by_number.insert(request, Box::new(job));
    }

    pub(super) fn remove(&mut self, request: RequestId) -> Option<Box<Job>> {
        self.by_number.remove(&request)
    }

    pub(super) fn get(&self, request: RequestId) -> Option<&Job> {
        self.by_number.get(&request).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, request: RequestId) -> Option<&mut Job> {
        self.by_number.get_mut(&request).map(Box::as_mut)
    }

    pub(super) fn contains(&self, request: RequestId) -> bool {
        self.by_number.contains_key(&request)
    }

    /// All, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Job> {
        self.by_number.values().map(Box::as_ref)
    }
}
