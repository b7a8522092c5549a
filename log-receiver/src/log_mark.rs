//! What stands beside an open log: the mark of how far it is durable, and a loss that the mark told of.
//!
//! Invariants: once a loss was found, every mark that is written names it until a pass that compares everything has ended,
//! durably. As long as the mark does not say that such a pass has begun, each agent is told to compare everything.

use backtide_recovery::{Durable, LogError};
use backtide_segment::{Entry, Seq};
use backtide_units::Lsn;

use crate::{
    Shelf, StoreWatch,
    disk::Disk,
    watermark::{Lost, Noted, Watermark},
};

/// See the module's description.
pub(crate) struct LogMark {
    /// Where it is noted how far the log is durable, if that can be.
    pub(crate) watermark: Option<Watermark>,
    /// Sees whether the store is still there.
    pub(crate) watch: StoreWatch,
    /// Acknowledged bytes are missing at its end.
    pub(crate) loss: Option<Loss>,
}

/// The end of a log was lost after it had been acknowledged, or what it holds is in doubt: to be compared in both cases.
#[derive(Clone)]
pub(crate) struct Loss {
    /// A sentence.
    pub(crate) why: String,
    /// How far the log had been durable.
    pub(crate) lost: Durable,
    /// Its end is not lost. What of it is damaged is told as a finding.
    pub(crate) in_doubt: bool,
    /// Something else than an attach has followed: it either follows exactly, or is a pass with a hole of its own.
    pub(crate) followed: bool,
    /// The entry with which a pass has begun since.
    pub(crate) pass: Option<Seq>,
    /// The entry with which such a pass has ended in a point.
    pub(crate) ended: Option<Seq>,
}

/// What was appended to a log that has a loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Followed {
    Attach,
    PassBegin,
    /// Of one that ends in a point.
    PassEnd,
    Other,
}

impl Followed {
    pub(crate) fn of(entry: &Entry) -> Self {
        match entry {
            Entry::Attach { .. } => Self::Attach,
            Entry::PassBegin { .. } => Self::PassBegin,
            Entry::PassEnd { valid_from: Some(_), .. } => Self::PassEnd,
            Entry::Write { .. }
            | Entry::Zero { .. }
            | Entry::PassData { .. }
            | Entry::Flush { .. }
            | Entry::Unchanged { .. }
            | Entry::PassEnd { .. }
            | Entry::Mark { .. } => Self::Other,
        }
    }
}

impl Loss {
    /// What is lost of a log, or in doubt, and a sentence that says so.
    pub(crate) fn of(lost: Lost, why: String) -> Self {
        let Lost { through, is_compared, in_doubt } = lost;
        // It was durable: so is every entry that is there.
        let pass = is_compared.then_some(Seq(0));
        Self { why, lost: through, in_doubt, followed: pass.is_some(), pass, ended: None }
    }

    /// Takes note of an entry that was appended.
    pub(crate) fn follow(&mut self, entry: Seq, kind: Followed) {
        match kind {
            Followed::Attach => {}
            Followed::PassBegin => {
                self.followed = true;
                self.pass.get_or_insert(entry);
            }
            Followed::PassEnd => {
                self.followed = true;
                if self.pass.is_some() {
                    self.ended.get_or_insert(entry);
                }
            }
            Followed::Other => self.followed = true,
        }
    }

    /// Whether a pass that compares everything is known to later starts, when the log is durable up to there.
    pub(crate) fn is_compared(&self, durable: Seq) -> bool {
        self.pass.is_some_and(|pass| pass <= durable)
    }

    /// Whether everything was compared since, when the log is durable up to there: nothing is left to be told of.
    pub(crate) fn is_over(&self, durable: Seq) -> bool {
        self.ended.is_some_and(|ended| ended <= durable)
    }

    /// What to note of a log with this loss, or without one.
    pub(crate) fn noted(loss: Option<&Self>, durable: Durable) -> Noted {
        let lost = loss.filter(|loss| !loss.is_over(durable.seq)).map(|loss| Lost {
            through: loss.lost,
            is_compared: loss.is_compared(durable.seq),
            in_doubt: loss.in_doubt,
        });
        Noted { durable, lost }
    }
}

impl Shelf {
    /// Takes note of how much the disk's agent knows to have been durable: a log in doubt that has less has lost its end. That is
    /// durable before the agent is told how much there is, for later it knows of no more.
    ///
    /// # Errors
    /// When it cannot be noted: the log is in doubt as before.
    pub(crate) fn learn_acknowledged(&self, disk: &mut Disk, acknowledged: Lsn) -> Result<(), LogError> {
        let (id, dir) = (disk.id(), Self::dir(disk.id(), disk.log_number()));
        let Some((mark, durable)) = disk.doubt_short_of(acknowledged) else { return Ok(()) };
        let Some(mut loss) = mark.loss.clone() else { return Ok(()) };
        loss.in_doubt = false;
        loss.lost.lsn = loss.lost.lsn.max(acknowledged);
        let lost = Lost { through: loss.lost, is_compared: false, in_doubt: false };
        loss.why = self.lost_sentence(&dir, lost, loss.lost.seq);
        if let Some(watermark) = &mark.watermark {
            let written = watermark.write_durably(Loss::noted(Some(&loss), durable));
            written.map_err(|source| self.loss_not_noted(&dir, source))?;
        }
        tracing::error!(disk = %id, why = loss.why, "the disk's agent knows more to have been durable");
        mark.loss = Some(loss);
        Ok(())
    }
}
