//! Blocking work on helper threads: name resolution, writing to disk, the encoding of what is large.
//!
//! Plain values cross two bounded channels; a [`Waker`] tells the loop that results wait. A helper
//! that hangs in a system call delays its own queue and nothing else: the loop never waits for it,
//! and at exit it is left behind.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use super::Waker;

/// Stack of a helper thread. The deepest user is the resolver; 256 KiB leaves it ample room.
const STACK_BYTES: usize = 256 * 1024;

/// One helper thread with its queues.
#[derive(Debug)]
pub struct Offload<Job, Outcome> {
    jobs: SyncSender<Job>,
    outcomes: Receiver<Outcome>,
}

impl<Job: Send + 'static, Outcome: Send + 'static> Offload<Job, Outcome> {
    /// Starts a thread that runs `work` on each job in order. At most `capacity` jobs wait.
    ///
    /// # Errors
    /// Where no thread can be had.
    pub fn spawn(
        name: &str,
        capacity: usize,
        waker: Waker,
        mut work: impl FnMut(Job) -> Outcome + Send + 'static,
    ) -> io::Result<Offload<Job, Outcome>> {
        let (jobs, queue) = sync_channel::<Job>(capacity);
        // Sends never block: no more outcomes exist than jobs were taken, plus the one at work.
        let (done, outcomes) = sync_channel::<Outcome>(2 * capacity + 1);
        std::thread::Builder::new().name(name.to_string()).stack_size(STACK_BYTES).spawn(move || {
            while let Ok(job) = queue.recv() {
                if done.send(work(job)).is_err() || waker.wake().is_err() {
                    return;
                }
            }
        })?;
        Ok(Offload { jobs, outcomes })
    }

    /// Hands over a job.
    ///
    /// # Errors
    /// The job, when the queue is full.
    pub fn submit(&self, job: Job) -> Result<(), Job> {
        self.jobs.try_send(job).map_err(|error| match error {
            TrySendError::Full(job) | TrySendError::Disconnected(job) => job,
        })
    }

    /// The next finished job, if there is one.
    pub fn take(&self) -> Option<Outcome> {
        self.outcomes.try_recv().ok()
    }
}
