//! Group commit: makes the logs durable, for all disks of a thread, at a pace that suits who waits.
//!
//! A device that syncs without a pause is slow for everybody who shares it, a guest's own flushes among
//! them, and most of what arrives nobody waits for: the agents keep it until it is durable. So it gathers
//! for the commit interval, or until there is enough of it. Whoever waits - an agent that asked, a claim,
//! a reader - has the sync begun at once.
//!
//! At most one sync per disk is under way. What arrives during it is covered by the next: batches grow
//! with the load by themselves. Syncs of different disks run side by side, and those that waited for the
//! interval begin together, so that they can share one flush ([`crate::committer`]).

use std::rc::Rc;

use backtide_units::DiskId;

use crate::{committer::Submitted, disk::Failure, ingest::Ingest};

impl Ingest {
    /// Makes sure that what is in the disk's log becomes durable, from now on. Its connection is woken
    /// when it is, and when it cannot be.
    pub(crate) fn commit(self: &Rc<Self>, disk: DiskId) {
        self.commit_all([disk]);
    }

    /// The same of several disks, which share a flush where they can.
    fn commit_all(self: &Rc<Self>, disks: impl IntoIterator<Item = DiskId>) {
        let (mut due, mut tickets) = (Vec::new(), Vec::new());
        for disk in disks {
            if self.syncing.borrow().contains(&disk) {
                self.hastened.borrow_mut().insert(disk);
                continue;
            }
            self.gathering.borrow_mut().remove(&disk);
            let ticket = self.disks.borrow_mut().get_mut(disk).and_then(|disk| disk.ticket());
            match ticket {
                Some(ticket) => {
                    self.syncing.borrow_mut().insert(disk);
                    due.push((disk, ticket.life));
                    tickets.push(ticket);
                }
                None => self.wake_owner(disk),
            }
        }
        for ((disk, life), submitted) in due.into_iter().zip(self.commits.submit(tickets)) {
            tokio::task::spawn_local(Rc::clone(self).sync(disk, life, submitted));
        }
    }

    /// The same within the commit interval; none waits for it. Whether the connection is going to be woken:
    /// it is not when everything is durable.
    pub(crate) fn commit_soon(self: &Rc<Self>, disk: DiskId) -> bool {
        let (wanted, enough) = match self.disks.borrow().get(disk) {
            Some(state) => {
                let crowded = state.undurable_bytes().0 >= self.undurable_bytes_max.0 / 2;
                (state.wants_sync(), crowded || state.gathered_bytes() >= self.commit_bytes)
            }
            None => (false, false),
        };
        if self.syncing.borrow().contains(&disk) {
            return true;
        }
        if wanted && (enough || self.commit_interval.is_zero()) {
            self.commit(disk);
        } else if wanted {
            self.gathering.borrow_mut().insert(disk);
            if !self.ticking.replace(true) {
                tokio::task::spawn_local(Rc::clone(self).tick());
            }
        }
        wanted
    }

    /// The end of an interval, for all disks that have gathered something.
    async fn tick(self: Rc<Self>) {
        tokio::time::sleep(self.commit_interval).await;
        self.ticking.set(false);
        self.commit_all(self.gathering.take());
    }

    async fn sync(self: Rc<Self>, disk: DiskId, life: u64, submitted: Submitted) {
        let outcome = submitted.outcome().await;
        if let Some(state) = self.disks.borrow_mut().get_mut(disk) {
            match outcome {
                Ok(outcome) => state.synced(outcome),
                // A log that was opened since has nothing to do with it.
                Err(_) if state.life() != life => {}
                Err(given_up) => state.fail(Failure { why: given_up.to_string(), damaged: false }),
            }
        }
        self.syncing.borrow_mut().remove(&disk);
        self.synced.notify_waiters();
        // The next sync first: the acknowledgement need not wait for it, nor it for that.
        if self.hastened.borrow_mut().remove(&disk) {
            self.commit(disk);
        } else {
            self.commit_soon(disk);
        }
        self.wake_owner(disk);
    }
}
