//! `backtide verify`: the live disk against the receiver, while the guest goes on.

use std::time::Duration;

use backtide_agent_api::{AgentClient, Mode, VerifyRequest, VerifyState, VerifyStatus};
use backtide_control::ErrorCode;
use backtide_units::{ByteCount, DiskName};
use clap::Args;

use crate::{
    commands::{Stop, attach::POLL, wait::caught_up},
    context::Context,
    ending::{Ending, Failure, failed},
    output::progress::Progress,
    quantity::{count_text, size_both},
};

/// `backtide verify`
#[derive(Args, Debug)]
pub(crate) struct Verify {
    /// The disk's name or UUID
    name: DiskName,
    /// Send what differs anew, and wait until the receiver has it
    #[arg(long)]
    repair: bool,
    /// Do not wait for the result
    #[arg(long)]
    no_wait: bool,
    /// Show the verify that is running or the last one, and begin none
    #[arg(long, conflicts_with_all = ["no_wait", "repair"])]
    last: bool,
    /// End the verify that is running
    #[arg(long, conflicts_with_all = ["no_wait", "last", "repair"])]
    cancel: bool,
}

/// How many differing ranges people are shown; JSON has more.
const SHOWN_MAX: usize = 20;

/// How long the agent may take to end a verify whose command was stopped.
const CANCEL_TIME: Duration = Duration::from_secs(3);

impl Verify {
    /// Begins a verify and waits for its report. Differences end with the exit code of damage. Stopped
    /// by a signal, it ends the verify it began. Differences that were repaired end with warnings.
    pub(crate) async fn run(self, context: &Context, mut stop: Stop) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let begun = tokio::select! {
            begun = self.begin(&agent) => begun?,
            () = stop.asked() => return Err(Failure::Interrupted),
        };
        if self.cancel {
            context.print(&begun, || report_text(&begun))?;
            return Ok(Ending::Done);
        }
        let verify = if self.no_wait || self.last {
            begun
        } else {
            tokio::select! {
                ended = ended(context, &agent, begun) => ended?,
                () = stop.asked() => {
                    // An agent that does not answer is not waited for.
                    if let Ok(cancelled) =
                        tokio::time::timeout(CANCEL_TIME, agent.cancel_verify(&self.name)).await
                    {
                        cancelled?;
                    }
                    return Err(Failure::Interrupted);
                }
            }
        };
        let repairs = self.repair && !self.no_wait && verify.state == VerifyState::Done;
        if repairs && verify.differing_count > 0 {
            tokio::select! {
                repaired = repaired(&agent, &verify) => repaired?,
                () = stop.asked() => return Err(Failure::Interrupted),
            }
            context.print(&verify, || {
                format!("{}\nrepaired: the receiver has them now", report_text(&verify))
            })?;
            return Ok(Ending::Warnings);
        }
        context.print(&verify, || report_text(&verify))?;
        ending(verify)
    }

    async fn begin(&self, agent: &AgentClient) -> Result<VerifyStatus, Failure> {
        Ok(if self.cancel {
            agent.cancel_verify(&self.name).await?
        } else if self.last {
            agent.verify_status(&self.name).await?
        } else {
            agent.start_verify(&self.name, VerifyRequest { repair: self.repair }).await?
        })
    }
}

/// The verify once it has ended.
async fn ended(
    context: &Context,
    agent: &AgentClient,
    mut verify: VerifyStatus,
) -> Result<VerifyStatus, Failure> {
    let agent = agent.at_length();
    let mut progress = Progress::new(context, "compared");
    while verify.state == VerifyState::Running {
        progress.at(verify.compared_bytes, verify.total_bytes);
        tokio::time::sleep(POLL).await;
        let now = agent.verify_status(&verify.disk).await?;
        if now.id != verify.id {
            return Err(failed(format!("another verify of disk {} has begun", verify.disk.as_str())));
        }
        verify = now;
    }
    progress.end();
    Ok(verify)
}

/// Waits until the pass that the verify began has brought the disk in sync again.
async fn repaired(agent: &AgentClient, verify: &VerifyStatus) -> Result<(), Failure> {
    let agent = agent.at_length();
    loop {
        let disk = agent.disk(&verify.disk).await?;
        match disk.mode {
            Mode::Sync if caught_up(&disk) => return Ok(()),
            Mode::Sync | Mode::Resync | Mode::Tracking => tokio::time::sleep(POLL).await,
            // It was; what it is now comes when it answers.
            Mode::Paused | Mode::Detached if !disk.is_of_now() => tokio::time::sleep(POLL).await,
            Mode::Paused | Mode::Detached => {
                let message = format!("disk {} was not repaired: {}", disk.name.as_str(), disk.reason);
                return Err(failed(message));
            }
        }
    }
}

fn ending(verify: VerifyStatus) -> Result<Ending, Failure> {
    match (verify.state, verify.error) {
        (VerifyState::Failed, Some(error)) => Err(error.into()),
        (VerifyState::Failed, None) => Err(failed("the verify failed and the agent did not say why")),
        (VerifyState::Done, _) if verify.differing_count > 0 => Ok(Ending::Found(ErrorCode::Damaged)),
        (VerifyState::Done | VerifyState::Running, _) => Ok(Ending::Done),
    }
}

fn report_text(verify: &VerifyStatus) -> String {
    let at = verify.at.map_or_else(|| "so far".to_owned(), |at| format!("up to lsn:{at}"));
    let name = verify.disk.as_str();
    let compared = size_both(verify.compared_bytes);
    match verify.state {
        VerifyState::Running => {
            format!("disk {name}: comparing {at}, {compared} of {}", size_both(verify.total_bytes))
        }
        VerifyState::Failed => {
            let why = verify.error.as_ref().map_or_else(String::new, |error| format!(": {}", error.message));
            format!("disk {name}: not verified, {compared} were compared {at}{why}")
        }
        VerifyState::Done if verify.differing_count == 0 => {
            format!("disk {name}: identical at the receiver {at}, {compared} compared")
        }
        VerifyState::Done => {
            let ByteCount(differing) = verify.differing_bytes;
            let mut text = format!(
                "disk {name}: DIFFERS from the receiver {at} in {}, {differing} bytes of {compared}",
                count_text(verify.differing_count, "range")
            );
            for span in verify.differing.iter().take(SHOWN_MAX) {
                text.push_str(&format!("\n  {} +{}", span.offset, span.length));
            }
            if verify.differing_count > SHOWN_MAX as u64 {
                text.push_str(&format!("\n  and {} more", verify.differing_count - SHOWN_MAX as u64));
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use backtide_agent_api::{ByteSpan, DiskStatus};
    use backtide_units::{ByteOffset, CaptureTime, Lsn};

    use super::*;
    use crate::{output::status::tests::in_sync, played_agent::PlayedAgent};

    #[tokio::test]
    async fn repaired_is_what_the_receiver_is_known_to_have_now() {
        let then = |code: &str| DiskStatus { reason_code: code.to_owned(), ..in_sync() };
        let paused = DiskStatus { mode: Mode::Paused, ..then("not-answering") };
        let due = DiskStatus { resync_due: true, ..in_sync() };
        let shown = [then("not-answering"), then("detaching"), paused, due, in_sync()];
        let agent = PlayedAgent::showing(shown.clone());
        repaired(&agent.context().agent().unwrap(), &done(vec![])).await.unwrap();
        assert_eq!(agent.calls().len(), shown.len());
        let paused = DiskStatus { mode: Mode::Paused, ..in_sync() };
        let agent = PlayedAgent::showing([paused]);
        let refused = repaired(&agent.context().agent().unwrap(), &done(vec![])).await;
        assert!(refused.is_err());
    }

    fn done(differing: Vec<ByteSpan>) -> VerifyStatus {
        VerifyStatus {
            disk: "vm1".parse().unwrap(),
            id: 1,
            state: VerifyState::Done,
            at: Some(Lsn(40)),
            from_lsn: Lsn(40),
            to_lsn: Some(Lsn(44)),
            started: CaptureTime(1),
            ended: Some(CaptureTime(2)),
            compared_bytes: ByteCount(1 << 20),
            total_bytes: ByteCount(1 << 20),
            differing_bytes: ByteCount(differing.iter().map(|span| span.length.0).sum()),
            differing_count: differing.len() as u64,
            differing,
            error: None,
        }
    }

    #[test]
    fn differences_are_listed_and_end_as_damage() {
        let same = done(vec![]);
        assert!(report_text(&same).starts_with("disk vm1: identical at the receiver up to lsn:40"));
        assert_eq!(ending(same).unwrap(), Ending::Done);
        let span = ByteSpan { offset: ByteOffset(65536), length: ByteCount(65536) };
        let differs = done(vec![span; 21]);
        let text = report_text(&differs);
        assert!(
            text.contains("DIFFERS") && text.contains("\n  65536 +65536") && text.ends_with("and 1 more"),
            "{text}"
        );
        assert_eq!(ending(differs).unwrap(), Ending::Found(ErrorCode::Damaged));
    }
}
