//! A log's segments one after the other: started, full, sealed.
//!
//! ```text
//!          full                 a ticket's chores: footer written, synced
//!   open ────────▶ waiting ──────────────────────────────────────────────▶ sealed
//! ```
//! The thread that owns the log only moves a full segment aside and goes on in the next, whose file an earlier
//! ticket made. Invariant: as long as a segment waits, or its footer is not known durable, no entry and no header claims
//! anything behind it to be durable ([`DiskLog::claimable`]), for that is what recovery trusts a footer by.

use std::{collections::VecDeque, sync::Arc};

use backtide_segment::{Contents, SegmentFile, SegmentHeader, SegmentId, SegmentWriter, Seq};
use backtide_storage::KillPoint;
use backtide_units::{ByteCount, ByteOffset, ByteRange};

use crate::{
    LogError,
    chores::{
        AllocateJob, Away, Chores, Done, Gate, LastWork, Owned, SPARE, SealJob, Sealed, Spare, SpareJob,
    },
    recover::failed,
    segment::{OpenSegment, Segment},
};

use super::{Current, DiskLog};

/// Segments that wait although nobody is about to seal them; above it they are sealed at once.
const WAITING_MAX: usize = 4;

/// What lies between a log's open segment and its sealed ones, and what is prepared ahead.
#[derive(Default)]
pub(super) struct Rotation {
    waiting: VecDeque<Waiting>,
    /// The change that sealed a segment on the spot, and its last entry, until a ticket that covers it is back: one
    /// taken before makes entries behind it durable, not its footer.
    on_the_spot: VecDeque<(u64, Seq)>,
    away: Away,
    gate: Gate,
    spare: Option<Spare>,
}

/// A segment that is full and not sealed.
struct Waiting {
    segment: Arc<Segment>,
    file: SegmentFile,
    header: SegmentHeader,
    end: ByteOffset,
    last: Seq,
}

impl Rotation {
    /// Bytes of the entries of segments that wait.
    pub(super) fn bytes(&self) -> ByteCount {
        ByteCount(self.waiting.iter().map(|waiting| waiting.end.0).sum())
    }

    /// Whether the log's files are still its own, for work on other threads.
    pub(super) fn owned(&self) -> Arc<Owned> {
        self.gate.owned()
    }

    /// Whether chores are under way.
    pub(super) fn is_away(&self) -> bool {
        self.away.is_so()
    }

    /// See [`DiskLog::abandon`].
    pub(super) fn abandon(&mut self) -> LastWork {
        self.gate.abandon()
    }

    /// Forgets the segments whose footers are durable now that everything up to `change` is.
    pub(super) fn note_durable(&mut self, change: u64) {
        self.on_the_spot.retain(|(sealed, _)| *sealed > change);
    }
}

impl DiskLog {
    /// Whether anything waits to be sealed that nobody is about to seal.
    pub(super) fn has_waiting(&self) -> bool {
        !self.rotation.waiting.is_empty() && !self.rotation.away.is_so()
    }

    /// The newest entry that may be claimed durable.
    pub(super) fn claimable(&self) -> Seq {
        let waiting = self.rotation.waiting.front().map(|waiting| waiting.last);
        let on_the_spot = self.rotation.on_the_spot.front().map(|(_, last)| *last);
        let first = [waiting, on_the_spot].into_iter().flatten().min();
        first.map_or(self.durable.seq, |first| self.durable.seq.min(first))
    }

    /// Moves the open segment aside, to be sealed.
    pub(super) fn fill_current(&mut self) -> Result<(), LogError> {
        self.write_waiting()?;
        let Some(Current { segment, writer }) = self.current.take() else { return Ok(()) };
        self.change += 1;
        self.unsynced.push((writer.sync_handle(), self.change));
        let (file, header, end) = (writer.file().clone(), *writer.header(), writer.end());
        self.resident.grew(writer.sync_handle(), end);
        self.rotation.waiting.push_back(Waiting { segment, file, header, end, last: self.appended });
        if self.rotation.waiting.len() > WAITING_MAX { self.seal_waiting() } else { Ok(()) }
    }

    /// Seals here and now what waits, unless somebody is about to.
    pub(super) fn seal_waiting(&mut self) -> Result<(), LogError> {
        if self.rotation.away.is_so() {
            return Ok(());
        }
        for job in self.seal_jobs() {
            // It may have been synced already, without its footer.
            self.change += 1;
            self.unsynced.push((Arc::clone(job.file.file()), self.change));
            let sealed = job.run().map_err(LogError::from);
            let sealed = self.poison_always(sealed)?;
            self.rotation.on_the_spot.push_back((self.change, sealed.last()));
            // Not durable before the next ticket, which is before any later entry.
            let done = Done::of(sealed);
            done.publish();
            self.take_done(done);
        }
        while let Some(upkeep) = self.segments.upkeep() {
            Arc::make_mut(&mut self.segments).install(upkeep.run());
        }
        Ok(())
    }

    fn seal_jobs(&self) -> Vec<SealJob> {
        let job = |waiting: &Waiting| SealJob {
            segment: Arc::clone(&waiting.segment),
            file: waiting.file.clone(),
            header: waiting.header,
        };
        self.rotation.waiting.iter().map(job).collect()
    }

    /// What a ticket can do beside its syncs; nothing while another does.
    pub(super) fn chores(&mut self) -> Option<Chores> {
        if self.rotation.away.is_so() {
            return None;
        }
        let (seal, upkeep) = (self.seal_jobs(), self.segments.upkeep());
        let allocate = self.allocate_job();
        let spare = self.spare_job();
        if seal.is_empty() && upkeep.is_none() && allocate.is_none() && spare.is_none() {
            return None;
        }
        let mut chores = self.rotation.gate.chores(&mut self.rotation.away);
        (chores.seal, chores.allocate) = (seal, allocate);
        (chores.spare, chores.upkeep) = (spare, upkeep);
        Some(chores)
    }

    /// Space for what is written next, once half of what was reserved is used.
    fn allocate_job(&self) -> Option<AllocateJob> {
        let writer = &self.current.as_ref()?.writer;
        let (end, allocated) = (writer.end(), writer.allocated()?);
        let step = self.options.writer().step_at(allocated).0;
        let most = self.options.segment_bytes_max.0.min(super::SEGMENT_BYTES_MAX);
        if end.0 + step / 2 < allocated.0 || allocated.0 >= most {
            return None;
        }
        let range = ByteRange::between(allocated, ByteOffset(allocated.0.checked_add(step)?));
        Some(AllocateJob { segment: writer.header().id, file: writer.sync_handle(), range })
    }

    /// A file for the next segment, once this one is half full.
    fn spare_job(&self) -> Option<SpareJob> {
        let current = self.current.as_ref()?;
        let extents = current.segment.with_open_mut(|open| open.contents.index().count());
        let half = current.writer.end().0 > self.options.segment_bytes_max.0 / 2
            || extents as u64 > u64::from(self.options.segment_extents_max) / 2;
        (half && self.rotation.spare.is_none()).then(|| SpareJob {
            storage: Arc::clone(&self.storage),
            path: self.segments_dir.join(SPARE),
            bytes: self.options.allocation_step,
        })
    }

    /// Takes what a ticket has done beside its syncs, which have succeeded.
    pub(super) fn take_done(&mut self, done: Done) {
        for sealed in &done.sealed {
            self.take_sealed(sealed);
        }
        if let (Some((segment, allocated)), Some(current)) = (done.allocated, &mut self.current)
            && current.writer.header().id == segment
        {
            current.writer.note_allocated(allocated);
        }
        if let Some(upkept) = done.upkept {
            Arc::make_mut(&mut self.segments).install(upkept);
        }
        self.rotation.spare = self.rotation.spare.take().or(done.spare);
    }

    fn take_sealed(&mut self, sealed: &Sealed) {
        let first = self.rotation.waiting.pop_front().expect("what was sealed waited");
        assert_eq!(first.header.id, sealed.id(), "segments are sealed in order");
        self.sealed_bytes += sealed.length().0;
        Arc::make_mut(&mut self.segments).finish_first(sealed.leaf.clone());
    }

    /// Starts the next segment. A full device leaves the log as it was.
    pub(super) fn start_segment(&mut self) -> Result<(), LogError> {
        let last = self.segments.last().map(|segment| segment.header().id);
        let header = SegmentHeader {
            disk: self.identity.disk,
            history: self.identity.history,
            id: last.map_or(SegmentId::FIRST, SegmentId::next),
            first_seq: self.appended.next(),
            synced: self.claimable(),
        };
        let path = self.segments_dir.join(header.id.file_name());
        let name = self.storage.display(&path);
        let Spare { file, allocated } = self.next_file(header.id)?;
        KillPoint::SegmentCreated.reached();
        self.change += 1;
        self.started = self.change;
        let file = SegmentFile::new(file, name);
        let writer = match SegmentWriter::create(file.clone(), header, self.options.writer(), allocated) {
            Ok(writer) => writer,
            Err(error) => {
                let removed = self.storage.remove(&path);
                self.poisoned |= removed.is_err();
                return Err(error.into());
            }
        };
        KillPoint::SegmentBegun.reached();
        let contents = Contents::new(header.first_seq, header.synced);
        let open = OpenSegment::new(file, contents, writer.end(), &self.cache);
        let segment = Arc::new(Segment::new_open(Arc::clone(&self.storage), path, header, &self.cache, open));
        Arc::make_mut(&mut self.segments).push(Arc::clone(&segment));
        self.current = Some(Current { segment, writer });
        Ok(())
    }

    /// The file of a new segment: the one that was prepared, or else one made now.
    fn next_file(&mut self, id: SegmentId) -> Result<Spare, LogError> {
        let path = self.segments_dir.join(id.file_name());
        let name = self.storage.display(&path);
        let failed = |source| failed(format!("create {}", name.display()), source);
        if let Some(spare) = self.rotation.spare.take() {
            match self.storage.rename(&self.segments_dir.join(SPARE), &path) {
                Ok(()) => return Ok(spare),
                // Somebody tidied up.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(failed(error)),
            }
        }
        let file = self.storage.create_new(&path).map_err(failed)?;
        Ok(Spare { file, allocated: ByteCount::ZERO })
    }

    fn poison_always<T>(&mut self, result: Result<T, LogError>) -> Result<T, LogError> {
        self.poisoned |= result.is_err();
        result
    }
}
