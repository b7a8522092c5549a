//! Which points need a chunk of an image: those whose image has it, and above the floor those at which the log has nothing
//! newer.

use std::collections::BTreeMap;

use backtide_images::{Having, Losses, LostBytes};
use backtide_units::{ByteOffset, ByteRange, Lsn};

use super::{Known, LOOKED_FOR_BYTES_MAX, Touched, TouchedSpan};
use crate::{LogError, Snapshot, merge::Content};

/// Bytes of the disk from one place to another that some images lack, the images by their number.
type Lacking = BTreeMap<(ByteOffset, ByteOffset), Vec<usize>>;

impl Snapshot {
    /// The points that need what was lost of this log's images, by what is wrong. Reads nodes, each once.
    pub(crate) fn touched_by_losses(&self, losses: &Losses) -> BTreeMap<String, Touched> {
        let mut having = Having::new(losses);
        let mut lacking: BTreeMap<String, (Lacking, bool)> = BTreeMap::new();
        for (nth, (_, image)) in self.origin().images().iter().enumerate() {
            let Ok(lost) = having.of(image) else {
                return self.all_points_of(losses);
            };
            for (what, LostBytes { ranges, coarse }) in lost {
                let (lacking, any_coarse) = lacking.entry(what.as_ref().to_owned()).or_default();
                *any_coarse |= coarse;
                for range in ranges {
                    lacking.entry((range.start(), range.end())).or_default().push(nth);
                }
            }
        }
        let touched = |(what, (lacking, coarse)): (String, (Lacking, bool))| {
            let known = if coarse { Known::AtMost } else { Known::Exact };
            (what, self.touched_by_lacking(&lacking, known))
        };
        lacking.into_iter().map(touched).collect()
    }

    /// What a read at `at` meets of damaged chunks in `range`, and which points have them at the same place.
    pub(super) fn look_for_damaged_chunks(
        &self,
        at: Lsn,
        range: ByteRange,
        found: &mut BTreeMap<String, Touched>,
    ) -> Result<(), LogError> {
        let images = self.origin().images();
        let Some(nth) = images.partition_point(|(point, _)| point.lsn <= at).checked_sub(1) else {
            return Ok(());
        };
        for (what, name, covers) in images[nth].1.damaged_chunks(range)? {
            let has = |(other, (_, image)): &(usize, &(_, backtide_images::Image))| {
                *other == nth || image.has_chunk(&name, covers)
            };
            let having = images.iter().enumerate().filter(has).map(|(nth, _)| nth).collect();
            let lacking = Lacking::from([((covers.start(), covers.end()), having)]);
            let touched = self.touched_by_lacking(&lacking, Known::AtLeast);
            found.entry(what).or_insert_with(Touched::nothing).merge(touched);
        }
        Ok(())
    }

    /// A bound: every point that is an image, and all that stand on the last of them.
    fn all_points_of(&self, losses: &Losses) -> BTreeMap<String, Touched> {
        let all = || Touched::of(self.span(None, Lsn::ZERO, Lsn::MAX, true), Known::AtMost);
        losses.sentences().map(|what| (what.to_owned(), all())).collect()
    }

    fn touched_by_lacking(&self, lacking: &Lacking, known: Known) -> Touched {
        let mut touched = Touched { spans: Vec::new(), known };
        for ((start, end), images) in lacking {
            let range = self.within_disk(ByteRange::between(*start, *end));
            for run in images.chunk_by(|one, next| one + 1 == *next) {
                touched.merge(self.touched_by_run(range, run, known));
            }
        }
        touched
    }

    /// The points of images one after the other that lack a range.
    fn touched_by_run(&self, range: ByteRange, run: &[usize], known: Known) -> Touched {
        let images = self.origin().images();
        let (Some(first), Some(last)) = (run.first(), run.last()) else { return Touched::nothing() };
        let (first, floor) = (images[*first].0, images[*last].0);
        let so_far =
            TouchedSpan { range: Some(range), from: Some(first), to: Some(floor), open: false, lost: false };
        if last + 1 < images.len() {
            return Touched::of([so_far], known);
        }
        // The last image is what everything above it stands on.
        let is_below = |content: &Content<'_>| matches!(content, Content::Below);
        let needed = |at| self.is_needed(range, at, &is_below);
        let above = match range.count() > LOOKED_FOR_BYTES_MAX {
            true => None,
            false => self.needed_from(range, floor.lsn, &needed).ok().flatten(),
        };
        match above {
            Some(above) => Touched::of([TouchedSpan { from: Some(first), ..above }], known),
            None => {
                let bound = self.touched_at_most(Some(range), floor.lsn);
                let spans = bound.spans.into_iter().map(|span| TouchedSpan { from: Some(first), ..span });
                Touched::of(spans, if known == Known::Exact { bound.known } else { known })
            }
        }
    }

    /// The part of a range that was ever on the disk: a node covers more.
    fn within_disk(&self, range: ByteRange) -> ByteRange {
        let sizes = self.own_timeline().sizes.iter().map(|(_, size)| size.0);
        let images = self.origin().images().iter().map(|(_, image)| image.size().0);
        let end = sizes.chain(images).max().unwrap_or(range.end().0).max(range.start().0);
        ByteRange::between(range.start(), ByteOffset(range.end().0.min(end)))
    }
}
