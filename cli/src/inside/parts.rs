//! The parts of a point - partitions and logical volumes - and the choice of one to look into.

use std::rc::Rc;

use backtide_control::{ApiError, ErrorCode};
use backtide_export::ClientError;
use backtide_filesystems::{Source, Window};
use backtide_units::{ByteOffset, ByteRange};
use serde::Serialize;

use super::{Content, LogicalVolume, Partition, PointReader, Volume, logical_volumes, partitions};
use crate::{ending::Failure, ending::wrong_usage, quantity::size_text};

/// What a point consists of.
#[derive(Debug, Serialize)]
pub(crate) struct Parts {
    /// The partitions, or the whole disk.
    pub(crate) partitions: Vec<Partition>,
    /// What is on those that are physical volumes of LVM.
    pub(crate) logical_volumes: Vec<LogicalVolume>,
    /// What keeps logical volumes from being found; other parts can be read all the same.
    #[serde(skip)]
    damage: Option<ApiError>,
}

/// One of them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part<'parts> {
    Partition(&'parts Partition),
    Logical(&'parts LogicalVolume),
}

impl Parts {
    /// Those of `disk`.
    ///
    /// # Errors
    /// When the table of partitions is damaged.
    pub(crate) fn find(disk: &Rc<PointReader>) -> Result<Self, Failure> {
        let found = partitions(disk);
        let partitions = found.map_err(|error| {
            // What the receiver cannot give is damaged there; else it is the table that is.
            let is_unread = error.get_ref().is_some_and(|inner| inner.is::<ClientError>());
            let code = if is_unread { ErrorCode::Damaged } else { ErrorCode::Failed };
            ApiError::new(code, format!("the partitions cannot be read: {error}"))
        })?;
        let (logical_volumes, damage) = logical_volumes(disk, &partitions);
        let damage = damage.map(|error| {
            ApiError::from_error(ErrorCode::Damaged, &error).with_hint(
                "without it the logical volumes cannot be found; a point before the damage may have it",
            )
        });
        Ok(Self { partitions, logical_volumes, damage })
    }

    /// What a reader has to know of the parts, a sentence each.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let sentence = |error: &ApiError| format!("logical volumes cannot be found: {}", error.message);
        let unread = self.all().filter_map(|part| part.unread().map(|error| error.message));
        self.damage.iter().map(sentence).chain(unread).collect()
    }

    /// Whether there is nothing to choose from because of what is damaged.
    pub(crate) fn is_lost(&self) -> bool {
        self.damage.is_some() && self.readable().next().is_none()
    }

    fn all(&self) -> impl Iterator<Item = Part<'_>> {
        self.partitions.iter().map(Part::Partition).chain(self.logical_volumes.iter().map(Part::Logical))
    }

    /// Those with a file system that can be read.
    pub(crate) fn readable(&self) -> impl Iterator<Item = Part<'_>> {
        self.all().filter(|part| part.content().is_readable())
    }

    /// The part of this number or name, or the only one that can be read.
    ///
    /// # Errors
    /// When there is no such part, or more than one to choose from.
    pub(crate) fn choose(&self, wanted: Option<&str>) -> Result<Part<'_>, Failure> {
        if let Some(wanted) = wanted {
            let is_it = |part: &Part<'_>| match part {
                Part::Partition(partition) => wanted.parse() == Ok(partition.number),
                Part::Logical(volume) => volume.name == wanted,
            };
            return self.all().find(is_it).ok_or_else(|| {
                if let Some(damage) = self.damage.as_ref().filter(|_| wanted.contains('/')) {
                    return damage.clone().into();
                }
                let why = format!("there is no partition {wanted}; what there is: {}", self.names());
                ApiError::new(ErrorCode::NotFound, why).into()
            });
        }
        let mut readable = self.readable();
        match (readable.next(), readable.next()) {
            (Some(only), None) => Ok(only),
            (None, _) if self.is_lost() => {
                Err(self.damage.clone().expect("it is damaged when it is lost").into())
            }
            // Opening it says why it cannot be read, and what can.
            (None, _) => {
                let last = |part: &Part<'_>| (part.unread().is_some(), part.length());
                Ok(self.all().max_by_key(last).expect("a disk has a part"))
            }
            (Some(_), Some(_)) => {
                Err(wrong_usage(format!("say which --partition: there are {}", self.names())))
            }
        }
    }

    fn names(&self) -> String {
        let name = |part: Part<'_>| {
            format!("{} ({}, {})", part.name(), part.content().name(), size_text(part.length()))
        };
        self.all().map(name).collect::<Vec<_>>().join(", ")
    }
}

impl Part<'_> {
    fn content(&self) -> Content {
        match self {
            Self::Partition(partition) => partition.content,
            Self::Logical(volume) => volume.content,
        }
    }

    fn length(&self) -> backtide_units::ByteCount {
        match self {
            Self::Partition(partition) => partition.length,
            Self::Logical(volume) => volume.length,
        }
    }

    /// Why it cannot be told what it holds, when its beginning cannot be read.
    fn unread(&self) -> Option<ApiError> {
        let why = match self {
            Self::Partition(partition) => partition.unread.as_ref(),
            Self::Logical(volume) => volume.unread.as_ref(),
        };
        let said = |why| format!("what {} holds cannot be told: {why}", self.full_name());
        why.map(|why| ApiError::new(ErrorCode::Damaged, said(why)))
    }

    fn full_name(&self) -> String {
        match self {
            Self::Partition(Partition { number: 0, .. }) => "the whole disk".to_owned(),
            Self::Partition(partition) => format!("partition {}", partition.number),
            Self::Logical(volume) => format!("the logical volume {}", volume.name),
        }
    }

    /// What `--partition` calls it.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Partition(partition) => partition.number.to_string(),
            Self::Logical(volume) => volume.name.clone(),
        }
    }

    /// Where bytes of it are on the disk.
    pub(crate) fn on_disk(&self, range: ByteRange) -> Vec<ByteRange> {
        match self {
            Self::Partition(partition) => {
                let start = partition.offset.0.saturating_add(range.start().0);
                ByteRange::new(ByteOffset(start), range.count()).into_iter().collect()
            }
            Self::Logical(volume) => volume.on_disk(range),
        }
    }

    /// The files in it.
    ///
    /// # Errors
    /// When it has none that can be read here.
    pub(crate) fn open(&self, disk: &Rc<PointReader>) -> Result<Volume, ApiError> {
        let disk = Rc::clone(disk) as Rc<dyn Source>;
        if let Some(error) = self.unread() {
            return Err(error);
        }
        let name = self.full_name();
        match self {
            Self::Partition(partition) => {
                let bytes = Rc::new(Window::new(disk, partition.range()));
                Volume::open(bytes, partition.content, &name)
            }
            Self::Logical(volume) => match &volume.unreadable {
                Some(why) => Err(ApiError::new(ErrorCode::Refused, format!("{name} cannot be read: {why}"))
                    .with_hint(super::volume::OTHERWISE)),
                None => Volume::open(Rc::new(volume.bytes(disk)), volume.content, &name),
            },
        }
    }
}
