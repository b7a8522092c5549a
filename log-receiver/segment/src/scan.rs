//! Recovery of one segment that is not sealed: entry by entry up to where the log ends.
//!
//! Every payload is read and checked. Where an entry does not stand, the rest of the file is searched
//! for entries that claim to have been written after it was durable; [`crate::verdict`] decides.

use backtide_units::{ByteCount, ByteOffset};

use crate::{
    Contents, ENTRY_HEADER_LENGTH, EntryHeader, HeaderState, PayloadState, Position, SEGMENT_HEADER_LENGTH,
    SegmentError, SegmentFile, SegmentHeader, Seq, Verdict,
    entry_header::{ALIGNMENT, HeaderFault},
    pieces::{is_sound, table_length},
    read::{PAGE, Window},
    scan_batch::{ScannedBatch, scan_batch},
    verdict,
};

/// What a scan found.
#[derive(Debug)]
pub struct Scanned {
    /// Index, steps and statistics of the good entries.
    pub contents: Contents,
    /// Where the next entry goes.
    pub end: ByteOffset,
    /// From the end of the good entries to the last byte that is not zero.
    pub trailing: ByteCount,
    /// Every entry up to this one was durable at some time, as this file or the caller knows.
    pub synced: Seq,
    /// Entries whose payload is damaged.
    pub damaged: Vec<(Seq, Position)>,
}

struct Scan<'a> {
    file: &'a SegmentFile,
    header: SegmentHeader,
    salt: u32,
    window: Window<'a>,
    length: u64,
    at: u64,
    scanned: Scanned,
    searched: bool,
    noted: Seq,
    /// The batch that the next entry is in, when it is not the first of one.
    batch: Option<ScannedBatch>,
}

/// Scans a segment. `synced` is what later segments claim to have been durable. `noted` is what somebody noted
/// beside the log: entries up to there were whole, so a payload that is not is damage and no torn write. It refuses
/// nothing: an entry that is gone at the end is missed by whoever noted it.
///
/// # Errors
/// [`SegmentError::Damaged`] when an acknowledged entry is missing; the file's.
pub fn scan(
    file: &SegmentFile,
    header: SegmentHeader,
    synced: Seq,
    noted: Seq,
) -> Result<Scanned, SegmentError> {
    let mut scan = Scan::new(file, header, synced, noted)?;
    while scan.step()? {}
    scan.scanned.trailing = scan.trailing()?;
    Ok(scan.finish())
}

/// Scans up to entry `through` or to where entries stop following each other, whatever stands behind:
/// what can still be read of a damaged segment. Gives the damage too, where that is what ended it. `noted` as for [`scan`].
///
/// # Errors
/// The file's.
pub fn scan_prefix(
    file: &SegmentFile,
    header: SegmentHeader,
    through: Seq,
    noted: Seq,
) -> Result<(Scanned, Option<SegmentError>), SegmentError> {
    let mut scan = Scan::new(file, header, Seq(0), noted)?;
    while scan.scanned.contents.stats.next_seq <= through {
        match scan.step() {
            Ok(true) => {}
            Ok(false) => break,
            Err(damage @ SegmentError::Damaged { .. }) => return Ok((scan.finish(), Some(damage))),
            Err(
                error @ (SegmentError::UnknownVersion { .. }
                | SegmentError::Full { .. }
                | SegmentError::Io { .. }
                | SegmentError::Poisoned),
            ) => return Err(error),
        }
    }
    Ok((scan.finish(), None))
}

/// Searches a whole file for entries of `header`'s segment, whatever stands between them, and gives
/// the highest number that one claims to have been durable. `header` names the log and the segment: the
/// file's own may be lost.
///
/// # Errors
/// The file's.
pub fn claims(
    file: &SegmentFile,
    header: &SegmentHeader,
    from: ByteOffset,
) -> Result<Option<Seq>, SegmentError> {
    let mut window = Window::new(file);
    let length = file.length()?;
    let mut highest = None;
    let mut at = from.0.next_multiple_of(ALIGNMENT);
    while at + ENTRY_HEADER_LENGTH as u64 <= length {
        let bytes = match window.at(at, ENTRY_HEADER_LENGTH) {
            Ok(bytes) => bytes,
            // What cannot be read says nothing; what stands behind it may.
            Err(SegmentError::Damaged { .. }) => {
                at = (at + 1).next_multiple_of(PAGE);
                continue;
            }
            Err(
                error @ (SegmentError::UnknownVersion { .. }
                | SegmentError::Full { .. }
                | SegmentError::Io { .. }
                | SegmentError::Poisoned),
            ) => return Err(error),
        };
        if let Ok(bytes) = <&[u8; ENTRY_HEADER_LENGTH]>::try_from(bytes)
            && EntryHeader::looks_right(bytes, header.id)
            && let Ok(entry) = EntryHeader::decode(bytes, header.salt(), header.id)
        {
            highest = highest.max(entry.synced);
        }
        at += ALIGNMENT;
    }
    Ok(highest)
}

impl<'a> Scan<'a> {
    fn new(
        file: &'a SegmentFile,
        header: SegmentHeader,
        synced: Seq,
        noted: Seq,
    ) -> Result<Self, SegmentError> {
        Ok(Self {
            file,
            header,
            salt: header.salt(),
            window: Window::new(file),
            length: file.length()?,
            at: SEGMENT_HEADER_LENGTH as u64,
            scanned: Scanned {
                contents: Contents::new(header.first_seq, header.synced),
                end: ByteOffset(SEGMENT_HEADER_LENGTH as u64),
                trailing: ByteCount::ZERO,
                synced: synced.max(header.synced),
                damaged: Vec::new(),
            },
            searched: false,
            noted,
            batch: None,
        })
    }

    fn finish(mut self) -> Scanned {
        self.scanned.end = ByteOffset(self.at);
        self.scanned
    }

    /// Takes the next entry; false where the log ends.
    fn step(&mut self) -> Result<bool, SegmentError> {
        let next_seq = self.scanned.contents.stats.next_seq;
        let (header, fault) = self.header_here(next_seq)?;
        let state = match (&header, &fault) {
            (Some(_), _) => HeaderState::Good,
            (None, Some(HeaderFault::Wrong(_))) => HeaderState::Bad,
            (None, Some(HeaderFault::Zero) | None) => HeaderState::None,
        };
        let mut unreadable = None;
        let (payload, control) = match &header {
            Some(header) => match self.payload_state(header) {
                // The next entry can still be found, as behind other bytes than were written.
                Err(damage @ SegmentError::Damaged { .. }) if header.kind.is_data() => {
                    unreadable = Some(damage);
                    (PayloadState::Wrong, None)
                }
                read => read?,
            },
            None => (PayloadState::Lost, None),
        };
        let whole = state == HeaderState::Good && payload == PayloadState::Good;
        if !whole {
            self.search()?;
        }
        // A batch is written at once: with its first entry all of it is taken.
        let taken = self.batch.as_ref().is_some_and(|batch| batch.first < next_seq);
        let noted = payload == PayloadState::Wrong && next_seq <= self.noted;
        let acknowledged = taken || noted || next_seq <= self.scanned.synced;
        match (verdict(state, payload, acknowledged), header) {
            (Verdict::Accept | Verdict::AcceptDamaged, Some(header)) => {
                let position = self.position()?;
                if !whole {
                    self.scanned.damaged.push((header.seq, position));
                }
                self.scanned.synced = self.scanned.synced.max(header.synced.unwrap_or_default());
                self.scanned.contents.add(&header, position, control);
                self.at += header.stored_length();
                if header.body_ahead() == Some(1) {
                    self.at = self.batch.take().map_or(self.at, |batch| batch.end);
                }
                Ok(true)
            }
            // A torn write can be read: this is damage, acknowledged or not.
            (Verdict::End, _) => unreadable.map_or(Ok(false), Err),
            (Verdict::Damage | Verdict::Accept | Verdict::AcceptDamaged, _) => {
                let found = match (state, fault) {
                    (_, Some(fault)) => fault.describe(),
                    (HeaderState::Good, None) => "its payload is lost".to_owned(),
                    (HeaderState::None | HeaderState::Bad, None) => "the file ends".to_owned(),
                };
                Err(self.file.damaged(
                    self.at,
                    format!(
                        "entry {next_seq} was durable (up to {} were) and is gone: {found}",
                        self.scanned.synced
                    ),
                ))
            }
        }
    }

    fn header_here(
        &mut self,
        next_seq: Seq,
    ) -> Result<(Option<EntryHeader>, Option<HeaderFault>), SegmentError> {
        let bytes = self.window.at(self.at, ENTRY_HEADER_LENGTH)?;
        let Ok(bytes) = <&[u8; ENTRY_HEADER_LENGTH]>::try_from(bytes) else {
            return Ok((None, None));
        };
        Ok(match EntryHeader::decode(bytes, self.salt, self.header.id) {
            Ok(header) if header.seq == next_seq => (Some(header), None),
            Ok(_) => (None, Some(HeaderFault::Wrong("it is not the next entry"))),
            Err(fault) => (None, Some(fault)),
        })
    }

    /// Also gives a control entry, which cannot be taken without its text.
    fn payload_state(
        &mut self,
        header: &EntryHeader,
    ) -> Result<(PayloadState, Option<crate::Entry>), SegmentError> {
        if header.body_ahead().is_some() {
            return Ok((self.batched_state(header)?, None));
        }
        if self.at + header.stored_length() > self.length
            || self.at + header.stored_length() > u64::from(u32::MAX)
        {
            return Ok((PayloadState::Lost, None));
        }
        let length = header.stored_length() as usize - ENTRY_HEADER_LENGTH;
        let table = table_length(ByteCount(header.payload_length.into())) as usize;
        let (table, payload) = self.window.at(self.at + ENTRY_HEADER_LENGTH as u64, length)?.split_at(table);
        let payload = &payload[..header.payload_length as usize];
        let good = is_sound(header, table, payload);
        if header.kind.is_data() {
            return Ok((if good { PayloadState::Good } else { PayloadState::Wrong }, None));
        }
        let control = header.entry(bytes::Bytes::copy_from_slice(payload)).ok().filter(|_| good);
        Ok(match control {
            Some(control) => (PayloadState::Good, Some(control)),
            None => (PayloadState::Lost, None),
        })
    }

    /// The state of the payload of an entry in a batch. Looks at the whole batch where its first entry stands, for either
    /// all of it is taken or nothing.
    fn batched_state(&mut self, header: &EntryHeader) -> Result<PayloadState, SegmentError> {
        if self.batch.is_none() {
            let found = scan_batch(&mut self.window, (self.at, self.length), header, &self.header)?;
            let Some(mut batch) = found else { return Ok(PayloadState::Lost) };
            if !batch.is_whole() {
                self.search()?;
                let acknowledged = header.seq <= self.scanned.synced.max(self.noted);
                if !acknowledged {
                    return batch.unreadable.take().map_or(Ok(PayloadState::Wrong), Err);
                }
            }
            self.batch = Some(batch);
        }
        let batch = self.batch.as_ref().expect("it was just scanned");
        Ok(batch.state(header.seq))
    }

    /// Looks for claims in the rest of the file, once: they hold wherever they stand.
    fn search(&mut self) -> Result<(), SegmentError> {
        if !self.searched {
            self.searched = true;
            let claimed = claims(self.file, &self.header, ByteOffset(self.at))?;
            self.scanned.synced = self.scanned.synced.max(claimed.unwrap_or_default());
        }
        Ok(())
    }

    fn position(&self) -> Result<Position, SegmentError> {
        let too_far = |_| self.file.damaged(self.at, "a segment of 4 GiB or more".to_owned());
        u32::try_from(self.at).map(Position).map_err(too_far)
    }

    fn trailing(&mut self) -> Result<ByteCount, SegmentError> {
        const STEP: usize = 64 << 10;
        let mut last = self.at;
        let mut at = self.at;
        while at < self.length {
            let bytes = self.window.at(at, STEP)?;
            if let Some(place) = bytes.iter().rposition(|&byte| byte != 0) {
                last = at + place as u64 + 1;
            }
            at += STEP as u64;
        }
        Ok(ByteCount(last - self.at))
    }
}
