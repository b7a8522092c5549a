//! The handshake's messages, and how a connection ends. Rare and evolvable, so they are JSON.

use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Epoch, HistoryId, LogPosition, Lsn, Reason};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The agent's first frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::PROTOCOL_VERSION`] of the agent.
    pub version: u32,
    /// Which disk.
    pub disk: DiskId,
    /// Its name today.
    pub name: DiskName,
    /// Its size in bytes.
    pub size: ByteCount,
    /// The attach this connection belongs to.
    pub epoch: Epoch,
    /// Random, made with the epoch: two hosts with copies of one agent's state come to the same epoch
    /// and to different ids, so that only one of them gets the disk.
    pub attach: Uuid,
    /// The history the agent continues; none when it never met this receiver.
    pub history: Option<HistoryId>,
    /// What the agent can still send.
    pub tracking: Tracking,
    /// The LSN the agent would give next: the receiver has never seen one at or above it, or the
    /// agent has been rolled back.
    pub next_lsn: Lsn,
    /// The highest LSN this receiver acknowledged to the agent as durable.
    pub acked_durable: Lsn,
    /// When the disk's guest is answered; whoever attaches the disk elsewhere is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ack: Option<AckPolicy>,
    /// What `ack` means while the receiver is away; none says nothing, or `continue` beside an `ack`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_outage: Option<OnOutage>,
    /// The point of another disk that this one began as, if it did and the agent knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<OriginPoint>,
}

/// When a guest's requests are acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AckPolicy {
    /// When the local disk has completed them.
    Local,
    /// Writes when the receiver has them in memory.
    Received,
    /// FLUSH and FUA when the receiver has made everything before them durable.
    Durable,
    /// Every write when the receiver has made it durable.
    DurableEveryWrite,
}

/// What happens to requests that wait for a receiver that is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnOutage {
    /// They are acknowledged when they are local.
    #[default]
    Continue,
    /// They wait until the receiver is back.
    Block,
}

impl OnOutage {
    /// What a log adds to the number of a policy.
    fn code(self) -> u8 {
        match self {
            Self::Continue => 0,
            Self::Block => 16,
        }
    }

    /// As `attach --on-outage` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Continue => "continue",
            Self::Block => "block",
        }
    }
}

impl AckPolicy {
    /// Its number in a log, with what it means in an outage; 0 is none.
    pub fn code(self, on_outage: OnOutage) -> u8 {
        let policy = match self {
            Self::Local => 1,
            Self::Received => 2,
            Self::Durable => 3,
            Self::DurableEveryWrite => 4,
        };
        policy + on_outage.code()
    }

    /// The one with this number; none for 0 and for one of a later version.
    pub fn of_code(code: u8) -> Option<(Self, OnOutage)> {
        let all = [Self::Local, Self::Received, Self::Durable, Self::DurableEveryWrite];
        let all = all
            .into_iter()
            .flat_map(|policy| [OnOutage::Continue, OnOutage::Block].map(|on_outage| (policy, on_outage)));
        all.into_iter().find(|(policy, on_outage)| policy.code(*on_outage) == code)
    }

    /// As `attach --ack` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Received => "received",
            Self::Durable => "durable",
            Self::DurableEveryWrite => "durable-every-write",
        }
    }
}

/// A point of another disk that a disk began as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OriginPoint {
    /// Where the receiver listens that has that disk's history.
    pub receiver: String,
    /// The other disk.
    pub disk: DiskId,
    /// Its name then.
    pub name: DiskName,
    /// The point.
    pub lsn: Lsn,
    /// When its last change was captured.
    pub time: CaptureTime,
}

/// What the agent knows of the differences between its disk and the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum Tracking {
    /// Nothing: the disk was never protected.
    New,
    /// Every record above `base` is retained and no block is dirty.
    Window {
        /// Everything at or below it has left the window.
        base: Lsn,
    },
    /// The dirty bitmap says what differs from the log up to `gap_from`.
    Bitmap {
        /// Changes above it are in the bitmap, not in records.
        gap_from: Lsn,
        /// Why there is a gap.
        reason: Reason,
    },
    /// The knowledge was lost; everything allocated has to be compared.
    Lost {
        /// How it was lost.
        reason: Reason,
    },
}

/// The receiver's answer to a [`Hello`] it accepts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// [`crate::PROTOCOL_VERSION`] of the receiver.
    pub version: u32,
    /// The history the receiver keeps of this disk from now on.
    pub history: HistoryId,
    /// Whether that history is new, continued or not the one the agent named.
    pub state: ReceiverState,
    /// Everything at or below it is in the log and durable.
    pub durable: Lsn,
    /// The highest LSN that occurs anywhere in the log: the agent goes on above it.
    pub highest: Lsn,
    /// How many entries of the log are durable, without that of this hello: never fewer than any acknowledgement said,
    /// or the store was put back from an older copy.
    #[serde(default)]
    pub position: LogPosition,
    /// Whether the log ends in an unfinished pass: only another pass can continue it.
    pub in_pass: bool,
    /// When the newest record in the log was captured, or its newest pass frozen, by the agent's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_time: Option<CaptureTime>,
    /// The attach that had the disk here before this hello, which may be the hello's own. None where there was none,
    /// and from a receiver that does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_attach: Option<Uuid>,
}

impl Welcome {
    /// Why it cannot be. Also for who takes a disk over: no other look is taken there at what is saved of it.
    pub(crate) fn plausible(&self) -> Result<(), String> {
        let (Self { durable, highest, .. }, max) = (self, Lsn::PLAUSIBLE_MAX);
        if *highest > max {
            return Err(format!("LSN {highest} is above the highest one believed, {max}"));
        }
        if durable > highest {
            return Err(format!("LSN {durable} is durable of a log up to LSN {highest}"));
        }
        Ok(())
    }
}

/// What the receiver had of the disk before this handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ReceiverState {
    /// Nothing.
    New,
    /// The history the agent named.
    Known,
    /// Another history than the agent named, or the agent named none.
    Foreign,
}

/// Why a side closes the connection; the other side shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// What to do about it.
    pub code: CloseCode,
    /// A sentence for people.
    pub message: String,
    /// Of a fenced agent: the epoch that has the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Epoch>,
}

impl Closed {
    /// An end for this reason.
    pub fn new(code: CloseCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), epoch: None }
    }
}

/// Kinds of ends, each with one right reaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CloseCode {
    /// Orderly end: detach, pause or shutdown. Connect again when there is something to send.
    Bye,
    /// A higher epoch owns the disk, or another attach with the same one. Never connect again with this one.
    Fenced,
    /// The peer speaks another version. Upgrade one side.
    Version,
    /// The peer sent something invalid. Connect again, and report it.
    Invalid,
    /// The receiver's store is full or failing. Track and retry later.
    Store,
    /// The disk is connected already, with the same epoch. Retry later.
    Busy,
    /// The disk's size or identity contradicts the receiver's.
    Refused,
    /// The peer may not speak here: it comes without TLS where that is asked for, or its certificate is
    /// not for this disk. Retry later, for a person has to change something.
    Denied,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hello_is_readable_json() {
        let hello = Hello {
            version: 1,
            disk: DiskId::random(),
            name: "vm1".parse().unwrap(),
            size: ByteCount(1 << 30),
            epoch: Epoch(3),
            attach: Uuid::from_u128(5),
            history: None,
            tracking: Tracking::Bitmap { gap_from: Lsn(17), reason: Reason::ReceiverAway },
            next_lsn: Lsn(40),
            acked_durable: Lsn(17),
            ack: Some(AckPolicy::DurableEveryWrite),
            on_outage: Some(OnOutage::Block),
            origin: None,
        };
        let codes: Vec<u8> = (0..=u8::MAX).filter(|code| AckPolicy::of_code(*code).is_some()).collect();
        assert_eq!(codes, [1, 2, 3, 4, 17, 18, 19, 20]);
        for code in codes {
            let (policy, on_outage) = AckPolicy::of_code(code).unwrap();
            assert_eq!(policy.code(on_outage), code);
            assert_eq!(serde_json::to_string(&policy).unwrap(), format!("{:?}", policy.name()));
            assert_eq!(serde_json::to_string(&on_outage).unwrap(), format!("{:?}", on_outage.name()));
        }
        let text = serde_json::to_string(&hello).unwrap();
        assert!(
            text.contains(r#""tracking":{"state":"bitmap","gap_from":17,"reason":"receiver-away"}"#),
            "{text}"
        );
        assert!(text.contains(r#""ack":"durable-every-write","on_outage":"block""#), "{text}");
        assert!(!text.contains("origin"), "{text}");
        assert_eq!(serde_json::from_str::<Hello>(&text).unwrap(), hello);
    }
}
