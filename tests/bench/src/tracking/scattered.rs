//! How much a resync of lone blocks sends.

use std::fs::File;

use super::{Setting, guest::Guest, stand::Stand};

const BLOCKS: u64 = 100_000;
const MIB: u64 = 64 << 10;

/// A pause, blocks written here and there, and what the agent writes until it is in sync again.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("resync-scattered");
    std::fs::create_dir_all(&directory)?;
    let image = directory.join("disk.raw");
    File::create(&image)?.set_len(MIB << 20)?;
    let stand = Stand::start(setting.backtide, &directory, true)?;
    stand.attach(&image, &[])?;
    stand.wait_for_sync()?;
    stand.obey(&["pause", "disk"])?;
    let count = format!("--number_ios={BLOCKS}");
    Guest::start(&stand.uri(), "randwrite", MIB, &["--iodepth=32", "--randrepeat=1", &count])?.end()?;
    let dirty = stand.status()?["dirty"]["blocks"].as_u64().unwrap_or_default();
    let before = stand.agent_wrote()?;
    let began = std::time::Instant::now();
    stand.obey(&["resume", "disk"])?;
    stand.wait_for_sync()?;
    let took = began.elapsed();
    let wrote = stand.agent_wrote()? - before;
    drop(stand);
    std::fs::remove_dir_all(&directory)?;
    let bytes = dirty * 4096;
    Ok(format!(
        "{dirty} dirty blocks of 4 KiB all over {} GiB, {bytes} bytes: the agent wrote {wrote} bytes, headers, answers and its own files included, {:.3} times as much, in {:.1} s.\n",
        MIB >> 10,
        wrote as f64 / bytes as f64,
        took.as_secs_f64()
    ))
}
