//! The records for whoever runs among others: reading and writing them waits for the file system, which may stand
//! still, so that is done on threads that nobody else needs.

use std::io;

use backtide_units::DiskName;

use super::{AllRecords, DiskRecord, Records};

impl Records {
    /// [`load_all`](Self::load_all).
    pub(crate) async fn load_all_aside(&self) -> io::Result<AllRecords> {
        self.aside(|records| records.load_all()).await
    }

    /// [`load`](Self::load).
    pub(crate) async fn load_aside(&self, disk: &DiskName) -> io::Result<Option<DiskRecord>> {
        let disk = disk.clone();
        self.aside(move |records| records.load(&disk)).await
    }

    /// Makes the record durable that `change` makes of a disk's; nothing where there is none, or it makes none.
    pub(crate) async fn change_aside(
        &self,
        disk: &DiskName,
        change: impl FnOnce(DiskRecord) -> Option<DiskRecord> + Send + 'static,
    ) -> io::Result<()> {
        let disk = disk.clone();
        let load_and_save = move |records: &Self| match records.load(&disk)?.and_then(change) {
            Some(record) => records.save(&record),
            None => Ok(()),
        };
        self.aside(load_and_save).await
    }

    /// What waits, on a thread of its own.
    pub(crate) async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let records = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&records)).await;
        // Only a panic of the work, or the runtime's end.
        done.unwrap_or_else(|error| Err(io::Error::other(error)))
    }
}

#[cfg(test)]
mod tests {
    use std::{
        path::{Path, PathBuf},
        sync::{Arc, Condvar, Mutex},
        time::Duration,
    };

    use backtide_storage::{MemoryStorage, Storage, StorageFile};
    use backtide_units::ByteCount;

    use super::*;

    /// A file system that stands still until somebody lets it go on.
    struct StandsStill {
        inner: MemoryStorage,
        gate: Arc<Gate>,
    }

    #[derive(Default)]
    struct Gate {
        open: Mutex<bool>,
        opened: Condvar,
    }

    impl Gate {
        fn pass(&self) -> io::Result<()> {
            // So that whoever could have opened it and waits instead fails.
            let (open, time) = (self.open.lock().unwrap(), Duration::from_secs(10));
            let (open, _) = self.opened.wait_timeout_while(open, time, |open| !*open).unwrap();
            if *open { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
        }

        fn open(&self) {
            *self.open.lock().unwrap() = true;
            self.opened.notify_all();
        }
    }

    impl Storage for StandsStill {
        fn create_new(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
            self.gate.pass()?;
            self.inner.create_new(path)
        }

        fn open(&self, path: &Path) -> io::Result<Arc<dyn StorageFile>> {
            self.gate.pass()?;
            self.inner.open(path)
        }

        fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
            self.gate.pass()?;
            self.inner.list(dir)
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.inner.rename(from, to)
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            self.inner.remove(path)
        }

        fn create_dir(&self, dir: &Path) -> io::Result<()> {
            self.inner.create_dir(dir)
        }

        fn sync_dir(&self, dir: &Path) -> io::Result<()> {
            self.inner.sync_dir(dir)
        }

        fn free_space(&self) -> io::Result<ByteCount> {
            self.inner.free_space()
        }

        fn display(&self, path: &Path) -> PathBuf {
            self.inner.display(path)
        }
    }

    #[tokio::test]
    async fn a_file_system_that_stands_still_holds_up_nobody_else() {
        let name: DiskName = "vm1".parse().unwrap();
        let record = DiskRecord::new(name.clone(), "/vm1".to_owned(), "unix:/run/r.sock".parse().unwrap());
        let inner = MemoryStorage::new();
        Records::new(Arc::new(inner.clone())).save(&record).unwrap();
        // Whoever waits for it, on the one thread that all of them have, cannot let it go on.
        let gate = Arc::new(Gate::default());
        let still = || Records::new(Arc::new(StandsStill { inner: inner.clone(), gate: Arc::clone(&gate) }));
        let go_on = async { gate.open() };
        let (loaded, ()) = tokio::join!(async { still().load_aside(&name).await }, go_on);
        assert_eq!(loaded.unwrap().unwrap(), record);
        *gate.open.lock().unwrap() = false;
        let go_on = async { gate.open() };
        let (all, ()) = tokio::join!(async { still().load_all_aside().await }, go_on);
        assert_eq!(all.unwrap().known, std::slice::from_ref(&record));
        *gate.open.lock().unwrap() = false;
        let go_on = async { gate.open() };
        let change = |record| Some(DiskRecord { paused: true, ..record });
        let (changed, ()) = tokio::join!(async { still().change_aside(&name, change).await }, go_on);
        changed.unwrap();
        assert!(still().load(&name).unwrap().unwrap().paused);
    }
}
