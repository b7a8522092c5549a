//! `backtide resize`: a disk that has grown.

use backtide_agent_api::{ResizeReport, ResizeRequest};
use backtide_units::{ByteCount, DiskName};
use clap::Args;

use crate::{
    context::Context,
    ending::{Ending, Failure},
    quantity::{parse_size, size_both},
};

/// `backtide resize`
#[derive(Args, Debug)]
pub(crate) struct Resize {
    /// The disk's name or UUID
    name: DiskName,
    /// Make a raw or qcow2 image this large first; a device or what is behind an NBD server is grown
    /// beforehand
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<ByteCount>,
    /// Hang up NBD clients that have the disk open: QEMU with a reconnect-delay connects again by itself
    #[arg(long)]
    reconnect: bool,
}

impl Resize {
    /// Lets the agent take over the size.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let request = ResizeRequest { size: self.size, reconnect: self.reconnect };
        let report = context.agent()?.resize(&self.name, request).await?;
        context.print(&report, || text(&report))?;
        Ok(Ending::Done)
    }
}

fn text(report: &ResizeReport) -> String {
    let ResizeReport { size_before, hung_up, disk } = report;
    let name = disk.name.as_str();
    if disk.size == *size_before {
        return format!("{name} has {} already", size_both(disk.size));
    }
    let grown = format!("{name} has {} now, and had {}", size_both(disk.size), size_both(*size_before));
    let guest = match hung_up {
        0 => "clients that connect from now on see it".to_owned(),
        _ => format!(
            "QEMU connects again with its guest's next request, if it has a \
             reconnect-delay; then tell it to show the guest the new size:\n  \
             virsh blockresize DOMAIN DEVICE {0}B\n  \
             or QMP: {{\"execute\": \"block_resize\", \"arguments\": {{\"node-name\": NODE, \"size\": {0}}}}}",
            disk.size.0
        ),
    };
    format!("{grown}: {guest}")
}
