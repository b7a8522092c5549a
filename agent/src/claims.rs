//! Who changes what: a disk's name is claimed while it is attached or detached, its image for as
//! long as it is attached.
//!
//! Invariants: one change of a name at a time, so it is never attached twice; one image is one disk,
//! since two would write past each other. A disk whose change stands still holds up no other.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::Metadata,
    os::unix::fs::{FileTypeExt, MetadataExt},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use backtide_units::DiskName;
use tokio::sync::Notify;

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
    images: BTreeMap<DiskName, Identity>,
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

/// What makes an image the same, by whatever name it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    text: String,
    file: Option<(bool, u64, u64)>,
}

impl Identity {
    /// Of a path or URI. Waits for the file system.
    pub(crate) fn of(image: &str) -> Self {
        let file = std::fs::metadata(image).ok().map(|found| file_of(&found));
        Self { text: image.to_owned(), file }
    }

    /// Whether there was a file or device.
    pub(crate) fn is_file(&self) -> bool {
        self.file.is_some()
    }

    /// Whether it is the file or device that was found.
    pub(crate) fn is_of(&self, found: &Metadata) -> bool {
        self.file == Some(file_of(found))
    }

    fn is_same(&self, other: &Self) -> bool {
        self.text == other.text || (self.file.is_some() && self.file == other.file)
    }
}

fn file_of(found: &Metadata) -> (bool, u64, u64) {
    // A device has many names, and its number is not that of the file system it is named in.
    let device = found.file_type().is_block_device();
    let (on, number) = if device { (found.rdev(), 0) } else { (found.dev(), found.ino()) };
    (device, on, number)
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

    /// Gives no more claims, and waits for the given ones for up to `patience`; whether all are back.
    pub(crate) async fn close(&self, patience: Duration) -> bool {
        self.state().closed = true;
        let none = async {
            loop {
                let released = self.released.notified();
                if self.state().names.is_empty() {
                    return;
                }
                released.await;
            }
        };
        tokio::time::timeout(patience, none).await.is_ok()
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

    /// The image is this disk's from now on; or it is another's already, whose name this gives.
    pub(crate) fn take_image(&self, name: &DiskName, image: Identity) -> Result<(), DiskName> {
        let mut state = self.state();
        let mut others = state.images.iter().filter(|(other, _)| *other != name);
        if let Some((other, _)) = others.find(|(_, taken)| taken.is_same(&image)) {
            return Err(other.clone());
        }
        state.images.insert(name.clone(), image);
        Ok(())
    }

    /// The disk has no image any more.
    pub(crate) fn leave_image(&self, name: &DiskName) {
        self.state().images.remove(name);
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

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> DiskName {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_is_being_changed_holds_up_no_other() {
        let claims = Arc::<Claims>::default();
        let stuck = claims.try_claim(&name("stuck")).unwrap();
        drop(claims.claim(&name("other"), Duration::ZERO).await.unwrap());
        let refused = claims.claim(&name("stuck"), Duration::from_secs(10)).await;
        assert_eq!(refused.unwrap_err(), Claimed::Changing);
        let waiting = tokio::spawn({
            let claims = Arc::clone(&claims);
            async move { claims.claim(&name("stuck"), Duration::MAX).await.map(drop) }
        });
        tokio::task::yield_now().await;
        drop(stuck);
        waiting.await.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn closed_claims_are_opened_again() {
        let claims = Arc::<Claims>::default();
        let claim = claims.try_claim(&name("vm1")).unwrap();
        assert!(!claims.close(Duration::from_secs(1)).await, "one is out");
        assert_eq!(claims.try_claim(&name("vm2")).unwrap_err(), Claimed::Closed);
        drop(claim);
        assert!(claims.close(Duration::from_secs(1)).await);
        claims.open();
        assert!(claims.try_claim(&name("vm2")).is_ok());
    }

    #[test]
    fn an_image_by_another_name_is_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(path("a"), "").unwrap();
        std::os::unix::fs::symlink(path("a"), path("b")).unwrap();
        let claims = Claims::default();
        claims.take_image(&name("vm1"), Identity::of(&path("a"))).unwrap();
        let taken = claims.take_image(&name("vm2"), Identity::of(&path("b")));
        assert_eq!(taken, Err(name("vm1")));
        claims.take_image(&name("vm1"), Identity::of(&path("b"))).unwrap();
        claims.take_image(&name("vm3"), Identity::of("nbd://host/a")).unwrap();
        assert!(claims.take_image(&name("vm4"), Identity::of("nbd://host/a")).is_err());
        claims.leave_image(&name("vm3"));
        claims.take_image(&name("vm4"), Identity::of("nbd://host/a")).unwrap();
    }
}
