//! Waiting for a disk that was set to a point, and lacks blocks of it.

use backtide_agent_api::{AgentClient, DiskStatus, HydrationStatus, Mode};
use backtide_control::{ApiError, ErrorCode};
use backtide_units::{ByteCount, DiskName};

use crate::{
    commands::attach::POLL, context::Context, ending::Failure, output::progress::Progress,
    quantity::size_both,
};

/// The disk when nothing of it is missing any more.
pub(crate) async fn until_complete(
    context: &Context,
    agent: &AgentClient,
    name: &DiskName,
) -> Result<DiskStatus, Failure> {
    let agent = agent.at_length();
    let mut progress = Progress::new(context, "fetched");
    let mut told = None;
    loop {
        let disk = agent.disk(name).await?;
        // What it lacks is not known then; the agent tries to attach it again.
        if disk.mode == Mode::Detached {
            let why = Some(format!("disk {} is not attached: {}", name.as_str(), disk.reason));
            if why != told {
                context.warn(why.as_deref().unwrap_or_default());
                told = why;
            }
            tokio::time::sleep(POLL).await;
            continue;
        }
        let Some(hydration) = &disk.hydration else {
            progress.end();
            return Ok(disk);
        };
        if !hydration.damaged_bytes.is_zero() && hydration.damaged_bytes == hydration.missing_bytes {
            let message = format!(
                "{} of disk {} cannot be had: that is damaged at the receiver",
                size_both(hydration.damaged_bytes),
                name.as_str()
            );
            let hint = format!(
                "its guest can write there; `backtide rewind {} --to POINT --force` sets it to another point",
                name.as_str()
            );
            return Err(ApiError::new(ErrorCode::Damaged, message).with_hint(hint).into());
        }
        if hydration.stuck {
            return Err(never_complete(name, hydration));
        }
        if hydration.trouble.is_some() && hydration.trouble != told {
            told.clone_from(&hydration.trouble);
            context.warn(told.as_deref().unwrap_or_default());
        }
        let done = hydration.total_bytes.0.saturating_sub(hydration.missing_bytes.0);
        progress.at(ByteCount(done), hydration.total_bytes);
        tokio::time::sleep(POLL).await;
    }
}

/// The disk was set to its point, which is no refusal, and waiting for the rest of it is in vain.
fn never_complete(name: &DiskName, lacks: &HydrationStatus) -> Failure {
    let why = lacks.trouble.as_deref().unwrap_or("the receiver does not give it");
    let missing = size_both(lacks.missing_bytes);
    let message = format!("what disk {name} lacks, {missing}, does not come by itself: {why}");
    let hint = format!(
        "see to the receiver at {}, and it comes when that has it; or `backtide rewind {name} --to POINT --force` sets \
         the disk to another point",
        lacks.receiver
    );
    ApiError::new(ErrorCode::Failed, message).with_hint(hint).into()
}

#[cfg(test)]
mod tests {
    use backtide_agent_api::HydrationKind;
    use backtide_units::{CaptureTime, Lsn};

    use super::*;
    use crate::{output::status::tests::in_sync, played_agent::PlayedAgent};

    fn lacking(trouble: Option<&str>, stuck: bool) -> DiskStatus {
        let hydration = HydrationStatus {
            kind: HydrationKind::Rewind,
            receiver: "unix:/run/backtide/stream.sock".to_owned(),
            disk: "vm1".parse().unwrap(),
            point: Lsn(7),
            point_time: CaptureTime(5),
            before: None,
            total_bytes: ByteCount(1 << 20),
            missing_bytes: ByteCount(1 << 19),
            damaged_bytes: ByteCount::ZERO,
            fetched_bytes: ByteCount(1 << 19),
            rate: ByteCount::ZERO,
            eta_seconds: None,
            trouble: trouble.map(str::to_owned),
            stuck,
            waiting_requests: 0,
        };
        DiskStatus { hydration: Some(hydration), ..in_sync() }
    }

    #[tokio::test]
    async fn what_does_not_come_by_itself_is_not_waited_for() {
        let name = "vm1".parse().unwrap();
        let away = || lacking(Some("the receiver does not answer"), false);
        let agent = PlayedAgent::showing([away(), lacking(Some("there is no LSN 7 here"), true), in_sync()]);
        let context = agent.context();
        let ended = until_complete(&context, &context.agent().unwrap(), &name).await;
        let Err(Failure::Error(error)) = ended else { panic!("{ended:?}") };
        assert_eq!(error.code, ErrorCode::Failed);
        assert!(error.message.contains("does not come by itself: there is no LSN 7 here"), "{error}");
        assert!(error.hint.is_some_and(|hint| hint.contains("/stream.sock") && hint.contains("--force")));
        // A receiver that is away may come back.
        let agent = PlayedAgent::showing([away(), away(), in_sync()]);
        let context = agent.context();
        assert!(
            until_complete(&context, &context.agent().unwrap(), &name).await.unwrap().hydration.is_none()
        );
    }
}
