//! Drivers that do one thing wrong: the world notices each of them.

/// What a driver must not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mistake {
    /// Blocks are called durable although the image was not synced.
    DurableBeforeSync,
    /// Blocks are called present before the image has them.
    PresentBeforeWrite,
    /// A flush syncs the image, and nothing says so in the file.
    FlushWithoutFile,
    /// What was fetched is stored over what a guest wrote meanwhile.
    FetchOverWrite,
    /// A guest is answered before its blocks are called present.
    AnsweredBeforePresent,
    /// Blocks are called present that the server was not told to flush.
    PresentBeforeStable,
    /// A flush that succeeds after one that the server refused counts for what was written before both.
    StableAfterRefusal,
}

impl Mistake {
    pub(crate) const ALL: [Self; 7] = [
        Self::DurableBeforeSync,
        Self::PresentBeforeWrite,
        Self::FlushWithoutFile,
        Self::FetchOverWrite,
        Self::AnsweredBeforePresent,
        Self::PresentBeforeStable,
        Self::StableAfterRefusal,
    ];
}
