//! A host made up of directories: what `/sys` and `/proc` tell of block devices, as far as anybody here reads it.

use std::{
    fs,
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::makedev;
use tempfile::TempDir;

use super::{
    hold::{Hold, InUse, Standing},
    host::Host,
    identity::{Behind, Identity, Thing},
    looks::Looks,
};

/// Gone when dropped.
pub(super) struct MadeUp {
    root: TempDir,
    looks: Looks,
    /// Of those who look elsewhere than at an image's own storage.
    patience: Duration,
}

/// Longer than any test.
const LONG: Duration = Duration::from_secs(600);

impl MadeUp {
    /// Without any device.
    pub(super) fn new() -> Self {
        let made_up = Self { root: tempfile::tempdir().unwrap(), looks: Looks::default(), patience: LONG };
        for directory in ["sys/dev/block", "sys/block", "sys/devices", "proc/self", "dev", "images"] {
            fs::create_dir_all(made_up.path(directory)).unwrap();
        }
        fs::write(made_up.path("proc/swaps"), "Filename Type Size Used Priority\n").unwrap();
        made_up
    }

    pub(super) fn host(&self) -> Host {
        Host {
            root: self.root.path().to_owned(),
            is_claimed: |path| path.with_extension("claimed").exists(),
            metadata: |path| {
                let gate = path.with_extension("gate");
                if gate.exists() {
                    // Until somebody opens its other end.
                    drop(fs::File::open(gate));
                }
                fs::metadata(path)
            },
            looks: self.looks.clone(),
            patience: self.patience,
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A disk of 1000 sectors with the number `major:minor`.
    pub(super) fn disk(&self, name: &str, number: &str) {
        self.device(&format!("sys/devices/{name}"), number);
        symlink(self.path(&format!("sys/devices/{name}")), self.path(&format!("sys/block/{name}"))).unwrap();
    }

    /// A partition of it, in sectors.
    pub(super) fn partition(&self, disk: &str, name: &str, number: &str, sectors: (u64, u64)) {
        let directory = format!("sys/devices/{disk}/{name}");
        self.device(&directory, number);
        for (file, value) in [("partition", 1), ("start", sectors.0), ("size", sectors.1)] {
            self.write(&format!("{directory}/{file}"), &value.to_string());
        }
    }

    fn device(&self, directory: &str, number: &str) {
        for inside in ["slaves", "holders"] {
            fs::create_dir_all(self.path(directory).join(inside)).unwrap();
        }
        self.write(&format!("{directory}/dev"), number);
        symlink(self.path(directory), self.path(&format!("sys/dev/block/{number}"))).unwrap();
    }

    /// `volume` is made of the devices in these directories.
    pub(super) fn volume(&self, volume: &str, label: &str, of: &[&str]) {
        fs::create_dir(self.path(&format!("sys/devices/{volume}/dm"))).unwrap();
        self.write(&format!("sys/devices/{volume}/dm/name"), label);
        let own = self.path(&format!("sys/devices/{volume}"));
        for below in of {
            let below = self.path(&format!("sys/devices/{below}"));
            symlink(&below, own.join("slaves").join(below.file_name().unwrap())).unwrap();
            symlink(&own, below.join("holders").join(volume)).unwrap();
            // It has what it is made of for itself, and with a partition the disk cannot be had as a whole.
            for name in below.strip_prefix(self.path("sys/devices")).unwrap() {
                self.claim(name.to_str().unwrap());
            }
        }
    }

    /// A loop device over `length` bytes of a file from `offset` on; 0: to its end.
    pub(super) fn looped(&self, name: &str, number: &str, over: &Path, offset: u64, length: u64) {
        self.disk(name, number);
        fs::create_dir(self.path(&format!("sys/devices/{name}/loop"))).unwrap();
        let shown = [
            ("backing_file", over.display().to_string()),
            ("offset", offset.to_string()),
            ("sizelimit", length.to_string()),
        ];
        for (file, value) in shown {
            self.write(&format!("sys/devices/{name}/loop/{file}"), &value);
        }
    }

    /// A file.
    pub(super) fn image(&self, name: &str) -> PathBuf {
        let path = self.path("images").join(name);
        fs::write(&path, "content").unwrap();
        path
    }

    /// Whoever asks for a file from elsewhere gets no answer, and a moment's patience, until the result is dropped.
    pub(super) fn stand_still(&mut self, file: &Path) -> StandsStill {
        let gate = file.with_extension("gate");
        rustix::fs::mkfifoat(rustix::fs::CWD, &gate, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
        self.patience = Duration::from_millis(20);
        StandsStill(gate)
    }

    /// Waits longer than any test for what does not answer.
    pub(super) fn wait_long(&mut self) {
        self.patience = LONG;
    }

    /// A file system of a device is mounted.
    pub(super) fn mount(&self, number: &str, at: &str, source: &str) {
        let line = format!("28 1 {number} / {at} rw,relatime shared:1 - ext4 {source} rw\n");
        let mut table =
            fs::File::options().create(true).append(true).open(self.path("proc/self/mountinfo")).unwrap();
        table.write_all(line.as_bytes()).unwrap();
    }

    /// The host swaps to a file or device.
    pub(super) fn swap(&self, path: &str) {
        let mut table = fs::File::options().append(true).open(self.path("proc/swaps")).unwrap();
        table.write_all(format!("{path}  partition 1048572  0  -2\n").as_bytes()).unwrap();
    }

    /// Something opens it exclusively that tells nobody.
    pub(super) fn claim(&self, name: &str) {
        self.write(&format!("dev/{name}.claimed"), "");
    }

    /// A process has a file open.
    pub(super) fn open_in(&self, process: u32, name: &str, at: &str) {
        let opened = self.path(&format!("proc/{process}/fd"));
        fs::create_dir_all(&opened).unwrap();
        symlink(at, opened.join("3")).unwrap();
        self.write(&format!("proc/{process}/comm"), name);
    }

    /// Where a device is, by its name.
    pub(super) fn dev(&self, name: &str) -> String {
        self.path("dev").join(name).display().to_string()
    }

    /// Nobody writes to a device.
    pub(super) fn read_only(&self, name: &str) {
        self.write(&format!("sys/devices/{name}/ro"), "1");
    }

    /// Nothing is mounted any more.
    pub(super) fn unmount_all(&self) {
        fs::remove_file(self.path("proc/self/mountinfo")).unwrap();
    }

    /// The image that a device is. There is none to be opened.
    pub(super) fn of_device(&self, name: &str, number: &str) -> Identity {
        let (major, minor) = number.split_once(':').unwrap();
        let number = makedev(major.parse().unwrap(), minor.parse().unwrap());
        Identity::made_up(&self.host(), &self.dev(name), Thing::Device(number))
    }

    /// The image that a file is.
    pub(super) fn of_file(&self, path: &Path) -> Identity {
        self.of_overlay(path, &[])
    }

    /// The image that a file is which names other files as parts of its content, and whether it writes to them.
    pub(super) fn of_overlay(&self, path: &Path, behind: &[(&Path, bool)]) -> Identity {
        let behind = behind.iter().map(|&(path, is_written)| Behind { path: path.to_owned(), is_written });
        Identity::on(&self.host(), path.to_str().unwrap(), &behind.collect::<Vec<_>>())
    }

    /// Why an image cannot be kept; none when it can.
    pub(super) fn refusal(&self, identity: &Identity) -> Option<InUse> {
        Hold::on(&self.host(), identity, Standing::New).err()
    }

    /// What is told of an image that a disk has.
    pub(super) fn told_beside(&self, identity: &Identity) -> Option<String> {
        let held = Hold::on(&self.host(), identity, Standing::New).unwrap();
        held.beside().map(|beside| beside.to_string())
    }

    fn write(&self, path: &str, text: &str) {
        fs::write(self.path(path), format!("{text}\n")).unwrap();
    }
}

/// A file whose storage does not answer.
pub(super) struct StandsStill(PathBuf);

impl Drop for StandsStill {
    fn drop(&mut self) {
        // Reading it too, this waits for nobody, and whoever waits goes on.
        drop(fs::File::options().read(true).write(true).open(&self.0));
        let _ = fs::remove_file(&self.0);
    }
}
