//! What a receiver can be told. Every value has a default but the store's place.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use backtide_control::Address;
use backtide_export::{NbdRule, NbdTls, NbdUri};
use backtide_recovery::{CacheLimits, Compression, LogOptions};
use backtide_tls::WhichDisks;
use backtide_units::ByteCount;
use serde::{Deserialize, Serialize};

use crate::retention::Span;

/// Undurable bytes gather no longer: agents keep them in memory meanwhile.
const COMMIT_INTERVAL_MAX: Duration = Duration::from_secs(60);

/// A store is not read all the time.
const EVERY_MIN: Duration = Duration::from_secs(60 * 60);

/// A receiver's configuration; in TOML the same names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The store's directory; made when it is missing.
    pub store: PathBuf,
    /// The directory of sockets; made when it is missing. Default: `run` in the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<PathBuf>,
    /// Where agents' streams are taken. Default: `unix:RUN/stream.sock`.
    #[serde(default)]
    pub listen: Vec<Address>,
    /// Where the control API is served. Default: `unix:RUN/receiver.sock`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api: Option<Address>,
    /// Limits of memory, threads, files and space.
    #[serde(default)]
    pub limits: Limits,
    /// How long history is kept.
    #[serde(default)]
    pub retention: Retention,
    /// When everything that is kept is read and checked.
    #[serde(default)]
    pub scrub: Scrubbing,
    /// An NBD URI of a socket on which every mount is served by its id, beside those of their own. The export it names
    /// is the default there; where it names none, the only mount is. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_listen: Option<String>,
    /// TLS of mounts whose NBD URI says nothing of it. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbd_tls: Option<NbdTls>,
    /// Bounds of the NBD server of each mount.
    #[serde(default)]
    pub nbd: backtide_export::Limits,
    /// TLS of `tls://` addresses of `listen`, which need it. Default: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream_tls: Option<StreamTls>,
    /// Whether streams may come in the clear, and from whomever, over TCP that is not loopback, and mounts be served so.
    #[serde(default)]
    pub insecure: bool,
}

/// TLS of the streams that come to `tls://` addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamTls {
    /// The folder of `ca-cert.pem`, whose authorities sign agents, `server-cert.pem` and `server-key.pem`.
    pub certificates: PathBuf,
    /// What an agent's certificate that names no disks may speak for.
    #[serde(default)]
    pub disks: WhichDisks,
}

/// Bounds of a receiver.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Threads that own disks and their connections. Default: the processors, at most 4.
    pub ingest_threads: usize,
    /// Threads that sync segment files. Default 4.
    pub commit_threads: usize,
    /// Threads that read for mounts, compares and the control API. Default 4.
    pub read_threads: usize,
    /// Streams open at once; a further one takes the place of one that has not said who it is, or is closed at once.
    /// Default 1024.
    pub connections: usize,
    /// Disks the store takes. Default 1024.
    pub disks: usize,
    /// Mounts open at once. Default 64.
    pub mounts: usize,
    /// Overlays of writable mounts, mounted or kept. Default 64.
    pub overlays: usize,
    /// What one overlay may hold. Default 16 GiB.
    pub overlay_bytes: ByteCount,
    /// What all overlays in use may hold together; each GiB takes about 8 MiB of memory. Default 64 GiB.
    pub overlays_bytes: ByteCount,
    /// Bytes per disk that were received and are not durable yet; above it nothing more is read
    /// from that disk's stream. Default 64 MiB.
    pub undurable_bytes: ByteCount,
    /// How long what was received may wait for more to be synced with it, unless somebody waits for it; 0 is
    /// not at all, and more than 60,000 counts as that. Default 20 ms.
    pub commit_interval_ms: u64,
    /// As many undurable bytes of a disk are not gathered any longer; of what a resync brings eight times as
    /// many. At most half of `undurable_bytes`. Default 4 MiB.
    pub commit_bytes: ByteCount,
    /// When so many disks wait to be made durable, two flushes of the store's file system serve all of them: where
    /// file system and kernel are good for that, and little else waits to be written. 0 is never, and the default: each
    /// disk then waits for the bytes of all others.
    pub commit_together: usize,
    /// New data is refused when less than this is free in the store. Default 64 MiB.
    pub free_bytes_min: ByteCount,
    /// A segment is sealed when it would grow beyond this. Default 64 MiB.
    pub segment_bytes: ByteCount,
    /// How what disks write is stored. Default: as it came. Others take part of a processor and of the store's room:
    /// `docs/performance.md`. What is stored stays as it is.
    pub journal_compression: JournalCompression,
    /// Memory for index blocks of all readers. Default 64 MiB.
    pub index_cache_bytes: ByteCount,
    /// How often an agent hears from the receiver, and is asked how its clock stamps what happens. Agents give a receiver up that
    /// is silent for 30 seconds while a slow device syncs. Default 5000 ms.
    pub ping_interval_ms: u64,
    /// Sealed segment files kept open for readers. Default 256.
    pub open_segments: usize,
    /// Extents in the indexes of segments that are still written, of all disks together; beyond it segments are sealed
    /// before they are full. Each takes about 48 bytes. Default 2,097,152.
    pub open_extents: u64,
}

/// How what disks write is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum JournalCompression {
    /// As it came.
    #[default]
    None,
    /// With LZ4, where that saves something.
    Lz4,
    /// With Zstandard, where that saves something.
    Zstd,
}

/// How long history is kept, and at what pace it is thinned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Retention {
    /// The ladder of disks that have none of their own, such as `any=24h hourly=7d daily=30d weekly=1y`. Default
    /// `forever`.
    pub default: String,
    /// The most of the store that is read in a second to fold old history into images; 0 is without limit. Default
    /// 64 MiB.
    pub bytes_per_second_max: ByteCount,
    /// How often it is looked for history that has grown old. Default 60,000 ms.
    pub interval_ms: u64,
    /// Less free room than this is an alarm, and with `on_full = "shrink"` the oldest history goes. Default 1 GiB.
    pub low_bytes: ByteCount,
    /// What a store does that is nearly full. Default `refuse`.
    pub on_full: OnFull,
}

/// What a store does that is nearly full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFull {
    /// It keeps what was promised and refuses new data in the end; agents then track.
    #[default]
    Refuse,
    /// It gives up the oldest history, whatever was promised.
    Shrink,
}

/// When everything that is kept is read and checked without being asked for, and at what pace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Scrubbing {
    /// A scrub begins so long after the last one of everything has ended. Default: only when somebody asks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<Every>,
    /// The most of the store that a scrub reads in a second when who asks for it does not say; 0 is without limit. Default
    /// 64 MiB.
    pub bytes_per_second_max: ByteCount,
}

/// How long after one scrub the next begins, such as `7d`; an hour or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Every(Span);

impl Every {
    /// The same as a duration.
    pub fn duration(self) -> Duration {
        Duration::from_micros(self.0.0)
    }
}

impl TryFrom<String> for Every {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let long = Span::parse(&text).map(Self).filter(|every| every.duration() >= EVERY_MIN);
        long.ok_or_else(|| {
            format!("{text:?} is no time between two scrubs: expected a number with h, d, w or y such as 7d, an hour or more")
        })
    }
}

impl From<Every> for String {
    fn from(every: Every) -> Self {
        every.0.to_string()
    }
}

impl Default for Scrubbing {
    fn default() -> Self {
        Self { every: None, bytes_per_second_max: ByteCount(64 << 20) }
    }
}

impl Default for Retention {
    fn default() -> Self {
        Self {
            default: "forever".to_owned(),
            bytes_per_second_max: ByteCount(64 << 20),
            interval_ms: 60_000,
            low_bytes: ByteCount(1 << 30),
            on_full: OnFull::Refuse,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        let log = LogOptions::default();
        let cache = CacheLimits::default();
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            ingest_threads: processors.min(4),
            commit_threads: 4,
            read_threads: 4,
            connections: 1024,
            disks: 1024,
            mounts: 64,
            overlays: 64,
            overlay_bytes: ByteCount(16 << 30),
            overlays_bytes: ByteCount(64 << 30),
            undurable_bytes: ByteCount(64 << 20),
            commit_interval_ms: 20,
            commit_bytes: ByteCount(4 << 20),
            commit_together: 0,
            free_bytes_min: ByteCount(64 << 20),
            segment_bytes: log.segment_bytes_max,
            journal_compression: JournalCompression::None,
            index_cache_bytes: cache.index_bytes_max,
            ping_interval_ms: 5000,
            open_segments: cache.open_files_max,
            open_extents: cache.open_extents_max,
        }
    }
}

impl Limits {
    pub(crate) fn log(&self) -> LogOptions {
        let compression = match self.journal_compression {
            JournalCompression::None => Compression::None,
            JournalCompression::Lz4 => Compression::Lz4,
            JournalCompression::Zstd => Compression::Zstd,
        };
        LogOptions { segment_bytes_max: self.segment_bytes, compression, ..LogOptions::default() }
    }

    /// How long undurable bytes gather.
    pub(crate) fn commit_interval(&self) -> Duration {
        Duration::from_millis(self.commit_interval_ms).min(COMMIT_INTERVAL_MAX)
    }

    /// How many of them at the most: a stream that is not read any more must not wait for the interval.
    pub(crate) fn commit_bytes(&self) -> ByteCount {
        ByteCount(self.commit_bytes.0.min(self.undurable_bytes.0 / 2))
    }

    pub(crate) fn cache(&self) -> CacheLimits {
        CacheLimits {
            index_bytes_max: self.index_cache_bytes,
            open_files_max: self.open_segments,
            open_extents_max: self.open_extents,
            free_bytes_min: self.free_bytes_min,
        }
    }
}

impl Config {
    /// The defaults for a store at `store`.
    pub fn new(store: impl Into<PathBuf>) -> Self {
        Self {
            store: store.into(),
            run: None,
            listen: Vec::new(),
            api: None,
            limits: Limits::default(),
            retention: Retention::default(),
            scrub: Scrubbing::default(),
            nbd_listen: None,
            nbd_tls: None,
            nbd: backtide_export::Limits::default(),
            stream_tls: None,
            insecure: false,
        }
    }

    /// The directory of sockets.
    pub fn run_dir(&self) -> PathBuf {
        self.run.clone().unwrap_or_else(|| self.store.join("run"))
    }

    /// Where streams are taken.
    pub fn listen_addresses(&self) -> Vec<Address> {
        if self.listen.is_empty() { vec![self.socket("stream.sock")] } else { self.listen.clone() }
    }

    /// Where the control API is served.
    pub fn api_address(&self) -> Address {
        self.api.clone().unwrap_or_else(|| self.socket("receiver.sock"))
    }

    /// Where all mounts are served, if anywhere.
    ///
    /// # Errors
    /// When it is no NBD URI, or one at which other machines would be served in the clear; a sentence.
    pub fn shared_uri(&self) -> Result<Option<NbdUri>, String> {
        let rule = self.nbd_rule();
        self.nbd_listen.as_ref().map(|text| rule.shared_uri(text)).transpose()
    }

    /// What holds for every place at which it is told to serve NBD.
    pub(crate) fn nbd_rule(&self) -> NbdRule {
        NbdRule { tls: self.nbd_tls.clone(), insecure: self.insecure }
    }

    fn socket(&self, name: &str) -> Address {
        let path = self.run_dir().join(name);
        // Addresses hold absolute paths; a relative store is meant from here.
        Address::Unix(std::path::absolute(Path::new(&path)).unwrap_or(path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_store_is_needed_and_sockets_follow_it() {
        let config: Config = serde_json::from_str(r#"{"store": "/srv/backtide"}"#).unwrap();
        assert_eq!(config, Config::new("/srv/backtide"));
        let shown: Vec<_> = config.listen_addresses().iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["unix:/srv/backtide/run/stream.sock"]);
        assert_eq!(config.api_address().to_string(), "unix:/srv/backtide/run/receiver.sock");
    }

    #[test]
    fn compression_is_one_of_three_words() {
        for (word, compression) in
            [("none", Compression::None), ("lz4", Compression::Lz4), ("zstd", Compression::Zstd)]
        {
            let text = format!(r#"{{"journal_compression": "{word}"}}"#);
            let limits: Limits = serde_json::from_str(&text).unwrap();
            assert_eq!(limits.log().compression, compression);
        }
        assert_eq!(Limits::default().log().compression, Compression::None);
        assert!(serde_json::from_str::<Limits>(r#"{"journal_compression": "gzip"}"#).is_err());
    }

    #[test]
    fn a_scrub_begins_by_itself_only_where_that_is_said_and_no_oftener_than_hourly() {
        let scrub = |text: &str| serde_json::from_str::<Scrubbing>(text);
        assert_eq!(
            scrub("{}").unwrap(),
            Scrubbing { every: None, bytes_per_second_max: ByteCount(64 << 20) }
        );
        for (text, hours) in [("60m", 1), ("7d", 168), ("168h", 168)] {
            let found = scrub(&format!(r#"{{"every": "{text}"}}"#)).unwrap();
            assert_eq!(found.every.unwrap().duration(), Duration::from_secs(hours * 3600), "{text}");
            let shown = serde_json::to_string(&found).unwrap();
            assert_eq!(scrub(&shown).unwrap(), found, "{shown}");
        }
        for text in ["", "7", "d", "59m", "0d", "-7d", "7 days", "99999999999999y"] {
            let refused = scrub(&format!(r#"{{"every": "{text}"}}"#)).unwrap_err().to_string();
            assert!(refused.contains("is no time between two scrubs"), "{text}: {refused}");
        }
    }

    #[test]
    fn a_misspelled_name_is_refused() {
        for text in [r#"{"store": "/s", "lisen": []}"#, r#"{"store": "/s", "limits": {"disk": 1}}"#] {
            assert!(serde_json::from_str::<Config>(text).is_err(), "{text}");
        }
    }
}
