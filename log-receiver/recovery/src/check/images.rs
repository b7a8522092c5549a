//! The images of a log, against the hashes of their chunks.

use std::collections::BTreeMap;

use backtide_images::{Left, Losses, LostChunk, Mended};
use backtide_units::ByteCount;
use roaring::RoaringTreemap;

use super::{Checked, chain};
use crate::{LogError, Snapshot, mend::Mender};

impl Snapshot {
    /// Reads each chunk once: most of them belong to several images.
    pub(super) fn check_images(
        &self,
        checked: &mut Checked,
        mender: Option<&Mender<'_>>,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<(), LogError> {
        let (mut seen, mut losses) = (RoaringTreemap::new(), Losses::default());
        let mut walked = self.walk_images(&mut seen, &mut losses, checked, step);
        // What is mended of a tree may lead to more that is damaged, a level lower each time.
        while let Some(mender) =
            mender.filter(|_| walked.is_ok() && !losses.is_empty() && !checked.called_off)
        {
            let found = losses.take();
            walked = self.mend_images(&found, (&mut seen, &mut losses), checked, mender, step);
        }
        self.note_all(&losses, None, checked);
        walked
    }

    fn walk_images(
        &self,
        seen: &mut RoaringTreemap,
        losses: &mut Losses,
        checked: &mut Checked,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<(), LogError> {
        for (number, (_, image)) in self.origin().images().iter().enumerate() {
            if checked.called_off {
                break;
            }
            let mut bytes = 0;
            let whole = image.check(number, seen, losses, &mut |read| {
                bytes += read.0;
                step(read)
            })?;
            checked.images += 1;
            checked.bytes.0 += bytes;
            checked.called_off |= !whole;
        }
        Ok(())
    }

    /// Mends what can be; what is found behind that goes to `behind`.
    fn mend_images(
        &self,
        losses: &Losses,
        (seen, behind): (&mut RoaringTreemap, &mut Losses),
        checked: &mut Checked,
        mender: &Mender<'_>,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<(), LogError> {
        let find = &mut |lost: &LostChunk, is_wanted: &dyn Fn(&[u8]) -> bool| mender.chunk(lost, is_wanted);
        // What a mend reads and writes is for the pace alone: it is no part of what is checked.
        let pace = &mut |bytes: ByteCount| step(ByteCount(bytes.0.saturating_add(mender.take_read().0)));
        let Mended { chunks, tables, left, called_off } = match self.images().mend(losses, seen, find, pace) {
            Ok(mended) => mended,
            Err(error) => {
                self.note_all(losses, Some(&chain(&error)), checked);
                return Ok(());
            }
        };
        checked.called_off |= called_off;
        losses.lasting().for_each(|what| checked.note(what.to_owned()));
        checked.more_damage += losses.more();
        let mut touched = match left.is_empty() {
            true => BTreeMap::new(),
            false => self.touched_by_losses(losses),
        };
        for Left { what, why } in left {
            let needing = touched.remove(&what).unwrap_or_default();
            checked.note_touching(what, why.as_deref(), |_| needing);
        }
        tables.into_iter().for_each(|what| checked.note_mended(what));
        chunks.iter().for_each(|lost| checked.note_mended(lost.what().to_owned()));
        for lost in chunks.iter().filter(|lost| lost.is_node()) {
            let place = lost.places().first();
            let Some((_, image)) = place.and_then(|(number, _)| self.origin().images().get(*number)) else {
                continue;
            };
            let whole = image.check_below(lost, seen, behind, &mut |read| {
                checked.bytes.0 += read.0;
                step(read)
            })?;
            checked.called_off |= !whole;
        }
        Ok(())
    }

    /// Notes everything that was found, with why none of it could be mended.
    fn note_all(&self, losses: &Losses, why: Option<&str>, checked: &mut Checked) {
        let mut touched = match losses.is_empty() {
            true => BTreeMap::new(),
            false => self.touched_by_losses(losses),
        };
        for what in losses.sentences() {
            // A pack without its table, and a node whose second is whole, are read all the same.
            let needing = touched.remove(what).unwrap_or_default();
            checked.note_touching(what.to_owned(), why, |_| needing);
        }
        checked.more_damage += losses.more();
    }
}
