//! What each sector of the disk may hold: what was flushed last, or something written since.

/// A content of a sector: the point's, what the image had before, or that of a write.
pub(crate) type Tag = u32;

/// What the point holds in a sector.
pub(crate) fn of_point(sector: u64) -> Tag {
    1_000_000 + sector as Tag
}

/// What the image holds where nothing was fetched or written: nothing that anybody may see.
pub(crate) fn stale(sector: u64) -> Tag {
    2_000_000 + sector as Tag
}

#[derive(Clone, Debug)]
struct Sector {
    flushed: Tag,
    /// Acknowledged since, in order.
    acknowledged: Vec<Tag>,
    /// Being written; one at a time.
    under_way: Option<Tag>,
}

/// How something ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crash {
    /// The process: what was acknowledged is there.
    Killed,
    /// The process and the server of its image: what was flushed is there, and what nobody flushed stays in doubt.
    ServerLost,
    /// The host, or its storage: what was flushed is there.
    PowerLost,
}

/// All sectors.
pub(crate) struct Model {
    sectors: Vec<Sector>,
}

impl Model {
    pub(crate) fn new(sectors: u64) -> Self {
        let sector = |n| Sector { flushed: of_point(n), acknowledged: Vec::new(), under_way: None };
        Self { sectors: (0..sectors).map(sector).collect() }
    }

    pub(crate) fn begin(&mut self, sectors: std::ops::Range<u64>, tag: Tag) {
        for n in sectors {
            self.sectors[n as usize].under_way = Some(tag);
        }
    }

    pub(crate) fn acknowledge(&mut self, sectors: std::ops::Range<u64>) {
        for n in sectors {
            let sector = &mut self.sectors[n as usize];
            sector.acknowledged.extend(sector.under_way.take());
        }
    }

    /// How much was acknowledged of each sector at this moment: what a flush that begins now is about.
    pub(crate) fn acknowledged(&self) -> Vec<usize> {
        self.sectors.iter().map(|sector| sector.acknowledged.len()).collect()
    }

    pub(crate) fn flushed(&mut self, acknowledged: &[usize]) {
        for (sector, count) in self.sectors.iter_mut().zip(acknowledged) {
            sector.flushed = sector.acknowledged.drain(..count).next_back().unwrap_or(sector.flushed);
        }
    }

    /// Whether a reader may see this now, or after the process was killed.
    pub(crate) fn may_be(&self, n: u64, tag: Tag) -> Result<(), String> {
        let sector = &self.sectors[n as usize];
        let last = *sector.acknowledged.last().unwrap_or(&sector.flushed);
        let right = tag == last || sector.under_way == Some(tag);
        right.then_some(()).ok_or_else(|| format!("sector {n} holds {tag}: {sector:?}"))
    }

    /// The world goes on with this in a sector.
    pub(crate) fn crashed(&mut self, crash: Crash, n: u64, tag: Tag) -> Result<(), String> {
        match crash {
            Crash::Killed => {
                self.may_be(n, tag)?;
                let sector = &mut self.sectors[n as usize];
                sector.acknowledged.extend(sector.under_way.take().filter(|other| *other == tag));
            }
            Crash::ServerLost | Crash::PowerLost => {
                let sector = &mut self.sectors[n as usize];
                let written: Vec<Tag> =
                    sector.acknowledged.drain(..).chain(sector.under_way.take()).collect();
                let position = written.iter().rposition(|other| *other == tag);
                if position.is_none() && sector.flushed != tag {
                    return Err(format!("after a loss sector {n} holds {tag} of {written:?}: {sector:?}"));
                }
                match crash {
                    // Its block may be missing again when the host loses power: that was not flushed.
                    Crash::ServerLost => {
                        sector.acknowledged = written[..position.map_or(0, |at| at + 1)].to_vec();
                    }
                    Crash::Killed | Crash::PowerLost => sector.flushed = tag,
                }
            }
        }
        Ok(())
    }
}
