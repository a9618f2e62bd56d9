//! The shell's part of drains and callbacks: an operation is handed to the core and answered, deliveries
//! and cuts are carried out.

use std::collections::BTreeSet;

use super::{Daemon, Running};
use crate::pool_managerd::callback_client;
use crate::pool_managerd::callbacks::Delivery;
use crate::pool_managerd::core::Input;
use crate::pool_managerd::operations::{self, Operation};
use crate::reactor::token::Token;
use crate::replicas::drain_routes::CUT_REASON;
use crate::time::Now;

impl Daemon {
    pub(super) fn operate(&mut self, client: Token, operation: Operation, now: Now) {
        let response = match operation {
            Operation::Drain(scope, deadline_ms) => {
                self.core.handle(Input::Drain(scope.clone(), deadline_ms), now, &mut self.effects);
                operations::progress(202, &self.core, &scope)
            }
            Operation::Resume(scope) => {
                self.core.handle(Input::Resume(scope.clone()), now, &mut self.effects);
                operations::progress(200, &self.core, &scope)
            }
            Operation::Register(url, pool) => {
                let outcome = self.core.register_callback(&url, pool.clone(), false, now, &mut self.effects);
                operations::registered(&url, pool.as_ref(), &outcome)
            }
            Operation::Unregister(url, pool) => {
                let removed = self.core.unregister_callback(&url, pool.as_ref(), now, &mut self.effects);
                operations::unregistered(&url, removed)
            }
            Operation::Order(order) => return self.order(client, order, now),
        };
        self.net.respond(client, &response, now.mono);
    }

    /// Ends the relayed requests with these leases. Their clients see no clean end.
    pub(super) fn cut(&mut self, leases: &[u64], now: Now) {
        let leases: BTreeSet<u64> = leases.iter().copied().collect();
        let is_meant = |running: &Running| match running {
            Running::Relay { lease, .. } => leases.contains(&lease.id),
            Running::Probe(..) | Running::Call { .. } | Running::Callback { .. } => false,
        };
        let meant = self.exchanges.iter().filter(|(_, running)| is_meant(running)).map(|(token, _)| *token);
        for exchange in meant.collect::<Vec<Token>>() {
            self.net.abort(exchange, CUT_REASON, now.mono);
        }
    }

    /// Delivers a notice.
    pub(super) fn deliver(&mut self, delivery: &Delivery, now: Now) {
        let outbound = callback_client::outbound(delivery, self.guard.bearer(now.mono));
        let exchange = self.net.start_judged(outbound, Some(self.callback_rule.clone()), now.mono);
        let (callback, event) = (delivery.callback, delivery.event);
        self.exchanges.insert(exchange, Running::Callback { callback, event });
    }
}
