//! `backtide inspect`: a file of the store in readable form.

use std::{
    io::{self, Read},
    path::PathBuf,
};

use backtide_control::{ApiError, ErrorCode};
use backtide_storage::RealStorage;
use clap::Args;
use serde::Serialize;

use crate::{
    context::Context,
    ending::{Ending, Failure, failed, io_failure, wrong_usage},
};

/// `backtide inspect`
#[derive(Args, Debug)]
pub(crate) struct Inspect {
    /// A file of a receiver's store: a segment (*.seg), a pack of images (*.pack) or the base of a log (base.1, base.2); a
    /// receiver may be running on it
    file: PathBuf,
}

/// What a file of a store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Segment,
    Pack,
    Base,
}

/// How each kind begins.
const KINDS: [([u8; 8], Kind); 3] = [
    (backtide_segment::MAGIC, Kind::Segment),
    (backtide_images::PACK_MAGIC, Kind::Pack),
    (backtide_recovery::BASE_MAGIC, Kind::Base),
];

/// The JSON of the command. The lines are for people.
#[derive(Debug, Serialize)]
struct Listing {
    file: PathBuf,
    lines: Vec<String>,
}

impl Inspect {
    /// Prints the listing; ends with the code of damage when anything in a segment is damaged, which a line of
    /// the listing names.
    pub(crate) fn run(self, context: &Context) -> Result<Ending, Failure> {
        let kind = self.kind()?;
        let whole = self.print(context, kind)?;
        if kind != Kind::Segment {
            return Ok(Ending::Done);
        }
        if let Some(why) = self.bad_header()? {
            context.warn(&format!("the segment is damaged: {why}"));
            return Ok(Ending::Found(ErrorCode::Damaged));
        }
        if !whole {
            context.warn("the segment is damaged: the listing says where");
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
        let known = KINDS.iter().find(|(magic, _)| start == *magic);
        let Some((_, kind)) = known else {
            let message = format!(
                "{} is no segment of a store: expected it to begin with {:?}, found {:?}",
                self.file.display(),
                String::from_utf8_lossy(&backtide_segment::MAGIC),
                String::from_utf8_lossy(&start)
            );
            let hint = "segments are the *.seg files in disks/<uuid>/segments of a receiver's store, packs the *.pack files \
                        in images/packs";
            return Err(ApiError::new(ErrorCode::Usage, message).with_hint(hint).into());
        };
        Ok(*kind)
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
            return Err(wrong_usage(format!(
                "{} is no file: name a *.seg file of a store",
                self.file.display()
            )));
        }
        let storage = RealStorage::open(parent)
            .map_err(|error| io_failure(format_args!("open {}", parent.display()), &error))?;
        let listed = match kind {
            Kind::Segment => backtide_segment::inspect(&storage, file.as_ref(), out),
            Kind::Pack => backtide_images::inspect(&storage, file.as_ref(), out).map(|()| true),
            Kind::Base => backtide_recovery::inspect_base(&storage, file.as_ref(), out).map(|()| true),
        };
        match listed.and_then(|whole| out.flush().map(|()| whole)) {
            Ok(whole) => Ok(whole),
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::ClosedPipe),
            Err(error) => Err(failed(format!("inspect {}: {error}", self.file.display()))),
        }
    }
}
