//! Deliberate mistakes, to test the tests: a simulation that does not notice each of them is worth nothing. Without
//! the feature `mutants` none can be switched on.

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "mutants"), expect(unreachable_pub, reason = "public with the feature only"))]
pub enum Mutant {
    /// The journal calls blocks present that a change is going to overwrite, before it does.
    NotesFirst,
    /// A change is answered although the journal was not told of its blocks.
    NeverNotes,
    /// What was fetched is stored over what was written meanwhile.
    StoresOverWrites,
    /// What the image is found to hold counts, though it has refused to make that stable.
    ComparesAfterRefusal,
}

/// Which mistake is made, if any.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mutation(#[cfg(feature = "mutants")] Option<Mutant>);

impl Mutation {
    #[cfg(feature = "mutants")]
    pub(crate) fn of(mutant: Mutant) -> Self {
        Self(Some(mutant))
    }

    #[cfg(feature = "mutants")]
    pub(crate) fn is(self, mutant: Mutant) -> bool {
        self.0 == Some(mutant)
    }

    #[cfg(not(feature = "mutants"))]
    pub(crate) fn is(self, _: Mutant) -> bool {
        false
    }
}
