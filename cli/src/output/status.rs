//! Disks' status: a line each, or one in full.

use backtide_agent_api::{
    AckPolicy, CacheMode, DiskStatus, HydrationStatus, Mode, OnOutage, Origin, PassKind, ResyncStatus,
    Rewound, Spill, StreamTlsStatus,
};

use crate::{
    output::{facts, plain_table},
    quantity::{count_text, duration_text, size_both, size_text, time_text},
};

/// All disks, a line each.
pub(crate) fn table(disks: &[DiskStatus]) -> String {
    if disks.is_empty() {
        return "no disks; `backtide attach NAME IMAGE --receiver ADDR` protects one".to_owned();
    }
    let row = |disk: &DiskStatus| {
        vec![
            disk.name.as_str().to_owned(),
            mode_text(disk),
            lag_text(disk),
            dirty_size_text(disk),
            disk.resync.as_ref().map(resync_text).unwrap_or_default(),
            reason_text(disk),
        ]
    };
    let table = plain_table(&["DISK", "MODE", "LAG", "DIRTY", "RESYNC", "REASON"], disks.iter().map(row));
    let beside = disks.iter().flat_map(|disk| {
        let told = [way_out(disk), untracked(disk).cloned(), spill_lost(disk)];
        told.into_iter().flatten().map(|told| format!("{}: {told}", disk.name.as_str()))
    });
    std::iter::once(table).chain(beside).collect::<Vec<_>>().join("\n")
}

/// So long a guest may wait before a person is told what to do: a receiver that starts again is back by then.
const WAIT_BORNE_SECONDS: f64 = 10.0;

/// What a person has to do about a disk that does not come right by itself.
pub(crate) fn way_out(disk: &DiskStatus) -> Option<String> {
    let name = disk.name.as_str();
    if disk.reason_code == "fenced" {
        return Some(format!(
            "shut its machine down here and `backtide detach {name}{}`; then `backtide failback {name}` brings the \
             latest point here when the other host has let go of it, or `backtide attach {name} {} --receiver {} --take-over` makes \
             what this image holds the latest content",
            if disk.guest_waits.is_some() { " --force" } else { "" },
            disk.image,
            disk.receiver,
        ));
    }
    let for_good = disk.on_outage == OnOutage::Block;
    disk.guest_waits.as_ref().filter(|waits| for_good && waits.seconds >= WAIT_BORNE_SECONDS)?;
    let goes_on = match disk.mode {
        _ if disk.open_elsewhere => format!(
            "shut down the program that has {} open beside the agent: it goes on when everything was compared then",
            disk.image
        ),
        Mode::Resync | Mode::Tracking if disk.connected => "it goes on when the resync has ended".to_owned(),
        _ => format!("it goes on when {} answers", disk.receiver),
    };
    Some(format!("{goes_on}; `backtide detach {name} --force` answers what waits with an error instead"))
}

/// Whether a person should look at a disk now: the exit code says so.
pub(crate) fn needs_a_person(disk: &DiskStatus) -> bool {
    // Nothing is protected, and what keeps it from being attached is not the agent's to change.
    let not_attached = disk.reason_code == "not-attached";
    not_attached || way_out(disk).is_some() || disk.hydration.as_ref().is_some_and(|lacks| lacks.stuck)
}

/// One disk in one line.
pub(crate) fn disk_line(disk: &DiskStatus) -> String {
    format!("{}  {}: {}", disk.name.as_str(), mode_text(disk), reason_text(disk))
}

/// One disk in full.
pub(crate) fn disk_text(disk: &DiskStatus) -> String {
    let mut lines = vec![
        ("disk", format!("{} ({})", disk.name.as_str(), disk.uuid.0)),
        ("mode", format!("{}: {}", mode_text(disk), disk.reason)),
        ("NBD", if disk.nbd_uri.is_empty() { "not served".to_owned() } else { disk.nbd_uri.clone() }),
        ("image", image_text(disk)),
    ];
    if let Some(waits) = &disk.guest_waits {
        let (requests, since) = (count_text(waits.requests, "request"), duration_text(waits.seconds));
        let why = format!("acknowledged {}, {} in an outage", disk.ack, disk.on_outage);
        lines.insert(2, ("guest waits", format!("{requests} for the receiver, for {since}: {why}")));
    }
    if let Some(way) = way_out(disk) {
        lines.insert(2, ("way out", way));
    }
    if let Some(why) = &disk.engine_reason {
        lines.push(("", why.clone()));
    }
    let connected = if disk.connected { "connected" } else { "not connected" };
    lines.push(("receiver", format!("{}, {connected}", disk.receiver)));
    if let Some(tls) = &disk.stream_tls {
        lines.extend(tls_lines(tls));
    }
    if let Some(trouble) = &disk.local_error {
        lines.push((trouble_of(disk), trouble.clone()));
    }
    if let Some(untracked) = untracked(disk) {
        lines.push(("state error", untracked.clone()));
    }
    if let Some(origin) = &disk.origin {
        let Origin { disk, lsn, time, .. } = origin;
        lines.push(("began as", format!("{}@lsn:{lsn} ({})", disk.as_str(), time_text(*time))));
    }
    if let Some(Rewound { from, to, to_time }) = disk.rewound {
        let undo = format!("undone by rewind --to lsn:{from}");
        lines.push(("set back", format!("to lsn:{to} ({}), {undo}", time_text(to_time))));
    }
    if let Some(lacks) = &disk.hydration {
        lines.push(("image lacks", hydration_text(lacks, disk.clients)));
    }
    if let Some(bad) = &disk.unreadable {
        let place = format!("the first at byte {} for {}", bad.offset, size_text(bad.length));
        lines.push(("unreadable", format!("{}, {place}", count_text(bad.blocks.0, "block"))));
    }
    if let Some(error) = &disk.last_error {
        lines.push(("last error", format!("{}: {} ({})", time_text(error.time), error.message, error.code)));
    }
    lines.push((
        "LSN",
        format!("{} last, {} received, {} durable", disk.lsn.last, disk.lsn.received, disk.lsn.durable),
    ));
    lines.push(("lag", lag_text(disk)));
    lines.push(("dirty", dirty_text(disk)));
    lines.push(("window", format!("{} of {}", size_text(disk.window.bytes), size_text(disk.window.limit))));
    if let Some(spill) = &disk.spill {
        lines.push(("spill", spill_text(spill)));
    }
    if let Some(resync) = &disk.resync {
        lines.push(("resync", format!("{}, {}", resync_text(resync), resync.reason)));
        let lacks = disk.hydration.as_ref();
        let ends = lacks.is_none_or(|lacks| !lacks.stuck && lacks.damaged_bytes.is_zero());
        lines.push(("", resync_speed_text(resync, ends)));
        lines.push(("", resync_point_text(resync)));
    }
    lines.push(("acknowledged", format!("{}, {} in an outage", disk.ack, disk.on_outage)));
    lines.push(("delayed", delay_text(disk)));
    lines.push(("clients", clients_text(disk)));
    lines.push((
        "since attach",
        format!(
            "{} ({}), {} ({}), {}; epoch {}",
            count_text(disk.counters.writes, "write"),
            size_text(disk.counters.write_bytes),
            count_text(disk.counters.reads, "read"),
            size_text(disk.counters.read_bytes),
            match disk.counters.flushes {
                1 => "1 flush".to_owned(),
                flushes => format!("{flushes} flushes"),
            },
            disk.epoch
        ),
    ));
    facts(&lines)
}

/// Both sides' certificates, and what is the matter with them.
fn tls_lines(tls: &StreamTlsStatus) -> Vec<(&'static str, String)> {
    let whose = |subject: &Option<String>, until: Option<backtide_units::CaptureTime>| {
        let subject = subject.as_deref().unwrap_or("not known yet");
        until.map_or(subject.to_owned(), |until| format!("{subject} until {}", time_text(until)))
    };
    let own = whose(&tls.subject, tls.not_after);
    let receiver = whose(&tls.receiver, tls.receiver_not_after);
    let mut lines = vec![("TLS", format!("as {own}, the receiver as {receiver}"))];
    lines.extend(tls.warnings.iter().map(|warning| ("TLS warning", warning.clone())));
    lines
}

fn image_text(disk: &DiskStatus) -> String {
    if disk.engine.is_empty() {
        return format!("{}, {}, not open", disk.image, size_both(disk.size));
    }
    let how = match disk.cache {
        CacheMode::Writeback => "by",
        CacheMode::Direct => "directly by",
    };
    format!("{}, {}, {how} {}", disk.image, size_both(disk.size), disk.engine)
}

/// What the receiver lacks of a disk, if it lacks anything.
pub(crate) fn missing_at_receiver(disk: &DiskStatus) -> Option<String> {
    if lacks_everything(disk) {
        return Some("everything".to_owned());
    }
    if disk.dirty.blocks.0 > 0 {
        return Some(count_text(disk.dirty.blocks.0, "changed block"));
    }
    if disk.resync_due {
        return Some("an unknown part".to_owned());
    }
    (disk.lag.records > 0).then(|| count_text(disk.lag.records, "write"))
}

/// Whether the receiver has never had anything of the disk: what is marked as changed is the least of it then.
fn lacks_everything(disk: &DiskStatus) -> bool {
    disk.resync_due && (disk.history.is_none() || disk.reason_code == "first-attach")
}

fn dirty_size_text(disk: &DiskStatus) -> String {
    match (lacks_everything(disk), disk.resync_due) {
        (true, _) => "everything".to_owned(),
        (false, true) => "not known yet".to_owned(),
        (false, false) => size_text(disk.dirty.bytes),
    }
}

fn dirty_text(disk: &DiskStatus) -> String {
    let known = format!("{}, {}", count_text(disk.dirty.blocks.0, "block"), size_text(disk.dirty.bytes));
    match (lacks_everything(disk), disk.resync_due) {
        (true, _) => {
            "everything that the disk holds is to be sent: the receiver has nothing of it".to_owned()
        }
        (false, true) => format!("{known}; what else differs is found out when a pass begins"),
        (false, false) => known,
    }
}

/// What hurts the guest goes before what explains the mode.
fn reason_text(disk: &DiskStatus) -> String {
    match &disk.local_error {
        Some(trouble) => format!("{}: {trouble}", trouble_of(disk)),
        None => disk.reason.clone(),
    }
}

/// Why a crash of the agent would cost a compare of the whole disk, where that is not told as its trouble.
pub(crate) fn untracked(disk: &DiskStatus) -> Option<&String> {
    disk.untracked.as_ref().filter(|_| disk.untracked != disk.local_error)
}

/// Why an outage would be bridged by memory alone, where there should be a spill.
pub(crate) fn spill_lost(disk: &DiskStatus) -> Option<String> {
    let why = disk.spill.as_ref()?.error.as_ref()?;
    Some(format!("its spill cannot be used, and an outage is bridged by memory alone: {why}"))
}

/// Whether the trouble is with the agent's state, whatever the image is.
pub(crate) fn is_of_state(disk: &DiskStatus) -> bool {
    disk.local_error.is_some() && [&disk.unsaved, &disk.untracked].contains(&&disk.local_error)
}

fn trouble_of(disk: &DiskStatus) -> &'static str {
    if is_of_state(disk) { "state error" } else { "image error" }
}

fn mode_text(disk: &DiskStatus) -> String {
    // Whatever it keeps or tracks, none of it goes to the receiver.
    if disk.reason_code == "fenced" {
        return "fenced".to_owned();
    }
    let mode = match disk.mode {
        Mode::Sync => "sync",
        Mode::Resync => "resync",
        Mode::Tracking => "tracking",
        Mode::Paused => "paused",
        Mode::Detached => "detached",
    };
    if disk.mode == Mode::Sync && !disk.connected {
        format!("{mode} (disconnected)")
    } else {
        mode.to_owned()
    }
}

fn lag_text(disk: &DiskStatus) -> String {
    if lacks_everything(disk) {
        return format!("{}, everything", duration_text(disk.lag.seconds));
    }
    if disk.lag.records == 0 && disk.dirty.blocks.0 == 0 && !disk.resync_due {
        return "none".to_owned();
    }
    let writes = count_text(disk.lag.records, "write");
    format!("{}, {writes}, {}", duration_text(disk.lag.seconds), size_text(disk.lag.bytes))
}

fn spill_text(spill: &Spill) -> String {
    if let Some(error) = &spill.error {
        return format!("cannot be used: {error}");
    }
    let records = count_text(spill.records, "write");
    let full = if spill.full { ", full" } else { "" };
    format!("{records}, {} of {}{full}", size_text(spill.bytes), size_text(spill.limit))
}

fn resync_text(resync: &ResyncStatus) -> String {
    let percent = (resync.done_bytes.0 * 100).checked_div(resync.total_bytes.0).unwrap_or(100).min(100);
    let eta = match resync.eta_seconds {
        Some(seconds) => format!(", {} left", duration_text(seconds as f64)),
        None => String::new(),
    };
    let what = if resync.compare { "compared" } else { "sent" };
    format!("pass {} {percent}% {what} at {}/s{eta}", resync.pass, size_text(resync.rate))
}

fn resync_speed_text(resync: &ResyncStatus, ends: bool) -> String {
    let done = format!("{} of {}", size_text(resync.done_bytes), size_text(resync.total_bytes));
    let guest = format!("the guest changes {}/s", size_text(resync.guest_rate));
    let held = match resync.held_to {
        Some(rate) => format!(", held back to {}/s", size_text(rate)),
        None => String::new(),
    };
    let sync = match resync.sync_eta_seconds {
        Some(seconds) => format!("in sync in about {}", duration_text(seconds as f64)),
        None if !ends => "it does not get in sync without what the image lacks".to_owned(),
        None => "when it is in sync cannot be told yet".to_owned(),
    };
    format!("{done}, {guest}{held}; {sync}")
}

fn delay_text(disk: &DiskStatus) -> String {
    let counters = &disk.counters;
    let longest = f64::from(u32::try_from(counters.guest_delay_max_us).unwrap_or(u32::MAX)) / 1000.0;
    let bound = match disk.limits.guest_delay_max_ms {
        0 => "never".to_owned(),
        bound => format!("at most {bound} ms"),
    };
    let late = match counters.guest_delay_late_max_us {
        0..1000 => String::new(),
        late => format!(
            " (up to {:.1} ms of it waiting for a processor or local storage)",
            f64::from(u32::try_from(late).unwrap_or(u32::MAX)) / 1000.0
        ),
    };
    match counters.guest_delay_max_us {
        0 => format!("no request was, for the receiver; {bound}"),
        _ => format!("{longest:.1} ms at the longest, for the receiver{late}; {bound}"),
    }
}

/// The bounds of a disk, a line each.
pub(crate) fn limits_text(disk: &DiskStatus) -> String {
    let limits = &disk.limits;
    let rate = match limits.resync_bytes_per_second_max.0 {
        0 => "as fast as it goes".to_owned(),
        _ => format!("{}/s at the most", size_text(limits.resync_bytes_per_second_max)),
    };
    let latency = match limits.resync_latency_us_max {
        0 => "as much as it takes".to_owned(),
        us => format!("about {us} µs at the most"),
    };
    let delay = match limits.guest_delay_max_ms {
        0 => "never".to_owned(),
        ms => format!("{ms} ms at the most"),
    };
    // As the engine has it: who may block never gives the receiver up, and a disk of which no request waits for it goes on.
    let outage = match (disk.ack, disk.on_outage) {
        (AckPolicy::Local, _) => "never: no request waits for the receiver".to_owned(),
        (_, OnOutage::Block) => "never: the guest waits".to_owned(),
        (_, OnOutage::Continue) => format!("after {} ms", limits.outage_after_ms),
    };
    facts(&[
        ("resync", rate),
        ("adds to the guest's latency", latency),
        ("a full window delays the guest", delay),
        ("silence is an outage", outage),
        ("window", size_text(limits.window_bytes)),
        ("resync buffer", size_text(limits.resync_buffer_bytes)),
        ("bitmap", size_text(limits.bitmap_bytes)),
        (
            "hot extents",
            format!("{} of {}", limits.activity_extents, size_text(limits.activity_extent_bytes)),
        ),
    ])
}

fn resync_point_text(resync: &ResyncStatus) -> String {
    let meanwhile = match resync.kind {
        PassKind::Forwarding => "writes are forwarded meanwhile",
        PassKind::Coalescing => "writes are gathered for the next pass",
    };
    if resync.point_recoverable {
        format!("{meanwhile}; lsn:{} becomes a point when the pass ends", resync.at)
    } else {
        format!("{meanwhile}; lsn:{} is not going to be a point", resync.at)
    }
}

/// Who has the disk open, and who may come back to it.
fn clients_text(disk: &DiskStatus) -> String {
    match disk.awaited_clients {
        0 => disk.clients.to_string(),
        awaited => format!(
            "{}, and {awaited} that had the disk open when its service was interrupted: a virtual machine comes back with its next request",
            disk.clients
        ),
    }
}

/// What an image lacks, and how it comes.
fn hydration_text(lacks: &HydrationStatus, clients: u32) -> String {
    let (missing, total) = (size_text(lacks.missing_bytes), size_text(lacks.total_bytes));
    let mut text = format!("{missing} of {total}, at LSN {} of disk {}", lacks.point, lacks.disk);
    if lacks.rate.0 > 0 {
        text.push_str(&format!(", {}/s", size_text(lacks.rate)));
    }
    if let Some(trouble) = &lacks.trouble {
        text.push_str(&format!(": {trouble}"));
    }
    if lacks.waiting_requests > 0 && lacks.trouble.is_some() {
        let waiting = count_text(lacks.waiting_requests, "request");
        let whose = if clients > 0 { "the guest" } else { "clients that have gone" };
        text.push_str(&format!("; {waiting} of {whose} waiting for it"));
    }
    if lacks.stuck {
        text.push_str("; it does not come by itself: set the disk to another point, or see to the receiver");
    }
    text
}

#[cfg(test)]
pub(crate) mod tests;
