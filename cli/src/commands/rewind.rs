//! `backtide rewind`: the live disk back to a point.

use std::path::PathBuf;

use backtide_agent_api::{AgentClient, DiskStatus, Mode, RewindReport, RewindRequest};
use backtide_control::{ApiError, ErrorCode};
use backtide_export::{NbdAddress, NbdUri};
use backtide_receiver_api::{DiffReport, DiffRequest};
use backtide_units::{BlockCount, ByteCount, DiskName};
use clap::Args;
use serde::Serialize;

use crate::{
    arguments::ReceiverApi,
    commands::{Stop, until_complete::until_complete, wait::in_sync},
    confirm::confirm,
    context::Context,
    ending::{Ending, Failure},
    output::status::way_out,
    qmp::{Qmp, ServerPlace},
    quantity::{count_text, duration_text, size_both, time_text},
};

/// What is said of a guest whose disk was set back under it.
const PAUSED: &str = "the guest is paused, and its memory knows the disk as it was: reset it before it goes on, in QMP system_reset and then cont";

/// As many clients may have a disk that is set back under a guest: that of the one virtual machine that is paused.
const CLIENTS_LIVE: u32 = 1;

/// `backtide rewind`
#[derive(Args, Debug)]
pub(crate) struct Rewind {
    /// The disk's name or UUID
    name: DiskName,
    /// The point: latest, lsn:N, an RFC 3339 time, a duration ago such as -5m, or mark:LABEL
    #[arg(long, value_name = "POINT", allow_hyphen_values = true)]
    to: String,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
    /// Also to a point of which blocks are damaged at the receiver; and also while the disk lacks blocks of another
    /// point and is not in sync: what has not reached the receiver is given up
    #[arg(long)]
    force: bool,
    /// Wait until everything that changed has been fetched and the image is complete
    #[arg(long)]
    wait: bool,
    /// Also while a virtual machine has the disk open: it is paused for it, and stays so, for its memory
    /// knows the disk as it was
    #[arg(long, requires = "qmp")]
    live: bool,
    /// The QMP socket of that virtual machine
    #[arg(long, value_name = "SOCKET", requires = "live")]
    qmp: Option<PathBuf>,
    #[command(flatten)]
    api: ReceiverApi,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Rewound<'a> {
    #[serde(flatten)]
    report: &'a RewindReport,
    /// Whether the guest was paused, and is to be reset before it goes on.
    guest_paused: bool,
}

impl Rewind {
    /// Sets the disk back. Whatever else this ends with says so of a guest that it leaves paused.
    pub(crate) async fn run(self, context: &Context, mut stop: Stop) -> Result<Ending, Failure> {
        let (name, mut pause) = (self.name.clone(), Pause::No);
        let done = tokio::select! {
            done = self.set_back(context, &mut pause) => done,
            () = stop.asked() => Err(Failure::Interrupted),
        };
        if done.is_err()
            && let Some(said) = pause.left(&name)
        {
            context.warn(&said);
        }
        done
    }

    /// Finds the point, says what will change, and has the agent do it.
    async fn set_back(self, context: &Context, pause: &mut Pause) -> Result<Ending, Failure> {
        let agent = context.agent()?;
        let disk = agent.disk(&self.name).await?;
        if disk.reason_code == "fenced" {
            let error =
                ApiError::new(ErrorCode::Fenced, format!("disk {} is fenced: {}", disk.name, disk.reason));
            return Err(way_out(&disk).into_iter().fold(error, ApiError::with_hint).into());
        }
        let uuid: DiskName = disk.uuid.to_string().parse().expect("a UUID is a good name");
        let request = DiffRequest { from: self.to.clone(), to: "latest".to_owned() };
        let diff = context.receiver(&self.api)?.diff(&uuid, &request).await?;
        context.remark(diff.from.warning.as_deref());
        let under_way = RewindReport::under_way(&disk, diff.from.lsn).filter(|_| !self.force);
        if let Some(report) = under_way {
            return self.goes_on(context, &agent, report).await;
        }
        if !self.force && is_there(&disk, &diff) {
            let report = unchanged(disk, &diff);
            let text = || {
                let (name, to, time) = (&report.disk.name, report.to, time_text(report.to_time));
                format!("{name} is at lsn:{to} ({time}), its newest point: there is nothing to do")
            };
            context.print(&Rewound { report: &report, guest_paused: false }, text)?;
            return Ok(Ending::Done);
        }
        if disk.clients.saturating_add(disk.awaited_clients) > 0 && self.qmp.is_none() {
            return Err(in_use(&disk));
        }
        if self.yes {
            context.tell(&plan_text(&disk, &diff, self.force));
        } else {
            confirm(context, &plan_text(&disk, &diff, self.force)).await?;
        }
        let mut guest = match &self.qmp {
            Some(socket) => Some(Guest::paused(socket, &agent, &disk, pause).await?),
            None => None,
        };
        let (to, reconnect) = (diff.from.lsn, guest.is_some());
        // Whoever comes after the look is not paused.
        let clients_max = reconnect.then_some(CLIENTS_LIVE);
        let request = RewindRequest { to, reconnect, clients_max, force: self.force };
        let mut report = match agent.rewind(&disk.name, request).await {
            Ok(report) => report,
            Err(error) => {
                if let Some(guest) = &mut guest {
                    guest.let_go(&agent, &disk, &error, pause).await;
                }
                return Err(error.into());
            }
        };
        if guest.is_some() {
            *pause = Pause::SetBack;
        }
        if self.wait {
            report.disk = until_complete(context, &agent, &disk.name).await?;
        }
        let guest_paused = guest.is_some();
        context.print(&Rewound { report: &report, guest_paused }, || report_text(&report, guest_paused))?;
        Ok(Ending::Done)
    }
}

impl Rewind {
    /// The disk was set to the point already, and lacks blocks of it: nothing is asked, and there is nothing to do but to wait.
    async fn goes_on(
        &self,
        context: &Context,
        agent: &AgentClient,
        mut report: RewindReport,
    ) -> Result<Ending, Failure> {
        if self.wait {
            report.disk = until_complete(context, agent, &report.disk.name).await?;
        }
        context.print(&Rewound { report: &report, guest_paused: false }, || report_text(&report, false))?;
        Ok(Ending::Done)
    }
}

/// What a command that ends early leaves of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// As it was.
    No,
    /// Paused by this command, with a disk that may have been set back or not.
    Begun,
    /// Paused, with a disk that was set back under it.
    SetBack,
}

impl Pause {
    /// That, and the way out of it; none when there is nothing to say.
    fn left(self, name: &DiskName) -> Option<String> {
        match self {
            Self::No => None,
            Self::Begun => Some(format!(
                "the guest is paused, and its disk may have been set back: `backtide status {name}` says whether it was, once it is attached; if it was, reset the guest before it goes on, in QMP system_reset and then cont; if it was not, cont is enough"
            )),
            Self::SetBack => Some(PAUSED.to_owned()),
        }
    }
}

/// A virtual machine whose guest does not run.
struct Guest {
    qmp: Qmp,
    /// Whether it did before.
    ran: bool,
}

impl Guest {
    /// The machine behind `socket`, which has to be one that has the disk open; its guest is paused if it runs.
    async fn paused(
        socket: &std::path::Path,
        agent: &AgentClient,
        disk: &DiskStatus,
        pause: &mut Pause,
    ) -> Result<Self, Failure> {
        let mut qmp = Qmp::connect(socket).await?;
        let shared = agent.status(Some(&disk.name)).await?.nbd_listen;
        if !qmp.uses(&servers(disk, shared.as_deref())).await? {
            let message = format!(
                "the virtual machine at {} does not have disk {} open at {}",
                socket.display(),
                disk.name.as_str(),
                disk.nbd_uri
            );
            return Err(ApiError::new(ErrorCode::Refused, message)
                .with_hint("give the QMP socket of the machine that has it")
                .into());
        }
        only_client(&agent.disk(&disk.name).await?)?;
        let (ran, _) = qmp.runs().await?;
        if ran {
            // Not later: it may be paused by a command whose answer does not come.
            *pause = Pause::Begun;
            qmp.stop().await?;
            let (runs, state) = qmp.runs().await?;
            if runs {
                *pause = Pause::No;
                let message = format!("the guest is not paused: QEMU says {state}");
                return Err(ApiError::new(ErrorCode::Busy, message).into());
            }
        }
        Ok(Self { qmp, ran })
    }

    /// After a rewind that failed: the guest goes on when its disk was surely never let go of.
    async fn let_go(
        &mut self,
        agent: &AgentClient,
        before: &DiskStatus,
        error: &ApiError,
        pause: &mut Pause,
    ) {
        if !self.ran {
            return;
        }
        // An agent that has not answered may be at it still.
        let untouched = is_final(error.code)
            && agent.disk(&before.name).await.is_ok_and(|disk| was_never_let_go_of(before, &disk));
        if untouched && self.qmp.cont().await.is_ok() {
            *pause = Pause::No;
        }
    }
}

fn was_never_let_go_of(before: &DiskStatus, now: &DiskStatus) -> bool {
    now.is_of_now() && now.epoch == before.epoch && now.mode != Mode::Detached && now.hydration.is_none()
}

/// Refuses a disk that somebody has open who would not be paused, or may have.
fn only_client(now: &DiskStatus) -> Result<(), ApiError> {
    let name = now.name.as_str();
    if !now.is_of_now() {
        let message = format!("who has disk {name} open is not known: {}", now.reason);
        let way = match now.reason_code.as_str() {
            "not-answering" => "look at the storage its image is on",
            _ => "try again when that is over",
        };
        return Err(ApiError::new(ErrorCode::Busy, message).with_hint(way));
    }
    // An idle machine connects again only with its next request.
    let clients = now.clients.saturating_add(now.awaited_clients);
    if clients != CLIENTS_LIVE {
        let message = format!("disk {name} has {clients} clients, and only one of them can be paused for it");
        return Err(ApiError::new(ErrorCode::Busy, message)
            .with_hint("see that the virtual machine, and nobody else, has the disk open"));
    }
    Ok(())
}

/// Whether an error says that no rewind goes on, nor begins later.
fn is_final(code: ErrorCode) -> bool {
    !matches!(code, ErrorCode::Busy | ErrorCode::Unreachable | ErrorCode::Interrupted)
}

/// Where a disk is served: on its own socket, and by its name on the one that all share.
fn servers(disk: &DiskStatus, shared: Option<&str>) -> Vec<ServerPlace> {
    let own = ServerPlace { place: place_of(&disk.nbd_uri), export: None };
    let export = || Some(disk.name.as_str().to_owned());
    let shared = shared.map(|uri| ServerPlace { place: place_of(uri), export: export() });
    [own].into_iter().chain(shared).collect()
}

/// What an NBD client of this URI has in its own words: the socket's path, or host and port.
fn place_of(uri: &str) -> String {
    match uri.parse::<NbdUri>().map(|uri| uri.address) {
        Ok(NbdAddress::Unix(path)) => path.display().to_string(),
        Ok(NbdAddress::Tcp { host, port }) => format!("{host}:{port}"),
        Err(_) => uri.to_owned(),
    }
}

/// Whether the point is the newest one, and the disk is as it is there.
fn is_there(disk: &DiskStatus, diff: &DiffReport) -> bool {
    let newest = diff.from.lsn == diff.to.lsn && disk.lsn.last == diff.to.lsn;
    newest && in_sync(disk) && disk.hydration.is_none() && disk.local_error.is_none()
}

/// The report of a disk that was where it was to go.
fn unchanged(disk: DiskStatus, diff: &DiffReport) -> RewindReport {
    RewindReport {
        from: diff.from.lsn,
        to: diff.from.lsn,
        to_time: diff.from.time,
        changed_blocks: BlockCount(0),
        changed_bytes: ByteCount(0),
        blocked_ms: 0,
        hung_up: 0,
        under_way: false,
        disk,
    }
}

fn in_use(disk: &DiskStatus) -> Failure {
    let name = disk.name.as_str();
    if disk.clients == 0 {
        let message = format!(
            "disk {name} is in use: a virtual machine that had it open when its service was interrupted comes back with its next request, and would see another content under its feet"
        );
        return ApiError::new(ErrorCode::Busy, message)
            .with_hint(format!(
                "shut the virtual machine down first, or give its QMP socket with --live --qmp; where nobody comes back, `backtide detach {name} --nobody-returns`, attach it again, then rewind"
            ))
            .into();
    }
    let message = format!("disk {name} is in use: its guest would see another content under its feet");
    ApiError::new(ErrorCode::Busy, message)
        .with_hint("shut the virtual machine down first, or give its QMP socket with --live --qmp: it is paused then, and reset afterwards")
        .into()
}

fn plan_text(disk: &DiskStatus, diff: &DiffReport, force: bool) -> String {
    let (from, to) = (&diff.to, &diff.from);
    let goes = format!(
        "disk {} goes from lsn:{} ({}) back to lsn:{} ({}): {} may change",
        disk.name.as_str(),
        from.lsn,
        time_text(from.time),
        to.lsn,
        time_text(to.time),
        size_both(diff.bytes),
    );
    match given_up(disk).filter(|_| force) {
        Some(what) => format!("{goes}; {what} not reached the receiver, and IS GIVEN UP: no point has it"),
        None => format!("{goes}; what is there now stays in its history"),
    }
}

/// What of an incomplete disk has not reached the receiver. Of a complete one the agent waits for it, or refuses.
fn given_up(disk: &DiskStatus) -> Option<String> {
    disk.hydration.as_ref()?;
    missed(disk.dirty.bytes, disk.lag.records, disk.mode == Mode::Sync && disk.connected)
}

fn missed(dirty: ByteCount, lag: u64, in_touch: bool) -> Option<String> {
    let writes = count_text(lag, "write");
    match (dirty.is_zero(), lag) {
        (true, 0) if in_touch => None,
        (true, 0) => Some("what was written since the receiver was last there may have".to_owned()),
        (true, _) => Some(format!("of what is there now {writes} have")),
        (false, 0) => Some(format!("of what is there now {} of changed blocks have", size_both(dirty))),
        (false, _) => {
            Some(format!("of what is there now {} of changed blocks, {writes}, have", size_both(dirty)))
        }
    }
}

fn report_text(report: &RewindReport, guest_paused: bool) -> String {
    let name = report.disk.name.as_str();
    let (to, to_time, changed) = (report.to, time_text(report.to_time), size_both(report.changed_bytes));
    let first = match report.under_way {
        true => format!(
            "{name} was set to lsn:{to} ({to_time}) already, {changed} may have changed, and nothing was written since"
        ),
        false => format!(
            "{name} is at lsn:{to} ({to_time}) again, {changed} may have changed; it was not served for {}",
            duration_text(report.blocked_ms as f64 / 1000.0),
        ),
    };
    let mut lines = vec![first, format!("to undo it: backtide rewind {name} --to lsn:{}", report.from)];
    if let Some(hydration) = &report.disk.hydration {
        lines.push(format!(
            "{} still come from the receiver, on first touch and in the background: until then the image alone is not the disk; `backtide status {name}` shows how far it is",
            size_both(hydration.missing_bytes)
        ));
    }
    if guest_paused {
        lines.push(PAUSED.to_owned());
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::status::tests::in_sync as in_sync_disk;

    #[test]
    fn a_machine_names_its_disk_by_the_socket() {
        assert_eq!(place_of("nbd+unix:///vm1?socket=/run/vm1.sock"), "/run/vm1.sock");
        assert_eq!(place_of("nbd://127.0.0.1:10809/vm1"), "127.0.0.1:10809");
    }

    #[test]
    fn a_disk_that_does_not_answer_proves_nothing() {
        let now = in_sync_disk();
        assert!(only_client(&now).is_ok() && was_never_let_go_of(&now, &now));
        for code in ["not-answering", "detaching"] {
            let then = DiskStatus { reason_code: code.to_owned(), ..now.clone() };
            assert!(only_client(&then).is_err() && !was_never_let_go_of(&now, &then), "{code}");
        }
        let two = DiskStatus { awaited_clients: 1, ..now.clone() };
        assert!(only_client(&two).is_err());
        assert!(!was_never_let_go_of(&now, &DiskStatus { mode: Mode::Detached, ..now.clone() }));
    }

    #[test]
    fn what_a_forced_rewind_gives_up_is_said() {
        assert_eq!(missed(ByteCount(0), 0, true), None);
        assert!(missed(ByteCount(0), 0, false).unwrap().contains("since the receiver was last there"));
        assert_eq!(missed(ByteCount(0), 1, true).unwrap(), "of what is there now 1 write have");
        let both = missed(ByteCount(1 << 20), 7, false).unwrap();
        assert!(both.contains("1.0 MiB") && both.contains("7 writes"), "{both}");
    }

    #[test]
    fn a_guest_that_is_left_paused_is_told_of() {
        let name: DiskName = "vm1".parse().unwrap();
        assert_eq!(Pause::No.left(&name), None);
        for pause in [Pause::Begun, Pause::SetBack] {
            let said = pause.left(&name).unwrap();
            assert!(said.starts_with("the guest is paused") && said.contains("system_reset"), "{said}");
        }
        assert!(Pause::Begun.left(&name).unwrap().contains("backtide status vm1"));
    }
}
