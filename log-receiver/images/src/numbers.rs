//! Which numbers of packs are taken, beside those that files have.
//!
//! Invariants: no two of a writer and a mend have one number; a writer never takes a number that an image names, also when
//! that pack's file is missing: what is there under the number must be what images mean by it, or a mend could not put it back.

use std::{
    io,
    sync::{Arc, Mutex},
};

use crate::{
    ImageError,
    error::failed,
    store::{Shared, lock},
};

/// See the module's description.
#[derive(Default)]
pub(crate) struct Numbers(Mutex<Taken>);

#[derive(Default)]
struct Taken {
    /// Packs from this one on are a writer's.
    writing_from: Option<u32>,
    /// The pack that is made again.
    mending: Option<u32>,
    /// The highest that any image names of which somebody told.
    named: u32,
}

impl Numbers {
    /// An image names packs up to this one: what a tree names lies in packs no higher than that of its top.
    pub(crate) fn named(&self, pack: u32) {
        let mut taken = lock(&self.0);
        taken.named = taken.named.max(pack);
    }

    /// Takes a pack's number for as long as the answer is there; none when a writer has it.
    pub(crate) fn mend(&self, number: u32) -> Option<Mending<'_>> {
        let mut taken = lock(&self.0);
        if taken.writing_from.is_some_and(|first| first <= number) {
            return None;
        }
        assert!(taken.mending.is_none(), "whoever writes packs anew is alone");
        taken.mending = Some(number);
        Some(Mending(self))
    }
}

/// A number that a mend has.
pub(crate) struct Mending<'a>(&'a Numbers);

impl Drop for Mending<'_> {
    fn drop(&mut self) {
        lock(&self.0.0).mending = None;
    }
}

/// The numbers of a writer: those from [`Writing::first`] on.
pub(crate) struct Writing {
    shared: Arc<Shared>,
    first: u32,
}

impl Writing {
    /// Takes all numbers above those that are in use; `listed` gives the highest that a file has.
    ///
    /// # Errors
    /// Those of `listed`, or none is left.
    pub(crate) fn begin(
        shared: Arc<Shared>,
        listed: impl FnOnce() -> Result<Option<u32>, ImageError>,
    ) -> Result<Self, ImageError> {
        let first = {
            let mut taken = lock(&shared.numbers.0);
            assert!(taken.writing_from.is_none(), "there is one writer at a time");
            let used = listed()?.into_iter().chain(taken.mending).fold(taken.named, u32::max);
            let first = after(used)?;
            taken.writing_from = Some(first);
            first
        };
        Ok(Self { shared, first })
    }

    /// The first of them.
    pub(crate) fn first(&self) -> u32 {
        self.first
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        lock(&self.shared.numbers.0).writing_from = None;
    }
}

/// The number after this one.
///
/// # Errors
/// There is none.
pub(crate) fn after(number: u32) -> Result<u32, ImageError> {
    let none_left = || failed("number another pack".to_owned(), io::Error::other("no number is left"));
    number.checked_add(1).ok_or_else(none_left)
}
