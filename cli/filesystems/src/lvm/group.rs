//! A volume group, from the text that describes it.

use backtide_units::{ByteCount, ByteOffset, ByteRange};

use super::{
    Logical, Physical, Segment,
    text::{self, Section, Value},
};
use crate::Error;

const SECTOR: u64 = 512;

/// Stripes of one segment; LVM makes 128 at most.
const STRIPES_MAX: u64 = 128;

/// A group as its description has it.
pub(super) struct Group {
    pub(super) id: String,
    /// Which version of the description this is.
    pub(super) seqno: u64,
    name: String,
    extent: ByteCount,
    text: Section,
}

/// Reads a description.
pub(super) fn parse(description: &str) -> Result<Group, Error> {
    let named = |error: Error| error.of(|| "the description of the volume group (LVM)".to_owned());
    parse_group(description).map_err(named)
}

fn parse_group(description: &str) -> Result<Group, Error> {
    let all = text::parse(description)?;
    // The one section is the group; what stands beside it tells who wrote it.
    let group = all.0.into_iter().find_map(|(name, value)| match value {
        Value::Section(section) => Some((name, section)),
        Value::Number(_) | Value::Text(_) | Value::List(_) => None,
    });
    let (name, text) = group.ok_or_else(|| Error::damaged("", "it names no group"))?;
    let (id, seqno) = (text.text("id")?.to_owned(), text.number("seqno")?);
    let extent = text.number("extent_size")?.checked_mul(SECTOR).filter(|extent| *extent > 0);
    let extent = extent.ok_or_else(|| Error::damaged("", "its extents have no size"))?;
    Ok(Group { id, seqno, name, extent: ByteCount(extent), text })
}

impl Group {
    /// Its visible logical volumes. Those that cannot be read say why.
    pub(super) fn logical_volumes(&self, physicals: &[(ByteRange, Physical)]) -> Vec<Logical> {
        let Ok(section) = self.text.section("logical_volumes") else { return Vec::new() };
        let volumes = section.0.iter().filter_map(|(name, value)| match value {
            Value::Section(volume) => Some((name, volume)),
            Value::Number(_) | Value::Text(_) | Value::List(_) => None,
        });
        // Some of what it holds is in the snapshot's volume only, until that has ended.
        let segments = volumes.clone().flat_map(|(_, volume)| Self::numbered(volume));
        let merges = segments.filter(|segment| segment.text("merging_store").is_ok());
        let merged_into: Vec<&str> = merges.filter_map(|segment| segment.text("origin").ok()).collect();
        let visible = |volume: &Section| {
            volume.list("status").is_ok_and(|list| list.contains(&Value::Text("VISIBLE".to_owned())))
        };
        let volumes = volumes.filter(|(_, volume)| visible(volume));
        let read = volumes.map(|(name, volume)| {
            let segments = match merged_into.contains(&name.as_str()) {
                true => Err(Error::Unsupported { what: "a snapshot is being merged into it".to_owned() }),
                false => self.segments(volume, physicals),
            };
            let segments = segments.map_err(|error| match error {
                Error::Damaged { why, .. } => format!("its description is damaged: {why}"),
                other => other.to_string(),
            });
            let length = ByteCount(self.length(volume).unwrap_or(0));
            Logical { group: self.name.clone(), name: name.clone(), length, segments }
        });
        read.collect()
    }

    fn numbered(volume: &Section) -> impl Iterator<Item = &Section> {
        volume.0.iter().filter_map(|(name, value)| match value {
            Value::Section(segment) if name.starts_with("segment") => Some(segment),
            Value::Section(_) | Value::Number(_) | Value::Text(_) | Value::List(_) => None,
        })
    }

    /// The bytes of all segments together.
    fn length(&self, volume: &Section) -> Option<u64> {
        Self::numbered(volume).try_fold(0_u64, |sum, segment| {
            let count = segment.number("extent_count").ok()?;
            sum.checked_add(count.checked_mul(self.extent.0)?)
        })
    }

    fn segments(&self, volume: &Section, physicals: &[(ByteRange, Physical)]) -> Result<Vec<Segment>, Error> {
        let mut segments = Vec::new();
        for segment in Self::numbered(volume) {
            segments.push(self.segment(segment, physicals)?);
        }
        segments.sort_by_key(|segment| segment.at);
        let mut end = 0;
        for segment in &segments {
            if segment.at.0 != end {
                return Err(Error::damaged("", format!("no segment begins at byte {end}")));
            }
            end = segment.at.checked_add(segment.length).ok_or_else(too_large)?.0;
        }
        Ok(segments)
    }

    fn segment(&self, segment: &Section, physicals: &[(ByteRange, Physical)]) -> Result<Segment, Error> {
        let bytes = |extents: u64| extents.checked_mul(self.extent.0).ok_or_else(too_large);
        let (at, length) = (bytes(segment.number("start_extent")?)?, bytes(segment.number("extent_count")?)?);
        let kind = segment.text("type")?;
        if !matches!(kind, "striped" | "linear") {
            return Err(Error::Unsupported { what: format!("it is of the kind {kind:?}") });
        }
        let count = segment.number("stripe_count")?;
        let list = segment.list("stripes")?;
        if count == 0 || count > STRIPES_MAX || list.len() as u64 != 2 * count {
            return Err(Error::damaged("", format!("{count} stripes in a list of {}", list.len())));
        }
        let stripe = match count {
            1 => length,
            _ => segment.number("stripe_size")?.checked_mul(SECTOR).ok_or_else(too_large)?,
        };
        if length == 0 || stripe == 0 || length % stripe != 0 || length / stripe % count != 0 {
            return Err(Error::damaged("", format!("{length} bytes are no stripes of {stripe}")));
        }
        let mut stripes = Vec::new();
        for pair in list.chunks_exact(2) {
            let (Value::Text(name), Value::Number(extent)) = (&pair[0], &pair[1]) else {
                return Err(Error::damaged("", "a stripe is no name and number"));
            };
            stripes.push(self.place(name, bytes(*extent)?, length / count, physicals)?);
        }
        Ok(Segment { at: ByteOffset(at), length: ByteCount(length), stripe: ByteCount(stripe), stripes })
    }

    /// Where `length` bytes of a physical volume are on the disk.
    fn place(
        &self,
        name: &str,
        at: u64,
        length: u64,
        physicals: &[(ByteRange, Physical)],
    ) -> Result<ByteOffset, Error> {
        let wrong = || Error::damaged("", format!("a stripe lies beyond the physical volume {name}"));
        let section = self.text.section("physical_volumes")?.section(name)?;
        let id = section.text("id")?.replace('-', "");
        let Some((range, _)) = physicals.iter().find(|(_, physical)| physical.id == id) else {
            let what = format!("a part of it is on the physical volume {name}, on another disk");
            return Err(Error::Unsupported { what });
        };
        let start = section.number("pe_start")?.checked_mul(SECTOR).and_then(|start| start.checked_add(at));
        let end = start.and_then(|start| start.checked_add(length)).ok_or_else(wrong)?;
        if end > range.count().0 {
            return Err(wrong());
        }
        Ok(ByteOffset(range.start().0 + end - length))
    }
}

fn too_large() -> Error {
    Error::damaged("", "it is larger than any disk")
}
