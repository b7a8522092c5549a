//! `backtide fsck`: a store that no receiver uses, against its checksums; made anew, or mended, where that is asked for.

use std::path::{Path, PathBuf};

use backtide_control::{ApiError, ErrorCode};
use backtide_log_receiver::{Repair, StoreFileError, forget_retention, fsck, repair};
use backtide_receiver_api::StoreCheck;
use backtide_units::ByteCount;
use clap::Args;
use tokio::sync::mpsc;

use crate::{
    commands::receiver::store_failure_code,
    context::Context,
    ending::{Ending, Failure, failed},
    output::{
        checks::{disks_text, overlays_text, problems_text},
        progress::Progress,
    },
    restore::is_agent_state,
};

/// Progress reports on their way; who reads slowly gets fewer.
const REPORTS_MAX: usize = 16;

/// `backtide fsck`
#[derive(Args, Debug)]
pub(crate) struct Fsck {
    /// The store's directory; its receiver must not be running (`backtide scrub` is for that)
    store: PathBuf,
    /// Write anew what follows from the logs and images: headers and indexes of segments, where logs begin, store.json
    #[arg(long, conflicts_with = "repair")]
    rebuild: bool,
    /// That, and mend what is damaged from wherever else its bytes are, and cut a log where a part of it is lost: no point is
    /// given up that can be read, and what is cut off is put into STORE/cut
    #[arg(long)]
    repair: bool,
    /// First forget every ladder, kept point and lock of all disks, where retention.json is damaged or lost: until then no
    /// history goes
    #[arg(long)]
    forget_retention: bool,
}

/// Refuses the state directory of an agent, whose lock looks like that of another receiver.
fn refuse_agent_state(store: &Path) -> Result<(), Failure> {
    if store.join("store.json").exists() || !is_agent_state(store) {
        return Ok(());
    }
    let why = format!("{} is an agent's state directory, and no receiver's store", store.display());
    let hint = "name the directory that `receiver run --store` was given";
    Err(ApiError::new(ErrorCode::Usage, why).with_hint(hint).into())
}

impl Fsck {
    /// Reads every file, changes none unless that is asked for, and ends with the code of damage when there is some.
    pub(crate) async fn run(self, context: &Context) -> Result<Ending, Failure> {
        if self.store.is_file() {
            let why = format!("{} is a file, and a store is a directory", self.store.display());
            let hint = "name the directory that `receiver run --store` was given";
            return Err(ApiError::new(ErrorCode::Usage, why).with_hint(hint).into());
        }
        refuse_agent_state(&self.store)?;
        let what = match (self.rebuild, self.repair) {
            (true, _) => Some(Repair::Rebuild),
            (_, true) => Some(Repair::Everything),
            (false, false) => None,
        };
        // What was repaired is read once more, to see that it is.
        let total = ByteCount(bytes_below(&self.store) * if what.is_some() { 2 } else { 1 });
        let (reports, mut progress) = mpsc::channel(REPORTS_MAX);
        let (store, forgets) = (self.store, self.forget_retention);
        // A thread that nobody waits for: ctrl-c ends the command while it reads.
        let (ended, result) = tokio::sync::oneshot::channel();
        std::thread::Builder::new()
            .name("fsck".to_owned())
            .spawn(move || {
                let mut progress = |done| {
                    // A report that finds no room is followed by another.
                    let _ = reports.try_send(done);
                };
                let result = run(&store, forgets, what, &mut progress);
                drop(reports);
                let _ = ended.send(result);
            })
            .map_err(|error| failed(format!("start the thread that reads: {error}")))?;
        let mut shown =
            Progress::new(context, if what.is_some() { "repaired and checked" } else { "checked" });
        while let Some(done) = progress.recv().await {
            shown.at(done, total);
        }
        shown.end();
        let report = result.await.map_err(|_| failed("the thread that reads has panicked"))?;
        let report = report?;
        context.print(&report, || text(&report, what))?;
        Ok(match (report.sound, is_repaired(&report)) {
            (true, false) => Ending::Done,
            (true, true) => Ending::Warnings,
            (false, _) => Ending::Found(ErrorCode::Damaged),
        })
    }
}

/// Does all that was asked for.
fn run(
    store: &Path,
    forgets: bool,
    what: Option<Repair>,
    progress: &mut dyn FnMut(ByteCount),
) -> Result<StoreCheck, Failure> {
    let mut forgotten = None;
    if forgets {
        forgotten = forget_retention(store).map_err(failure)?;
        if forgotten.is_none() {
            let why = format!("retention.json of {} is whole, so it is not forgotten", store.display());
            let hint = "backtide retention changes what a running receiver keeps";
            return Err(ApiError::new(ErrorCode::Refused, why).with_hint(hint).into());
        }
    }
    let report = match what {
        Some(what) => repair(store, what, progress),
        None => fsck(store, progress),
    };
    let mut report = report.map_err(failure)?;
    report.repaired.splice(0..0, forgotten);
    Ok(report)
}

/// Whether anything was not as it should be, and is now.
fn is_repaired(report: &StoreCheck) -> bool {
    let disks = report.disks.iter().any(|disk| !disk.mended.is_empty() || !disk.cut.is_empty());
    disks || !report.repaired.is_empty()
}

fn failure(error: StoreFileError) -> Failure {
    let api = ApiError::from_error(store_failure_code(&error), &error);
    match error {
        StoreFileError::Locked { .. } => {
            ApiError { message: api.message, ..api }.with_hint("backtide scrub checks a store in use").into()
        }
        StoreFileError::Io { .. }
        | StoreFileError::NotAStore { .. }
        | StoreFileError::NoStore { .. }
        | StoreFileError::Damaged { .. }
        | StoreFileError::Version { .. } => api.into(),
    }
}

/// What there is to read, for the progress only: what cannot be looked at counts nothing.
fn bytes_below(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    let bytes = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_below(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    };
    entries.flatten().map(bytes).sum()
}

fn text(report: &StoreCheck, done: Option<Repair>) -> String {
    let mut lines = vec![disks_text(&report.disks)];
    lines.extend(report.repaired.iter().map(|done| format!("MENDED: {done}")));
    lines.extend(problems_text(&report.damage, &report.disks));
    lines.extend(overlays_text(&report.overlays));
    lines.extend(report.forgotten.iter().map(|disk| {
        format!("disk {} was forgotten: a receiver removes the rest of it when it starts", disk.name)
    }));
    lines.push(if report.sound {
        format!("{} is sound", report.store)
    } else {
        format!("{} is DAMAGED", report.store)
    });
    lines.extend(next_steps(report, done));
    if report.disks.iter().any(|disk| !disk.cut.is_empty()) {
        lines.push(
            "a disk whose log was cut gets a new one when its agent connects, which sends what differs; until then it \
             is not protected"
                .to_owned(),
        );
    }
    lines.join("\n")
}

/// What can be done about what is damaged still.
fn next_steps(report: &StoreCheck, done: Option<Repair>) -> Vec<String> {
    let store = &report.store;
    let mut lines = Vec::new();
    let (promises, files): (Vec<_>, Vec<_>) =
        report.damage.iter().partition(|why| why.contains("retention.json"));
    if !promises.is_empty() {
        lines.push(format!(
            "what retention.json said is nowhere else: restore the file from a copy, or have every ladder, kept point and \
             lock forgotten with `backtide fsck {store} --forget-retention`; until then no history goes"
        ));
    }
    let disks: Vec<_> = report.disks.iter().filter(|disk| !disk.sound).collect();
    let overlays: Vec<_> = report.overlays.iter().filter(|overlay| !overlay.sound).collect();
    if files.is_empty() && disks.is_empty() && overlays.is_empty() {
        return lines;
    }
    if done != Some(Repair::Everything) {
        lines.push(format!(
            "`backtide fsck {store} --repair` mends what can be mended, and says what is lost; of what it cannot mend it says \
             what can be done"
        ));
        return lines;
    }
    for disk in disks {
        let name = disk.name.as_ref().map_or_else(|| disk.uuid.to_string(), ToString::to_string);
        lines.push(format!(
            "what is damaged still of {name} cannot be mended: nothing in the store has those bytes, and another --repair does \
             the same. Points that it does not touch are sound. With the receiver running, `backtide mount {name} --at POINT` \
             serves what can be read of the others, `backtide scrub {name}` mends what the disk itself has still while its \
             agent is connected, and retention lets go of the rest when it is old"
        ));
    }
    lines.extend(overlays.iter().map(|overlay| {
        let id = &overlay.id;
        format!(
            "overlay {id} cannot be mended: `backtide unmount {id} --discard` at the running receiver gives it up"
        )
    }));
    if !files.is_empty() {
        lines.push(
            "the files of the store named above cannot be made again: restore them from a copy of the store"
                .to_owned(),
        );
    }
    lines
}

#[cfg(test)]
mod tests {
    use backtide_receiver_api::DiskCheck;
    use backtide_units::DiskId;

    use super::*;

    fn store(damage: &[&str], disks: Vec<DiskCheck>) -> StoreCheck {
        StoreCheck {
            store: "/srv/b".to_owned(),
            damage: damage.iter().map(|why| (*why).to_owned()).collect(),
            repaired: Vec::new(),
            disks,
            overlays: Vec::new(),
            forgotten: Vec::new(),
            sound: false,
        }
    }

    fn damaged_disk() -> DiskCheck {
        DiskCheck {
            name: Some("vm1".parse().unwrap()),
            damage: vec!["a.seg is damaged at byte 7".to_owned()],
            ..DiskCheck::unread(DiskId::random())
        }
    }

    #[test]
    fn what_no_repair_mends_is_told_with_what_can_be_done() {
        let lost = store(&["/srv/b/retention.json is missing"], Vec::new());
        for done in [None, Some(Repair::Everything)] {
            let text = text(&lost, done);
            assert!(text.contains("`backtide fsck /srv/b --forget-retention`"), "{text}");
            assert!(!text.contains("--repair"), "it does nothing about that: {text}");
        }
        let damaged = store(&[], vec![damaged_disk()]);
        assert!(text(&damaged, None).contains("`backtide fsck /srv/b --repair`"));
        let after = text(&damaged, Some(Repair::Everything));
        assert!(after.contains("of vm1 cannot be mended") && after.contains("backtide scrub vm1"), "{after}");
        assert!(!after.contains("fsck /srv/b --repair"), "{after}");
    }
}
