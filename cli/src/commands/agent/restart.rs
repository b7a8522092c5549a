//! `backtide agent restart`: asks the agent, and waits for the one that follows.

use std::time::{Duration, Instant};

use backtide_agent_api::{AgentStatus, DiskStatus};
use backtide_control::{ApiError, ErrorCode};
use backtide_units::DiskName;
use clap::Args;
use serde::Serialize;

use crate::{
    context::Context,
    ending::{Ending, Failure},
    quantity::count_text,
};

/// How long the next agent may take to answer.
const NEXT_TIME: Duration = Duration::from_secs(60);

/// How often it is looked for.
const POLL: Duration = Duration::from_millis(10);

/// `backtide agent restart`
#[derive(Args, Debug)]
pub(crate) struct Restart {}

/// What is printed when the next agent answers.
#[derive(Debug, Serialize)]
struct Restarted {
    /// The version of before.
    from: String,
    /// The version that runs now.
    version: String,
    /// Disks attached now.
    disks: usize,
    /// From the old agent's agreement to the new one's first answer.
    took_ms: u64,
}

impl Restart {
    /// Restarts; warns of disks that did not come back.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let known = agent.status(None).await?;
        // An agent that has gone while its flushing was waited for has taken over, or died: the next one tells.
        let (before, failed_before) = match agent.restart().await? {
            Some(before) => (before, None),
            None => (known.clone(), known.restart_failure),
        };
        let asked = Instant::now();
        let after = loop {
            match agent.status(None).await {
                Ok(status) if status.instance != before.instance => break status,
                Ok(AgentStatus { restart_failure: Some(why), .. })
                    if failed_before.as_ref() != Some(&why) =>
                {
                    return Err(ApiError::new(
                        ErrorCode::Failed,
                        format!("the agent goes on as it was: {why}"),
                    )
                    .into());
                }
                Err(error) if asked.elapsed() > NEXT_TIME => return Err(error.into()),
                Ok(_) if asked.elapsed() > NEXT_TIME => {
                    let message = "the agent still has to let go of its disks";
                    return Err(ApiError::new(ErrorCode::Busy, message).into());
                }
                // Between the two nobody may answer for a moment.
                Ok(_) | Err(_) => tokio::time::sleep(POLL).await,
            }
        };
        let took = asked.elapsed();
        let attached = |status: &AgentStatus| -> Vec<DiskName> {
            let attached = status.disks.iter().filter(|disk| is_attached(disk));
            attached.map(|disk| disk.name.clone()).collect()
        };
        let now = attached(&after);
        let restarted = Restarted {
            from: before.version.clone(),
            version: after.version,
            disks: now.len(),
            took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        };
        context.print(&restarted, || {
            let Restarted { from, version, disks, took_ms } = &restarted;
            let change = if from == version { version.clone() } else { format!("{version}, after {from}") };
            format!(
                "the agent runs again: version {change}, {}, {took_ms} ms",
                count_text(*disks as u64, "disk")
            )
        })?;
        if let Some(restart_failure) = after.restart_failure {
            let message = format!("the old program runs again: {restart_failure}");
            return Err(ApiError::new(ErrorCode::Failed, message).into());
        }
        let missing: Vec<DiskName> =
            attached(&before).into_iter().filter(|disk| !now.contains(disk)).collect();
        for disk in &missing {
            context.warn(&format!("disk {disk} is not attached yet: see backtide status {disk}"));
        }
        Ok(if missing.is_empty() { Ending::Done } else { Ending::Warnings })
    }
}

/// One that cannot be attached for the moment is shown as detached, one on its way out says so.
fn is_attached(disk: &DiskStatus) -> bool {
    disk.mode != backtide_agent_api::Mode::Detached && disk.reason_code != "detaching"
}

#[cfg(test)]
mod tests {
    use backtide_agent_api::GoesOn;

    use super::*;
    use crate::played_agent::{Answer, PlayedAgent, status_of};

    fn shown(instance: &str) -> Answer {
        Some((200, serde_json::to_value(status_of(instance, Vec::new())).unwrap()))
    }

    fn error(error: &ApiError) -> Answer {
        Some((400, serde_json::to_value(error).unwrap()))
    }

    /// What the command ends with, of a restart that takes longer than a call, and what it asked for after that.
    async fn slow(then: Vec<Answer>) -> (Result<Ending, Failure>, Vec<String>) {
        let slow = GoesOn { change: "slow".to_owned(), seconds: 50 }.answer();
        let answers = [shown("one"), error(&slow)].into_iter().chain(then);
        let agent = PlayedAgent::answering(answers.collect::<Vec<_>>());
        let ended = Restart {}.run(&agent.context()).await;
        let mut calls = agent.calls();
        assert_eq!(calls.drain(..2).collect::<Vec<_>>(), ["GET /v1/status", "POST /v1/restart"]);
        (ended, calls)
    }

    #[tokio::test]
    async fn one_that_takes_long_is_followed_to_its_end() {
        let (ended, calls) = slow(vec![shown("one"), shown("one"), shown("two")]).await;
        assert_eq!(ended.unwrap(), Ending::Done);
        assert_eq!(calls, ["GET /v1/changes/slow", "GET /v1/status", "GET /v1/status"]);
        let refused = ApiError::new(ErrorCode::Failed, "disk vm1 cannot be flushed");
        let (ended, calls) = slow(vec![error(&refused)]).await;
        let Err(Failure::Error(told)) = ended else { panic!("{ended:?}") };
        assert_eq!((*told, calls.len()), (refused, 1));
    }

    #[tokio::test]
    async fn an_agent_that_goes_meanwhile_is_followed_by_another() {
        let unknown = ApiError::new(ErrorCode::NotFound, "there is no change slow at this agent");
        for gone in [None, error(&unknown)] {
            let (ended, calls) = slow(vec![gone, shown("one"), None, shown("two")]).await;
            assert_eq!(ended.unwrap(), Ending::Done);
            assert_eq!(calls.len(), 4, "{calls:?}");
        }
    }
}
