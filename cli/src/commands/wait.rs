//! `backtide wait`: for scripts, instead of polling.

use std::{cell::OnceCell, time::Duration};

use backtide_agent_api::{AgentClient, DiskStatus, Mode};
use backtide_control::{ApiError, ErrorCode};
use backtide_receiver_api::{AroundReport, ReceiverClient};
use backtide_units::{DiskName, Lsn};
use clap::{Args, ValueEnum};
use tokio::sync::Notify;

use crate::{
    arguments::ReceiverApi,
    commands::attach::POLL,
    context::Context,
    ending::{Ending, Failure, failed, wrong_usage},
    output::{progress::Progress, status::disk_line},
    quantity::{duration_text, parse_duration},
};

/// How long a first look may take, however short the bound is: who does not answer for so long is not there.
const FIRST_LOOK: Duration = Duration::from_secs(5);

/// `backtide wait`
#[derive(Args, Debug)]
pub(crate) struct Wait {
    /// The disk's name or UUID
    name: DiskName,
    /// For what
    #[arg(long = "for", value_name = "STATE")]
    state: State,
    /// The point, with --for point
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    at: Option<String>,
    /// How long at most; then the command fails [default: for ever]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    timeout: Option<Duration>,
    #[command(flatten)]
    api: ReceiverApi,
}

/// What can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum State {
    /// In sync mode, connected, and no forced resync due
    Sync,
    /// Everything the guest has written so far is durable at the receiver, as a point
    Durable,
    /// The stream to the receiver is established
    Connected,
    /// The receiver is away and blocks are tracked
    Tracking,
    /// The receiver can give back the point of --at
    Point,
}

/// Whether a disk is in sync and its receiver is there. That it was, when it answered last, is not enough.
pub(crate) fn in_sync(disk: &DiskStatus) -> bool {
    disk.is_of_now() && disk.mode == Mode::Sync && disk.connected && !disk.resync_due
}

/// The same, and all that a resync was to bring is at the receiver: while a spill is in use a disk is in sync too.
pub(crate) fn caught_up(disk: &DiskStatus) -> bool {
    in_sync(disk) && disk.dirty.blocks.0 == 0
}

impl Wait {
    /// Waits, then prints the disk's status.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let name = &self.name;
        if self.at.is_some() != (self.state == State::Point) {
            return Err(wrong_usage("--at POINT belongs to --for point, and --for point needs it"));
        }
        let disk = match self.state {
            State::Sync => until(context, &agent, name, in_sync, self.timeout).await?,
            State::Connected => until(context, &agent, name, |disk| disk.connected, self.timeout).await?,
            State::Tracking => {
                until(context, &agent, name, |disk| disk.mode == Mode::Tracking, self.timeout).await?
            }
            State::Durable => {
                // What was written when the waiting began.
                let last = OnceCell::new();
                let durable = |disk: &DiskStatus| {
                    let last = *last.get_or_init(|| disk.lsn.last);
                    // What is marked as changed has not come as writes that are.
                    caught_up(disk) && disk.lsn.durable >= last
                };
                until(context, &agent, name, durable, self.timeout).await?
            }
            State::Point => {
                let receiver = context.receiver(&self.api)?;
                let at = self.at.as_deref().unwrap_or_default();
                let point = until_point(&receiver, name, at, self.timeout).await?;
                context.remark(point.warning.as_deref());
                context.print(&point, || format!("{}  lsn:{}", name.as_str(), point.lsn))?;
                let around = receiver.around(name, &format!("lsn:{}", point.lsn)).await?;
                return Ok(whether_whole(context, &around, point.lsn));
            }
        };
        context.print(&disk, || disk_line(&disk))?;
        Ok(Ending::Done)
    }
}

/// The disk's status once `reached` says so. It is not asked while the disk does not answer: what it was then is no proof.
pub(crate) async fn until(
    context: &Context,
    agent: &AgentClient,
    name: &DiskName,
    reached: impl Fn(&DiskStatus) -> bool,
    timeout: Option<Duration>,
) -> Result<DiskStatus, Failure> {
    until_it(context, agent, name, |disk| Ok(reached(disk)), timeout).await
}

/// The same, where `reached` may say that it never will be.
pub(crate) async fn until_it(
    context: &Context,
    agent: &AgentClient,
    name: &DiskName,
    reached: impl Fn(&DiskStatus) -> Result<bool, Failure>,
    timeout: Option<Duration>,
) -> Result<DiskStatus, Failure> {
    let agent = agent.at_length();
    let (mut last, looked) = (None, Notify::new());
    let waiting = async {
        let mut progress = Progress::new(context, "resynchronized");
        loop {
            let disk = last.insert(agent.disk(name).await?);
            if disk.is_of_now() && reached(disk)? {
                progress.end();
                return Ok(disk.clone());
            }
            if let Some(resync) = &disk.resync {
                progress.at(resync.done_bytes, resync.total_bytes);
            }
            looked.notify_one();
            tokio::time::sleep(POLL).await;
        }
    };
    match within(timeout, &looked, waiting).await {
        Some(result) => result,
        None => {
            let now = last.map_or_else(|| "the agent does not answer".to_owned(), |disk| disk_line(&disk));
            Err(timed_out(timeout, &now))
        }
    }
}

async fn until_point(
    receiver: &ReceiverClient,
    name: &DiskName,
    at: &str,
    timeout: Option<Duration>,
) -> Result<backtide_receiver_api::ResolvedPoint, Failure> {
    let (mut why, looked) = ("the receiver does not answer".to_owned(), Notify::new());
    let waiting = async {
        loop {
            match receiver.resolve(name, at).await {
                // It may become another one, or none, when the agent comes.
                Ok(point) if point.unheard => why = point.warning.unwrap_or_default(),
                Ok(point) => return Ok(point),
                Err(ApiError {
                    code: ErrorCode::PointInHole | ErrorCode::PointNotFound, message, ..
                }) => {
                    why = message;
                }
                Err(error) => return Err(Failure::from(error)),
            }
            looked.notify_one();
            tokio::time::sleep(POLL).await;
        }
    };
    match within(timeout, &looked, waiting).await {
        Some(result) => result,
        None => Err(timed_out(timeout, &why)),
    }
}

/// A point that the receiver has, and cannot read all of, is not what was waited for.
fn whether_whole(context: &Context, around: &AroundReport, lsn: Lsn) -> Ending {
    let mut of_it = around.touched.iter().filter(|touched| touched.touches(lsn)).peekable();
    if of_it.peek().is_none() {
        return Ending::Done;
    }
    for touched in of_it {
        context.warn(&format!("{}; {}", touched.place, touched.text));
    }
    Ending::Found(ErrorCode::Damaged)
}

/// What `work` gives within `timeout`. It tells when it has `looked`: a bound that is shorter than a look takes lets it have one.
async fn within<T>(timeout: Option<Duration>, looked: &Notify, work: impl Future<Output = T>) -> Option<T> {
    let Some(timeout) = timeout else { return Some(work.await) };
    let bound = async {
        tokio::time::sleep(timeout).await;
        let _ = tokio::time::timeout(FIRST_LOOK.saturating_sub(timeout), looked.notified()).await;
    };
    tokio::select! {
        biased;
        done = work => Some(done),
        () = bound => None,
    }
}

fn timed_out(timeout: Option<Duration>, now: &str) -> Failure {
    let seconds = timeout.unwrap_or_default().as_secs_f64();
    failed(format!("waited {} in vain: {now}", duration_text(seconds)))
}

#[cfg(test)]
mod tests {
    use backtide_agent_api::{Dirty, LsnStatus};
    use backtide_units::{BlockCount, ByteCount};

    use super::*;
    use crate::{
        output::status::tests::in_sync as in_sync_disk,
        played_agent::{PlayedAgent, status_of},
    };

    /// As the agent shows it of a disk that it has heard of nothing since.
    fn of_then(disk: DiskStatus) -> [DiskStatus; 2] {
        ["not-answering", "detaching"].map(|code| DiskStatus { reason_code: code.to_owned(), ..disk.clone() })
    }

    fn waiting(state: State) -> Wait {
        let api = ReceiverApi::default();
        Wait { name: "vm1".parse().unwrap(), state, at: None, timeout: None, api }
    }

    async fn waits_for_the_last(state: State, shown: Vec<DiskStatus>) {
        let agent = PlayedAgent::showing(shown.clone());
        assert_eq!(waiting(state).run(&agent.context()).await.unwrap(), Ending::Done);
        assert_eq!(agent.calls().len(), shown.len(), "{state:?}");
    }

    #[tokio::test]
    async fn what_a_disk_was_when_it_answered_last_ends_no_wait() {
        let tracking = DiskStatus { mode: Mode::Tracking, connected: false, ..in_sync_disk() };
        for (state, reached) in
            [(State::Sync, in_sync_disk()), (State::Connected, in_sync_disk()), (State::Tracking, tracking)]
        {
            let [then, leaving] = of_then(reached.clone());
            waits_for_the_last(state, vec![then, leaving, reached]).await;
        }
    }

    #[tokio::test]
    async fn durable_is_what_was_written_when_the_disk_answered_and_nothing_missing() {
        let at = |last, durable| DiskStatus {
            lsn: LsnStatus { last: Lsn(last), received: Lsn(durable), durable: Lsn(durable) },
            ..in_sync_disk()
        };
        let [then, _] = of_then(at(90, 90));
        let blocks = BlockCount(7);
        let dirty = Dirty { blocks, bytes: ByteCount(7 << 12), hot_extents: None };
        waits_for_the_last(
            State::Durable,
            vec![
                then,
                at(100, 95),
                DiskStatus { dirty, ..at(110, 105) },
                DiskStatus { resync_due: true, ..at(110, 105) },
                at(120, 100),
            ],
        )
        .await;
    }

    /// An agent whose answer does not come at once.
    fn shown_late(disk: DiskStatus) -> PlayedAgent {
        let mut shown = Some((200, serde_json::to_value(status_of("one", vec![disk])).unwrap()));
        PlayedAgent::answering(std::iter::from_fn(move || {
            std::thread::sleep(Duration::from_millis(50));
            shown.take().map(Some)
        }))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_bound_of_nothing_is_one_look() {
        for state in [State::Sync, State::Connected, State::Durable] {
            let wait = || Wait { timeout: Some(Duration::ZERO), ..waiting(state) };
            let agent = shown_late(in_sync_disk());
            assert_eq!(wait().run(&agent.context()).await.unwrap(), Ending::Done, "{state:?}");
            let away = DiskStatus { mode: Mode::Tracking, connected: false, ..in_sync_disk() };
            let agent = shown_late(away);
            let ended = wait().run(&agent.context()).await;
            let Err(Failure::Error(error)) = ended else { panic!("{ended:?}") };
            assert!(error.message.contains("in vain: vm1  tracking"), "{error}");
        }
    }
}
