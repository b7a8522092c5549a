//! Something made of a folder's certificates, made again when they change.
//!
//! Looked at when it is used, and now and then: whoever renews a certificate has to tell nobody. What cannot be made
//! of new files (a certificate that has come before its key, half a file, one that has expired) leaves the old in use, is
//! said once, and is tried again until it can be.
//!
//! Invariant: files are touched by a thread that nobody waits for without an end ([`Looks`]).

use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustls::pki_types::CertificateDer;

use crate::{Certificate, Role, TlsError, certificate::now, in_use, looks::Looks, renewal};

/// How long a look may take for somebody who has something to go on with.
const PATIENCE: Duration = Duration::from_secs(1);

/// And for somebody who has nothing yet.
const FIRST_PATIENCE: Duration = Duration::from_secs(10);

/// What was made of a folder, and the certificates it shows to peers: its own first, or none.
pub struct Loaded<T> {
    /// What was made.
    pub value: T,
    /// The certificates.
    pub chain: Vec<CertificateDer<'static>>,
}

/// What is made of some files, as new as they are. Who has one uses them.
pub struct Reloading<T> {
    followed: Arc<Followed<T>>,
    _used: Arc<()>,
}

/// The same, whether it is used or not.
pub(crate) struct Followed<T> {
    notes: Arc<Notes>,
    current: Arc<Mutex<Option<Arc<T>>>>,
}

/// What is known of a folder's certificates.
pub(crate) struct Notes {
    role: Role,
    folder: PathBuf,
    looks: Arc<Looks>,
    told: Mutex<Told>,
    /// Lives as long as somebody uses them.
    used: Mutex<Weak<()>>,
    /// Whether the log has been told that the files are not answered for.
    said_silent: AtomicBool,
}

#[derive(Default)]
struct Told {
    /// Those in use.
    chain: Vec<Certificate>,
    /// Whether there are some in use, be it that they show none.
    is_loaded: bool,
    /// Why what is there now is not in use.
    trouble: Option<TlsError>,
}

/// The files when they were last tried, and what the log has been told.
struct Look<T> {
    notes: Arc<Notes>,
    current: Arc<Mutex<Option<Arc<T>>>>,
    load: Box<dyn Fn() -> Result<Loaded<T>, TlsError> + Send>,
    files: Vec<PathBuf>,
    stamps: Vec<Option<Stamp>>,
    said: Option<String>,
    end: End,
}

/// How near the end of what is in use is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Far,
    Soon,
    Past,
}

/// Enough of a file's state to notice that it was replaced or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Self> {
        let metadata = std::fs::metadata(path).ok()?;
        Some(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl<T: Send + Sync + 'static> Followed<T> {
    /// What `load` makes of the files that `role` has in `folder`. They are looked at from now on, by another thread.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(crate) fn start(
        role: Role,
        folder: &Path,
        load: impl Fn() -> Result<Loaded<T>, TlsError> + Send + 'static,
    ) -> Result<Self, TlsError> {
        let notes = Arc::new(Notes {
            role,
            folder: folder.to_path_buf(),
            looks: Looks::new(),
            told: Mutex::default(),
            used: Mutex::default(),
            said_silent: AtomicBool::new(false),
        });
        let current = Arc::<Mutex<Option<Arc<T>>>>::default();
        let mut look = Look {
            notes: Arc::clone(&notes),
            current: Arc::clone(&current),
            load: Box::new(load),
            files: role.files(folder),
            stamps: Vec::new(),
            said: None,
            end: End::Far,
        };
        let begun = Arc::clone(&notes.looks).begin(move || look.look());
        begun
            .map_err(|error| TlsError::NoThread { folder: folder.to_path_buf(), source: Arc::new(error) })?;
        in_use::note(&notes);
        Ok(Self { notes, current })
    }
}

impl<T> Followed<T> {
    /// For somebody who uses it.
    pub(crate) fn used(self: &Arc<Self>) -> Reloading<T> {
        let mut known = self.notes.used.lock().unwrap_or_else(PoisonError::into_inner);
        let used = known.upgrade().unwrap_or_default();
        *known = Arc::downgrade(&used);
        Reloading { followed: Arc::clone(self), _used: used }
    }

    pub(crate) fn is_used(&self) -> bool {
        self.notes.is_used()
    }
}

impl<T> Drop for Followed<T> {
    fn drop(&mut self) {
        self.notes.looks.end();
    }
}

impl<T> Reloading<T> {
    /// As new as can be: what comes after a look that begins now, or what there is when that takes long.
    ///
    /// # Errors
    /// When the files could never be used so far, or were not answered for.
    pub async fn current(&self) -> Result<Arc<T>, TlsError> {
        let patience = if self.known().is_some() { PATIENCE } else { FIRST_PATIENCE };
        self.notes().looks.look(patience).await;
        self.notes().say_silence();
        if let Some(current) = self.known() {
            return Ok(current);
        }
        let silent = || TlsError::Silent { folder: self.notes().folder.clone(), seconds: patience.as_secs() };
        Err(self.notes().told().trouble.clone().unwrap_or_else(silent))
    }

    fn notes(&self) -> &Notes {
        &self.followed.notes
    }

    /// What is in use, without a look.
    pub fn known(&self) -> Option<Arc<T>> {
        self.followed.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The certificate that is shown to peers, if there is one.
    pub fn certificate(&self) -> Option<Certificate> {
        self.notes().told().chain.first().cloned()
    }

    /// What a person should see to: a certificate that ends, files that cannot be used. Sentences.
    pub fn warnings(&self) -> Vec<String> {
        self.notes().warnings()
    }
}

impl<T> Clone for Reloading<T> {
    fn clone(&self) -> Self {
        self.followed.used()
    }
}

impl<T> std::fmt::Debug for Reloading<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Reloading").field(&self.notes().folder).finish()
    }
}

impl Notes {
    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody does.
    pub(crate) fn is_used(&self) -> bool {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).strong_count() > 0
    }

    /// Has the files looked at, and waits for it a moment.
    pub(crate) async fn look(&self) {
        self.looks.look(PATIENCE).await;
    }

    /// Why the files cannot even be looked at, at this moment.
    fn silence(&self) -> Option<TlsError> {
        let silence = self.looks.under_way().filter(|silence| *silence >= PATIENCE)?;
        Some(TlsError::Silent { folder: self.folder.clone(), seconds: silence.as_secs() })
    }

    /// Tells the log of it, once.
    fn say_silence(&self) {
        let Some(silence) = self.silence() else { return };
        if !self.said_silent.swap(true, Ordering::Relaxed) {
            let sentence = self.told().sentence(&self.folder, &silence);
            tracing::warn!("{sentence}");
        }
    }

    /// What a person should see to.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let told = self.told();
        let mut warnings = told.ending(&self.role.certificate(&self.folder));
        let trouble = self.silence().or_else(|| told.trouble.clone());
        warnings.extend(trouble.map(|trouble| told.sentence(&self.folder, &trouble)));
        warnings
    }
}

impl Told {
    fn ending(&self, file: &Path) -> Vec<String> {
        let file = file.display().to_string();
        self.chain.iter().filter_map(|certificate| certificate.warning_now(&file)).collect()
    }

    fn end(&self) -> End {
        let now = now();
        let end = |certificate: &Certificate| match () {
            () if certificate.not_after < now => End::Past,
            () if certificate.ends_soon(now) => End::Soon,
            () => End::Far,
        };
        self.chain.iter().map(end).max().unwrap_or(End::Far)
    }

    /// What is wrong, what holds meanwhile, and the way out.
    fn sentence(&self, folder: &Path, trouble: &TlsError) -> String {
        let folder = folder.display();
        let why = trouble.chain();
        if !self.is_loaded {
            return format!("the certificates of {folder} cannot be used: {why}; {}", trouble.way_out());
        }
        let until = renewal::end(&self.chain)
            .map(|end| format!(" until {}", renewal::time_text(end)))
            .unwrap_or_default();
        format!(
            "the certificates of {folder} cannot be read again, the old ones stay in use{until}: {why}; {}",
            trouble.way_out()
        )
    }
}

impl<T> Look<T> {
    fn look(&mut self) {
        self.load();
        self.say();
    }

    fn load(&mut self) {
        // Stamps first: what changes while it is read is read again.
        let stamps: Vec<_> = self.files.iter().map(|file| Stamp::of(file)).collect();
        let (is_loaded, trouble) = {
            let told = self.notes.told();
            (told.is_loaded, told.trouble.is_some())
        };
        // What could not be used may be by now, without a change: time passes.
        if stamps == self.stamps && is_loaded && !trouble {
            return;
        }
        self.stamps = stamps;
        // Not under the lock: it may take for ever.
        let loaded = (self.load)();
        let mut told = self.notes.told();
        let file = self.notes.role.certificate(&self.notes.folder);
        let checked = loaded.and_then(|loaded| {
            let chain: Vec<_> = loaded.chain.iter().filter_map(|der| Certificate::read(der)).collect();
            if told.is_loaded {
                renewal::check(&chain, &told.chain, &file, now())?;
            }
            Ok((loaded.value, chain))
        });
        match checked {
            Ok((value, chain)) => {
                if told.is_loaded {
                    tracing::info!(files = ?self.files, "certificates were read again");
                }
                *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(value));
                *told = Told { chain, is_loaded: true, trouble: None };
                self.end = End::Far;
            }
            Err(error) => told.trouble = Some(error),
        }
    }

    /// Tells the log what is new to it.
    fn say(&mut self) {
        self.notes.said_silent.store(false, Ordering::Relaxed);
        let told = self.notes.told();
        let end = told.end();
        if end > self.end {
            for warning in told.ending(&self.notes.role.certificate(&self.notes.folder)) {
                tracing::warn!("{warning}: put a new one there, it is read without a restart");
            }
        }
        self.end = end;
        // Whoever asks for the first ones is told himself.
        let trouble = told.trouble.as_ref().filter(|_| told.is_loaded);
        let trouble = trouble.map(|trouble| told.sentence(&self.notes.folder, trouble));
        if let Some(sentence) = trouble.as_ref().filter(|sentence| self.said.as_ref() != Some(sentence)) {
            tracing::warn!("{sentence}");
        }
        self.said = trouble;
    }
}

#[cfg(test)]
mod tests;
