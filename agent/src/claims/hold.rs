//! Keeping an image for one disk: from others of this host that would use the same bytes.
//!
//! The kernel keeps a list of who has a block device for itself: mounts, swap, device-mapper and md volumes, and whoever
//! opens it exclusively. So does the agent, for as long as it has the disk: what is in use is refused, and what wants
//! to use it later is. QEMU does not ask for that, so the device can be put back under a running machine at any
//! moment. A loop device asks for nothing of what it lies on: there the agent looks itself, once, at the attach. What a loop
//! device lies on is locked as well, for agents that have the file itself.

use std::{
    fmt,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use backtide_storage::lock_owner;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};

use super::{
    host::{Block, Host, Use, open_alone},
    identity::{DeviceNumber, Identity, Thing, overlap},
};

/// An image that is kept for one disk, until dropped.
#[derive(Debug, Default)]
pub(crate) struct Hold {
    /// The device, opened exclusively, and the files it lies on, locked.
    _files: Vec<File>,
    beside: Option<Beside>,
}

/// How a disk comes by its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It begins with it.
    New,
    /// It had it until just now: a guest may be waiting for it.
    Had,
}

/// What uses bytes of an image that a disk has all the same; as it is told.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    host: Host,
    image: Identity,
    /// The volume that has the device, so that the disk does not have it for itself.
    volume: Option<String>,
    told: String,
}

/// Why an image cannot be a disk's now.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InUse {
    /// The host uses it, or something on the same bytes.
    #[error("{image} is in use: {} {}", subject(device.as_deref()), predicate(&usage.0))]
    ByHost {
        image: String,
        /// Another device, which has the same bytes.
        device: Option<PathBuf>,
        usage: Usage,
    },
    /// Another agent, or a restore.
    #[error("{image} is locked by {}: another agent protects it, or a restore writes to it", by.as_deref().unwrap_or("another process"))]
    Locked {
        image: String,
        /// The process, when the system tells.
        by: Option<String>,
    },
}

/// What for, and the way out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Usage(Use);

fn subject(device: Option<&Path>) -> String {
    device.map_or("it".to_owned(), |device| format!("{}, which has bytes of it,", device.display()))
}

fn predicate(found: &Use) -> String {
    match found {
        Use::Mounted(at) => format!("is mounted at {at}"),
        Use::Swap => "is what the host swaps to".to_owned(),
        Use::Volume(name, used) => format!("is a part of the volume {name}, which {}", predicate(used)),
        Use::Open(process) => format!("is open in {process}"),
        Use::Claimed => {
            "is opened exclusively, for instance by a mount that cannot be seen from here".to_owned()
        }
    }
}

impl InUse {
    /// The way out.
    pub(crate) fn hint(&self) -> String {
        match self {
            Self::Locked { .. } => "detach it from the other agent first".to_owned(),
            Self::ByHost { image, device, usage: Usage(found) } => {
                let device = device.as_deref().map_or(image.clone(), |device| device.display().to_string());
                way_out(found, &device)
            }
        }
    }
}

/// How to take a device down that is a volume.
const TAKE_DOWN: &str = "for instance with `vgchange -an`, `kpartx -d`, `dmsetup remove` or `mdadm --stop`";

fn way_out(found: &Use, device: &str) -> String {
    match found {
        Use::Mounted(at) => format!("unmount it first: umount {at}"),
        Use::Swap => format!("take it from the host first: swapoff {device}"),
        Use::Volume(..) => {
            format!("attach the volume instead, or end its use and take it down first, {TAKE_DOWN}")
        }
        Use::Open(process) => format!("end {process} first"),
        Use::Claimed => {
            format!("find out who has it with `lsblk {device}` and `fuser -v {device}`, and end that first")
        }
    }
}

impl fmt::Display for Beside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.told)
    }
}

impl Beside {
    /// What uses the image that lies beside it, or `volume`, or could use that.
    fn of(host: &Host, image: &Identity, volume: Option<String>) -> Option<Self> {
        let by_volume = || volume.as_ref().map_or(Ok(()), |_| refuse_told(host, image));
        let told = match by_volume().and_then(|()| refuse_used_beside(host, image)) {
            Err(in_use) => {
                format!("{in_use}: what that writes is in no point of the disk; {}", in_use.hint())
            }
            Ok(()) => format!(
                "{} is not kept from other use by the host: it was a part of the volume {}, which nothing uses, when it was attached; take that down, {TAKE_DOWN}, then `backtide agent restart`",
                image.image(),
                volume.as_ref()?
            ),
        };
        Some(Self { host: host.clone(), image: image.clone(), volume, told })
    }

    /// What is there now. Waits for the file system.
    pub(crate) fn again(&self) -> Option<Self> {
        Self::of(&self.host, &self.image, self.volume.clone())
    }
}

impl Hold {
    /// Keeps an image, if nothing uses it. For a disk that had it, what lies beside it is told and no hindrance: its guest
    /// would wait for somebody who has nothing to do with it. Waits for the file system.
    ///
    /// # Errors
    /// What uses it.
    pub(crate) fn of(identity: &Identity, standing: Standing) -> Result<Self, InUse> {
        Self::on(&Host::this(), identity, standing)
    }

    /// Whether a disk that lets go of its image could have it again, as far as can be told while it has it.
    ///
    /// # Errors
    /// What uses it.
    pub(crate) fn could_be_had_again(identity: &Identity) -> Result<(), InUse> {
        refuse_told(&Host::this(), identity)
    }

    /// What was found to use the image too.
    pub(super) fn beside(&self) -> Option<Beside> {
        self.beside.clone()
    }

    /// The same as [`of`](Self::of) on a host.
    pub(super) fn on(host: &Host, identity: &Identity, standing: Standing) -> Result<Self, InUse> {
        let (mut files, mut volume) = (Vec::new(), None);
        match identity.itself() {
            // No file of this host.
            None => return Ok(Self::default()),
            Some(Thing::File(..)) => refuse_told(host, identity)?,
            Some(Thing::Device(number)) => {
                let found = have_alone(host, identity, host.block(number))?;
                files.extend(found.files);
                volume = found.volume;
            }
        }
        for backing in backings(host, identity) {
            files.extend(lock_backing(identity, &backing.0, backing.1)?);
        }
        if standing == Standing::New {
            refuse_used_beside(host, identity)?;
        }
        let is_told = standing == Standing::Had || volume.is_some();
        let beside = is_told.then(|| Beside::of(host, identity, volume)).flatten();
        Ok(Self { _files: files, beside })
    }
}

fn by_host(identity: &Identity, device: Option<PathBuf>, found: Use) -> InUse {
    InUse::ByHost { image: identity.image().to_owned(), device, usage: Usage(found) }
}

/// What the agent has of a device.
#[derive(Default)]
struct Had {
    /// Opened exclusively: the device, or what of it can be had alone.
    files: Vec<File>,
    /// A volume has the rest, which nothing uses.
    volume: Option<String>,
}

/// Opens the image's device exclusively; none where that cannot be done and nobody is known to use it. What the host has made a
/// volume of by itself, and does not use, is had without that.
fn have_alone(host: &Host, identity: &Identity, block: Option<Block>) -> Result<Had, InUse> {
    let path = Path::new(identity.image());
    let is_busy = match open_alone(path) {
        Ok(file) => return Ok(Had { files: vec![file], volume: None }),
        Err(error) => Errno::from_io_error(&error) == Some(Errno::BUSY) || (host.is_claimed)(path),
    };
    refuse_told(host, identity)?;
    if !is_busy {
        // Whoever opens it as the disk's image is going to say why it cannot be opened.
        return Ok(Had::default());
    }
    let lock = File::open(path).and_then(|file| lock_shared(&file).map(|locked| (file, locked)));
    if let Ok((file, false)) = lock {
        return Err(locked(identity, &file));
    }
    let partitions = block.as_ref().map_or_else(Vec::new, |block| host.partitions(block));
    let disk = block.as_ref().and_then(|block| host.place(block)).map(|(disk, ..)| disk);
    let mut volumes = block.iter().chain(&disk).chain(&partitions).flat_map(|part| host.volumes_of(part));
    let Some(volume) = volumes.next() else { return Err(by_host(identity, None, Use::Claimed)) };
    if let Some(used) = partitions.iter().find(|part| host.is_somebodys(part)) {
        return Err(by_host(identity, Some(host.path(used)), Use::Claimed));
    }
    let files = partitions.iter().filter_map(|part| open_alone(&host.path(part)).ok()).collect();
    Ok(Had { files, volume: Some(volume.label()) })
}

/// Refuses an image that the host uses itself, as far as it tells.
fn refuse_told(host: &Host, identity: &Identity) -> Result<(), InUse> {
    let block = match identity.itself() {
        Some(file @ Thing::File(..)) if host.swaps_to(file) => {
            return Err(by_host(identity, None, Use::Swap));
        }
        Some(Thing::Device(number)) => host.block(number),
        Some(Thing::File(..)) | None => None,
    };
    let Some(block) = block else { return Ok(()) };
    if let Some(found) = host.told_use_of(&block) {
        return Err(by_host(identity, None, found));
    }
    let disk = host.place(&block).map(|(disk, ..)| disk);
    for other in disk.iter().chain(&host.partitions(&block)) {
        if let Some(found) = host.told_use_of(other) {
            return Err(by_host(identity, Some(host.path(other)), found));
        }
    }
    Ok(())
}

fn locked(identity: &Identity, file: &File) -> InUse {
    InUse::Locked { image: identity.image().to_owned(), by: lock_owner(file) }
}

/// Whether nobody else has it locked as its own.
fn lock_shared(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The files that the image names as parts of its content, and those that its loop devices lie on, and where they are.
fn backings(host: &Host, identity: &Identity) -> Vec<(PathBuf, Thing)> {
    let blocks = identity.parts().iter().filter_map(|part| match part.of {
        Thing::Device(number) => host.block(number),
        Thing::File(..) => None,
    });
    let backings = blocks.filter_map(|block| host.backing(&block));
    let backings = backings.map(|backing| (backing.path, backing.thing));
    let all = identity.files_behind().iter().cloned().chain(backings);
    all.filter(|(_, thing)| matches!(thing, Thing::File(..))).collect()
}

/// Others may have other parts of it, and nobody all of it. None where its path leads to another file.
fn lock_backing(identity: &Identity, path: &Path, thing: Thing) -> Result<Option<File>, InUse> {
    // Not opened before it is known to be a file: that may wait for ever.
    let is_it = fs::metadata(path).is_ok_and(|found| found.is_file() && Thing::of(&found) == thing);
    let Some(file) = is_it.then(|| File::open(path).ok()).flatten() else { return Ok(None) };
    match lock_shared(&file) {
        Ok(true) => Ok(Some(file)),
        Ok(false) => Err(locked(identity, &file)),
        // Its file system has no locks.
        Err(_) => Ok(None),
    }
}

/// Refuses an image of which something uses bytes that lies beside it: on a loop device of its own, or directly on what the
/// image's loop device lies on.
fn refuse_used_beside(host: &Host, identity: &Identity) -> Result<(), InUse> {
    let beneath = beneath_loops(host, identity);
    let mut beside: Vec<_> = beneath.iter().flat_map(|disk| host.with_parts(disk)).collect();
    // Of those on its way down the kernel knows.
    beside.extend(host.loops_beside(&own_way(identity, &beneath)));
    for (block, parts) in beside {
        let has_bytes = overlap(&parts, identity.parts());
        if let Some(found) = has_bytes.then(|| host.use_of(&block)).flatten() {
            return Err(by_host(identity, Some(host.path(&block)), found));
        }
    }
    Ok(())
}

/// The devices on the image's way down.
fn own_way(identity: &Identity, beneath: &[Block]) -> Vec<DeviceNumber> {
    let devices = identity.parts().iter().filter_map(|part| match part.of {
        Thing::Device(number) => Some(number),
        Thing::File(..) => None,
    });
    devices.filter(|number| beneath.iter().all(|below| below.number != *number)).collect()
}

/// The block devices that the image's loop devices lie on: a loop device does not claim them.
fn beneath_loops(host: &Host, identity: &Identity) -> Vec<Block> {
    let mut found = Vec::new();
    for part in identity.parts() {
        let Thing::Device(number) = part.of else { continue };
        let backing = host.block(number).and_then(|block| host.backing(&block));
        let Some(Thing::Device(below)) = backing.map(|backing| backing.thing) else { continue };
        let Some(block) = host.block(below) else { continue };
        found.push(host.place(&block).map_or(block, |(disk, ..)| disk));
    }
    found
}
