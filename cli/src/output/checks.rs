//! What `fsck` and `scrub` found, as text.

use backtide_receiver_api::{DiskCheck, OverlayCheck, Touched};

use crate::{output::plain_table, quantity::size_text};

/// The disks, a line each.
pub(crate) fn disks_text(disks: &[DiskCheck]) -> String {
    if disks.is_empty() {
        return "no disks".to_owned();
    }
    let row = |disk: &DiskCheck| {
        let verdict = match (&disk.error, disk.sound) {
            (Some(_), _) => "UNREADABLE",
            (None, true) => "sound",
            (None, false) => "DAMAGED",
        };
        vec![
            name(disk),
            disk.segments.to_string(),
            disk.entries.to_string(),
            size_text(disk.bytes),
            verdict.to_owned(),
        ]
    };
    plain_table(&["DISK", "SEGMENTS", "ENTRIES", "READ", "STATE"], disks.iter().map(row))
}

/// The overlays, a line each; nothing when there are none.
pub(crate) fn overlays_text(overlays: &[OverlayCheck]) -> Vec<String> {
    if overlays.is_empty() {
        return Vec::new();
    }
    let row = |overlay: &OverlayCheck| {
        let verdict = match (&overlay.error, overlay.sound) {
            (Some(_), _) => "UNREADABLE",
            (None, true) => "sound",
            (None, false) => "DAMAGED",
        };
        vec![overlay.id.clone(), size_text(overlay.bytes), verdict.to_owned()]
    };
    let mut lines = vec![plain_table(&["OVERLAY", "READ", "STATE"], overlays.iter().map(row))];
    for OverlayCheck { id, damage, more_damage, error, .. } in overlays {
        lines.extend(damage.iter().chain(error).map(|why| format!("overlay {id}: {why}")));
        if *more_damage > 0 {
            lines.push(format!("overlay {id}: {more_damage} more damaged places"));
        }
    }
    lines
}

/// What is wrong, a line each.
pub(crate) fn problems_text(store: &[String], disks: &[DiskCheck]) -> Vec<String> {
    let mut lines: Vec<String> = store.to_vec();
    for disk in disks {
        let name = name(disk);
        lines.extend(disk.mended.iter().map(|damage| format!("{name}: MENDED, it is whole again: {damage}")));
        lines.extend(disk.cut.iter().map(|lost| format!("{name}: CUT: {lost}")));
        let told = |damage: &String| format!("{name}: {}", damage_text(damage, &disk.touched));
        lines.extend(disk.damage.iter().map(told));
        if disk.more_damage > 0 {
            lines.push(format!("{name}: {} more damaged places", disk.more_damage));
        }
        lines.extend(disk.error.iter().map(|error| format!("{name}: {error}")));
    }
    lines
}

/// A damaged place, and which points it touches.
pub(crate) fn damage_text(damage: &str, all: &[Touched]) -> String {
    match Touched::by(all, damage) {
        Some(touched) => format!("{damage}; {}", touched.text),
        None => damage.to_owned(),
    }
}

fn name(disk: &DiskCheck) -> String {
    disk.name.as_ref().map_or_else(|| disk.uuid.to_string(), ToString::to_string)
}
