//! `backtide resync`: force one.

use backtide_agent_api::{DiskStatus, Mode, ResyncExtent, ResyncRequest};
use backtide_control::{ApiError, ErrorCode};
use backtide_units::DiskName;
use clap::Args;

use crate::{
    commands::wait,
    context::Context,
    ending::{Ending, Failure},
    output::status::{disk_line, way_out},
};

/// `backtide resync`
#[derive(Args, Debug)]
pub(crate) struct Resync {
    /// The disk's name or UUID
    name: DiskName,
    /// Compare hashes of every allocated block, and send what differs
    #[arg(long, conflicts_with = "full")]
    compare: bool,
    /// Send every allocated block
    #[arg(long)]
    full: bool,
    /// Wait until the disk is in sync
    #[arg(long)]
    wait: bool,
}

impl Resync {
    fn extent(&self) -> ResyncExtent {
        match (self.compare, self.full) {
            (true, _) => ResyncExtent::Compare,
            (false, true) => ResyncExtent::Full,
            (false, false) => ResyncExtent::Changed,
        }
    }

    /// Forces a resync and, if asked to, waits for its end.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        self.refuse_idle(&agent.disk(&self.name).await?)?;
        let mut disk = agent.resync(&self.name, ResyncRequest { extent: self.extent() }).await?;
        if self.wait {
            disk = {
                let ended = |disk: &DiskStatus| self.refuse_idle(disk).map(|()| wait::caught_up(disk));
                wait::until_it(context, &agent, &self.name, ended, None).await?
            };
        }
        context.print(&disk, || disk_line(&disk))?;
        if disk.mode == Mode::Paused {
            let name = &disk.name;
            context.remark(Some(&format!(
                "disk {name} is paused: the resync begins after `backtide resume {name}`"
            )));
        }
        Ok(Ending::Done)
    }

    /// Refuses a resync that never comes to its end as the disk is now. One that a pause puts off is remembered, unless it is
    /// what any resume does.
    fn refuse_idle(&self, disk: &DiskStatus) -> Result<(), Failure> {
        let name = &disk.name;
        if disk.reason_code == "fenced" {
            let message = format!("disk {name} is not resynchronized: {}", disk.reason);
            let error = ApiError::new(ErrorCode::Fenced, message);
            return Err(way_out(disk).into_iter().fold(error, ApiError::with_hint).into());
        }
        if disk.open_elsewhere {
            let message = format!(
                "disk {name} is not resynchronized while a QEMU has its image itself open, to write it"
            );
            return Err(ApiError::new(ErrorCode::Refused, message)
                .with_hint(format!(
                    "shut down the program that has {} open: everything is compared by itself then; `backtide wait {name} --for sync` \
                     waits for that",
                    disk.image
                ))
                .into());
        }
        let put_off = self.extent() != ResyncExtent::Changed && !self.wait;
        if disk.mode == Mode::Paused && !put_off {
            let message = format!("disk {name} is paused: nothing is sent to its receiver");
            return Err(ApiError::new(ErrorCode::Refused, message)
                .with_hint(format!("`backtide resume {name}` first"))
                .into());
        }
        Ok(())
    }
}
