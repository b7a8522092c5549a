//! Making a disk durable: what to sync, where blocking is fine, and how that went.

use std::sync::atomic::{AtomicU64, Ordering};

use backtide_recovery::{SyncOutcome, SyncTicket};
use backtide_storage::{KillPoint, Storage};

use crate::{StoreWatch, log_mark::Loss, shortfalls::Shortfalls, watermark::Watermark};

/// No two openings of logs are the same, whatever their disks: one that was forgotten may begin anew.
pub(crate) fn next_life() -> u64 {
    static LIVES: AtomicU64 = AtomicU64::new(1);
    LIVES.fetch_add(1, Ordering::Relaxed)
}

/// Files to sync for a disk's entries to be durable.
pub struct CommitTicket {
    pub(crate) life: u64,
    pub(crate) ticket: SyncTicket,
    pub(crate) watermark: Option<Watermark>,
    pub(crate) loss: Option<Loss>,
    pub(crate) shortfalls: Shortfalls,
    pub(crate) watch: StoreWatch,
}

/// How a ticket's sync went.
pub struct CommitOutcome {
    pub(crate) life: u64,
    pub(crate) outcome: SyncOutcome,
    /// Why nothing that was synced can be found again.
    pub(crate) gone: Option<String>,
}

/// What is left to do once a ticket is synced.
struct Noting {
    life: u64,
    watermark: Option<Watermark>,
    loss: Option<Loss>,
    watch: StoreWatch,
}

impl CommitTicket {
    /// Syncs; blocks as long as the device takes.
    pub fn sync(self) -> CommitOutcome {
        let (ticket, noting) = self.split();
        noting.note(ticket.sync())
    }

    /// Whether it should not be synced together with others.
    pub(crate) fn is_apart(&self) -> bool {
        self.ticket.has_chores() || self.shortfalls.wants_writing()
    }

    /// Syncs tickets of logs on one storage, see [`SyncTicket::sync_together`]; blocks. Outcomes come in the order of
    /// the tickets.
    pub fn sync_together(storage: &dyn Storage, tickets: Vec<Self>) -> Vec<CommitOutcome> {
        let (tickets, notings): (Vec<_>, Vec<_>) = tickets.into_iter().map(Self::split).unzip();
        let outcomes = SyncTicket::sync_together(storage, tickets);
        notings.into_iter().zip(outcomes).map(|(noting, outcome)| noting.note(outcome)).collect()
    }

    fn split(self) -> (SyncTicket, Noting) {
        let Self { life, ticket, watermark, loss, shortfalls, watch } = self;
        // Before the pass of an agent that misses something is durable, so that it is known whatever happens then.
        shortfalls.write();
        (ticket, Noting { life, watermark, loss, watch })
    }
}

impl Noting {
    fn note(self, outcome: SyncOutcome) -> CommitOutcome {
        let gone = self.watch.check().err();
        if let (Ok(durable), None, Some(watermark)) = (outcome.result(), &gone, &self.watermark)
            && let Some(Err(error)) =
                outcome.while_owned(|| watermark.write(Loss::noted(self.loss.as_ref(), durable)))
        {
            tracing::debug!(%error, "cannot note beside the log how far it is durable");
        }
        KillPoint::MarkWritten.reached();
        CommitOutcome { life: self.life, outcome, gone }
    }
}
