//! `backtide scrub`: what a running receiver keeps, against its checksums.

use std::time::Duration;

use backtide_control::{ApiError, ErrorCode};
use backtide_receiver_api::{ScrubRequest, ScrubStatus};
use backtide_units::{ByteCount, CaptureTime, DiskName};
use clap::Args;

use crate::{
    arguments::ReceiverApi,
    context::Context,
    ending::{Ending, Failure},
    output::{
        checks::{disks_text, overlays_text, problems_text},
        progress::Progress,
    },
    quantity::{parse_size, time_text},
};

/// How often the receiver is asked how far it is.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// `backtide scrub`
#[derive(Args, Debug)]
pub(crate) struct Scrub {
    /// One disk's name or UUID [default: all disks]
    name: Option<DiskName>,
    /// The most that is read in a second; 0 is without limit [default: as the receiver is configured, else 64MiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    rate: Option<ByteCount>,
    /// Start it and do not wait for its end; `backtide receiver status` shows how far it is
    #[arg(long)]
    no_wait: bool,
    /// Show the scrub that runs, or the last one, and start none
    #[arg(long, conflicts_with_all = ["name", "rate", "no_wait", "cancel"])]
    last: bool,
    /// Call off the scrub that runs
    #[arg(long, conflicts_with_all = ["name", "rate", "no_wait"])]
    cancel: bool,
    #[command(flatten)]
    api: ReceiverApi,
}

impl Scrub {
    /// Runs a scrub to its end, which ctrl-c does not change: it goes on at the receiver.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let receiver = context.receiver(&self.api)?;
        let mut status = if self.cancel {
            receiver.cancel_scrub().await?
        } else if self.last {
            receiver.scrub_status().await?
        } else {
            let request = ScrubRequest { name: self.name, bytes_per_second_max: self.rate };
            receiver.scrub(&request).await?
        };
        if !self.last && !self.no_wait {
            let receiver = receiver.at_length();
            let mut progress = Progress::new(context, "scrubbed");
            let started = status.started;
            while status.running {
                progress.at(status.done_bytes, status.total_bytes);
                tokio::time::sleep(ASK_EVERY).await;
                status = receiver.scrub_status().await?;
                if status.started != started {
                    return Err(replaced(started, &status));
                }
            }
            progress.end();
        }
        context.print(&status, || text(&status))?;
        let mended = status.disks.iter().any(|disk| !disk.mended.is_empty());
        Ok(match (status.sound, mended || (status.cancelled && !self.cancel)) {
            (false, _) => Ending::Found(ErrorCode::Damaged),
            (true, true) => Ending::Warnings,
            (true, false) => Ending::Done,
        })
    }
}

/// The receiver tells of one scrub only. What another one finds is no answer to this one.
fn replaced(started: CaptureTime, other: &ScrubStatus) -> Failure {
    let message = format!(
        "the scrub that began at {} has ended, and what it found is not told any more: another one began at {}",
        time_text(started),
        time_text(other.started)
    );
    let hint =
        "`backtide scrub --last` shows that one, and `backtide receiver status` what is known to be damaged";
    ApiError::new(ErrorCode::Failed, message).with_hint(hint).into()
}

fn text(status: &ScrubStatus) -> String {
    let mut lines = vec![disks_text(&status.disks)];
    lines.extend(problems_text(&status.damage, &status.disks));
    lines.extend(overlays_text(&status.overlays));
    lines.push(
        match (status.running, status.cancelled, status.sound) {
            (true, false, _) => "the scrub goes on",
            (true, true, _) => "the scrub is called off and ends soon",
            (false, true, true) => "the scrub was called off; what it read is sound",
            (false, false, true) => "everything is sound",
            (false, _, false) => "the store is DAMAGED",
        }
        .to_owned(),
    );
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::played_agent::{Answer, PlayedAgent};

    fn told(started: u64, running: bool, cancelled: bool) -> Answer {
        let status = ScrubStatus {
            running,
            cancelled,
            started: CaptureTime(started),
            ended: (!running).then_some(CaptureTime(started + 1)),
            done_bytes: ByteCount(1),
            total_bytes: ByteCount(2),
            bytes_per_second_max: ByteCount::ZERO,
            disks: Vec::new(),
            overlays: Vec::new(),
            damage: Vec::new(),
            sound: true,
        };
        Some((200, serde_json::to_value(status).unwrap()))
    }

    async fn scrub(cancel: bool, answers: [Answer; 3]) -> Result<Ending, Failure> {
        let receiver = PlayedAgent::answering(answers);
        let api = ReceiverApi { receiver: Some(receiver.address()) };
        let scrub = Scrub { name: None, rate: None, no_wait: false, last: false, cancel, api };
        scrub.run(&receiver.context()).await
    }

    #[tokio::test]
    async fn another_scrub_is_not_waited_for_nor_taken_for_the_own_one() {
        for (cancel, other_runs) in [(false, false), (false, true), (true, false), (true, true)] {
            let own = || told(5, true, cancel);
            let ended = scrub(cancel, [own(), own(), told(9, other_runs, false)]).await;
            let Err(Failure::Error(error)) = ended else { panic!("{ended:?}") };
            assert_eq!(error.code, ErrorCode::Failed);
            assert!(error.message.contains("another one began"), "{error}");
            let ended = scrub(cancel, [own(), own(), told(5, false, cancel)]).await;
            assert_eq!(ended.unwrap(), Ending::Done);
        }
    }
}
