//! Handles of the in-memory storage: every operation counted, checked for faults, then done.

use std::{
    io::{self, IoSlice},
    sync::MutexGuard,
};

use backtide_units::{ByteCount, ByteOffset, ByteRange};

use super::{ELSEWHERE, HERE, MemoryStorage, World, power_off};
use crate::{DeviceId, StorageFile};

pub(super) struct MemoryFile {
    pub(super) storage: MemoryStorage,
    pub(super) file: usize,
    pub(super) generation: u64,
}

/// What a device answers for a bad sector.
pub(super) const EIO: i32 = 5;

/// What a full file system answers.
const ENOSPC: i32 = 28;

impl MemoryFile {
    fn world(&self) -> io::Result<MutexGuard<'_, World>> {
        let world = self.storage.world();
        if world.generation != self.generation {
            return Err(io::Error::other("the file was opened before the power was cut"));
        }
        world.alive()?;
        Ok(world)
    }
}

/// The part of `bytes` to be written at `offset` that fits in `free` bytes of growth.
fn fitting(space: u64, free: u64, offset: u64, bytes: usize) -> usize {
    let room = space.saturating_add(free).saturating_sub(offset);
    bytes.min(usize::try_from(room).unwrap_or(usize::MAX))
}

impl StorageFile for MemoryFile {
    fn read_at(&self, offset: ByteOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let mut world = self.world()?;
        if let Some(error) = world.bad_sector(self.file, offset, buffer.len()) {
            return Err(error);
        }
        Ok(world.files[self.file].read(offset.0, buffer))
    }

    fn write_vectored_at(&self, offset: ByteOffset, buffers: &[IoSlice<'_>]) -> io::Result<()> {
        let mut world = self.world()?;
        let bytes: Vec<u8> = buffers.iter().map(|buffer| &**buffer).collect::<Vec<&[u8]>>().concat();
        let cut = world.change()?;
        let fails = world.fail_write == Some(world.writes);
        world.writes += 1;
        let free = world.free();
        let content = &mut world.files[self.file];
        let fits = fitting(content.space(), free, offset.0, bytes.len());
        // A failing write has written half, so that callers meet a torn record.
        let written = if fails { fits.min(bytes.len() / 2) } else { fits };
        content.write(offset.0, &bytes[..written]);
        world.heal(self.file, offset, written);
        if cut {
            return Err(power_off());
        }
        if fails {
            return Err(io::Error::other("injected failure of a write"));
        }
        if written < bytes.len() { Err(io::Error::from_raw_os_error(ENOSPC)) } else { Ok(()) }
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut world = self.world()?;
        if world.change()? {
            return Err(power_off());
        }
        if world.sync_fails() | world.files[self.file].owed_failure() | world.read_only {
            world.files[self.file].fail_sync();
            return Err(io::Error::other("injected failure of a sync"));
        }
        world.files[self.file].sync();
        Ok(())
    }

    fn write_out(&self, _wait: bool) -> io::Result<()> {
        match self.world()?.files[self.file].owed_failure() {
            true => Err(io::Error::other("injected failure of writing out")),
            false => Ok(()),
        }
    }

    fn device(&self) -> io::Result<DeviceId> {
        Ok(if self.world()?.elsewhere.contains(&self.file) { ELSEWHERE } else { HERE })
    }

    fn len(&self) -> io::Result<ByteCount> {
        Ok(ByteCount(self.world()?.files[self.file].len()))
    }

    fn set_len(&self, len: ByteCount) -> io::Result<()> {
        let mut world = self.world()?;
        let cut = world.change()?;
        world.files[self.file].set_len(len.0);
        if cut { Err(power_off()) } else { Ok(()) }
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        let mut world = self.world()?;
        let cut = world.change()?;
        let free = world.free();
        let content = &mut world.files[self.file];
        if range.end().0 > content.space().saturating_add(free) {
            return Err(io::Error::from_raw_os_error(ENOSPC));
        }
        content.allocate(range.end().0);
        if cut { Err(power_off()) } else { Ok(()) }
    }
}
