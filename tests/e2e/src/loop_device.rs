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
        Self::with(file, &["--sector-size", &sector.to_string()])
    }

    /// Of `bytes` of it from `offset` on.
    ///
    /// # Errors
    /// Why there is none on this machine.
    pub fn stretch(file: &Path, offset: u64, bytes: u64) -> Result<Self, String> {
        Self::with(file, &["--offset", &offset.to_string(), "--sizelimit", &bytes.to_string()])
    }

    fn with(file: &Path, options: &[&str]) -> Result<Self, String> {
        if !is_root() || !tools::is_there("losetup") {
            return Err("only root makes a block device of a file, with losetup".to_owned());
        }
        let file = file.display().to_string();
        match tools::try_run("losetup", &[options, &["--find", "--show", &file]].concat()) {
            (true, device) => Ok(Self(device.trim().to_owned())),
            (false, said) => Err(format!("no loop device here: {said}")),
        }
    }

    /// Makes a partition of it, whatever it holds: its `number`, its first sector of 512 bytes, and how many there are. The
    /// name of that in `/dev`.
    ///
    /// # Errors
    /// Why there is none on this machine.
    pub fn partition(&self, number: u32, first: u64, sectors: u64) -> Result<String, String> {
        let [number, first, sectors] = [number.into(), first, sectors].map(|value: u64| value.to_string());
        let device = format!("{}p{number}", self.0);
        match tools::try_run("addpart", &[&self.0, &number, &first, &sectors]) {
            (true, _) if Path::new(&device).exists() => Ok(device),
            (_, said) => Err(format!("no partition of {} here: {said}", self.0)),
        }
    }

    /// Its name in `/dev`.
    pub fn path(&self) -> &str {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        tools::try_run("partx", &["--delete", &self.0]);
        tools::try_run("losetup", &["--detach", &self.0]);
    }
}
