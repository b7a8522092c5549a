//! The tracking file: its newest durable snapshot and the durable records that come on top. An
//! operation under way at a crash has happened or has not.

use backtide_io_filter::{Resume, TrackingOp};
use backtide_tracking::{DirtyBitmap, LogRecord, Snapshot};
use backtide_units::{BlockCount, HistoryId, Lsn, Reason};
use uuid::Uuid;

/// Every block is an extent.
pub(crate) const EXTENT: BlockCount = BlockCount(1);

/// See the module's description; with what the agent's own record says.
#[derive(Clone, Debug)]
pub(crate) struct TrackingFile {
    pub(crate) snapshot: Snapshot,
    pub(crate) records: Vec<LogRecord>,
    /// It was removed: what is still under way to it is nowhere.
    pub(crate) gone: bool,
    /// The history, saved as soon as it is known.
    pub(crate) history: Option<HistoryId>,
    /// No LSN above it was given.
    pub(crate) reserved: Lsn,
    /// See `Filter::follows`.
    pub(crate) attaches: Option<Vec<Uuid>>,
}

impl TrackingFile {
    pub(crate) fn new(snapshot: Snapshot, history: Option<HistoryId>, reserved: Lsn) -> Self {
        Self { snapshot, records: Vec::new(), gone: false, history, reserved, attaches: None }
    }

    pub(crate) fn apply(&mut self, op: &TrackingOp) {
        match op {
            TrackingOp::Record(_) | TrackingOp::Snapshot(_) if self.gone => {}
            TrackingOp::Record(record) => self.records.push(record.clone()),
            TrackingOp::Snapshot(snapshot) => {
                assert!(snapshot.generation > self.snapshot.generation, "snapshots follow one another");
                self.snapshot = Snapshot::clone(snapshot);
                self.records.retain(|record| record.sequence >= snapshot.log_from);
            }
            TrackingOp::Discard => self.gone = true,
            TrackingOp::Begin(snapshot) => {
                assert!(self.gone && snapshot.generation == 1, "it is begun where there is none");
                (self.gone, self.snapshot) = (false, Snapshot::clone(snapshot));
                self.records.clear();
            }
        }
    }

    /// The blocks that may differ from the receiver; none when all may.
    pub(crate) fn candidates(&self) -> Option<DirtyBitmap> {
        let Snapshot { everything, saved, hot, log_from, .. } = &self.snapshot;
        if self.gone || *everything || self.history.is_none() || saved.history != self.history {
            return None;
        }
        let mut blocks = saved.dirty.clone();
        blocks.union_with(&saved.zeroes);
        let logged = self.records.iter().filter(|record| record.sequence >= *log_from);
        for run in hot.iter().chain(logged.flat_map(|record| &record.runs)) {
            blocks.insert(run.blocks(EXTENT));
        }
        Some(blocks)
    }

    /// What the next agent begins with; the rules of the agent's `trust.rs`.
    pub(crate) fn resume(&self) -> Resume {
        let (history, last_lsn) = (self.history, self.reserved);
        match self.candidates() {
            Some(candidates) => Resume::Crashed {
                reason: Reason::AgentCrashed,
                history,
                last_lsn,
                acked_durable: self.snapshot.saved.acked_durable,
                acked_position: self.snapshot.saved.acked_position,
                candidates,
            },
            None => {
                let reason = if history.is_none() { Reason::FirstAttach } else { Reason::AgentCrashed };
                Resume::Lost { reason, history, last_lsn, acked_durable: Lsn::ZERO }
            }
        }
    }
}
