//! What a disk lacks that is set to a point, and what its next attach takes for changed: decisions without I/O.
//!
//! Invariants: of every block whose content is not the point's, or may not be, the image lacks it; the first attach
//! afterwards takes all of these for changed, so that the receiver gets them as the newest content.

use backtide_tracking::{DirtyBitmap, SavedTracking};
use backtide_units::{BlockRange, ByteCount, Epoch, Lsn};

use crate::{Header, Kind};

/// From where on changes count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// The image is the disk at this LSN.
    Lsn(Lsn),
    /// The image may have any version above the point.
    Everything,
}

impl Since {
    /// Of an image that a clean detach has left so, and that lacked blocks before or not.
    pub fn of(saved: &SavedTracking, lacked: bool) -> Self {
        match lacked || !saved.dirty.is_empty() {
            true => Self::Everything,
            false => Self::Lsn(saved.last_lsn),
        }
    }

    /// The other end of the changes that the receiver is asked for.
    pub fn lsn(self) -> Lsn {
        match self {
            Self::Lsn(lsn) => lsn,
            Self::Everything => Lsn::MAX,
        }
    }
}

/// Whether a clean detach has left a disk that can be set back: one that the receiver has everything of, unless
/// what it lacks is `given_up`.
pub fn may_be_set_back(saved: &SavedTracking, given_up: bool) -> bool {
    let nothing = saved.dirty.is_empty() && saved.zeroes.is_empty() && saved.spilled_to.is_none();
    given_up || (nothing && saved.reason.is_none())
}

/// What a disk of `size` lacks that is set back: where the point differs by what the receiver has, what the receiver
/// never got, and what the image had nothing of.
pub fn lacking(
    mut changed: DirtyBitmap,
    saved: &SavedTracking,
    lacked: Option<&DirtyBitmap>,
    size: ByteCount,
) -> DirtyBitmap {
    changed.union_with(&saved.dirty);
    changed.union_with(&saved.zeroes);
    if let Some(lacked) = lacked {
        changed.union_with(lacked);
    }
    changed.keep_only(BlockRange::whole_disk(size));
    changed
}

impl Header {
    /// Whether an attach whose disk's last epoch was this takes what is missing for changed: it is the first with it, and
    /// what is missing is not what the receiver has as the newest.
    pub fn changes_the_disk(&self, last: Epoch) -> bool {
        match self.kind {
            Kind::Rewind => self.epoch == last,
            Kind::Origin | Kind::Failover => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use backtide_units::{DiskId, Reason};

    use super::*;
    use crate::header::tests::header;

    fn saved() -> SavedTracking {
        SavedTracking { last_lsn: Lsn(9), reason: None, ..SavedTracking::unknown(DiskId::random()) }
    }

    fn blocks(start: u64, end: u64) -> DirtyBitmap {
        DirtyBitmap::of((start..end).into())
    }

    #[test]
    fn only_what_the_receiver_has_everything_of_is_set_back_unless_it_is_given_up() {
        assert!(may_be_set_back(&saved(), false));
        for left in [
            SavedTracking { dirty: blocks(1, 2), ..saved() },
            SavedTracking { zeroes: blocks(1, 2), ..saved() },
            SavedTracking { spilled_to: Some(Lsn(9)), ..saved() },
            SavedTracking { reason: Some(Reason::ReceiverAway), ..saved() },
        ] {
            assert!(!may_be_set_back(&left, false) && may_be_set_back(&left, true), "{left:?}");
        }
    }

    #[test]
    fn an_image_is_the_disk_at_its_last_lsn_when_nothing_is_dirty_or_missing() {
        assert_eq!(Since::of(&saved(), false).lsn(), Lsn(9));
        assert_eq!(Since::of(&saved(), true).lsn(), Lsn::MAX);
        assert_eq!(Since::of(&SavedTracking { dirty: blocks(1, 2), ..saved() }, false), Since::Everything);
    }

    #[test]
    fn everything_that_may_not_be_the_points_is_missing() {
        let saved = SavedTracking { dirty: blocks(1, 2), zeroes: blocks(3, 4), ..saved() };
        let lacked = blocks(5, 6);
        let found = lacking(blocks(7, 100), &saved, Some(&lacked), ByteCount(8 * 4096 + 512));
        let runs: Vec<_> = found.runs((0..100).into(), backtide_units::BlockCount(99)).collect();
        assert_eq!(runs, [(1..2).into(), (3..4).into(), (5..6).into(), (7..9).into()]);
    }

    #[test]
    fn the_first_attach_of_a_rewind_changes_the_disk_and_no_other() {
        let rewind = header();
        assert!(rewind.changes_the_disk(rewind.epoch) && !rewind.changes_the_disk(rewind.epoch.next()));
        for kind in [Kind::Origin, Kind::Failover] {
            assert!(!Header { kind, ..header() }.changes_the_disk(rewind.epoch));
        }
    }
}
