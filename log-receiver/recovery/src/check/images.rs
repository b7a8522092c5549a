//! The images of a log, against the hashes of their chunks.

use backtide_images::{Left, Losses, Mended};
use backtide_units::ByteCount;
use roaring::RoaringTreemap;

use super::Checked;
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
        for (number, (_, image)) in self.origin().images().iter().enumerate() {
            if checked.called_off {
                break;
            }
            let mut bytes = 0;
            let whole = image.check(number, &mut seen, &mut losses, &mut |read| {
                bytes += read.0;
                step(read)
            })?;
            checked.images += 1;
            checked.bytes.0 += bytes;
            checked.called_off |= !whole;
        }
        let mender = mender.filter(|_| !checked.called_off);
        // What is mended of a tree may lead to more that is damaged, a level lower each time.
        while let Some(mender) = mender.filter(|_| !losses.is_empty()) {
            losses = self.mend_images(&losses, &mut seen, checked, mender, step)?;
        }
        losses.sentences().for_each(|what| checked.note(what.to_owned()));
        checked.more_damage += losses.more();
        Ok(())
    }

    /// Mends what can be, and gives what was found behind that.
    fn mend_images(
        &self,
        losses: &Losses,
        seen: &mut RoaringTreemap,
        checked: &mut Checked,
        mender: &Mender<'_>,
        step: &mut dyn FnMut(ByteCount) -> bool,
    ) -> Result<Losses, LogError> {
        let find = &mut |lost: &_, is_wanted: &dyn Fn(&[u8]) -> bool| mender.chunk(lost, is_wanted);
        let Mended { chunks, tables, left } = self.images().mend(losses, find)?;
        checked.called_off |= !step(mender.take_read());
        losses.lasting().for_each(|what| checked.note(what.to_owned()));
        checked.more_damage += losses.more();
        for Left { what, why } in left {
            checked.note(why.map_or(what.clone(), |why| format!("{what}: cannot be mended: {why}")));
        }
        tables.into_iter().for_each(|what| checked.note_mended(what));
        let mut behind = Losses::default();
        for lost in chunks {
            if let Some((number, _)) = lost.places().first().filter(|_| lost.is_node())
                && let Some((_, image)) = self.origin().images().get(*number)
            {
                let whole = image.check_below(&lost, seen, &mut behind, &mut |read| {
                    checked.bytes.0 += read.0;
                    step(read)
                })?;
                checked.called_off |= !whole;
            }
            checked.note_mended(lost.what().to_owned());
        }
        Ok(behind)
    }
}
