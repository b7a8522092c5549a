//! What the daemons' answers say about them and their disks.

use backtide_agent_api::{DiskStatus, Mode};
use backtide_control::ApiError;
use backtide_receiver_api::{ReceiverDisks, ReceiverStatus};
use backtide_units::CaptureTime;

use super::{Answers, Finding, Verdict};
use crate::{
    output::status::{is_of_state, missing_at_receiver, spill_lost, untracked, way_out},
    quantity::{count_text, duration_text, size_text},
};

/// The version of this command; daemons have the same.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Less room than so many times the reserve is worth a warning.
const ROOM_FACTOR: u64 = 4;

/// Clocks that differ by no more are the same for a person.
const CLOCKS_APART_US_MAX: u64 = 3_000_000;

/// Reasons for which everything is compared: what was tracked could not be trusted.
const DISTRUSTED: [&str; 5] =
    ["bitmap-untrusted", "agent-crashed", "receiver-rolled-back", "foreign-history", "damaged"];

/// Whether the daemons answer. One of the two may run on another machine, not both.
pub(super) fn reachable(answers: &Answers) -> Vec<Finding> {
    let some_answer = answers.agent.is_ok() || answers.receiver.is_ok();
    let lost = |check, error: &ApiError| {
        // One that is there and says nothing is no good anywhere.
        let elsewhere = some_answer && !error.is_silence();
        let verdict = if elsewhere { Verdict::Warning } else { Verdict::Failed };
        let finding = Finding::new(check, verdict, error.message.clone());
        match &error.hint {
            Some(hint) => finding.hint(hint.clone()),
            None => finding,
        }
    };
    let agent = match &answers.agent {
        Ok(agent) => Finding::ok("agent", format!("it answers, {}", count_text(count(&agent.disks), "disk"))),
        Err(error) => lost("agent", error),
    };
    let receiver = match &answers.receiver {
        Ok((receiver, _)) => {
            let connected = format!("{} connected", receiver.connected);
            Finding::ok(
                "receiver",
                format!("it answers, {}, {connected}", count_text(receiver.disks, "disk")),
            )
        }
        Err(error) => lost("receiver", error),
    };
    vec![agent, receiver]
}

/// Whether daemons and command are of one version.
pub(super) fn versions(answers: &Answers) -> Vec<Finding> {
    let mut found: Vec<(&str, &str)> = Vec::new();
    found.extend(answers.agent.iter().map(|agent| ("agent", agent.version.as_str())));
    found.extend(answers.receiver.iter().map(|(receiver, _)| ("receiver", receiver.version.as_str())));
    let other: Vec<String> = found
        .iter()
        .filter(|(_, version)| *version != VERSION)
        .map(|(name, version)| format!("the {name} is of version {version}"))
        .collect();
    if found.is_empty() {
        return Vec::new();
    }
    if other.is_empty() {
        return vec![Finding::ok("versions", format!("all are of version {VERSION}"))];
    }
    let message = format!("{}, this command of {VERSION}", other.join(", "));
    vec![Finding::new("versions", Verdict::Warning, message).hint("restart the daemons after an upgrade")]
}

/// Whether the store has room.
pub(super) fn free_space(receiver: &ReceiverStatus) -> Finding {
    if let Some(why) = &receiver.store_error {
        return Finding::new("store", Verdict::Failed, format!("its room cannot be looked at: {why}"));
    }
    let (free, reserve) = (receiver.free_bytes, receiver.free_bytes_min);
    let message = format!("{} has {} left", receiver.store, size_text(free));
    if free <= reserve {
        let message = format!("{message}, and new data is refused below {}", size_text(reserve));
        return Finding::new("store", Verdict::Failed, message)
            .hint("make room on its file system: agents track meanwhile and resynchronize by themselves");
    }
    if free.0 / ROOM_FACTOR <= reserve.0 {
        let message = format!("{message}; new data is refused below {}", size_text(reserve));
        return Finding::new("store", Verdict::Warning, message).hint("make room on its file system soon");
    }
    Finding::ok("store", message)
}

/// Whether the receiver can read what it keeps.
pub(super) fn kept(kept: &ReceiverDisks) -> Vec<Finding> {
    let wrong = kept.disks.iter().flat_map(|disk| {
        let failed =
            |why| Finding::new("store", Verdict::Failed, format!("disk {}: {why}", disk.name.as_str()));
        disk.error.iter().chain(&disk.damage).map(failed)
    });
    wrong.collect()
}

/// What the receiver says that a person should look at, but for what other findings say.
pub(super) fn alarms(receiver: &ReceiverStatus, said: &[Finding]) -> Vec<Finding> {
    let is_said = |alarm: &str| {
        receiver.certificate_warnings.iter().any(|warning| warning == alarm)
            || said.iter().any(|finding| alarm.starts_with(&finding.message))
    };
    let new = receiver.alarms.iter().filter(|alarm| !is_said(alarm));
    new.map(|alarm| Finding::new("alarms", Verdict::Warning, alarm.clone())).collect()
}

/// How far a clock that showed `now` is ahead of this machine's, at least, in microseconds: by that it was `asked` when the
/// question went, and `answered` when the answer was there.
pub(super) fn apart(asked: CaptureTime, now: CaptureTime, answered: CaptureTime) -> i64 {
    let nearest = now.0.clamp(asked.0.min(answered.0), answered.0);
    i64::try_from(i128::from(now.0) - i128::from(nearest)).unwrap_or(i64::MAX)
}

/// Whether clocks agree, those of the daemons with this machine's and those that stamped the disks' points with the
/// receiver's: points are asked for by time.
pub(super) fn clocks(answers: &Answers) -> Vec<Finding> {
    let warning = |message| {
        Finding::new("clock", Verdict::Warning, message)
            .hint("set the clocks of agent and receiver by NTP: points are asked for by time")
    };
    let others = answers.clocks.iter().filter(|(_, ahead)| ahead.unsigned_abs() > CLOCKS_APART_US_MAX);
    let mut found: Vec<_> = others
        .map(|(name, ahead)| {
            let side = if *ahead > 0 { "ahead of" } else { "behind" };
            let by = duration_text(ahead.unsigned_abs() as f64 / 1e6);
            warning(format!("the clock of the {name} is {by} {side} this machine's"))
        })
        .collect();
    let kept = answers.receiver.iter().flat_map(|(_, kept)| &kept.disks);
    found.extend(kept.filter_map(|disk| disk.clock.clone()).map(warning));
    if found.is_empty() && (answers.agent.is_ok() || answers.receiver.is_ok()) {
        found.push(Finding::ok("clock", "all clocks agree, as far as daemons and disks show them"));
    }
    found
}

/// Whether disks are protected.
pub(super) fn disks(disks: &[DiskStatus]) -> Vec<Finding> {
    if disks.is_empty() {
        let none = Finding::new("disks", Verdict::Warning, "no disk is attached: nothing is protected");
        return vec![none.hint("`backtide attach NAME IMAGE --receiver ADDR` protects one")];
    }
    disks.iter().flat_map(|one| std::iter::once(disk(one)).chain(costly_later(one))).collect()
}

/// Why a crash of the agent, or an outage, would cost more than it has to.
fn costly_later(disk: &DiskStatus) -> impl Iterator<Item = Finding> {
    let told = [untracked(disk).cloned(), spill_lost(disk)];
    told.into_iter()
        .flatten()
        .map(|told| Finding::new("disks", Verdict::Warning, format!("{}: {told}", disk.name.as_str())))
}

fn disk(disk: &DiskStatus) -> Finding {
    let name = disk.name.as_str();
    let finding = |verdict, how: &str| Finding::new("disks", verdict, format!("{name}: {how}"));
    if let Some(trouble) = &disk.local_error {
        let what = if is_of_state(disk) { "" } else { "its image: " };
        return finding(Verdict::Failed, &format!("{what}{trouble}"));
    }
    if disk.reason_code == "not-attached" {
        return finding(Verdict::Failed, &disk.reason);
    }
    // What else is shown of it was so when it answered last.
    if !disk.is_of_now() {
        let found = finding(Verdict::Failed, &disk.reason);
        return match disk.reason_code.as_str() {
            "not-answering" => found.hint("look at the storage its image is on"),
            _ => found,
        };
    }
    if let Some(way) = way_out(disk) {
        return finding(Verdict::Failed, &disk.reason).hint(way);
    }
    if !disk.connected {
        let why = disk.last_error.as_ref().map_or(disk.reason.as_str(), |error| error.message.as_str());
        let how = format!("no receiver has its changes: {why}");
        return match disk.mode {
            Mode::Paused => finding(Verdict::Warning, "paused").hint(format!("`backtide resume {name}`")),
            Mode::Sync | Mode::Resync | Mode::Tracking | Mode::Detached => finding(Verdict::Failed, &how),
        };
    }
    if DISTRUSTED.contains(&disk.reason_code.as_str()) {
        return finding(Verdict::Warning, &format!("everything is compared: {}", disk.reason));
    }
    match disk.mode {
        // Writes that are on their way are no reason to look at it.
        Mode::Sync if disk.resync_due || disk.dirty.blocks.0 > 0 => {
            let missing = missing_at_receiver(disk).unwrap_or_default();
            finding(Verdict::Warning, &format!("in sync mode, and the receiver still lacks {missing}"))
        }
        Mode::Sync => finding(Verdict::Ok, "in sync"),
        Mode::Resync | Mode::Tracking | Mode::Paused | Mode::Detached => {
            finding(Verdict::Warning, &format!("not in sync: {}", disk.reason))
        }
    }
}

fn count<T>(things: &[T]) -> u64 {
    things.len() as u64
}

#[cfg(test)]
mod tests;
