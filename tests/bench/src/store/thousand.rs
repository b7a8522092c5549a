//! A thousand disks at one receiver: what they cost while nothing is written, what a little of each costs, and
//! whether everybody else is still served.

use std::{
    fmt::Write,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::Context;
use backtide_protocol::{Data, Message};
use bytes::Bytes;
use tokio::time::{MissedTickBehavior, interval_at};

use super::{
    peer::Peer,
    receiver::{Receiver, Usage},
};
use crate::tracking::Setting;

const DISKS: usize = 1000;

/// How often each of them writes.
const PERIOD: Duration = Duration::from_secs(1);

const PAYLOAD_BYTES: usize = 4096;

/// Memory is given back, and syncs end, a while after the last frame.
const SETTLING: Duration = Duration::from_secs(2);

/// What a stretch of writing brought.
struct Stretch {
    seconds: f64,
    usage: Usage,
    writes: usize,
    /// From sent to durable, of all writes, sorted.
    took: Vec<Duration>,
    /// The slowest disk's mean, in means of all.
    slowest: f64,
}

/// See the module's description.
pub(super) fn run(setting: &Setting<'_>) -> anyhow::Result<String> {
    let directory = setting.place.join("thousand-disks");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut text = format!(
        "{DISKS} disks attached to one receiver by their streams. Writing: {} KiB each second to each disk, {} s.\n\n| | |\n|---|---|\n",
        PAYLOAD_BYTES >> 10,
        stretch_of(setting).as_secs()
    );
    let mut line = |what: &str, value: String| {
        eprintln!("thousand-disks: {what}: {value}");
        writeln!(text, "| {what} | {value} |")
    };
    let receiver = Receiver::start(setting.backtide, &directory)?;
    line("a receiver without disks, memory", mib(receiver.memory()?))?;
    let begun = Instant::now();
    let peers = runtime.block_on(attach(&receiver.stream()))?;
    line("attached, one after the other, in", seconds(begun.elapsed()))?;
    std::thread::sleep(SETTLING);
    line("idle: memory", mib(receiver.memory()?))?;
    line("idle: open files", receiver.open_files()?.to_string())?;
    line("idle: threads", receiver.threads()?.to_string())?;
    line("idle: space of the store", mib(space(&receiver.store())?))?;
    ask(&receiver, "idle", &mut line)?;
    // What others have written is not for the receiver to write.
    Command::new("sync").status().context("run sync")?;
    let (peers, written) = runtime.block_on(write_to_all(&receiver, peers, stretch_of(setting), false))?;
    tell("writing", &written, &mut line)?;
    ask(&receiver, "after it", &mut line)?;
    let (peers, waited) = runtime.block_on(write_to_all(&receiver, peers, stretch_of(setting), true))?;
    tell("writing, each write waited for", &waited, &mut line)?;
    line("after it: memory", mib(receiver.memory()?))?;
    line("after it: space of the store", mib(space(&receiver.store())?))?;
    drop(peers);
    receiver.end()?;
    let begun = Instant::now();
    let receiver = Receiver::start(setting.backtide, &directory)?;
    line("started again, ready in", seconds(begun.elapsed()))?;
    line("started again: memory", mib(receiver.memory()?))?;
    line("started again: open files", receiver.open_files()?.to_string())?;
    drop(receiver);
    std::fs::remove_dir_all(&directory)?;
    Ok(text)
}

fn stretch_of(setting: &Setting<'_>) -> Duration {
    // Each disk writes a few times, whatever the other rows' seconds are.
    Duration::from_secs(u64::from(setting.seconds).max(10))
}

async fn attach(socket: &Path) -> anyhow::Result<Vec<Peer>> {
    let mut peers = Vec::new();
    for number in 0..DISKS {
        peers.push(Peer::attach(socket, number).await.with_context(|| format!("attach disk {number}"))?);
    }
    Ok(peers)
}

/// Has every disk written at its own moment of each second.
async fn write_to_all(
    receiver: &Receiver,
    peers: Vec<Peer>,
    stretch: Duration,
    waits: bool,
) -> anyhow::Result<(Vec<Peer>, Stretch)> {
    let before = receiver.usage()?;
    let begun = Instant::now();
    let payload = Data::capture(payload_of(PAYLOAD_BYTES));
    let tasks: Vec<_> = peers
        .into_iter()
        .enumerate()
        .map(|(number, mut peer)| {
            let first = tokio::time::Instant::now() + PERIOD.mul_f64(number as f64 / DISKS as f64);
            let payload = payload.clone();
            tokio::task::spawn(async move {
                write_now_and_then(&mut peer, first, stretch, &payload, waits).await?;
                anyhow::Ok(peer)
            })
        })
        .collect();
    let mut peers = Vec::new();
    for task in tasks {
        peers.push(task.await??);
    }
    let elapsed = begun.elapsed();
    let after = receiver.usage()?;
    let means: Vec<f64> = peers.iter().map(|peer| mean(&peer.took)).collect();
    let slowest = means.iter().copied().fold(0.0, f64::max) * means.len() as f64 / means.iter().sum::<f64>();
    let mut took: Vec<Duration> = peers.iter_mut().flat_map(|peer| std::mem::take(&mut peer.took)).collect();
    took.sort_unstable();
    let stretch = Stretch {
        seconds: elapsed.as_secs_f64(),
        usage: Usage {
            cpu: after.cpu - before.cpu,
            written: after.written - before.written,
            flushes: after.flushes - before.flushes,
            commits: after.commits - before.commits,
        },
        writes: took.len(),
        took,
        slowest,
    };
    Ok((peers, stretch))
}

async fn write_now_and_then(
    peer: &mut Peer,
    first: tokio::time::Instant,
    stretch: Duration,
    payload: &Data,
    waits: bool,
) -> anyhow::Result<()> {
    let mut turns = stretch.as_secs() / PERIOD.as_secs();
    let mut turn = interval_at(first, PERIOD);
    turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while turns > 0 || peer.behind() > 0 {
        tokio::select! {
            heard = peer.hear() => heard?,
            _ = turn.tick(), if turns > 0 => {
                turns -= 1;
                let mut batch = vec![peer.write(payload)];
                if waits {
                    batch.push(Message::Hasten { durable: true });
                }
                peer.send_measured(&batch).await?;
            }
        }
    }
    Ok(())
}

/// Questions that concern all disks.
fn ask(
    receiver: &Receiver,
    when: &str,
    line: &mut impl FnMut(&str, String) -> std::fmt::Result,
) -> anyhow::Result<()> {
    for question in [&["receiver", "status"][..], &["points", "disk7"], &["retention", "preview", "disk7"]] {
        let (took, _) = receiver.time(question)?;
        line(&format!("{when}: `backtide {}`", question.join(" ")), seconds(took))?;
    }
    Ok(())
}

fn tell(
    what: &str,
    stretch: &Stretch,
    line: &mut impl FnMut(&str, String) -> std::fmt::Result,
) -> anyhow::Result<()> {
    let Stretch { seconds, usage, writes, took, slowest } = stretch;
    let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    line(&format!("{what}: writes a second"), format!("{:.0}", *writes as f64 / seconds))?;
    line(&format!("{what}: processors"), format!("{:.2}", usage.cpu.as_secs_f64() / seconds))?;
    line(&format!("{what}: flushes a second"), format!("{:.0}", usage.flushes as f64 / seconds))?;
    line(&format!("{what}: disks made durable a second"), format!("{:.0}", usage.commits as f64 / seconds))?;
    line(
        &format!("{what}: bytes to the device per byte of payload"),
        format!("{:.1}", usage.written as f64 / (*writes * PAYLOAD_BYTES) as f64),
    )?;
    line(
        &format!("{what}: durable after"),
        format!("{:.0} ms, p99 {:.0} ms, longest {:.0} ms", at(0.5), at(0.99), at(1.0)),
    )?;
    line(&format!("{what}: the slowest disk"), format!("{slowest:.2} of the mean"))?;
    Ok(())
}

/// Bytes that do not compress.
pub(super) fn payload_of(bytes: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut payload = Vec::with_capacity(bytes);
    while payload.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        payload.extend_from_slice(&state.to_le_bytes());
    }
    payload.into()
}

fn mean(took: &[Duration]) -> f64 {
    took.iter().map(Duration::as_secs_f64).sum::<f64>() / took.len().max(1) as f64
}

/// What a directory takes of the device, in bytes.
fn space(directory: &Path) -> anyhow::Result<u64> {
    let output = Command::new("du").args(["-s", "-B1"]).arg(directory).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.split_whitespace().next().context("the answer of du")?.parse()?)
}

pub(super) fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20))
}

fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}
