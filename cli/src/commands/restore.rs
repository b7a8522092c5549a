//! `backtide restore`: a point of a disk to a file, a device or an NBD server.

use std::time::{Duration, Instant};

use backtide_control::ErrorCode;
use backtide_receiver_api::{ByteSpan, Mount, MountRequest, ReceiverClient};
use backtide_units::{ByteCount, CaptureTime, DiskId, DiskName, Lsn};
use clap::Args;
use serde::Serialize;

use crate::{
    arguments::ReceiverApi,
    commands::{Stop, mounted},
    context::Context,
    ending::{Ending, Failure},
    output::progress::Progress,
    quantity::{duration_text, size_both, time_text},
    restore::{Goal, Target, Wanted, copy, refuse_no_name, refuse_no_room, take, verify},
};

/// How long the receiver may take to unmount what was restored: it ends by itself, too.
const UNMOUNT_TIME: Duration = Duration::from_secs(3);

/// `backtide restore`
#[derive(Args, Debug)]
pub(crate) struct Restore {
    /// The disk's name or UUID
    name: DiskName,
    /// The point to restore
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    at: String,
    /// Where to: a file, which becomes sparse and has mode 0600, a block device or an NBD URI
    #[arg(long, value_name = "PATH|URI")]
    output: String,
    /// Overwrite a file or a block device that exists, or an NBD export that holds data
    #[arg(long)]
    force: bool,
    /// Write only what differs from what the output holds, in place; needs --force
    #[arg(long)]
    only_changed: bool,
    /// Restore what is sound also of a point of which blocks are damaged: these become zeroes, are listed, and it ends with 8
    #[arg(long)]
    around_damage: bool,
    /// Do not read the result back to compare it
    #[arg(long)]
    no_verify: bool,
    #[command(flatten)]
    api: ReceiverApi,
}

/// What was restored; the JSON of the command.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// The disk's name.
    pub(crate) disk: DiskName,
    /// The disk's identity.
    pub(crate) uuid: DiskId,
    /// The last write the point includes.
    pub(crate) lsn: Lsn,
    /// When that was captured.
    pub(crate) time: CaptureTime,
    /// Where it was restored to.
    pub(crate) output: String,
    /// The point as it was asked for.
    pub(crate) asked: String,
    /// The size of the disk.
    pub(crate) size: ByteCount,
    /// How much was written; the rest are zeroes, or were there.
    pub(crate) data_bytes: ByteCount,
    /// How much of the rest an earlier restore had written that did not come to its end.
    pub(crate) resumed_bytes: ByteCount,
    /// What is damaged at the receiver and was left as zeroes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) damaged: Vec<ByteSpan>,
    /// Whether it was read back and compared.
    pub(crate) verified: bool,
    /// How long it took.
    pub(crate) seconds: f64,
}

impl Restore {
    /// Restores, or ends with nothing changed but a device or server that was being written.
    pub(crate) async fn run(self, context: &Context, mut stop: Stop) -> Result<Ending, Failure> {
        refuse_no_name(&self.output)?;
        let receiver = context.receiver(&self.api)?;
        let (name, at) = (self.name, self.at);
        let (temporary, writable) = (true, false);
        let request = MountRequest { name, at, nbd: None, temporary, writable, changed_since: None };
        let (force, only_changed, around_damage) = (self.force, self.only_changed, self.around_damage);
        let verify = !self.no_verify;
        let what = What { output: &self.output, force, only_changed, around_damage, verify };
        let report = restore(context, &receiver, &request, what, stop.asked()).await?;
        context.print(&report, || report_text(&report))?;
        if report.damaged.is_empty() {
            return Ok(Ending::Done);
        }
        let bytes = ByteCount(report.damaged.iter().map(|span| span.length.0).sum());
        context.warn(&format!(
            "{} of this point of disk {} cannot be read at the receiver, and are zeroes in {}",
            size_both(bytes),
            report.disk,
            report.output
        ));
        Ok(Ending::Found(ErrorCode::Damaged))
    }
}

/// What to do with a point.
#[derive(Clone, Copy, Debug)]
pub(crate) struct What<'a> {
    /// Where to write it.
    pub(crate) output: &'a str,
    /// Whether to replace what is there.
    pub(crate) force: bool,
    /// Whether to write only what differs from that.
    pub(crate) only_changed: bool,
    /// Whether to leave zeroes where the point is damaged.
    pub(crate) around_damage: bool,
    /// Whether to read it back.
    pub(crate) verify: bool,
}

/// Mounts the point, restores it, and unmounts it, however that ends.
pub(crate) async fn restore(
    context: &Context,
    receiver: &ReceiverClient,
    request: &MountRequest,
    what: What<'_>,
    stop: impl Future<Output = ()>,
) -> Result<Report, Failure> {
    let mut stop = std::pin::pin!(stop);
    // A mount that comes after the signal is without a client and ends by itself.
    let mount = tokio::select! {
        mount = receiver.mount(request) => mount?,
        () = &mut stop => return Err(Failure::Interrupted),
    };
    context.remark(mount.warning.as_deref());
    let restored = tokio::select! {
        restored = restore_mounted(context, &mount, &request.at, what) => restored,
        () = &mut stop => Err(Failure::Interrupted),
    };
    let Ok(unmounted) = tokio::time::timeout(UNMOUNT_TIME, receiver.unmount(&mount.id, None)).await else {
        if restored.is_ok() {
            context.warn(&format!("the mount {} may still be there: the receiver does not answer", mount.id));
        }
        return restored;
    };
    // It ends by itself with its client, as a rule before this asks for it.
    if let (Ok(_), Err(error)) = (&restored, &unmounted)
        && error.code != ErrorCode::NotFound
    {
        context.warn(&format!("the mount {} is still there: {error}", mount.id));
    }
    restored
}

async fn restore_mounted(
    context: &Context,
    mount: &Mount,
    asked: &str,
    what: What<'_>,
) -> Result<Report, Failure> {
    let begun = Instant::now();
    let goal = Goal { disk: mount.disk.uuid, lsn: mount.lsn, size: mount.size };
    // Before the target is looked at, which can take longer than the receiver keeps a mount for a client that has not come;
    // and before a partial file is in our hands, which goes with a target that is given up.
    let source = mounted::connect(mount).await?;
    let leftover = take(context, what.output, &goal)?;
    let goes_on = leftover.is_some();
    let wanted = Wanted { goal, force: what.force, only_changed: what.only_changed, leftover };
    let target = Target::open(what.output, wanted).await?;
    // A part of what is needed is there already then. Who forces it may know of zeroes that a guest wrote, and that take no room.
    if !goes_on && !what.force {
        refuse_no_room(&source, &target).await?;
    }
    let mut progress = Progress::new(context, "restored");
    let copied = match copy(&source, &target, what.verify, what.around_damage, &mut progress).await {
        Ok(copied) => copied,
        Err(Failure::Error(error))
            if error.code == ErrorCode::Damaged && error.hint.is_none() && !what.around_damage =>
        {
            let name = &mount.disk.name;
            let hint = format!(
                "--around-damage restores the rest, with zeroes there; `backtide scrub {name}` mends what it can, and \
                 `backtide points {name}` says which points need the place"
            );
            return Err(error.with_hint(hint).into());
        }
        Err(Failure::Error(error)) if error.code == ErrorCode::Unreachable => {
            let hint = format!("{}: --at lsn:{}", target.leave(), mount.lsn);
            return Err(error.with_hint(hint).into());
        }
        Err(error) => return Err(error),
    };
    drop(source);
    if what.verify {
        verify(&target, &copied, &mut Progress::new(context, "verified")).await?;
    }
    target.publish().await?;
    Ok(Report {
        disk: mount.disk.name.clone(),
        uuid: mount.disk.uuid,
        lsn: mount.lsn,
        time: mount.time,
        output: target.to_string(),
        asked: asked.to_owned(),
        size: mount.size,
        data_bytes: copied.data_bytes,
        resumed_bytes: copied.resumed_bytes,
        damaged: copied
            .damaged
            .iter()
            .map(|range| ByteSpan { offset: range.start(), length: range.count() })
            .collect(),
        verified: what.verify,
        seconds: begun.elapsed().as_secs_f64(),
    })
}

fn report_text(report: &Report) -> String {
    let resumed = match report.resumed_bytes.is_zero() {
        true => String::new(),
        false => format!(" and {} were there from before", size_both(report.resumed_bytes)),
    };
    let damaged = report.damaged.iter().map(|span| {
        format!("\n  DAMAGED, zeroes instead: bytes {}..{}", span.offset, span.offset.0 + span.length.0)
    });
    let damaged: String = damaged.collect();
    format!(
        "restored {} at {}, which is lsn:{}, written last at {}, to {}: {}, of which {} were written{}, in {}{}{damaged}",
        report.disk.as_str(),
        report.asked,
        report.lsn,
        time_text(report.time),
        report.output,
        size_both(report.size),
        size_both(report.data_bytes),
        resumed,
        duration_text(report.seconds),
        if report.verified { ", verified" } else { ", not verified" }
    )
}

#[cfg(test)]
mod tests {
    use backtide_receiver_api::DiskRef;
    use tokio::net::UnixListener;

    use super::*;
    use crate::played_agent::PlayedAgent;

    const SIZE: ByteCount = ByteCount(1 << 20);

    fn mount(socket: &std::path::Path) -> Mount {
        Mount {
            id: "vm1-1".to_owned(),
            disk: DiskRef { name: "vm1".parse().unwrap(), uuid: DiskId::random(), size: SIZE },
            uri: format!("nbd+unix:///vm1-1?socket={}", socket.display()),
            lsn: Lsn(7),
            time: CaptureTime(5),
            size: SIZE,
            mounted: CaptureTime(6),
            clients: 0,
            overlay: None,
            changed_since: None,
            warning: None,
        }
    }

    #[tokio::test]
    async fn what_an_earlier_restore_has_done_outlives_a_mount_that_cannot_be_reached() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd.sock");
        // It was there: nobody accepts any more.
        drop(UnixListener::bind(&socket).unwrap());
        let mount = mount(&socket);
        let output = directory.path().join("out.img");
        let output = output.to_str().unwrap();
        let goal = Goal { disk: mount.disk.uuid, lsn: mount.lsn, size: mount.size };
        let wanted = Wanted { goal, force: false, only_changed: false, leftover: None };
        let target = Target::open(output, wanted).await.unwrap();
        // As when it is killed.
        target.leave();
        drop(target);
        let names = || {
            let entries = std::fs::read_dir(directory.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        let before = names();
        assert_eq!(before.len(), 3, "the socket, a partial file and its notes: {before:?}");

        let answer = serde_json::to_value(&mount).unwrap();
        let receiver = PlayedAgent::answering([Some((200, answer.clone())), Some((200, answer))]);
        let client = ReceiverClient::new(&receiver.address()).unwrap();
        let request = MountRequest {
            name: "vm1".parse().unwrap(),
            at: "lsn:7".to_owned(),
            nbd: None,
            temporary: true,
            writable: false,
            changed_since: None,
        };
        let what = What { output, force: false, only_changed: false, around_damage: false, verify: true };
        let ended = restore(&receiver.context(), &client, &request, what, std::future::pending::<()>()).await;
        let Err(Failure::Error(error)) = ended else { panic!("{ended:?}") };
        assert_eq!(error.code, ErrorCode::Unreachable, "{error}");
        assert_eq!(names(), before);
    }
}
