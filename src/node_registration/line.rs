//! The line to a control plane: sockets of its own, and one call at a time over them.
//!
//! Every call can be given up at any moment, so nobody ever waits for a control plane that hangs.

use std::io;

use crate::net::{Limits, Net, NetEvent};
use crate::pool_managerd::control_client;
use crate::pool_managerd::core::CallBody;
use crate::pool_managerd::membership::{Answer, Call, Order};
use crate::reactor::token::{Kind, Token};
use crate::reactor::{Reactor, Waker, now};
use crate::time::{Mono, Now, earliest};

use super::{Plan, RegistrationError};

/// What the control plane is told of who calls.
const PROGRAM: &str = "node-registration";

/// An open line.
#[derive(Debug)]
pub(super) struct Line {
    reactor: Reactor,
    net: Net,
    /// Ends a wait from another thread.
    pub(super) waker: Waker,
}

/// A call that was sent.
#[derive(Debug)]
pub(super) struct Sent {
    exchange: Token,
    pub(super) call: Call,
}

impl Line {
    /// Nothing is connected before the first call.
    pub(super) fn open(plan: &Plan) -> Result<Line, RegistrationError> {
        let open = || {
            let reactor = Reactor::new()?;
            let waker = reactor.waker(Token::only(Kind::Waker))?;
            let mut net = Net::new(reactor.registry()?, waker.clone(), Limits::default());
            if plan.control_plane.https() {
                net.set_client_tls(plan.tls.client().map_err(io::Error::other)?);
            }
            Ok(Line { reactor, net, waker })
        };
        open().map_err(RegistrationError::System)
    }

    /// Sends a call. [`Line::take`] returns its answer.
    pub(super) fn send(
        &mut self,
        plan: &Plan,
        incarnation: u64,
        order: Order,
        body: &CallBody,
        now: Now,
    ) -> Sent {
        let body = control_client::encode(body);
        let (to, node, bearer) = (&plan.control_plane, &plan.node_id, plan.tokens.bearer());
        let outbound = control_client::outbound(PROGRAM, to, node, order, incarnation, body, bearer);
        Sent { exchange: self.net.start(outbound, now.mono), call: order.call }
    }

    /// Waits until something happens or `deadline` has passed.
    pub(super) fn turn(&mut self, deadline: Option<Mono>) -> io::Result<Now> {
        let now = self.reactor.wait(earliest(deadline, self.net.deadline()), self.net.busy())?;
        for (token, edge) in self.reactor.events() {
            self.net.on_edge(token, edge);
        }
        self.net.turn(now.mono);
        Ok(now)
    }

    /// The answer to `sent`, if it has come.
    pub(super) fn take(&mut self, plan: &Plan, sent: &Sent) -> Option<Answer> {
        while let Some(event) = self.net.next_event() {
            if let NetEvent::Finished { exchange, outcome, .. } = event
                && exchange == sent.exchange
            {
                return Some(plan.discreet(control_client::answer(sent.call, outcome)));
            }
        }
        None
    }

    /// Makes one call and waits for its answer, no longer than the order allows.
    pub(super) fn call(
        mut self,
        plan: &Plan,
        incarnation: u64,
        order: Order,
        body: &CallBody,
    ) -> Result<Answer, RegistrationError> {
        let begun = now();
        let until = begun.mono.plus_ms(order.timeout_ms);
        let sent = self.send(plan, incarnation, order, body, begun);
        loop {
            if let Some(answer) = self.take(plan, &sent) {
                return Ok(answer);
            }
            if self.turn(Some(until)).map_err(RegistrationError::System)?.mono >= until {
                let answer = self.take(plan, &sent);
                let late = || Answer::Failed(format!("no answer within {} ms", order.timeout_ms));
                return Ok(answer.unwrap_or_else(late));
            }
        }
    }
}
