//! Deliberate mistakes, to test the tests: a simulation that does not notice each of them is worth
//! nothing. Without the feature `mutants` none can be switched on.

use crate::filter::Filter;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "mutants"), expect(unreachable_pub, reason = "public with the feature only"))]
pub enum Mutant {
    /// The drain clears a run's bits when it begins to read, not when it has the content.
    ClearBeforeRead,
    /// A change during a pass overwrites blocks without having their content at T copied.
    NoCopyBeforeWrite,
    /// A pass that lost some block's content at T offers T all the same.
    ForfeitedOffersT,
    /// A change under way at the freeze is treated as one that came after it.
    FreezeForgetsOngoing,
    /// A change of a cold extent does not wait until the activity log says so.
    NoWaitForHot,
    /// A snapshot leaves out what the local disk may still lose.
    SnapshotForgetsUnflushed,
    /// A snapshot leaves out what is on its way to the receiver.
    SnapshotForgetsWindow,
    /// A tracking file that is begun anew says that no block differs.
    AnewForgetsBlocks,
    /// An idle disk says that it will not change for another second.
    UnchangedAhead,
    /// The spill is trimmed by what the receiver has in memory.
    SpillTrimsReceived,
    /// When the spill cannot be used any more, the blocks of what was in it are forgotten.
    SpillForgetsBlocks,
    /// A verify goes on while the receiver lacks changes.
    VerifyOutOfSync,
    /// A pass begins while somebody else writes the local disk.
    PassWhileWrittenPast,
}

impl Filter {
    /// Makes the mistake from now on.
    #[cfg(feature = "mutants")]
    pub fn mutate(&mut self, mutant: Mutant) {
        self.mutant = Some(mutant);
    }

    #[cfg(feature = "mutants")]
    pub(crate) fn is_mutant(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    #[cfg(not(feature = "mutants"))]
    pub(crate) fn is_mutant(&self, _: Mutant) -> bool {
        false
    }
}
