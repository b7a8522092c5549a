//! What a service manager is told while the agent runs: that it lives, and how its disks are.
//!
//! The sign of life comes from the loop that answers calls and after a look at the disks' list. A
//! disk that stands still is no reason to withhold it: to kill the agent would take the others down.

use std::{collections::BTreeMap, time::Duration};

use backtide_agent_api::Mode;
use backtide_socket::Notifier;
use tokio::time::{Instant, MissedTickBehavior};

use crate::registry::Registry;

/// How often the disks are looked at.
const LOOK: Duration = Duration::from_secs(5);

/// Tells it for ever, beginning with the agent being ready.
pub(crate) async fn tell(notifier: &Notifier, registry: &Registry) {
    let mut said = status(registry).await;
    notifier.tell(&format!("READY=1\nSTATUS={said}"));
    // Three signs in the time of one, lest one that is late is the death of all disks.
    let pause = notifier.watchdog().map_or(LOOK, |time| (time / 3).min(LOOK));
    let mut signs = tokio::time::interval(pause.max(Duration::from_millis(1)));
    signs.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut looked = Instant::now();
    loop {
        signs.tick().await;
        let _ = registry.handles().await;
        if notifier.watchdog().is_some() {
            notifier.tell("WATCHDOG=1");
        }
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            // A status takes as long as the slowest disk, which has a bound below a sign's pause.
            let now = match tokio::time::timeout(pause, status(registry)).await {
                Ok(now) => now,
                Err(_) => "a disk does not answer".to_owned(),
            };
            if now != said {
                notifier.tell(&format!("STATUS={now}"));
                said = now;
            }
        }
    }
}

/// As in the status' JSON.
fn mode_name(mode: Mode) -> String {
    match mode {
        Mode::Sync => "sync",
        Mode::Resync => "resync",
        Mode::Tracking => "tracking",
        Mode::Paused => "paused",
        Mode::Detached => "detached",
    }
    .to_owned()
}

/// How many disks there are, and in which modes.
async fn status(registry: &Registry) -> String {
    let mut asking = tokio::task::JoinSet::new();
    let handles = registry.handles().await;
    let attached = handles.len();
    for handle in handles {
        asking.spawn(async move { handle.status().await.map(|status| mode_name(status.mode)) });
    }
    let mut modes: BTreeMap<String, usize> = BTreeMap::new();
    for mode in asking.join_all().await {
        *modes.entry(mode.unwrap_or_else(|_| "not answering".to_owned())).or_default() += 1;
    }
    let failing = registry.failing().await.len();
    if failing > 0 {
        modes.insert("not attached yet".to_owned(), failing);
    }
    let modes: Vec<String> = modes.iter().map(|(mode, count)| format!("{count} {mode}")).collect();
    match attached + failing {
        0 => "no disks".to_owned(),
        1 => format!("1 disk: {}", modes.join(", ")),
        disks => format!("{disks} disks: {}", modes.join(", ")),
    }
}
