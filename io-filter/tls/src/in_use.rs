//! The certificates that this process uses, each folder read once, whoever uses it.
//!
//! What is wrong with a folder is then said once, and a folder whose file system stands still keeps one thread.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

use crate::{
    Loaded, Reloading, Role, TlsError,
    reload::{Followed, Notes},
};

/// Everything that is read again, for who asks what is wrong.
static NOTES: Mutex<Vec<Weak<Notes>>> = Mutex::new(Vec::new());

/// So many folders are followed though nobody uses them any more.
const UNUSED_MAX: usize = 16;

/// What was made of folders. It outlives its use, be it by a disk that goes and comes or by a socket that is given up and
/// taken again: files that are not whole at that moment cost nobody the good ones.
pub struct Shelf<T>(Mutex<BTreeMap<PathBuf, Arc<Followed<T>>>>);

impl<T: Send + Sync + 'static> Shelf<T> {
    /// An empty one.
    pub const fn new() -> Self {
        Self(Mutex::new(BTreeMap::new()))
    }

    /// What `load` makes of the files that `role` has in `folder`, once for all who use them. They are looked at by another
    /// thread, now and when they change; nothing is waited for here.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn follow(
        &self,
        role: Role,
        folder: &Path,
        load: impl Fn(&Path) -> Result<Loaded<T>, TlsError> + Send + 'static,
    ) -> Result<Reloading<T>, TlsError> {
        let mut followed = lock(&self.0);
        if let Some(found) = followed.get(folder) {
            return Ok(found.used());
        }
        if followed.values().filter(|followed| !followed.is_used()).count() >= UNUSED_MAX {
            followed.retain(|_, followed| followed.is_used());
        }
        let place = folder.to_path_buf();
        let new = Arc::new(Followed::start(role, folder, move || load(&place))?);
        followed.insert(folder.to_path_buf(), Arc::clone(&new));
        Ok(new.used())
    }
}

impl<T: Send + Sync + 'static> Default for Shelf<T> {
    fn default() -> Self {
        Self::new()
    }
}

pub(crate) fn note(notes: &Arc<Notes>) {
    let mut all = lock(&NOTES);
    all.retain(|used| used.strong_count() > 0);
    all.push(Arc::downgrade(notes));
}

fn all() -> Vec<Arc<Notes>> {
    lock(&NOTES).iter().filter_map(Weak::upgrade).filter(|notes| notes.is_used()).collect()
}

/// Has all files looked at that this process uses, and waits for it a moment, however many stand still.
pub async fn look_again() {
    let (all, mut ended) = (all(), Vec::new());
    for notes in &all {
        ended.push(Box::pin(notes.look()));
    }
    // Each is begun before any is waited for.
    std::future::poll_fn(|cx| {
        ended.retain_mut(|look| look.as_mut().poll(cx).is_pending());
        if ended.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// What a person should see to of all that this process uses: certificates that end, files that cannot be used. Sentences,
/// each once.
pub fn warnings() -> Vec<String> {
    let mut warnings: Vec<String> = all().iter().flat_map(|notes| notes.warnings()).collect();
    warnings.sort();
    warnings.dedup();
    warnings
}

fn lock<T>(kept: &Mutex<T>) -> MutexGuard<'_, T> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}
