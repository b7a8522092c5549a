//! What a change costs each process on its way, in figures that do not depend on how busy the machine is:
//! instructions, by `valgrind --tool=callgrind`, and switches between threads; beside them processor time and
//! page faults, which do.
//!
//! A run without a guest is taken off: starting, attaching and ending are no part of a change. Valgrind counts
//! what a program does itself; what the kernel does for it is in the processor time only.

use std::{fmt::Write, fs::File, path::Path};

use anyhow::Context;

use super::{
    Setting,
    guest::Guest,
    stand::{Role, Stand},
};

const MIB: u64 = 64;

/// What the guest does.
struct Work {
    name: &'static str,
    options: &'static [&'static str],
    /// Bytes of each change.
    length: u64,
    /// Without valgrind, and under it, where each costs fifty times as much.
    changes: [u64; 2],
}

const WORKS: [Work; 4] = [
    Work { name: "4 KiB write, depth 1", options: &["--iodepth=1"], length: 4096, changes: [20_000, 2_000] },
    Work {
        name: "4 KiB write, depth 32",
        options: &["--iodepth=32"],
        length: 4096,
        changes: [20_000, 2_000],
    },
    Work {
        name: "4 KiB write and flush, depth 1",
        options: &["--fsync=1"],
        length: 4096,
        changes: [2_000, 500],
    },
    Work {
        name: "1 MiB write, depth 4",
        options: &["--bs=1M", "--iodepth=4"],
        length: 1 << 20,
        changes: [1_000, 100],
    },
];

/// Who is measured: a name, whether there is a receiver, and options of the attach.
const SETS: [(&str, bool, &[&str]); 3] = [
    ("tracking", false, &[]),
    ("in sync", true, &[]),
    ("in sync, `ack=durable`", true, &["--ack", "durable"]),
];

/// What a process has used.
#[derive(Clone, Copy, Default)]
struct Used {
    processor_us: f64,
    switches: f64,
    faults: f64,
}

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let mut text = String::from(
        "For each change; user space and kernel for the processor time, user space for the instructions.\n\n| | | | instructions | switches | processor, µs | page faults |\n|---|---|---|---|---|---|---|\n",
    );
    let directory = setting.place.join("instructions");
    for (name, receives, options) in SETS {
        let idle = counted(setting, &directory, receives, options, None)?;
        for work in &WORKS {
            let counts = counted(setting, &directory, receives, options, Some(work))?;
            let used = used(setting, &directory, receives, options, work)?;
            for (role, used) in used {
                let of = |counts: &[(Role, f64)]| {
                    counts.iter().find(|(other, _)| *other == role).map_or(f64::NAN, |(_, count)| *count)
                };
                let instructions = (of(&counts) - of(&idle)) / work.changes[1] as f64;
                let Used { processor_us, switches, faults } = used;
                eprintln!(
                    "instructions, {name}, {role:?}: {}: {instructions:.0}, {switches:.2} switches, {processor_us:.1} µs, {faults:.2} faults",
                    work.name
                );
                writeln!(
                    text,
                    "| {name} | {} | {} | {instructions:.0} | {switches:.2} | {processor_us:.1} | {faults:.2} |",
                    work.name,
                    role.name()
                )?;
            }
        }
    }
    Ok(text)
}

/// An empty disk, so that coming in sync is nearly nothing.
fn attach(stand: &Stand, directory: &Path, receives: bool, options: &[&str]) -> anyhow::Result<()> {
    let image = directory.join("disk.raw");
    File::create(&image)?.set_len(MIB << 20)?;
    stand.attach(&image, options)?;
    if receives { stand.wait_for_sync() } else { Ok(()) }
}

fn works(stand: &Stand, work: &Work, changes: u64) -> anyhow::Result<()> {
    // More than the disk is long: again over the same blocks.
    let bytes = format!("--io_size={}", changes * work.length);
    let more = [work.options, &["--norandommap", &bytes]].concat();
    Guest::start(&stand.uri(), "randwrite", MIB, &more)?.end().map(drop)
}

/// Instructions of each process from its start to its end; what `work` adds is part of it.
fn counted(
    setting: &Setting<'_>,
    directory: &Path,
    receives: bool,
    options: &[&str],
    work: Option<&Work>,
) -> anyhow::Result<Vec<(Role, f64)>> {
    let _ = std::fs::remove_dir_all(directory);
    let output = |role: Role| directory.join(role.name()).with_extension("callgrind");
    let under = |role: Role| {
        let file = format!("--callgrind-out-file={}", output(role).display());
        vec!["valgrind".to_owned(), "--quiet".to_owned(), "--tool=callgrind".to_owned(), file]
    };
    let stand = Stand::start_under(setting.backtide, directory, receives, under)?;
    attach(&stand, directory, receives, options)?;
    if let Some(work) = work {
        works(&stand, work, work.changes[1])?;
        if receives {
            stand.wait_for_sync()?;
        }
    }
    let roles: Vec<Role> = stand.roles().map(|(role, _)| role).collect();
    stand.end()?;
    let count = |role: Role| {
        let text = std::fs::read_to_string(output(role)).context("what callgrind has counted")?;
        let total = text.lines().rev().find_map(|line| line.strip_prefix("totals: "));
        let total = total.context("callgrind's total")?.trim().parse::<f64>()?;
        Ok((role, total))
    };
    roles.into_iter().map(count).collect()
}

/// What each process uses for one change, on its own.
fn used(
    setting: &Setting<'_>,
    directory: &Path,
    receives: bool,
    options: &[&str],
    work: &Work,
) -> anyhow::Result<Vec<(Role, Used)>> {
    let _ = std::fs::remove_dir_all(directory);
    let stand = Stand::start(setting.backtide, directory, receives)?;
    attach(&stand, directory, receives, options)?;
    // Blocks and memory that are met for the first time are no part of it.
    works(&stand, work, work.changes[0] / 10)?;
    let before = stand.roles().map(|(_, id)| Used::so_far(id)).collect::<anyhow::Result<Vec<_>>>()?;
    works(&stand, work, work.changes[0])?;
    let changes = work.changes[0] as f64;
    let each = stand.roles().zip(before).map(|((role, id), before)| {
        let after = Used::so_far(id)?;
        let used = Used {
            processor_us: (after.processor_us - before.processor_us) / changes,
            switches: (after.switches - before.switches) / changes,
            faults: (after.faults - before.faults) / changes,
        };
        Ok((role, used))
    });
    each.collect()
}

impl Used {
    /// Of a process and all its threads that are there.
    fn so_far(process: u32) -> anyhow::Result<Self> {
        let mut used = Self::default();
        for thread in std::fs::read_dir(format!("/proc/{process}/task"))? {
            let thread = thread?.path();
            // A thread of a pool may end meanwhile.
            let Ok(status) = std::fs::read_to_string(thread.join("status")) else { continue };
            let switches = status.lines().filter(|line| line.contains("ctxt_switches"));
            let counts = switches.filter_map(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
            used.switches += counts.sum::<f64>();
        }
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat"))?;
        let fields: Vec<&str> =
            stat.rsplit_once(')').context("the end of a name")?.1.split_whitespace().collect();
        used.faults = fields.get(7).context("page faults")?.parse()?;
        let schedule = std::fs::read_dir(format!("/proc/{process}/task"))?;
        for thread in schedule {
            let Ok(text) = std::fs::read_to_string(thread?.path().join("schedstat")) else { continue };
            let ran = text.split_whitespace().next().context("time on a processor")?;
            used.processor_us += ran.parse::<f64>()? / 1000.0;
        }
        Ok(used)
    }
}
