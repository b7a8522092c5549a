//! Why a disk's stream was interrupted or a resync began: shown in status, points and logs, and
//! kept in the log beside the hole it made.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why changes of a disk did not reach the receiver as records, or why a resync pass runs.
///
/// The codes are part of the stream and of the log's files: never reuse one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The disk is protected for the first time.
    FirstAttach,
    /// The retained window overflowed while the receiver was away.
    ReceiverAway,
    /// The retained window overflowed although the receiver was there: it or the link is too slow.
    LinkTooSlow,
    /// The stream broke during a resync pass; what was not durable has to be sent again.
    ResyncInterrupted,
    /// The agent crashed: what it retained and tracked is lost, so everything is compared.
    AgentCrashed,
    /// The saved dirty bitmap was damaged or did not belong to this history.
    BitmapUntrusted,
    /// The receiver has less than it once acknowledged as durable.
    ReceiverRolledBack,
    /// The receiver keeps a history of this disk that this agent does not know.
    ForeignHistory,
    /// A person paused the disk.
    Paused,
    /// A person asked for a resync.
    Forced,
    /// The disk was detached while it had changes the receiver lacked.
    Detached,
    /// A local write failed: nobody knows what is on the disk there.
    LocalWriteFailed,
    /// The local disk was resized.
    Resized,
    /// A verify found differences and was asked to repair them.
    VerifyRepair,
    /// The receiver's store is damaged: what was there cannot be read any more.
    Damaged,
    /// Some block of the local disk cannot be read: what it holds is not at the receiver.
    LocalReadFailed,
    /// The agent's state is older than what the receiver has from it: a copy of before was put back.
    AgentRolledBack,
    /// Retention has thinned the history: single points are left of it.
    Thinned,
    /// The retained window and its spill were full before the receiver had everything.
    SpillFull,
    /// The spill could not be written or read back, and memory alone was not enough.
    SpillFailed,
    /// The disk was set back to an earlier point.
    Rewind,
    /// Somebody wrote the local disk past the agent: what was written so, and when, nobody knows.
    WrittenPastAgent,
    /// The retained window overflowed while the receiver was there and took nothing.
    ReceiverRefuses,
}

/// Every reason with its code and the sentence people read.
const TABLE: [(Reason, u8, &str); 23] = [
    (Reason::FirstAttach, 1, "first protection of the disk"),
    (Reason::ReceiverAway, 2, "the receiver was away longer than the retained window lasts"),
    (Reason::LinkTooSlow, 3, "the receiver or the link to it was slower than the guest's writes"),
    (Reason::ResyncInterrupted, 4, "the stream broke during a resync"),
    (Reason::AgentCrashed, 5, "the agent ended without a clean detach"),
    (Reason::BitmapUntrusted, 6, "the saved bitmap could not be trusted"),
    (Reason::ReceiverRolledBack, 7, "the receiver has less than it once acknowledged as durable"),
    (Reason::ForeignHistory, 8, "the receiver keeps another history of this disk"),
    (Reason::Paused, 9, "paused by an operator"),
    (Reason::Forced, 10, "resync asked for by an operator"),
    (Reason::Detached, 11, "detached by an operator"),
    (Reason::LocalWriteFailed, 12, "a write to the local disk failed"),
    (Reason::Resized, 13, "the local disk was resized"),
    (Reason::VerifyRepair, 14, "verify found differences and repaired them"),
    (Reason::Damaged, 15, "the receiver's store is damaged"),
    (Reason::LocalReadFailed, 16, "a block of the local disk cannot be read"),
    (Reason::AgentRolledBack, 17, "the agent's state is older than what the receiver has from it"),
    (Reason::Thinned, 18, "retention keeps single points of this time"),
    (Reason::SpillFull, 19, "the outage was longer than the retained window and its spill last"),
    (Reason::SpillFailed, 20, "the spill could not be written or read, and the retained window was full"),
    (Reason::Rewind, 21, "the disk was set back to an earlier point"),
    (Reason::WrittenPastAgent, 22, "written past the agent"),
    (Reason::ReceiverRefuses, 23, "the receiver refused the disk for longer than the retained window lasts"),
];

impl Reason {
    /// All reasons, in the order of their codes.
    pub fn all() -> impl Iterator<Item = Self> {
        TABLE.iter().map(|(reason, _, _)| *reason)
    }

    /// The code in frames and files.
    pub fn code(self) -> u8 {
        self.row().1
    }

    /// The reason of a code, if there is one.
    pub fn from_code(code: u8) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == code).map(|row| row.0)
    }

    fn row(self) -> &'static (Self, u8, &'static str) {
        TABLE.iter().find(|row| row.0 == self).expect("every reason is in the table")
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_come_back() {
        for reason in Reason::all() {
            assert_eq!(Reason::from_code(reason.code()), Some(reason));
        }
        assert_eq!(Reason::from_code(0), None);
    }
}
