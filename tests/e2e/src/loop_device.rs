//! A block device of a file, by the kernel's loop devices.

use std::path::Path;

use crate::{is_root, tools};

/// Goes with its test.
pub struct LoopDevice(String);

impl LoopDevice {
    /// With blocks of `sector` bytes.
    ///
    /// # Errors
    /// Why there is none on this machine.
    pub fn of(file: &Path, sector: u32) -> Result<Self, String> {
        if !is_root() || !tools::is_there("losetup") {
            return Err("only root makes a block device of a file, with losetup".to_owned());
        }
        let (sector, file) = (sector.to_string(), file.display().to_string());
        match tools::try_run("losetup", &["--sector-size", &sector, "--find", "--show", &file]) {
            (true, device) => Ok(Self(device.trim().to_owned())),
            (false, said) => Err(format!("no loop device here: {said}")),
        }
    }

    /// Its name in `/dev`.
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        tools::try_run("losetup", &["--detach", &self.0]);
    }
}
