//! `backtide find-change`: when a block last changed.

use backtide_receiver_api::{BlockChange, ChangedBy, FindChangeRequest, FoundChange};
use backtide_units::{ByteCount, ByteOffset, DiskName};
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure},
    quantity::{parse_size, time_text},
};

/// `backtide find-change`
#[derive(Args, Debug)]
pub(crate) struct FindChange {
    /// The disk's name or UUID
    name: DiskName,
    /// A byte of the block, from the disk's start: `1048576` or `1MiB`
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    offset: ByteCount,
    /// The point up to which changes count
    #[arg(long, value_name = "POINT", default_value = "latest", allow_hyphen_values = true)]
    at: String,
    #[command(flatten)]
    api: ReceiverApi,
}

impl FindChange {
    /// Prints the change, and the last point without it.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let request = FindChangeRequest { offset: ByteOffset(self.offset.0), at: self.at };
        let found = context.receiver(&self.api)?.find_change(&self.name, &request).await?;
        context.remark(found.at.warning.as_deref());
        context.print(&found, || text(&found))?;
        Ok(Ending::Done)
    }
}

fn text(found: &FoundChange) -> String {
    let FoundChange { at, block, change } = found;
    let block = format!("bytes {} to {}", block.offset, block.offset.0 + block.length.0);
    let Some(BlockChange { lsn, time, by, before }) = change else {
        return format!("{block} were never written up to lsn:{}", at.lsn);
    };
    let how = match by {
        ChangedBy::Write => "changed last",
        ChangedBy::Resync => "were brought last by a resync",
    };
    let before = match before {
        Some(before) => {
            format!("the last point before that is lsn:{} ({})", before.lsn, time_text(before.time))
        }
        None => "there is no point before that".to_owned(),
    };
    format!("{block} {how} at lsn:{lsn} ({}); {before}", time_text(*time))
}
