//! What an agent that ended has left in the spill: its valid beginning, as a ring.
//!
//! Frames count as long as each follows the one before: numbers without a gap, records whose
//! `previous` is where the log stands. The first that does not, torn or damaged, is the end: what comes
//! behind it is removed.

use backtide_protocol::{Decoder, Message, ProtocolError, Record};
use backtide_units::{BlockRange, ByteOffset, CaptureTime, Epoch, HistoryId};

use crate::{
    files::{SpillError, SpillFiles},
    header::{FileHeader, HEADER_BYTES},
    ring::{Ring, RingLimits},
};

/// Files are read in pieces of this size.
const PIECE_BYTES: usize = 1 << 20;

/// What there is of a spill.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// The frames that count; empty when there are none.
    pub ring: Ring,
    /// Whose they are; none when there are none.
    pub left: Option<Left>,
    /// Why something that was there does not count.
    pub cut: Option<String>,
}

/// Whose frames were left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// The history their records continue.
    pub history: HistoryId,
    /// The attach that wrote the last of them.
    pub epoch: Epoch,
    /// When the last record was captured.
    pub last_time: CaptureTime,
}

struct Walk<'a> {
    files: &'a SpillFiles,
    ring: Ring,
    left: Option<Left>,
}

impl SpillFiles {
    /// Reads what is there, all of it.
    ///
    /// # Errors
    /// When the directory cannot be listed; what is wrong with a file ends the spill before it.
    pub fn recover(&self, limits: RingLimits) -> Result<Recovered, SpillError> {
        let mut walk = Walk { files: self, ring: Ring::new(limits), left: None };
        let numbers = self.list()?;
        let mut cut = None;
        for (position, number) in numbers.iter().enumerate() {
            let Err(why) = walk.take_file(*number) else { continue };
            cut = Some(why);
            // The file that it happened in stays when it has frames that count.
            for number in &numbers[position..] {
                let bytes = self.storage.open(&self.path(*number)).and_then(|file| file.len());
                walk.ring.found_rest(*number, bytes.unwrap_or_default());
            }
            break;
        }
        let Walk { mut ring, left, .. } = walk;
        ring.close();
        let left = left.filter(|_| !ring.is_empty());
        Ok(Recovered { ring, left, cut })
    }
}

impl Walk<'_> {
    /// The frames of a file, as far as they count; an error ends the spill.
    fn take_file(&mut self, number: u64) -> Result<(), String> {
        let path = self.files.path(number);
        let named = |what: String| format!("{}: {what}", self.files.storage.display(&path).display());
        let file = self.files.storage.open(&path).map_err(|error| named(error.to_string()))?;
        let header = self.files.header(number, &*file).map_err(|error| error.to_string())?;
        self.check(number, &header).map_err(named)?;
        let length = file.len().map_err(|error| named(error.to_string()))?.0;
        let mut decoder = Decoder::starting_at(header.first);
        if self.ring.is_empty() {
            self.ring.begin_at(header.first);
        }
        self.ring.begin_file(number, ByteOffset(HEADER_BYTES as u64), header.base);
        let known = Left { history: header.history, epoch: header.epoch, last_time: CaptureTime::default() };
        let left = self.left.get_or_insert(known);
        left.epoch = header.epoch;
        let mut at = HEADER_BYTES as u64;
        while at < length {
            let mut piece = vec![0; PIECE_BYTES.min(usize::try_from(length - at).unwrap_or(PIECE_BYTES))];
            let found = file.read_at(ByteOffset(at), &mut piece).map_err(|error| named(error.to_string()))?;
            decoder.buffer().extend_from_slice(&piece[..found]);
            while let Some(next) = decoder.next_message().map_err(|error| named(error.to_string()))? {
                self.take(&next.message).map_err(|error| named(error.to_string()))?;
            }
            if found == 0 {
                break;
            }
            at += found as u64;
        }
        match decoder.unfinished() {
            0 => Ok(()),
            torn => Err(named(format!("the last {torn} bytes are no whole frame"))),
        }
    }

    fn check(&self, number: u64, header: &FileHeader) -> Result<(), String> {
        if header.disk != self.files.disk || header.number != number {
            return Err(format!("file {} of disk {}", header.number, header.disk));
        }
        let Some(left) = self.left else { return Ok(()) };
        let follows = header.history == left.history && header.epoch >= left.epoch;
        if follows && header.first == self.ring.next() && header.base == self.ring.end() {
            return Ok(());
        }
        Err(format!(
            "it begins with frame {} at LSN {}, expected frame {} at LSN {}",
            header.first,
            header.base,
            self.ring.next(),
            self.ring.end()
        ))
    }

    fn take(&mut self, message: &Message) -> Result<(), ProtocolError> {
        let (stands, end) = (self.ring.end(), self.ring.limits().end);
        let wrong = |why: String| Err(ProtocolError::Invalid { what: "spilled", why });
        match message {
            Message::Record(record) if record.previous != stands || record.lsn <= stands => {
                wrong(format!("record {} after {}, the log stands at {stands}", record.lsn, record.previous))
            }
            // The blocks that it touches are collected one by one.
            Message::Record(record) if BlockRange::touched_by(record.range).indices().end > end.0 => {
                wrong(format!("record {} at {}, the disk ends at block {end}", record.lsn, record.range))
            }
            Message::Flush { lsn, .. } | Message::Unchanged { lsn, .. } | Message::Mark { lsn, .. }
                if *lsn > stands =>
            {
                wrong(format!("a {} at LSN {lsn}, the log stands at {stands}", message.name()))
            }
            Message::Record(Record { time, .. })
            | Message::Flush { time, .. }
            | Message::Unchanged { time, .. }
            | Message::Mark { time, .. } => {
                self.ring.append(message);
                if let Some(left) = &mut self.left {
                    left.last_time = left.last_time.max(*time);
                }
                Ok(())
            }
            Message::Ping(_) => {
                self.ring.append(message);
                Ok(())
            }
            Message::Hello(_)
            | Message::Welcome(_)
            | Message::PassBegin { .. }
            | Message::PassData { .. }
            | Message::PassEnd { .. }
            | Message::Compare(_)
            | Message::CompareResult(_)
            | Message::Ack { .. }
            | Message::Reading(_)
            | Message::Hasten { .. }
            | Message::Close(_) => wrong(format!("a {}", message.name())),
        }
    }
}
