//! One disk of the store: its log, who is connected to it, and what is wrong with it if anything.
//!
//! Owned by one thread (a worker of the daemon, or a simulation). A failed log is kept out of use until the next
//! handshake opens it again, which recovers it. What is durable in it can be read all the time.

mod appending;
mod out_of_use;

pub(crate) use out_of_use::{DamagedLog, WantedLook};

use std::collections::VecDeque;

use backtide_recovery::{
    Attached, Base, DiskLog, Durable, LastWork, LogError, RebaseTicket, Rebased, SettleTicket, Snapshot,
    Timeline,
};
use backtide_segment::Seq;
use backtide_storage::KillPoint;
use backtide_units::{ByteCount, DiskId, HistoryId, Lsn};

use crate::{
    clock::Came,
    commit_ticket::{CommitOutcome, CommitTicket, next_life},
    log_mark::{LogMark, Loss},
    past::{EndedLog, Past},
    reopening::Reopened,
    session::ConnectionId,
    shortfalls::Shortfalls,
};

/// One disk of the store.
pub struct Disk {
    id: DiskId,
    log: Log,
    /// Which of the disk's logs is in use: all before it were damaged.
    number: u32,
    past: Past,
    /// What its agents found missing.
    shortfalls: Shortfalls,
    /// Which opening of a log this is: a sync that began before the log failed and was opened again, or before the
    /// disk was forgotten and began anew, says nothing about the log of today, whose entries may have the same numbers.
    life: u64,
    owner: Option<(ConnectionId, Came)>,
    /// What was appended since the last ticket and is worth a sync of its own, see [`Disk::gathered_bytes`].
    gathered: u64,
    /// Bytes appended and not yet known durable, by the entry that brought them there.
    waiting: VecDeque<(Seq, ByteCount)>,
    waiting_bytes: u64,
    /// The end of a pass that is not known to be durable.
    pass_end: Option<Seq>,
}

/// ```text
/// Open ──write or sync failed──▶ Failed ──next handshake: reopened, recovered──▶ Open
///                                   └─damaged: a new log begins──▶ Open
/// ```
enum Log {
    /// In use.
    Open(Box<DiskLog>, LogMark),
    /// Out of use: opening, writing or syncing it failed.
    Failed(Box<Failed>),
}

#[derive(Default)]
struct Failed {
    failure: Failure,
    /// How far it was durable when it failed; none when it was never open, and all of it counts.
    through: Option<Seq>,
    /// The newest attach it had taken when it failed: it fences, whether or not the log can be read again.
    attached: Option<Attached>,
    /// Nobody knows which logs the disk has: their directory cannot be listed.
    unlisted: bool,
    /// Bytes of its files when it failed, or that can still be read.
    bytes: ByteCount,
    /// What can still be read, once somebody has asked.
    left: Option<Left>,
    /// What another thread was doing to its files.
    work: Option<LastWork>,
    /// Another thread opens it again.
    reopening: bool,
    /// What that came to, for the next claim.
    reopened: Option<Reopened>,
}

/// What is left of a failed log.
struct Left {
    snapshot: Snapshot,
    damage: Vec<String>,
    attached: Option<Attached>,
    /// The device could not read all of it.
    unread: bool,
}

/// A failed log of which more may be read.
pub(crate) struct Wanted {
    /// How much of it counts.
    pub(crate) through: Option<Seq>,
}

/// A log that is to begin later.
pub(crate) struct Rebasing {
    pub(crate) life: u64,
    /// Which of the disk's logs.
    pub(crate) number: u32,
    pub(crate) ticket: RebaseTicket,
}

/// Why a disk's log is out of use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Failure {
    /// A sentence.
    pub why: String,
    /// Whether acknowledged bytes are not there any more, so that opening it again cannot help.
    pub damaged: bool,
}

impl From<&LogError> for Failure {
    fn from(error: &LogError) -> Self {
        Self { why: chain(error), damaged: matches!(error, LogError::Damaged { .. }) }
    }
}

/// An entry the log did not take.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The sender broke the order of the stream.
    #[error("{0}")]
    Invalid(String),
    /// The store is full or failing.
    #[error("{0}")]
    Store(String),
}

impl Disk {
    /// A disk with its opened log, or with the reason why it could not be opened.
    pub(crate) fn new(
        id: DiskId,
        number: u32,
        log: Result<(DiskLog, LogMark), Failure>,
        past: Past,
        shortfalls: Shortfalls,
    ) -> Self {
        let log = match log {
            Ok((log, mark)) => Log::Open(Box::new(log), mark),
            Err(failure) => Log::Failed(Box::new(Failed { failure, ..Failed::default() })),
        };
        let waiting = VecDeque::new();
        let life = next_life();
        let (gathered, waiting_bytes, pass_end) = (0, 0, None);
        Self {
            id,
            log,
            number,
            past,
            shortfalls,
            life,
            owner: None,
            gathered,
            waiting,
            waiting_bytes,
            pass_end,
        }
    }

    /// Which disk.
    pub fn id(&self) -> DiskId {
        self.id
    }

    /// Why the log is out of use, if it is.
    pub fn failure(&self) -> Option<&Failure> {
        match &self.log {
            Log::Open(..) => None,
            Log::Failed(failed) => Some(&failed.failure),
        }
    }

    /// Everything that is damaged, in the log in use and in those before it: a sentence each, with
    /// file and place. A lost end is, until a pass that has compared everything has ended durably. What a log in use has
    /// damaged elsewhere is among what was found of the disk (`findings.rs`).
    pub fn damage(&self) -> impl Iterator<Item = &String> {
        let present = match &self.log {
            Log::Open(..) => None,
            Log::Failed(failed) => failed.left.as_ref(),
        };
        let present = present.into_iter().flat_map(|left| &left.damage);
        let lost = self.loss().filter(|loss| !loss.in_doubt);
        self.past.damage().chain(present).chain(lost.map(|loss| &loss.why))
    }

    /// The mark of a log that is in doubt, and how far it is durable, when its agent knows more to have been durable than it has.
    pub(crate) fn doubt_short_of(&mut self, acknowledged: Lsn) -> Option<(&mut LogMark, Durable)> {
        let in_doubt = self.loss().is_some_and(|loss| loss.in_doubt);
        let Log::Open(log, mark) = &mut self.log else { return None };
        (in_doubt && acknowledged > log.timeline().covered()).then(|| (mark, log.durable()))
    }

    /// The lost end of the open log, or that it is in doubt, until a pass that has compared everything has ended durably.
    pub(crate) fn loss(&self) -> Option<&Loss> {
        let Log::Open(log, LogMark { loss: Some(loss), .. }) = &self.log else { return None };
        (!loss.is_over(log.durable().seq)).then_some(loss)
    }

    /// Why acknowledged bytes are missing at the end of the open log, as long as only attaches have
    /// followed: anything else either follows exactly, or is a pass with a hole of its own.
    pub fn lost_end(&self) -> Option<&str> {
        let Log::Open(_, LogMark { loss: Some(loss), .. }) = &self.log else { return None };
        (!loss.followed && !loss.in_doubt).then_some(loss.why.as_str())
    }

    /// Why nothing that the agent believes of this log may be relied on: acknowledged bytes are missing at
    /// its end, or what it holds is in doubt, and no pass that compares everything is durable since.
    pub(crate) fn uncompared_loss(&self) -> Option<&str> {
        let Log::Open(log, LogMark { loss: Some(loss), .. }) = &self.log else { return None };
        (!loss.is_compared(log.durable().seq)).then_some(loss.why.as_str())
    }

    /// The newest attach that any log of this disk is known to have, also one that is out of use.
    pub fn attached(&self) -> Option<&Attached> {
        let (taken, left) = match &self.log {
            Log::Open(log, _) => (log.timeline().attached(), None),
            Log::Failed(failed) => {
                (failed.attached.as_ref(), failed.left.as_ref().and_then(|left| left.attached.as_ref()))
            }
        };
        let known = [taken, left, self.past.attached.as_ref()].into_iter().flatten();
        // Of equal epochs the first: a log in use knows what its agent said last.
        known.reduce(|a, b| if b.epoch > a.epoch { b } else { a })
    }

    /// The highest LSN that any log of this disk names.
    pub fn highest_lsn(&self) -> Lsn {
        let present = self.timeline().map_or(Lsn::ZERO, Timeline::highest_lsn);
        let lost = match &self.log {
            Log::Open(_, LogMark { loss: Some(loss), .. }) => loss.lost.lsn,
            Log::Open(..) | Log::Failed(_) => Lsn::ZERO,
        };
        present.max(lost).max(self.past.highest())
    }

    /// What the log gives back; `None` while it is out of use.
    pub fn timeline(&self) -> Option<&Timeline> {
        self.log().map(DiskLog::timeline)
    }

    /// The history this receiver keeps of the disk; `None` while the log is out of use.
    pub fn history(&self) -> Option<HistoryId> {
        self.log().map(|log| log.identity().history)
    }

    /// Bytes of the files of its logs; of one that is damaged those that can be read.
    pub fn log_bytes(&self) -> ByteCount {
        let newest = match &self.log {
            Log::Open(log, _) => log.size(),
            Log::Failed(failed) => failed.bytes,
        };
        ByteCount(newest.0 + self.past.bytes().0)
    }

    /// How many files the log has.
    pub fn segments(&self) -> u64 {
        self.log().map_or(0, |log| log.segment_count() as u64)
    }

    /// The disk's size as the newest attach gave it.
    pub fn size(&self) -> ByteCount {
        self.attached().map_or(ByteCount::ZERO, |attached| attached.size)
    }

    /// The connection that may append.
    pub fn owner(&self) -> Option<ConnectionId> {
        self.owner.map(|(connection, _)| connection)
    }

    /// What has shown of its agent's clock; none when nothing may.
    pub(crate) fn came(&self) -> Option<Came> {
        self.owner.map(|(_, came)| came)
    }

    /// To note what shows of it.
    pub(crate) fn came_mut(&mut self) -> Option<&mut Came> {
        self.owner.as_mut().map(|(_, came)| came)
    }

    /// How far the log is durable.
    pub fn durable(&self) -> Durable {
        self.log().map_or(Durable::default(), DiskLog::durable)
    }

    /// The newest entry appended.
    pub fn appended(&self) -> Seq {
        self.log().map_or(Seq(0), DiskLog::appended)
    }

    /// Bytes appended and not yet durable, entry headers included: the driver bounds them by not reading on.
    pub fn undurable_bytes(&self) -> ByteCount {
        ByteCount(self.waiting_bytes)
    }

    /// What was appended since the last ticket, as it counts for beginning a sync: nobody waits for one block of
    /// a pass, and each sync is felt by the guests that share the device.
    pub fn gathered_bytes(&self) -> ByteCount {
        ByteCount(self.gathered)
    }

    /// Whether a [`ticket`](Self::ticket) would have something to do.
    pub fn wants_sync(&self) -> bool {
        self.log().is_some_and(DiskLog::wants_sync)
    }

    /// What to sync for everything appended so far to be durable; `None` when nothing is left to
    /// do, or when the log just failed (see [`Disk::failure`]). Run [`CommitTicket::sync`] where
    /// blocking is fine, then hand its outcome to [`Disk::synced`].
    pub fn ticket(&mut self) -> Option<CommitTicket> {
        let Log::Open(log, mark) = &mut self.log else { return None };
        self.gathered = 0;
        match log.ticket() {
            Ok(ticket) => ticket.map(|ticket| CommitTicket {
                life: self.life,
                ticket,
                watermark: mark.watermark.clone(),
                loss: mark.loss.clone(),
                shortfalls: self.shortfalls.clone(),
                watch: mark.watch.clone(),
            }),
            Err(error) => {
                self.fail(Failure::from(&error));
                None
            }
        }
    }

    /// Takes the outcome of a ticket's sync. A failed one takes the log out of use: after it nobody
    /// knows what is on the disk, and a second sync may lie.
    pub fn synced(&mut self, outcome: CommitOutcome) {
        let Log::Open(log, _) = &mut self.log else { return };
        if outcome.life != self.life {
            return;
        }
        if let Some(why) = outcome.gone {
            return self.fail(Failure { why, damaged: false });
        }
        match log.synced(outcome.outcome) {
            Ok(durable) => {
                while let Some(&(seq, bytes)) = self.waiting.front()
                    && seq <= durable.seq
                {
                    self.waiting.pop_front();
                    self.waiting_bytes -= bytes.0;
                }
                if self.pass_end.take_if(|end| *end <= durable.seq).is_some() {
                    KillPoint::PassEndDurable.reached();
                }
            }
            Err(error) => self.fail(Failure::from(&error)),
        }
    }

    /// The log as it is now, for readers on other threads.
    ///
    /// # Errors
    /// Why it cannot be read.
    pub fn snapshot(&mut self) -> Result<Snapshot, Failure> {
        let taken = match &mut self.log {
            Log::Open(log, _) => log.snapshot().map_err(|error| Failure::from(&error)),
            Log::Failed(failed) => match (&failed.left, &self.past.snapshot) {
                (Some(left), _) => Ok(left.snapshot.clone()),
                (None, Some(past)) => return Ok(past.clone()),
                (None, None) => return Err(failed.failure.clone()),
            },
        };
        match taken {
            Ok(snapshot) => Ok(self.past.followed_by(snapshot)),
            Err(failure) => {
                self.fail(failure.clone());
                Err(failure)
            }
        }
    }

    /// Lets the log begin later, once the ticket is written; none when it is out of use or has changed.
    pub(crate) fn rebase(&self, base: Base) -> Option<Rebasing> {
        Some(Rebasing { life: self.life, number: self.number, ticket: self.log()?.rebase(base)? })
    }

    /// See [`DiskLog::settle`]; none when that log is not in use.
    pub(crate) fn settle(&self, number: u32) -> Option<SettleTicket> {
        self.log().filter(|_| self.number == number)?.settle()
    }

    /// Takes note that it begins later. A log that was opened again since knows it from the file.
    pub(crate) fn rebased(&mut self, life: u64, rebased: Rebased) {
        if let (Log::Open(log, _), true) = (&mut self.log, self.life == life) {
            log.rebased(rebased);
        }
    }

    /// Which opening of a log this is: what is known of an earlier life says nothing about this one.
    pub(crate) fn life(&self) -> u64 {
        self.life
    }

    /// Which of the disk's logs is in use.
    pub(crate) fn log_number(&self) -> u32 {
        self.number
    }

    /// What is left of the logs before it.
    pub(crate) fn past(&self) -> &Past {
        &self.past
    }

    /// What its agents found missing in the store.
    pub(crate) fn shortfalls(&self) -> &Shortfalls {
        &self.shortfalls
    }

    /// Takes what is left of one of them now.
    pub(crate) fn put_ended(&mut self, ended: EndedLog) {
        self.past.put(ended);
    }

    pub(crate) fn set_owner(&mut self, connection: ConnectionId, came: Came) -> Option<ConnectionId> {
        self.owner.replace((connection, came)).map(|(before, _)| before)
    }

    /// Gives the disk up, if `connection` still has it.
    pub(crate) fn release(&mut self, connection: ConnectionId) {
        if self.owner() == Some(connection) {
            self.owner = None;
        }
    }

    pub(crate) fn fail(&mut self, failure: Failure) {
        tracing::error!(disk = %self.id, why = failure.why, "the disk's log failed and is out of use until it is opened again");
        let failed = Box::new(Failed { failure, ..Failed::default() });
        match (std::mem::replace(&mut self.log, Log::Failed(failed)), &mut self.log) {
            (Log::Open(log, _), Log::Failed(failed)) => {
                failed.through = Some(log.durable().seq);
                failed.bytes = log.size();
                failed.attached = log.timeline().attached().cloned();
                // A device that hangs under another thread holds up nobody here.
                failed.work = Some(log.abandon());
            }
            (Log::Failed(before), Log::Failed(failed)) => {
                let failure = failed.failure.clone();
                **failed = Failed { failure, ..*before };
            }
            (_, Log::Open(..)) => unreachable!("it was just replaced"),
        }
        self.waiting.clear();
        self.waiting_bytes = 0;
        self.pass_end = None;
    }

    fn log(&self) -> Option<&DiskLog> {
        match &self.log {
            Log::Open(log, _) => Some(log),
            Log::Failed(_) => None,
        }
    }
}

/// An error and its causes in one line, for sentences that cross the wire.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
