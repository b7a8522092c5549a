//! The bytes of a base; the table is in the segments' `FORMAT.md`.
//!
//! Encoded by hand, decoded strictly: a length is believed only as far as there are bytes for it.

use std::{path::Path, sync::Arc};

use backtide_images::{ROOT_LENGTH, Root};
use backtide_segment::{AttachFacts, PassReason, SegmentId, Seq};
use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskId, Epoch, HistoryId, Lsn};
use bytes::{Buf, BufMut};
use uuid::Uuid;

use super::{Base, KeptPoint};
use crate::{
    Attached, Forgotten, Hole, Interval, LogError, LogIdentity, Mark, OpenPass, Takeover, TimedLsn, Timeline,
};

/// How every base begins.
pub const MAGIC: [u8; 8] = *b"BKTDBAS\n";
/// Of logs that have a floor.
const WITH_FLOOR: u32 = 1;
/// Of logs that have ended.
const ENDED: u32 = 2;

pub(super) fn encode(base: &Base) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_slice(&MAGIC);
    out.put_u32_le(if base.is_ended() { ENDED } else { WITH_FLOOR });
    out.put_u32_le(base.first_segment.0);
    out.put_slice(base.identity.disk.0.as_bytes());
    out.put_slice(base.identity.history.0.as_bytes());
    out.put_u64_le(base.generation);
    out.put_u64_le(base.first_seq.0);
    base.floor.iter().for_each(|floor| put_kept(&mut out, floor));
    out.put_u32_le(base.kept.len() as u32);
    base.kept.iter().for_each(|kept| put_kept(&mut out, kept));
    put_timeline(&mut out, &base.timeline);
    let crc = crc32c::crc32c(&out);
    out.put_u32_le(crc);
    out
}

fn put_kept(out: &mut Vec<u8>, kept: &KeptPoint) {
    put_timed(out, kept.at);
    out.put_slice(&kept.root.encode());
}

fn put_timed(out: &mut Vec<u8>, at: TimedLsn) {
    out.put_u64_le(at.lsn.0);
    out.put_u64_le(at.time.0);
}

fn put_some<T>(out: &mut Vec<u8>, value: Option<T>, put: impl FnOnce(&mut Vec<u8>, T)) {
    out.put_u8(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.put_u32_le(text.len() as u32);
    out.put_slice(text.as_bytes());
}

fn put_list<T>(out: &mut Vec<u8>, list: &[T], mut put: impl FnMut(&mut Vec<u8>, &T)) {
    out.put_u32_le(list.len() as u32);
    list.iter().for_each(|item| put(out, item));
}

fn put_timeline(out: &mut Vec<u8>, timeline: &Timeline) {
    put_list(out, &timeline.intervals, |out, interval| {
        put_timed(out, interval.from);
        put_timed(out, interval.to);
    });
    put_list(out, &timeline.holes, |out, hole| {
        put_some(out, hole.from, put_timed);
        put_some(out, hole.to, put_timed);
        out.put_u8(hole.reason.code);
        put_text(out, &hole.reason.text);
        out.put_u64_le(hole.passes);
    });
    put_list(out, &timeline.seams, |out, seam| put_timed(out, *seam));
    put_list(out, &timeline.marks, |out, mark| {
        put_text(out, &mark.label);
        put_timed(out, mark.at);
    });
    put_list(out, &timeline.sizes, |out, (from, size)| {
        out.put_u64_le(from.0);
        out.put_u64_le(size.0);
    });
    out.put_u64_le(timeline.forgotten.marks);
    out.put_u64_le(timeline.forgotten.intervals);
    put_some(out, timeline.open_pass, |out, pass| {
        put_timed(out, TimedLsn { lsn: pass.at, time: pass.time });
    });
    out.put_u8(u8::from(timeline.in_interval));
    put_timed(out, timeline.last);
    put_some(out, timeline.attached.as_ref(), |out, attached| {
        out.put_u64_le(attached.epoch.0);
        out.put_slice(attached.attach.as_bytes());
        put_text(out, attached.name.as_str());
        out.put_u64_le(attached.size.0);
        out.put_u64_le(attached.time.0);
    });
    let facts = AttachFacts { before: Seq(0), ack: timeline.ack, origin: timeline.origin.clone() };
    out.put_u8(facts.ack);
    facts.put_origin(out);
    put_list(out, &timeline.takeovers, |out, takeover| {
        out.put_u64_le(takeover.before.0);
        out.put_u64_le(takeover.epoch.0);
        out.put_u64_le(takeover.covered.0);
        out.put_u64_le(takeover.entries.0);
    });
    out.put_u64_le(timeline.highest.0);
    out.put_u64_le(timeline.records);
    out.put_u64_le(timeline.flushes);
    put_some(out, timeline.last_flush, put_timed);
}

/// Reads the bytes back; `file` names them in errors.
///
/// # Errors
/// [`LogError::UnknownVersion`] or [`LogError::Damaged`].
pub(super) fn decode(bytes: &[u8], file: &Path) -> Result<Base, LogError> {
    let damaged = |at: usize, what: &str| LogError::Damaged {
        file: file.to_owned(),
        offset: ByteOffset(at as u64),
        what: what.to_owned(),
    };
    let Some((content, mut crc)) = bytes.split_last_chunk::<4>().map(|(content, crc)| (content, &crc[..]))
    else {
        return Err(damaged(0, "it is no base of a log"));
    };
    if crc.get_u32_le() != crc32c::crc32c(content) || !content.starts_with(&MAGIC) {
        return Err(damaged(0, "its checksum or its magic is wrong"));
    }
    let mut input = Input(&content[8..]);
    let version = input.u32().ok_or_else(|| damaged(8, "it ends in its header"))?;
    if !(WITH_FLOOR..=ENDED).contains(&version) {
        return Err(LogError::UnknownVersion { file: file.to_owned(), found: version, known: ENDED });
    }
    let base = input.base(version == ENDED).filter(|_| input.0.is_empty());
    base.ok_or_else(|| damaged(content.len() - input.0.len(), "it is not the base of a log"))
}

/// What is left to read.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn u8(&mut self) -> Option<u8> {
        self.0.try_get_u8().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.0.try_get_u32_le().ok()
    }

    fn u64(&mut self) -> Option<u64> {
        self.0.try_get_u64_le().ok()
    }

    fn uuid(&mut self) -> Option<Uuid> {
        let mut bytes = [0; 16];
        self.0.try_copy_to_slice(&mut bytes).ok()?;
        Some(Uuid::from_bytes(bytes))
    }

    fn bytes(&mut self, length: usize) -> Option<&[u8]> {
        let (bytes, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(bytes)
    }

    fn text(&mut self) -> Option<String> {
        let length = self.u32()? as usize;
        String::from_utf8(self.bytes(length)?.to_vec()).ok()
    }

    fn flag(&mut self) -> Option<bool> {
        match self.u8()? {
            0 => Some(false),
            1 => Some(true),
            2.. => None,
        }
    }

    fn timed(&mut self) -> Option<TimedLsn> {
        Some(TimedLsn { lsn: Lsn(self.u64()?), time: CaptureTime(self.u64()?) })
    }

    fn some<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        if self.flag()? { Some(Some(read(self)?)) } else { Some(None) }
    }

    fn list<T>(&mut self, mut read: impl FnMut(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.u32()?;
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(read(self)?);
        }
        Some(list)
    }

    fn kept(&mut self) -> Option<KeptPoint> {
        Some(KeptPoint { at: self.timed()?, root: Root::decode(self.bytes(ROOT_LENGTH)?)? })
    }

    fn base(&mut self, ended: bool) -> Option<Base> {
        let first_segment = SegmentId(self.u32()?);
        let identity = LogIdentity { disk: DiskId(self.uuid()?), history: HistoryId(self.uuid()?) };
        let (generation, first_seq) = (self.u64()?, Seq(self.u64()?));
        let floor = if ended { None } else { Some(self.kept()?) };
        let kept = self.list(Self::kept)?;
        let timeline = self.timeline()?;
        let ascending = kept.iter().chain(&floor).is_sorted_by(|a, b| a.at.lsn < b.at.lsn);
        let numbered = first_segment.0 > 0 && first_seq > Seq(0) && generation > 0;
        let base = Base { identity, generation, first_segment, first_seq, timeline, floor, kept };
        (ascending && numbered).then_some(base)
    }

    fn timeline(&mut self) -> Option<Timeline> {
        let intervals = self.list(|input| Some(Interval { from: input.timed()?, to: input.timed()? }))?;
        let holes = self.list(|input| {
            let (from, to) = (input.some(Self::timed)?, input.some(Self::timed)?);
            let reason = PassReason { code: input.u8()?, text: input.text()? };
            Some(Hole { from, to, reason, passes: input.u64()? })
        })?;
        let seams = self.list(Self::timed)?;
        let marks = self.list(|input| Some(Mark { label: input.text()?, at: input.timed()? }))?;
        let sizes = self.list(|input| Some((Lsn(input.u64()?), ByteCount(input.u64()?))))?;
        let forgotten = Forgotten { marks: self.u64()?, intervals: self.u64()? };
        let open_pass = self.some(Self::timed)?.map(|at| OpenPass { at: at.lsn, time: at.time });
        let (in_interval, last) = (self.flag()?, self.timed()?);
        let attached = self.some(|input| {
            let (epoch, attach) = (Epoch(input.u64()?), input.uuid()?);
            let (name, size) = (input.text()?.parse().ok()?, ByteCount(input.u64()?));
            Some(Attached { epoch, attach, name, size, time: CaptureTime(input.u64()?) })
        })?;
        let (ack, origin) = (self.u8()?, AttachFacts::get_origin(&mut self.0)?);
        let takeovers = self.list(|input| {
            let (before, epoch) = (Epoch(input.u64()?), Epoch(input.u64()?));
            Some(Takeover { before, epoch, covered: Lsn(input.u64()?), entries: Seq(input.u64()?) })
        })?;
        let highest = Lsn(self.u64()?);
        let (records, flushes, last_flush) = (self.u64()?, self.u64()?, self.some(Self::timed)?);
        // What folding relies on.
        let open_hole = holes.last().is_some_and(|hole| hole.to.is_none());
        let sound = (!in_interval || !intervals.is_empty()) && (open_pass.is_none() || open_hole);
        let marks = Arc::new(marks);
        let timeline = Timeline {
            intervals,
            holes,
            seams,
            marks,
            sizes,
            forgotten,
            open_pass,
            in_interval,
            last,
            attached,
            ack,
            origin,
            takeovers,
            highest,
            records,
            flushes,
            last_flush,
        };
        sound.then_some(timeline)
    }
}

#[cfg(test)]
mod tests;
