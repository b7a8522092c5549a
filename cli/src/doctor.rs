//! What can be wrong with an installation: looked at one thing after the other, each with a verdict
//! and, where it is not well, what to do.
//!
//! [`daemons`] judges what agent and receiver answer, [`streams`] the way between them, [`machine`] what
//! is around them.

mod daemons;
mod machine;
mod streams;

use backtide_agent_api::{AgentStatus, DiskStatus};
use backtide_control::ApiError;
use backtide_receiver_api::{ReceiverDisks, ReceiverStatus};
use backtide_units::CaptureTime;
use serde::Serialize;

use crate::{arguments::ReceiverApi, context::Context, ending::Failure, output::facts};

/// How one thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// Well.
    Ok,
    /// It works, and somebody should look at it.
    Warning,
    /// It does not work, or protects nothing.
    Failed,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at, for scripts: `agent`, `receiver`, `versions`, `sockets`, `store`, `disks`,
    /// `streams`, `alarms`, `nbd`, `clock`, `open-files`, `programs`.
    pub(crate) check: &'static str,
    pub(crate) verdict: Verdict,
    /// How it is: a sentence.
    pub(crate) message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) hint: Option<String>,
}

impl Finding {
    fn new(check: &'static str, verdict: Verdict, message: impl Into<String>) -> Self {
        Self { check, verdict, message: message.into(), hint: None }
    }

    fn ok(check: &'static str, message: impl Into<String>) -> Self {
        Self::new(check, Verdict::Ok, message)
    }

    fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// What the daemons answer.
#[derive(Debug)]
pub(crate) struct Answers {
    pub(crate) agent: Result<AgentStatus, ApiError>,
    pub(crate) receiver: Result<(ReceiverStatus, ReceiverDisks), ApiError>,
    /// How far the clock of each daemon that told it is ahead of this machine's, at least, in microseconds; less than 0 when
    /// it is behind.
    pub(crate) clocks: Vec<(&'static str, i64)>,
    /// What is served over NBD and where, by its URI, by the daemon of this name.
    pub(crate) served: Vec<(&'static str, String, String)>,
}

/// A daemon's answer, and when it was asked and had answered by this machine's clock.
async fn timed<T>(answer: impl Future<Output = T>) -> (CaptureTime, T, CaptureTime) {
    let asked = machine::now();
    let answer = answer.await;
    (asked, answer, machine::now())
}

impl Answers {
    /// Asks both, at the same time: each may be silent for as long as it is waited for.
    pub(crate) async fn gather(context: &Context, api: &ReceiverApi) -> Result<Self, Failure> {
        let (of_agent, of_receiver) = (context.agent()?, context.receiver(api)?);
        let agent = async {
            let (asked, status, answered) = timed(of_agent.status(None)).await;
            let status = status?;
            // What it serves beside disks is asked of one that answers.
            let mounts = of_agent.mounts().await.map(|mounts| mounts.mounts).unwrap_or_default();
            let mounts = mounts.into_iter().map(|mount| (format!("mount {}", mount.id), mount.uri));
            let apart = status.now.map(|now| ("agent", daemons::apart(asked, now, answered)));
            Ok((status, apart, mounts.collect::<Vec<_>>()))
        };
        let receiver = async {
            let (asked, status, answered) = timed(of_receiver.status()).await;
            let status = status?;
            let disks = of_receiver.disks(None).await?;
            let mounts = of_receiver.mounts().await.map(|mounts| mounts.mounts).unwrap_or_default();
            let mounts = mounts.into_iter().map(|mount| (format!("mount {}", mount.id), mount.uri));
            let apart = status.now.map(|now| ("receiver", daemons::apart(asked, now, answered)));
            Ok(((status, disks), apart, mounts.collect::<Vec<_>>()))
        };
        let (agent, receiver) = tokio::join!(agent, receiver);
        let (mut clocks, mut served) = (Vec::new(), Vec::new());
        let agent = agent.map(|(status, apart, mounts)| {
            clocks.extend(apart);
            // Of one that is not attached the socket may be gone, and is there again with it.
            let is_served = |disk: &&DiskStatus| {
                !disk.nbd_uri.is_empty() && !matches!(disk.reason_code.as_str(), "not-attached" | "detaching")
            };
            let disks = status.disks.iter().filter(is_served);
            served.extend(disks.map(|disk| ("agent", format!("disk {}", disk.name), disk.nbd_uri.clone())));
            served
                .extend(status.nbd_listen.iter().map(|uri| ("agent", "every disk".to_owned(), uri.clone())));
            served.extend(mounts.into_iter().map(|(what, uri)| ("agent", what, uri)));
            status
        });
        let receiver = receiver.map(|(answer, apart, mounts)| {
            clocks.extend(apart);
            let shared = answer.0.nbd_listen.iter();
            served.extend(shared.map(|uri| ("receiver", "every mount".to_owned(), uri.clone())));
            served.extend(mounts.into_iter().map(|(what, uri)| ("receiver", what, uri)));
            answer
        });
        Ok(Self { agent, receiver, clocks, served })
    }
}

/// Looks at everything.
pub(crate) fn examine(context: &Context, api: &ReceiverApi, answers: &Answers) -> Vec<Finding> {
    let mut findings = daemons::reachable(answers);
    findings.extend(daemons::versions(answers));
    let mut here = Vec::new();
    for (name, address) in [("agent", context.agent_address()), ("receiver", context.receiver_address(api))] {
        // Whoever has no place for it was not answered at all.
        let Ok(address) = address else { continue };
        findings.extend(machine::socket(name, &address));
        // A silent one may not even take a connection, which is waited for without end.
        let answers = if name == "agent" { answers.agent.is_ok() } else { answers.receiver.is_ok() };
        findings.extend(answers.then(|| machine::open_files(name, &address)).flatten());
        here.extend((answers && machine::is_here(&address)).then_some(name));
    }
    if let Ok((receiver, kept)) = &answers.receiver {
        findings.push(daemons::free_space(receiver));
        findings.extend(machine::store(receiver));
        findings.extend(daemons::kept(kept));
        findings.extend(streams::receiver(receiver, machine::now()));
        findings.extend(daemons::alarms(receiver, &findings));
    }
    findings.extend(daemons::clocks(answers));
    findings.extend(streams::open_to_others(&answers.served));
    let served = answers.served.iter().filter(|(by, _, _)| here.contains(by));
    findings.extend(served.filter_map(|(_, what, uri)| machine::lost_socket(what, uri)));
    if let Ok(agent) = &answers.agent {
        findings.extend(daemons::disks(&agent.disks));
        findings.extend(streams::disks(agent, machine::now()));
    }
    findings.push(machine::program("qemu-nbd", "qcow2 images need it (Debian package qemu-utils)"));
    findings.push(machine::qemu());
    findings
}

/// The worst of them.
pub(crate) fn worst(findings: &[Finding]) -> Verdict {
    findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Ok)
}

/// A line each, and below it what to do.
pub(crate) fn text(findings: &[Finding]) -> String {
    let mut lines = Vec::new();
    for finding in findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "WARNING",
            Verdict::Failed => "FAILED",
        };
        lines.push((verdict, format!("{}: {}", finding.check, finding.message)));
        lines.extend(finding.hint.iter().map(|hint| ("", format!("  {hint}"))));
    }
    facts(&lines)
}
