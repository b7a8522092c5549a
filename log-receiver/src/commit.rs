//! Group commit: makes the logs durable, for all disks of a thread, as fast as the device allows.
//!
//! At most one sync per disk is under way. What arrives during it is covered by the next, which
//! starts when it ends: batches grow with the load by themselves and nothing ever waits for a timer.
//! Syncs of different disks run side by side on one small pool, so that the file system can write
//! one journal record for several of them.

use std::rc::Rc;

use backtide_units::DiskId;

use crate::{commit_ticket::CommitTicket, disk::Failure, ingest::Ingest};

impl Ingest {
    /// Makes sure that what is in the disk's log becomes durable. Its connection is woken when it
    /// is, and when it cannot be.
    pub(crate) fn commit(self: &Rc<Self>, disk: DiskId) {
        if self.syncing.borrow().contains(&disk) {
            return;
        }
        let ticket = self.disks.borrow_mut().get_mut(disk).and_then(|disk| disk.ticket());
        match ticket {
            Some(ticket) => {
                self.syncing.borrow_mut().insert(disk);
                tokio::task::spawn_local(Rc::clone(self).sync(disk, ticket));
            }
            None => self.wake_owner(disk),
        }
    }

    async fn sync(self: Rc<Self>, disk: DiskId, ticket: CommitTicket) {
        let outcome = self.commits.run(|| ticket.sync()).await;
        if let Some(state) = self.disks.borrow_mut().get_mut(disk) {
            match outcome {
                Ok(outcome) => state.synced(outcome),
                Err(given_up) => state.fail(Failure { why: given_up.to_string(), damaged: false }),
            }
        }
        self.syncing.borrow_mut().remove(&disk);
        self.synced.notify_waiters();
        // The next sync first: the acknowledgement need not wait for it, nor it for that.
        self.commit(disk);
        self.wake_owner(disk);
    }
}
