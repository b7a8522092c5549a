//! What an agent is told when it starts.

use std::path::PathBuf;

use backtide_agent_api::{CacheMode, LimitsRequest, StreamTls};
use backtide_control::Address;
use backtide_export::{NbdRule, NbdTls, NbdUri};
use backtide_units::ByteCount;
use serde::{Deserialize, Serialize};

use crate::spill::{SPILL_SIZE_DEFAULT, SPILL_SIZE_MIN, SpillPlace};

/// An agent's configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where it remembers its disks; created when missing.
    pub state: PathBuf,
    /// Where it makes the NBD sockets of disks that name none; created when missing.
    pub run: PathBuf,
    /// Where it serves the control API.
    pub api: Address,
    /// Bounds of disks that do not set their own; what is left out keeps its default.
    #[serde(default)]
    pub limits: LimitsRequest,
    /// Whether images of disks that do not say are read and written through the page cache.
    #[serde(default)]
    pub cache: CacheMode,
    /// How local I/O is done that may wait for a device.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// For how long a disk's thread looks for the next request before it goes to sleep, in microseconds; 0: not at
    /// all. Default: [`POLL_MAX_US`].
    #[serde(default = "poll_max_us")]
    pub poll_max_us: u32,
    /// Where disks spill what the receiver lacks and memory has no room for; created when missing.
    /// Default: nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_dir: Option<PathBuf>,
    /// What each disk may spill. Default: 4 GiB, if there is a directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill_size: Option<ByteCount>,
    /// An NBD URI of a socket on which every disk is served by its name, beside those of their own. The export it names
    /// is the default there; where it names none, the only disk is. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_listen: Option<String>,
    /// TLS of disks whose NBD URI says nothing of it. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_tls: Option<NbdTls>,
    /// Whether disks and mounts may be served in the clear, to whomever, over TCP that is not loopback.
    #[serde(default)]
    pub insecure: bool,
    /// Bounds of the NBD server of each disk.
    #[serde(default)]
    pub nbd: backtide_export::Limits,
    /// Bounds of what is written to mounts.
    #[serde(default)]
    pub mounts: MountLimits,
    /// TLS of `tls://` receivers, for disks that name no certificates of their own. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_tls: Option<StreamTls>,
}

/// About what a client on the same host takes for its turn.
pub const POLL_MAX_US: u32 = 100;

/// Whoever waits for longer can be woken.
const POLL_LIMIT_US: u32 = 10_000;

fn poll_max_us() -> u32 {
    POLL_MAX_US
}

/// Bounds of what is written to the points that an agent serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MountLimits {
    /// Overlays of writable mounts, mounted or kept. Default 64.
    pub overlays: usize,
    /// What one overlay may hold, in bytes. Default 16 GiB.
    pub overlay_bytes: ByteCount,
    /// What all overlays in use may hold together, in bytes; each GiB takes about 8 MiB of memory. Default 64 GiB.
    pub overlays_bytes: ByteCount,
}

impl Default for MountLimits {
    fn default() -> Self {
        Self { overlays: 64, overlay_bytes: ByteCount(16 << 30), overlays_bytes: ByteCount(64 << 30) }
    }
}

/// How local I/O is done that may wait for a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoEngine {
    /// By io_uring where that can be used, else by threads.
    #[default]
    Auto,
    /// By io_uring; a disk is not attached without.
    IoUring,
    /// By a pool of threads.
    Threads,
}

impl Config {
    /// Whether its limits and its spill can be used.
    ///
    /// # Errors
    /// What cannot be, in a sentence.
    pub fn check(&self) -> Result<(), String> {
        self.limits.check().map_err(|why| format!("limits: {why}"))?;
        if self.poll_max_us > POLL_LIMIT_US {
            let most = format!("expected at most {POLL_LIMIT_US}, or 0 for not at all");
            return Err(format!("poll_max_us is {} microseconds, {most}", self.poll_max_us));
        }
        self.shared_uri()?;
        self.spill().map(|_| ())
    }

    /// Where all disks are served, if anywhere.
    ///
    /// # Errors
    /// When it is no NBD URI, or one at which other machines would be served in the clear.
    pub(crate) fn shared_uri(&self) -> Result<Option<NbdUri>, String> {
        let rule = self.nbd_rule();
        self.nbd_listen.as_ref().map(|text| rule.shared_uri(text)).transpose()
    }

    /// What holds for every place at which it is told to serve NBD.
    pub(crate) fn nbd_rule(&self) -> NbdRule {
        NbdRule { tls: self.nbd_tls.clone(), insecure: self.insecure }
    }

    /// Where spills are, if anywhere.
    ///
    /// # Errors
    /// When a size cannot be, or has no directory.
    pub(crate) fn spill(&self) -> Result<Option<SpillPlace>, String> {
        let bytes = self.spill_size.unwrap_or(SPILL_SIZE_DEFAULT);
        match &self.spill_dir {
            None if self.spill_size.is_some() => Err("spill_size is set and no spill_dir".to_owned()),
            None => Ok(None),
            Some(_) if bytes < SPILL_SIZE_MIN => {
                Err(format!("spill_size is {bytes} bytes, expected at least {SPILL_SIZE_MIN}"))
            }
            Some(directory) => Ok(Some(SpillPlace { directory: directory.clone(), bytes })),
        }
    }
}

/// The files under an agent's state directory.
#[derive(Clone, Debug)]
pub struct Places {
    state: PathBuf,
    run: PathBuf,
}

impl Places {
    /// Of this configuration.
    pub fn of(config: &Config) -> Self {
        Self { state: config.state.clone(), run: config.run.clone() }
    }

    /// Where the disks' records and tracking files lie.
    pub fn state(&self) -> &std::path::Path {
        &self.state
    }

    /// The NBD socket of a disk that names none.
    pub fn nbd_socket(&self, disk: &backtide_units::DiskName) -> PathBuf {
        self.run.join(format!("{disk}.nbd"))
    }

    /// The socket of the server that opens a disk's qcow2 file.
    pub fn qcow2_socket(&self, disk: &backtide_units::DiskName) -> PathBuf {
        self.run.join(format!("{disk}.qemu-nbd"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(more: &str) -> Config {
        let text = format!(r#"{{"state": "/s", "run": "/r", "api": "unix:/r/agent.sock"{more}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn limits_that_cannot_be_are_refused_as_those_of_an_attach_are() {
        assert_eq!(config("").check(), Ok(()));
        assert_eq!(config("").poll_max_us, POLL_MAX_US);
        assert_eq!(config(r#", "poll_max_us": 0"#).check(), Ok(()));
        assert_eq!(config(r#", "limits": {"guest_delay_max_ms": 0}"#).check(), Ok(()));
        for (more, part) in [
            (r#", "limits": {"bitmap_bytes": 4096}"#, "limits: the bitmap of changed blocks needs"),
            (r#", "limits": {"window_bytes": 0}"#, "limits: the retained window"),
            (r#", "limits": {"activity_extent_bytes": 65537}"#, "limits: an extent of the activity log"),
            (r#", "spill_size": 1048576"#, "no spill_dir"),
            (r#", "poll_max_us": 10001"#, "expected at most 10000, or 0 for not at all"),
            (r#", "nbd_listen": "/run/disks.nbd""#, "nbd_listen: expected nbd://host:port/export"),
        ] {
            let why = config(more).check().unwrap_err();
            assert!(why.contains(part), "{why}");
        }
    }
}
