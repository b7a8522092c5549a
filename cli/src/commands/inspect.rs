//! `backtide inspect`: a file of the store in readable form.

use std::{
    io::{self, Read},
    path::PathBuf,
    sync::Arc,
};

use backtide_control::{ApiError, ErrorCode};
use backtide_storage::{RealStorage, Storage};
use clap::Args;
use serde::Serialize;

use crate::{
    context::Context,
    ending::{Ending, Failure, failed, io_failure, wrong_usage},
};

/// `backtide inspect`
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// Any file of a receiver's store but its lock: segments (*.seg), packs of images (*.pack), bases of logs (base.1, base.2), how far
    /// logs are durable (durable), overlays (*.map, *.data), and all *.json; a receiver may be running on it
    file: PathBuf,
}

/// What a file of a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Segment,
    Pack,
    Base,
    Durable,
    OverlayMap,
    OverlayData,
    Json,
}

/// How each kind begins.
const KINDS: [([u8; 8], Kind); 8] = [
    (backtide_segment::MAGIC, Kind::Segment),
    (backtide_images::PACK_MAGIC, Kind::Pack),
    (backtide_recovery::BASE_MAGIC, Kind::Base),
    (backtide_log_receiver::DURABLE_MAGIC, Kind::Durable),
    (backtide_overlay::MAP_MAGIC, Kind::OverlayMap),
    (backtide_overlay::DATA_MAGIC, Kind::OverlayData),
    (*b"{\"magic\"", Kind::Json),
    // `store.json` is older than the others.
    (*b"{\n  \"mag", Kind::Json),
];

/// How the files of a store end that are called so: one whose beginning is damaged is known by its name.
const NAMES: [(&str, Kind); 16] = [
    (".seg", Kind::Segment),
    (".pack", Kind::Pack),
    ("/base.1", Kind::Base),
    ("/base.2", Kind::Base),
    // The copy of a base with the images.
    (".base", Kind::Base),
    ("/durable", Kind::Durable),
    (".map", Kind::OverlayMap),
    (".data", Kind::OverlayData),
    ("/store.json", Kind::Json),
    ("/retention.json", Kind::Json),
    ("/findings.json", Kind::Json),
    ("/scrub.json", Kind::Json),
    ("/mounts.json", Kind::Json),
    ("/disk.json", Kind::Json),
    ("/cut.json", Kind::Json),
    ("/shortfalls.json", Kind::Json),
];

impl Kind {
    /// What a file is called that is damaged.
    fn name(self) -> &'static str {
        match self {
            Self::Segment => "segment",
            Self::Pack => "pack",
            Self::Base => "base",
            Self::Durable => "mark",
            Self::OverlayMap | Self::OverlayData => "overlay",
            Self::Json => "file",
        }
    }

    /// Of a file that begins as none does.
    fn by_name(path: &std::path::Path) -> Option<Self> {
        let directory = path.parent().and_then(std::path::Path::file_name).and_then(|name| name.to_str());
        let is_json = path.extension().is_some_and(|ending| ending == "json");
        if is_json && matches!(directory, Some("forgotten" | "overlays")) {
            return Some(Self::Json);
        }
        let name = format!("/{}", path.file_name()?.to_str()?);
        NAMES.iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, kind)| *kind)
    }
}

/// The JSON of the command. The lines are for people.
#[derive(Debug, Serialize)]
struct Listing {
    file: PathBuf,
    lines: Vec<String>,
}

impl Inspect {
    /// Prints the listing; ends with the code of damage when anything in the file is damaged, which a line of
    /// the listing names.
    pub(crate) fn run(self, context: &Context) -> Result<Ending, Failure> {
        let kind = self.kind()?;
        let whole = self.print(context, kind)?;
        if kind == Kind::Segment
            && let Some(why) = self.bad_header()?
        {
            context.warn(&format!("the segment is damaged: {why}"));
            return Ok(Ending::Found(ErrorCode::Damaged));
        }
        if !whole {
            context.warn(&format!("the {} is damaged: the listing says where", kind.name()));
            return Ok(Ending::Found(ErrorCode::Damaged));
        }
        Ok(Ending::Done)
    }

    /// What the file is; refuses what was never of a store, before anything is printed.
    fn kind(&self) -> Result<Kind, Failure> {
        let failed = |error: io::Error| io_failure(self.file.display(), &error);
        let metadata = std::fs::metadata(&self.file).map_err(failed)?;
        if !metadata.is_file() {
            return Err(wrong_usage(format!("{} is no file", self.file.display())));
        }
        let mut start = Vec::new();
        let file = std::fs::File::open(&self.file).map_err(failed)?;
        file.take(backtide_segment::MAGIC.len() as u64).read_to_end(&mut start).map_err(failed)?;
        let known = KINDS.iter().find(|(magic, _)| start == *magic).map(|(_, kind)| *kind);
        known.or_else(|| Kind::by_name(&self.file)).ok_or_else(|| {
            let message = format!(
                "{} is no file of a store: expected it to begin as one of its files does, found {:?}",
                self.file.display(),
                String::from_utf8_lossy(&start)
            );
            let hint = "segments are the *.seg files in disks/<uuid>/segments of a receiver's store, packs the *.pack files \
                        in images/packs";
            ApiError::new(ErrorCode::Usage, message).with_hint(hint).into()
        })
    }

    fn bad_header(&self) -> Result<Option<String>, Failure> {
        let mut bytes = Vec::new();
        let file =
            std::fs::File::open(&self.file).map_err(|error| io_failure(self.file.display(), &error))?;
        let limit = backtide_segment::SEGMENT_HEADER_LENGTH;
        file.take(limit as u64)
            .read_to_end(&mut bytes)
            .map_err(|error| io_failure(self.file.display(), &error))?;
        let Ok(header) = <&[u8; backtide_segment::SEGMENT_HEADER_LENGTH]>::try_from(&bytes[..]) else {
            return Ok(Some(format!("{} ends within its header", self.file.display())));
        };
        let header = backtide_segment::SegmentHeader::decode(header, &self.file);
        Ok(header.err().map(|error| error.to_string()))
    }

    /// Prints it; whether all of it is whole.
    fn print(&self, context: &Context, kind: Kind) -> Result<bool, Failure> {
        if !context.json() {
            let mut out = io::BufWriter::new(io::stdout().lock());
            return self.list(kind, &mut out);
        }
        let mut text = Vec::new();
        let whole = self.list(kind, &mut text)?;
        let lines = String::from_utf8_lossy(&text).lines().map(str::to_owned).collect();
        context.print(&Listing { file: self.file.clone(), lines }, String::new)?;
        Ok(whole)
    }

    fn list(&self, kind: Kind, out: &mut dyn io::Write) -> Result<bool, Failure> {
        let name = self.file.display();
        let path = std::path::absolute(&self.file).map_err(|error| io_failure(name, &error))?;
        let (Some(parent), Some(file)) = (path.parent(), path.file_name()) else {
            return Err(wrong_usage(format!("{} is no file", self.file.display())));
        };
        // Opening a storage makes its directory; looking at a file must not.
        let found = std::fs::metadata(&path).map_err(|error| io_failure(self.file.display(), &error))?;
        if !found.is_file() {
            return Err(wrong_usage(format!("{} is no file: name one of a store", self.file.display())));
        }
        let opened = RealStorage::open(parent)
            .map_err(|error| io_failure(format_args!("open {}", parent.display()), &error))?;
        let shared: Arc<dyn Storage> = Arc::new(opened);
        let (storage, file) = (&*shared, std::path::Path::new(file));
        let listed = match kind {
            Kind::Segment => backtide_segment::inspect(storage, file, out),
            Kind::Pack => backtide_images::inspect(storage, file, out),
            Kind::Base => backtide_recovery::inspect_base(storage, file, out),
            Kind::Durable => backtide_log_receiver::inspect_durable(storage, file, out),
            Kind::OverlayMap => backtide_overlay::inspect_map(storage, file, out),
            Kind::OverlayData => backtide_overlay::inspect_data(&shared, file, out),
            Kind::Json => backtide_log_receiver::inspect_json(storage, file, out),
        };
        match listed.and_then(|whole| out.flush().map(|()| whole)) {
            Ok(whole) => Ok(whole),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::ClosedPipe),
            Err(error) => Err(failed(format!("inspect {}: {error}", self.file.display()))),
        }
    }
}
