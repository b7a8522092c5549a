//! Who changes what: a disk's name is claimed while it is attached or detached, its image for as
//! long as it is attached.
//!
//! Invariants: one change of a name at a time, so it is never attached twice; one image is one disk,
//! since two would write past each other, and no byte of it is another's ([`identity`]), nor something else's on
//! this host ([`hold`]). A disk whose change stands still holds up no other.

mod hold;
mod host;
mod identity;
mod looks;
#[cfg(test)]
mod made_up;
#[cfg(test)]
mod shared_tests;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use backtide_units::DiskName;
use tokio::sync::Notify;

pub(crate) use self::{
    hold::{Beside, Hold, InUse, Standing},
    identity::{Behind, Identity},
};

/// All claims of an agent.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    state: Mutex<State>,
    released: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// No new claim is given.
    closed: bool,
    names: BTreeSet<DiskName>,
    images: BTreeMap<DiskName, Taken>,
}

/// A disk's image.
#[derive(Debug)]
struct Taken {
    image: Identity,
    /// None until it is known that nothing else uses it.
    hold: Option<Hold>,
}

/// An image that is a disk's from now on.
#[derive(Debug)]
pub(crate) enum TakenImage {
    /// The disk had it before, and keeps it.
    Kept,
    /// It has yet to be [held](Claims::hold_image).
    ToHold {
        /// What held it as it was before, to be dropped first, and where that may wait for the device.
        before: Option<Box<Hold>>,
    },
}

/// Another disk of this agent has bytes of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shared {
    /// Which.
    pub(crate) disk: DiskName,
    /// Its image, when that is another file or device.
    pub(crate) image: Option<String>,
}

/// A name that is being changed, until this value goes.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Arc<Claims>,
    name: DiskName,
}

/// Why a name cannot be changed now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Claimed {
    /// Somebody else changes it, for long already.
    #[error("it is being attached or detached already")]
    Changing,
    /// The agent ends or is restarted.
    #[error("the agent is ending or being restarted")]
    Closed,
}

impl Claims {
    /// Claims `name`; while somebody else has it, waits for up to `patience`.
    pub(crate) async fn claim(
        self: &Arc<Self>,
        name: &DiskName,
        patience: Duration,
    ) -> Result<Claim, Claimed> {
        let waiting = async {
            loop {
                let released = self.released.notified();
                match self.try_claim(name) {
                    Err(Claimed::Changing) => released.await,
                    result => return result,
                }
            }
        };
        tokio::time::timeout(patience, waiting).await.unwrap_or(Err(Claimed::Changing))
    }

    /// The same without waiting.
    pub(crate) fn try_claim(self: &Arc<Self>, name: &DiskName) -> Result<Claim, Claimed> {
        let mut state = self.state();
        if state.closed {
            return Err(Claimed::Closed);
        }
        match state.names.insert(name.clone()) {
            true => Ok(Claim { claims: Arc::clone(self), name: name.clone() }),
            false => Err(Claimed::Changing),
        }
    }

    /// Gives no more claims, and waits as [`settled`](Self::settled) does.
    ///
    /// # Errors
    /// Names that are still claimed.
    pub(crate) async fn close(&self, patience: Duration) -> Result<(), Vec<DiskName>> {
        self.state().closed = true;
        self.settled(patience).await
    }

    /// Waits until no name is claimed, for up to `patience`.
    ///
    /// # Errors
    /// Names that are.
    pub(crate) async fn settled(&self, patience: Duration) -> Result<(), Vec<DiskName>> {
        let none = async {
            loop {
                let released = self.released.notified();
                if self.state().names.is_empty() {
                    return;
                }
                released.await;
            }
        };
        tokio::time::timeout(patience, none)
            .await
            .map_err(|_| self.state().names.iter().cloned().collect::<Vec<_>>())
    }

    /// For whoever has closed them and waited: nobody else has a claim.
    pub(crate) fn claim_closed(self: &Arc<Self>, name: &DiskName) -> Claim {
        let mut state = self.state();
        assert!(state.closed, "only who closed the claims goes past that");
        assert!(state.names.insert(name.clone()), "all claims are back");
        Claim { claims: Arc::clone(self), name: name.clone() }
    }

    /// Gives claims again.
    pub(crate) fn open(&self) {
        self.state().closed = false;
    }

    /// The image is this disk's from now on; or it shares bytes with another's.
    pub(crate) fn take_image(&self, name: &DiskName, image: Identity) -> Result<TakenImage, Shared> {
        let mut state = self.state();
        let mut others = state.images.iter().filter(|(other, _)| *other != name);
        if let Some((other, taken)) = others.find(|(_, taken)| taken.image.overlaps(&image)) {
            let of_another = !taken.image.is_same(&image);
            let image = of_another.then(|| taken.image.image().to_owned());
            return Err(Shared { disk: other.clone(), image });
        }
        let kept = state.images.get(name).is_some_and(|taken| taken.image == image && taken.hold.is_some());
        if kept {
            return Ok(TakenImage::Kept);
        }
        let before = state.images.insert(name.clone(), Taken { image, hold: None });
        Ok(TakenImage::ToHold { before: before.and_then(|taken| taken.hold).map(Box::new) })
    }

    /// Nothing else uses the disk's image: that is so until the disk has no image any more.
    pub(crate) fn hold_image(&self, name: &DiskName, hold: Hold) {
        let mut state = self.state();
        let taken = state.images.get_mut(name).expect("whoever holds an image has taken it");
        taken.hold = Some(hold);
    }

    /// What was found to use the disk's image too.
    pub(crate) fn beside(&self, name: &DiskName) -> Option<Beside> {
        self.state().images.get(name)?.hold.as_ref()?.beside()
    }

    /// The images of all disks.
    pub(crate) fn images(&self) -> Vec<(DiskName, Identity)> {
        let state = self.state();
        state.images.iter().map(|(name, taken)| (name.clone(), taken.image.clone())).collect()
    }

    /// The disk has no image any more. What held it is to be dropped where that may wait for the device.
    pub(crate) fn leave_image(&self, name: &DiskName) -> Option<Hold> {
        self.state().images.remove(name)?.hold
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// Whether it is of this name.
    pub(crate) fn is_of(&self, name: &DiskName) -> bool {
        self.name == *name
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.state().names.remove(&self.name);
        self.claims.released.notify_waiters();
    }
}
