//! Mounts as text.

use backtide_agent_api::{AgentKeptOverlay, AgentMount, AgentMounts, AgentOverlay};
use backtide_receiver_api::{KeptOverlay, Mount, MountOverlay, Mounts};

use crate::{
    output::{facts, plain_table},
    quantity::{size_both, size_text, time_text},
};

/// One mount that was made just now.
pub(crate) fn mount_text(mount: &Mount) -> String {
    let mut all = vec![
        ("mount", mount.id.clone()),
        ("disk", mount.disk.name.as_str().to_owned()),
        ("point", format!("lsn:{}  {}", mount.lsn, time_text(mount.time))),
        ("size", size_both(mount.size)),
    ];
    if let Some(overlay) = &mount.overlay {
        let holds = format!("{}, at most {}", size_text(overlay.bytes), size_text(overlay.limit));
        all.push(("written", holds));
    }
    if let Some(since) = &mount.changed_since {
        let told = format!("since lsn:{} in {}", since.lsn, since.context);
        all.push(("changes", told));
    }
    all.push(("NBD", mount.uri.clone()));
    facts(&all)
}

/// All mounts, and the overlays that are kept.
pub(crate) fn mounts_text(mounts: &Mounts) -> String {
    let mut lines = vec![table(&mounts.mounts)];
    if !mounts.kept.is_empty() {
        lines.push(kept_table(&mounts.kept));
    }
    for KeptOverlay { id, problem, .. } in &mounts.kept {
        lines.extend(problem.iter().map(|why| format!("{id}: {why}")));
    }
    lines.join("\n")
}

/// A mount of this host's agent that was made just now.
pub(crate) fn agent_mount_text(mount: &AgentMount) -> String {
    let mut all = vec![
        ("mount", mount.id.clone()),
        ("disk", mount.disk.as_str().to_owned()),
        ("point", format!("lsn:{}  {}", mount.lsn, time_text(mount.time))),
        ("size", size_both(mount.size)),
        ("receiver", mount.receiver.clone()),
        ("cache", format!("at most {}", size_text(mount.cache.limit))),
    ];
    if let Some(overlay) = &mount.overlay {
        let holds = format!("{}, at most {}", size_text(overlay.bytes), size_text(overlay.limit));
        all.push(("written", holds));
    }
    if let Some(since) = &mount.changed_since {
        all.push(("changes", format!("since lsn:{} in {}", since.lsn, since.context)));
    }
    all.push(("NBD", mount.uri.clone()));
    facts(&all)
}

/// All mounts of this host's agent, and the overlays that it keeps.
pub(crate) fn agent_mounts_text(mounts: &AgentMounts) -> String {
    let mut lines = vec![agent_table(&mounts.mounts)];
    for mount in &mounts.mounts {
        lines.extend(mount.last_error.iter().map(|why| format!("{}: {why}", mount.id)));
    }
    if !mounts.kept.is_empty() {
        let row = |overlay: &AgentKeptOverlay| {
            vec![
                overlay.id.clone(),
                overlay.disk.as_str().to_owned(),
                format!("lsn:{}", overlay.lsn),
                time_text(overlay.time),
                size_text(overlay.file_bytes),
            ]
        };
        lines.push(plain_table(&KEPT_HEADS, mounts.kept.iter().map(row)));
    }
    for overlay in &mounts.kept {
        lines.extend(overlay.problem.iter().map(|why| format!("{}: {why}", overlay.id)));
    }
    lines.join("\n")
}

fn agent_table(mounts: &[AgentMount]) -> String {
    if mounts.is_empty() {
        return "no mounts; `backtide mount NAME --at POINT --here` makes one".to_owned();
    }
    let row = |mount: &AgentMount| {
        vec![
            mount.id.clone(),
            mount.disk.as_str().to_owned(),
            format!("lsn:{}", mount.lsn),
            time_text(mount.time),
            mount.clients.to_string(),
            size_text(mount.cache.bytes),
            mount.overlay.map_or_else(String::new, |AgentOverlay { bytes, .. }| size_text(bytes)),
            mount.uri.clone(),
        ]
    };
    let heads = ["MOUNT", "DISK", "POINT", "TIME", "CLIENTS", "CACHED", "WRITTEN", "NBD"];
    plain_table(&heads, mounts.iter().map(row))
}

const KEPT_HEADS: [&str; 5] = ["KEPT", "DISK", "POINT", "TIME", "TAKES"];

fn kept_table(kept: &[KeptOverlay]) -> String {
    let unknown = || "?".to_owned();
    let row = |overlay: &KeptOverlay| {
        vec![
            overlay.id.clone(),
            overlay.disk.as_ref().map_or_else(unknown, |disk| disk.name.as_str().to_owned()),
            overlay.lsn.map_or_else(unknown, |lsn| format!("lsn:{lsn}")),
            overlay.time.map_or_else(unknown, time_text),
            size_text(overlay.file_bytes),
        ]
    };
    plain_table(&KEPT_HEADS, kept.iter().map(row))
}

fn table(mounts: &[Mount]) -> String {
    if mounts.is_empty() {
        return "no mounts; `backtide mount NAME --at POINT` makes one".to_owned();
    }
    let row = |mount: &Mount| {
        vec![
            mount.id.clone(),
            mount.disk.name.as_str().to_owned(),
            format!("lsn:{}", mount.lsn),
            time_text(mount.time),
            mount.clients.to_string(),
            mount.overlay.map_or_else(String::new, |MountOverlay { bytes, .. }| size_text(bytes)),
            mount.uri.clone(),
        ]
    };
    plain_table(&["MOUNT", "DISK", "POINT", "TIME", "CLIENTS", "WRITTEN", "NBD"], mounts.iter().map(row))
}
