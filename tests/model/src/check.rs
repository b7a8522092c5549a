//! What must be true in every state, by the promise it stands for.
//!
//! 1. Every block that differs between disk and receiver is one the filter answers for; and should the
//!    agent or its host die now, one that the tracking file names, whatever of the writes under way
//!    has happened, on the disk, in the file and at the receiver.
//! 2. and 3. Every offered point equals the model; a pass that is open offers none.
//! 4. What was offered durably is offered.
//!
//! While somebody else writes the image past the agent no mark is taken and nothing is read for a pass; the moment from which
//! on they are seen is no point.
//!
//! Promise 7 (a pass only shrinks) is checked at each step; that sync is reached, by `heal`. Promise 8
//! (a stale epoch changes nothing) is checked by offering one: here to the receiver of the walks, in
//! `lockstep` to the one that is shipped; and where another host takes the disk over, by looking that
//! nothing of the first agent's follows in the log.

use backtide_io_filter::TrackingOp;
use backtide_protocol::CloseCode;
use backtide_tracking::DirtyBitmap;
use backtide_units::{BlockRange, Epoch, Lsn};

use crate::{config::Config, rival::Rival, world::World};

impl World {
    /// See the module's description.
    ///
    /// # Panics
    /// When something is not as it must be.
    pub(crate) fn check(&self, config: &Config) {
        match self.rival {
            // What the disk holds is nobody's any more.
            Some(rival) => self.check_rival(rival),
            None => {
                self.check_differences(config);
                // What is written past the agent the file does not know, but the agent's record that it was.
                if config.hot > 0 && !self.past.wrote {
                    self.check_tracking(config);
                }
            }
        }
        self.check_points();
        self.check_past_agent();
        self.check_stale_epoch();
        let (acked, durable) = (self.filter.acked_durable(), self.receiver.durable_covered);
        assert!(acked <= durable, "the agent believes LSN {acked} to be durable, it is {durable}");
    }

    fn check_differences(&self, config: &Config) {
        let Some(unsettled) = self.filter.unsettled_blocks() else { return };
        for block in 0..config.blocks {
            let local = self.disk.value(block);
            let remote = self.receiver.value(block, Lsn::MAX, self.receiver.log.len());
            assert!(
                local == remote || unsettled.contains(range_of(block)),
                "block {block} differs, and nobody answers for it: disk {local:#x}, receiver {remote:#x}"
            );
        }
    }

    fn check_tracking(&self, config: &Config) {
        let ops: Vec<&TrackingOp> = self.tracking_ops.values().collect();
        let mut candidates: Vec<DirtyBitmap> = Vec::new();
        for happened in 0..1u8 << ops.len() {
            let mut file = self.file.clone();
            let which = |bit: &usize| happened & 1 << bit != 0;
            (0..ops.len()).filter(which).for_each(|bit| file.apply(ops[bit]));
            candidates.extend(file.candidates());
        }
        if candidates.is_empty() {
            return;
        }
        for block in 0..config.blocks {
            let local = self.possible_values(block);
            let lengths = self.receiver.durable..=self.receiver.log.len();
            let mut remote = lengths.map(|length| self.receiver.value(block, Lsn::MAX, length));
            let may_differ = remote.any(|remote| local != [remote]);
            let named = candidates.iter().all(|candidates| candidates.contains(range_of(block)));
            assert!(
                !may_differ || named,
                "block {block} may differ after a crash, and the tracking file does not name it"
            );
        }
    }

    fn check_points(&self) {
        let offers = self.receiver.offers();
        for (from, to) in &self.receiver.promised {
            let kept = offers.iter().any(|(first, last)| first <= from && to <= last);
            assert!(kept, "points {from} to {to} were offered, now there are {offers:?}");
        }
        if let (Some(pass), Some((_, newest))) = (self.receiver.timeline.open_pass(), offers.last()) {
            assert!(*newest < pass.at, "point {newest} is offered, the pass at {} is open", pass.at);
        }
        for (from, to) in offers {
            for lsn in (from.0..=to.0).map(Lsn) {
                self.check_point(lsn);
            }
        }
    }

    fn check_point(&self, lsn: Lsn) {
        for (block, expected) in (0..).zip(self.history.image_at(lsn)) {
            let found = self.receiver.value(block, lsn, self.receiver.log.len());
            let rival = self.rival.filter(|rival| lsn >= rival.at);
            let expected = if rival.is_some() { Some(Rival::value(block)) } else { expected };
            let right = expected.is_none_or(|expected| expected == found);
            assert!(
                right,
                "point {lsn} is wrong in block {block}: expected {expected:#x?}, found {found:#x}"
            );
        }
    }

    /// The hello of an attach before the newest the receiver knows is refused, and nothing changes.
    fn check_stale_epoch(&self) {
        let seen = self.receiver.timeline.attached().map(|attached| attached.epoch.0);
        let Some(seen) = seen.filter(|epoch| *epoch > 1) else { return };
        let mut hello = self.filter.hello();
        hello.epoch = Epoch(seen - 1);
        let mut receiver = self.receiver.clone();
        let refused = receiver.claim(&hello, 1).err();
        assert_eq!(refused, Some(CloseCode::Fenced), "a stale epoch is refused");
        assert_eq!(receiver.log.len(), self.receiver.log.len(), "a stale epoch changed something");
    }
}

fn range_of(block: u8) -> BlockRange {
    BlockRange::from(u64::from(block)..u64::from(block) + 1)
}
