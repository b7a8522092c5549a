//! What it takes to protect a disk.

use std::{fmt, path::PathBuf, str::FromStr};

use backtide_control::Address;
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn};
use serde::{Deserialize, Serialize};

use crate::{CacheMode, ImageFormat};

/// Protect a disk: serve it over NBD through the filter and forward its writes to a receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// The disk's name, and the name of its NBD export.
    pub name: DiskName,
    /// The disk behind: an absolute path of a raw image, a block device or a qcow2 file, or an NBD URI.
    pub image: String,
    /// What the image is. None: what it was at the disk's first attach, and then what its first bytes look like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
    /// Where the receiver takes streams.
    pub receiver: Address,
    /// Where to serve the disk: an NBD URI (`nbd+unix:///NAME?socket=/path`, `nbd://host:port/NAME`).
    /// None: on a unix socket of the agent's choice.
    #[serde(default)]
    pub nbd: Option<String>,
    /// When the guest is acknowledged. None: as at the disk's last attach here, and `local` at the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ack: Option<AckPolicy>,
    /// What `ack` means while the receiver is away. None: as at the disk's last attach here, and `continue` at the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_outage: Option<OnOutage>,
    /// Whether the image is read and written through the page cache. None: as the agent's configuration
    /// says.
    #[serde(default)]
    pub cache: Option<CacheMode>,
    /// Bounds; what is left out keeps its default.
    #[serde(default)]
    pub limits: LimitsRequest,
    /// TLS of a `tls://` receiver. None: what the agent's configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_tls: Option<StreamTls>,
    /// A history that the receiver keeps and this agent knows nothing of, to be continued: everything
    /// is compared. None: a new disk, or one that the agent knows by its name.
    #[serde(default)]
    pub adopt: Option<Adopted>,
    /// A point at the receiver that a new disk begins as; its image is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<FromPoint>,
    /// With `adopt`: the host that had the disk is gone, or is to be fenced. The disk goes on here at its latest point; its
    /// image is made.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub failover: bool,
    /// Attach the disk although another agent has had it since: that one is fenced, and what the image here holds
    /// becomes the latest content, after a comparison of everything.
    #[serde(default)]
    pub take_over: bool,
}

/// A point of another disk that a new one begins as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FromPoint {
    /// The other disk.
    pub disk: DiskId,
    /// The point.
    pub lsn: Lsn,
    /// Also when blocks of it are damaged at the receiver: they cannot be read until they are written.
    #[serde(default)]
    pub force: bool,
}

/// TLS of a stream, on the agent's side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamTls {
    /// The absolute path of a folder with `ca-cert.pem`, whose authorities sign receivers,
    /// `client-cert.pem` and `client-key.pem`.
    pub certificates: PathBuf,
    /// The name the receiver's certificate has to be for. None: the host of its address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
}

/// A disk as its receiver knows it, for an agent that has lost what it knew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adopted {
    /// Its identity.
    pub uuid: DiskId,
    /// Its history at the receiver.
    pub history: HistoryId,
    /// The highest epoch seen there: the attach gets a higher one.
    pub epoch: Epoch,
    /// Everything up to here is durable there.
    pub durable: Lsn,
    /// When the last record there was captured; no later one is captured before it.
    #[serde(default)]
    pub last_time: Option<CaptureTime>,
}

/// When the guest's requests are acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AckPolicy {
    /// When the local disk has completed them.
    #[default]
    Local,
    /// Writes when the receiver has them in memory.
    Received,
    /// Writes at once; FLUSH and FUA when the receiver has made everything before them durable.
    Durable,
    /// Every write when the receiver has made it durable.
    DurableEveryWrite,
}

/// What happens to requests that wait for a receiver that is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnOutage {
    /// They are acknowledged when they are local: the guest goes on without its promise.
    #[default]
    Continue,
    /// They wait: the guest stands still until the receiver is back.
    Block,
}

/// Bounds of one disk as asked for; what is none keeps the default of [`Limits`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitsRequest {
    /// The most record bytes retained until they are durable at the receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bytes: Option<ByteCount>,
    /// The most bytes between a pass's local reads and the stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_buffer_bytes: Option<ByteCount>,
    /// The longest a guest request is delayed for the sake of the receiver, in milliseconds; 0 = never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_delay_max_ms: Option<u32>,
    /// The most a resync sends, in bytes per second; 0 = as fast as it goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_bytes_per_second_max: Option<ByteCount>,
    /// The most that the local reads of a resync or a verify add to the guest's latency, in
    /// microseconds; 0 = as much as it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_latency_us_max: Option<u32>,
    /// The most memory for the bitmap of changed blocks; above it, it becomes coarser.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bitmap_bytes: Option<ByteCount>,
    /// How long a guest waits for a silent receiver, where the policy makes it wait and `on_outage` is
    /// `continue`, in milliseconds: 1 or more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outage_after_ms: Option<u32>,
    /// Extents that stay hot in the activity log; 0 = none is kept, and a crash means comparing all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activity_extents: Option<u32>,
    /// The size of an extent: a multiple of 4096, from 64 KiB to 16 TiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activity_extent_bytes: Option<ByteCount>,
}

/// The least memory a bitmap of changed blocks can do with.
const BITMAP_BYTES_MIN: u64 = 1 << 20;

/// The smallest extent of an activity log.
const EXTENT_BYTES_MIN: u64 = 64 << 10;

/// The largest: a tracking file knows none above.
const EXTENT_BYTES_MAX: u64 = 16 << 40;

/// Bounds of one disk as they are in force. What a configuration leaves out is the default.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// The most record bytes retained until they are durable at the receiver.
    pub window_bytes: ByteCount,
    /// The most bytes between a pass's local reads and the stream.
    pub resync_buffer_bytes: ByteCount,
    /// The longest a guest request is delayed for the sake of the receiver, in milliseconds; 0 = never.
    pub guest_delay_max_ms: u32,
    /// The most a resync sends, in bytes per second; 0 = as fast as it goes.
    pub resync_bytes_per_second_max: ByteCount,
    /// The most that the local reads of a resync or a verify shall add to the guest's latency, in
    /// microseconds: a target that their speed follows; 0 = as much as it takes. A resync that loses
    /// ground to the guest is held back neither by this nor by its limit.
    pub resync_latency_us_max: u32,
    /// The most memory for the bitmap of changed blocks; above it, it becomes coarser: a resync sends
    /// more than has changed then, in stretches of 64 KiB or more.
    pub bitmap_bytes: ByteCount,
    /// How long a guest waits for a silent receiver, where the policy makes it wait and `on_outage` is
    /// `continue`, in milliseconds.
    pub outage_after_ms: u32,
    /// Extents that stay hot in the activity log: about what has to be compared after a crash.
    /// 0 = no log is kept, and all has to be.
    pub activity_extents: u32,
    /// The size of an extent: a multiple of 4096, from 64 KiB to 16 TiB.
    pub activity_extent_bytes: ByteCount,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            window_bytes: ByteCount(64 << 20),
            resync_buffer_bytes: ByteCount(32 << 20),
            guest_delay_max_ms: 10,
            resync_bytes_per_second_max: ByteCount(0),
            resync_latency_us_max: 500,
            bitmap_bytes: ByteCount(64 << 20),
            outage_after_ms: 5000,
            activity_extents: 1024,
            activity_extent_bytes: ByteCount(4 << 20),
        }
    }
}

impl LimitsRequest {
    /// Whether what is asked for can be.
    ///
    /// # Errors
    /// A sentence that names the first limit that cannot.
    pub fn check(&self) -> Result<(), String> {
        let below = |value: Option<ByteCount>, least: u64| value.is_some_and(|value| value.0 < least);
        if below(self.window_bytes, 1) {
            return Err("the retained window has to hold something: it cannot have 0 bytes".to_owned());
        }
        if below(self.resync_buffer_bytes, 1) {
            return Err("the resync buffer has to hold something: it cannot have 0 bytes".to_owned());
        }
        if below(self.bitmap_bytes, BITMAP_BYTES_MIN) {
            return Err("the bitmap of changed blocks needs at least 1 MiB".to_owned());
        }
        if self.outage_after_ms == Some(0) {
            // No flush would wait for the receiver, whatever the policy promises.
            return Err("a guest that waits for a silent receiver (outage after) cannot do so for 0 ms: let it wait for 1 ms or \
                        more, or not at all with --ack local, or as long as it takes with --on-outage block"
                .to_owned());
        }
        let extent = self.activity_extent_bytes;
        let wrong = |bytes: ByteCount| bytes.0 > EXTENT_BYTES_MAX || !bytes.0.is_multiple_of(4096);
        if below(extent, EXTENT_BYTES_MIN) || extent.is_some_and(wrong) {
            return Err("an extent of the activity log has a multiple of 4096 bytes, from 64 KiB to 16 TiB"
                .to_owned());
        }
        Ok(())
    }

    /// What is asked for, and `otherwise` where nothing is.
    pub fn or(self, otherwise: Limits) -> Limits {
        Limits {
            window_bytes: self.window_bytes.unwrap_or(otherwise.window_bytes),
            resync_buffer_bytes: self.resync_buffer_bytes.unwrap_or(otherwise.resync_buffer_bytes),
            guest_delay_max_ms: self.guest_delay_max_ms.unwrap_or(otherwise.guest_delay_max_ms),
            resync_bytes_per_second_max: self
                .resync_bytes_per_second_max
                .unwrap_or(otherwise.resync_bytes_per_second_max),
            resync_latency_us_max: self.resync_latency_us_max.unwrap_or(otherwise.resync_latency_us_max),
            bitmap_bytes: self.bitmap_bytes.unwrap_or(otherwise.bitmap_bytes),
            outage_after_ms: self.outage_after_ms.unwrap_or(otherwise.outage_after_ms),
            activity_extents: self.activity_extents.unwrap_or(otherwise.activity_extents),
            activity_extent_bytes: self.activity_extent_bytes.unwrap_or(otherwise.activity_extent_bytes),
        }
    }
}

impl AckPolicy {
    /// All policies, the default first.
    pub const ALL: [Self; 4] = [Self::Local, Self::Received, Self::Durable, Self::DurableEveryWrite];

    /// The name in JSON and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Received => "received",
            Self::Durable => "durable",
            Self::DurableEveryWrite => "durable-every-write",
        }
    }
}

impl OnOutage {
    /// Both, the default first.
    pub const ALL: [Self; 2] = [Self::Continue, Self::Block];

    /// The name in JSON and on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Continue => "continue",
            Self::Block => "block",
        }
    }
}

impl fmt::Display for AckPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for OnOutage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for AckPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|policy| policy.as_str() == text)
            .ok_or_else(|| format!("{text:?} is none of local, received, durable, durable-every-write"))
    }
}

impl FromStr for OnOutage {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|choice| choice.as_str() == text)
            .ok_or_else(|| format!("{text:?} is neither continue nor block"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_on_the_command_line_are_those_of_the_json() {
        for policy in AckPolicy::ALL {
            assert_eq!(serde_json::to_value(policy).unwrap(), policy.as_str());
            assert_eq!(policy.as_str().parse(), Ok(policy));
        }
        for choice in OnOutage::ALL {
            assert_eq!(serde_json::to_value(choice).unwrap(), choice.as_str());
            assert_eq!(choice.as_str().parse(), Ok(choice));
        }
        assert!("sometimes".parse::<AckPolicy>().unwrap_err().contains("durable-every-write"));
    }

    #[test]
    fn an_attach_needs_no_more_than_name_image_and_receiver() {
        let text = r#"{"name":"vm1","image":"/vm1.img","receiver":"tcp://kvm-3:7300"}"#;
        let request: AttachRequest = serde_json::from_str(text).unwrap();
        assert_eq!((request.ack, request.on_outage), (None, None), "as before");
        assert_eq!(request.limits.or(Limits::default()), Limits::default());
        let zero = r#"{"guest_delay_max_ms":0}"#;
        let limits = serde_json::from_str::<LimitsRequest>(zero).unwrap().or(Limits::default());
        assert_eq!(limits.guest_delay_max_ms, 0, "zero is a value, not the default");
    }

    #[test]
    fn limits_that_cannot_be_are_named() {
        for (limits, part) in [
            (r#"{"window_bytes":0}"#, "window"),
            (r#"{"resync_buffer_bytes":0}"#, "resync buffer"),
            (r#"{"bitmap_bytes":1048575}"#, "bitmap"),
            (r#"{"outage_after_ms":0}"#, "--on-outage block"),
            (r#"{"activity_extent_bytes":32768}"#, "extent"),
            (r#"{"activity_extent_bytes":65537}"#, "extent"),
            (r#"{"activity_extent_bytes":17592186048512}"#, "extent"),
        ] {
            let limits: LimitsRequest = serde_json::from_str(limits).unwrap();
            assert!(limits.check().unwrap_err().contains(part), "{limits:?}");
        }
        let least = r#"{"window_bytes":1,"resync_buffer_bytes":1,"bitmap_bytes":1048576,"activity_extent_bytes":65536,"guest_delay_max_ms":0,"outage_after_ms":1}"#;
        assert_eq!(serde_json::from_str::<LimitsRequest>(least).unwrap().check(), Ok(()));
    }

    #[test]
    fn what_an_attach_does_not_know_is_refused() {
        let text = r#"{"name":"vm1","image":"/vm1.img","receiver":"tcp://kvm-3:7300","akc":"durable"}"#;
        assert!(serde_json::from_str::<AttachRequest>(text).unwrap_err().to_string().contains("akc"));
    }
}
