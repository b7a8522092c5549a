//! What the host tells of its block devices, in `/sys` and `/proc`: what lies on what, and what uses it.
//!
//! All of it is a help: where a host does not tell (there may be no `/sys`), a device lies on nothing and is used by
//! nobody, and what the kernel itself refuses is all there is.

use std::{
    fs::{self, File, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::LazyLock,
    time::Duration,
};

use backtide_storage::loop_backing;
use rustix::{
    fs::{OFlags, major, makedev, minor},
    io::Errno,
};

use super::{
    identity::{DeviceNumber, OPEN_END, Part, Thing},
    looks::{LOOK_TIME, Looks},
};

/// The unit of sizes and starts in `/sys/block`, in bytes.
const SECTOR: u64 = 512;

/// Devices that lie on each other, at most.
const DEPTH_MAX: usize = 16;

/// A host, by its file systems.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub(super) root: PathBuf,
    /// Whether something has the device of this path for itself.
    pub(super) is_claimed: fn(&Path) -> bool,
    /// What is at a path that may be on any storage.
    pub(super) metadata: fn(&Path) -> io::Result<Metadata>,
    /// Those at what need not lie on an image's own storage ...
    pub(super) looks: Looks,
    /// ... and how long that may take to answer.
    pub(super) patience: Duration,
}

/// The looks at the host this runs on.
static LOOKS: LazyLock<Looks> = LazyLock::new(Looks::default);

/// A block device as the host knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) number: DeviceNumber,
    /// As in `/dev`.
    pub(super) name: String,
    /// Its directory in `/sys`.
    directory: PathBuf,
}

/// What a loop device lies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Backing {
    pub(super) thing: Thing,
    /// Where its file is, or was.
    pub(super) path: PathBuf,
    from: u64,
    to: u64,
}

/// What somebody uses a device for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// A file system of it is mounted there.
    Mounted(String),
    /// The host swaps to it.
    Swap,
    /// A volume that is made of it, by its name, and is used itself.
    Volume(String, Box<Use>),
    /// A process has it open.
    Open(String),
    /// Somebody who does not tell.
    Claimed,
}

impl Block {
    /// As people know a volume.
    pub(super) fn label(&self) -> String {
        let label = read(&self.directory.join("dm/name"));
        label.map_or(self.name.clone(), |label| format!("{} ({label})", self.name))
    }

    /// Whether the system refuses every write to it.
    fn is_read_only(&self) -> bool {
        read(&self.directory.join("ro")).as_deref() == Some("1")
    }
}

impl Host {
    /// The one this runs on.
    pub(super) fn this() -> Self {
        Self {
            root: PathBuf::from("/"),
            is_claimed,
            metadata: |path| fs::metadata(path),
            looks: LOOKS.clone(),
            patience: LOOK_TIME,
        }
    }

    /// The thing as a whole, and everything it lies on.
    pub(super) fn parts_of(&self, thing: Thing) -> Vec<Part> {
        let mut parts = Vec::new();
        self.add_parts(
            Part { of: thing, from: 0, to: OPEN_END, through: None, is_written: true },
            &mut parts,
        );
        parts
    }

    fn add_parts(&self, part: Part, parts: &mut Vec<Part>) {
        if parts.len() > DEPTH_MAX || parts.contains(&part) {
            return;
        }
        parts.push(part);
        let Thing::Device(number) = part.of else { return };
        let Some(block) = self.block(number) else { return };
        if let Some((disk, from, to)) = self.place(&block) {
            let to = if part.to == OPEN_END { to } else { from.saturating_add(part.to).min(to) };
            let of = Thing::Device(disk.number);
            return self.add_parts(Part { of, from: from.saturating_add(part.from), to, ..part }, parts);
        }
        if let Some(backing) = self.backing(&block) {
            let to = if part.to == OPEN_END { backing.to } else { backing.from.saturating_add(part.to) };
            let (of, from) = (backing.thing, backing.from.saturating_add(part.from));
            return self.add_parts(Part { of, from, to: to.min(backing.to), ..part }, parts);
        }
        for slave in names_in(&block.directory.join("slaves")) {
            if let Some(slave) = self.block_of(&block.directory.join("slaves").join(slave)) {
                let through = Some(slave.number);
                let of = Thing::Device(slave.number);
                self.add_parts(Part { of, from: 0, to: OPEN_END, through, ..part }, parts);
            }
        }
    }

    /// The device of a number.
    pub(super) fn block(&self, number: DeviceNumber) -> Option<Block> {
        self.block_of(&self.root.join(format!("sys/dev/block/{}:{}", major(number), minor(number))))
    }

    fn block_of(&self, directory: &Path) -> Option<Block> {
        let directory = fs::canonicalize(directory).ok()?;
        let number = parse_number(&read(&directory.join("dev"))?)?;
        let name = directory.file_name()?.to_str()?.replace('!', "/");
        Some(Block { number, name, directory })
    }

    /// The disk that a partition is of, and where in it the partition begins and ends.
    pub(super) fn place(&self, block: &Block) -> Option<(Block, u64, u64)> {
        if !block.directory.join("partition").exists() {
            return None;
        }
        let disk = self.block_of(block.directory.parent()?)?;
        let sectors = |name: &str| read(&block.directory.join(name))?.parse::<u64>().ok();
        let from = sectors("start")?.saturating_mul(SECTOR);
        let to = from.saturating_add(sectors("size")?.saturating_mul(SECTOR));
        Some((disk, from, to))
    }

    /// The partitions of a disk.
    pub(super) fn partitions(&self, disk: &Block) -> Vec<Block> {
        let directories = names_in(&disk.directory).into_iter().map(|name| disk.directory.join(name));
        let partitions = directories.filter(|directory| directory.join("partition").exists());
        partitions.filter_map(|directory| self.block_of(&directory)).collect()
    }

    /// All loop devices by which something can be written that they lie on, and their partitions, each with what it is and
    /// lies on; without the devices of `own`, and those that do not tell in time.
    pub(super) fn loops_beside(&self, own: &[DeviceNumber]) -> Vec<(Block, Vec<Part>)> {
        let blocks = self.root.join("sys/block");
        let directories = names_in(&blocks).into_iter().map(|name| blocks.join(name));
        let bound = directories.filter(|directory| directory.join("loop").exists());
        let bound = bound.filter_map(|directory| self.block_of(&directory));
        let others = bound.filter(|disk| !own.contains(&disk.number) && !disk.is_read_only());
        let host = self.clone();
        let look = move |device: &Path| {
            let disk =
                device.file_name().and_then(|name| host.block_of(&host.root.join("sys/block").join(name)));
            disk.map_or_else(Vec::new, |disk| host.with_parts(&disk))
        };
        let found = self.looks.at_each(others.map(|disk| self.path(&disk)).collect(), self.patience, look);
        found.into_iter().flatten().collect()
    }

    /// A disk and its partitions, each with what it is and lies on.
    pub(super) fn with_parts(&self, disk: &Block) -> Vec<(Block, Vec<Part>)> {
        let blocks = std::iter::once(disk.clone()).chain(self.partitions(disk));
        let with_parts = blocks.map(|block| (self.parts_of(Thing::Device(block.number)), block));
        with_parts.map(|(parts, block)| (block, parts)).collect()
    }

    /// What a loop device lies on; none of another device.
    pub(super) fn backing(&self, block: &Block) -> Option<Backing> {
        let shown = block.directory.join("loop");
        let path = PathBuf::from(read(&shown.join("backing_file"))?);
        if let Some(found) = self.open(block).and_then(|file| loop_backing(&file).ok()) {
            let thing = found.block_device.map_or(Thing::File(found.device, found.inode), Thing::Device);
            let from = found.offset.0;
            let to = found.limit.map_or(OPEN_END, |limit| from.saturating_add(limit.0));
            return Some(Backing { thing, path, from, to });
        }
        // Who may not ask the driver has what it shows: a file may have got that name since.
        let number = |name: &str| read(&shown.join(name))?.parse::<u64>().ok();
        let from = number("offset")?;
        let to = number("sizelimit")
            .filter(|limit| *limit > 0)
            .map_or(OPEN_END, |limit| from.saturating_add(limit));
        let thing = Thing::of(&(self.metadata)(&path).ok()?);
        Some(Backing { thing, path, from, to })
    }

    /// Where a device is.
    pub(super) fn path(&self, block: &Block) -> PathBuf {
        self.root.join("dev").join(&block.name)
    }

    fn open(&self, block: &Block) -> Option<File> {
        let file = File::open(self.path(block)).ok()?;
        // In a container the name may be another device's.
        (file.metadata().ok()?.rdev() == block.number).then_some(file)
    }

    /// What a device is used for, as a whole.
    pub(super) fn use_of(&self, block: &Block) -> Option<Use> {
        self.told_use_of(block).or_else(|| self.is_somebodys(block).then_some(Use::Claimed))
    }

    /// Whether somebody has the device for himself who is neither a volume nor on a partition of it: with those in use it
    /// is claimed too.
    pub(super) fn is_somebodys(&self, block: &Block) -> bool {
        let alone = self.partitions(block).is_empty() && self.volumes_of(block).is_empty();
        alone && (self.is_claimed)(&self.path(block))
    }

    /// What a device is used for, as far as the host tells. A volume uses it when the volume is used: many hosts make those
    /// by themselves of whatever they find.
    pub(super) fn told_use_of(&self, block: &Block) -> Option<Use> {
        self.told_use(block, 0)
    }

    fn told_use(&self, block: &Block, depth: usize) -> Option<Use> {
        let mounted = || self.mount_of(block).map(Use::Mounted);
        let swap = || self.swaps().iter().any(|swap| self.is_named(block, swap)).then_some(Use::Swap);
        let volume = || {
            let used = |volume: Block| {
                let found = self.use_of_volume(&volume, depth + 1)?;
                Some(Use::Volume(volume.label(), Box::new(found)))
            };
            self.volumes_of(block).into_iter().find_map(used)
        };
        mounted().or_else(swap).or_else(volume)
    }

    fn use_of_volume(&self, volume: &Block, depth: usize) -> Option<Use> {
        if depth > DEPTH_MAX {
            return None;
        }
        let partitions = || self.partitions(volume).iter().find_map(|part| self.told_use(part, depth));
        let opened = || self.opener_of(volume).map(Use::Open);
        let claimed = || self.is_somebodys(volume).then_some(Use::Claimed);
        self.told_use(volume, depth).or_else(partitions).or_else(opened).or_else(claimed)
    }

    /// The volumes that are made of a device.
    pub(super) fn volumes_of(&self, block: &Block) -> Vec<Block> {
        let holders = block.directory.join("holders");
        names_in(&holders).iter().filter_map(|name| self.block_of(&holders.join(name))).collect()
    }

    /// A process that has the device open, where that can be seen.
    fn opener_of(&self, block: &Block) -> Option<String> {
        let processes = self.root.join("proc");
        let is_open_in = |process: &String| {
            let opened = processes.join(process).join("fd");
            // Only the names are looked at: what is open may be on storage that does not answer.
            let links =
                names_in(&opened).into_iter().filter_map(|name| fs::read_link(opened.join(name)).ok());
            links
                .filter_map(|link| link.into_os_string().into_string().ok())
                .any(|at| self.is_named(block, &at))
        };
        let numbers = names_in(&processes).into_iter().filter(|name| name.parse::<u32>().is_ok());
        let process = numbers.into_iter().find(is_open_in)?;
        let name = read(&processes.join(&process).join("comm"));
        Some(name.map_or(format!("process {process}"), |name| format!("process {process} ({name})")))
    }

    /// Whether the host swaps to a file.
    pub(super) fn swaps_to(&self, file: Thing) -> bool {
        let swaps = self.swaps().into_iter().map(PathBuf::from).collect();
        let metadata = self.metadata;
        let is_it = move |swap: &Path| metadata(swap).is_ok_and(|found| Thing::of(&found) == file);
        self.looks.at_each(swaps, self.patience, is_it).contains(&true)
    }

    /// Where the device's file system is mounted, if it is.
    fn mount_of(&self, block: &Block) -> Option<String> {
        let mounts = fs::read_to_string(self.root.join("proc/self/mountinfo")).ok()?;
        mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            // Optional fields end with a dash.
            let dash = fields.iter().position(|field| *field == "-")?;
            let (number, at, source) = (fields.get(2)?, fields.get(4)?, fields.get(dash + 2)?);
            // Btrfs has a number of its own.
            let is_it = parse_number(number) == Some(block.number) || self.is_named(block, &unescape(source));
            is_it.then(|| unescape(at))
        })
    }

    fn swaps(&self) -> Vec<String> {
        let table = fs::read_to_string(self.root.join("proc/swaps")).unwrap_or_default();
        table.lines().skip(1).filter_map(|line| line.split_whitespace().next().map(unescape)).collect()
    }

    /// Whether a path is that of the device.
    fn is_named(&self, block: &Block, path: &str) -> bool {
        // What is mounted from elsewhere names whatever it likes, also what never answers.
        let Some(name) = path.strip_prefix("/dev/") else { return false };
        let is_it = |found: Metadata| found.file_type().is_block_device() && found.rdev() == block.number;
        name == block.name || (self.metadata)(Path::new(path)).is_ok_and(is_it)
    }
}

/// Opens a block device for nobody else: mounts, volumes and whoever else has devices for themselves are kept away as long
/// as it is open; who just opens it, as QEMU does, is not.
pub(super) fn open_alone(path: &Path) -> io::Result<File> {
    fs::OpenOptions::new().read(true).custom_flags(OFlags::EXCL.bits().cast_signed()).open(path)
}

fn is_claimed(path: &Path) -> bool {
    let is_device = fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    is_device && open_alone(path).is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::BUSY))
}

fn parse_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn read(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim_end_matches('\n').to_owned())
}

/// What is in a directory, sorted.
fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort_unstable();
    names
}

/// A path as the kernel writes it in its tables: with blanks and the like as octal numbers.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, behind)) = rest.split_first() {
        let code = behind.get(..3).filter(|_| byte == b'\\');
        let code = code.and_then(|code| u8::from_str_radix(std::str::from_utf8(code).ok()?, 8).ok());
        bytes.push(code.unwrap_or(byte));
        rest = if code.is_some() { &behind[3..] } else { behind };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
