//! Folding while points come and go, and while a part of the history cannot be read.

use std::{fs, ops::Range, os::unix::fs::FileExt, path::Path};

use backtide_log_receiver::{Config, Receiver, Retention};
use backtide_protocol::Hello;
use backtide_receiver_api::{KeepRequest, ReceiverClient, RetentionReport, RetentionRequest};
use backtide_units::{ByteCount, Lsn};

use crate::{
    agent::*,
    fixture::*,
    going_back::{assert_content, request},
    mending::scrubbed,
    retention::{TENS, at, content, files, ladder, rounds, vm1, write_history},
};

/// Folds so slowly that others can do something meanwhile.
async fn slow(place: &Place) -> Receiver {
    let retention =
        Retention { bytes_per_second_max: ByteCount(4 << 20), interval_ms: 20, ..Retention::default() };
    Receiver::start(Config { retention, ..place.config() }).await.unwrap()
}

async fn keep(api: &ReceiverClient, lsn: u64, release: bool) {
    let request = KeepRequest { name: vm1(), at: format!("lsn:{lsn}"), release, held: None };
    api.keep(&request).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_kept_and_released_above_the_floor_while_images_are_made_holds_up_no_folding() {
    let place = Place::new();
    let receiver = slow(&place).await;
    let mut agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    keep(&api, 95, false).await;
    let begun = api.set_retention(&vm1(), &ladder("any=1h")).await.unwrap().rounds;
    // At any two moments something else is kept: always the newest point, which is above the floor of any plan before it.
    for lsn in 96.. {
        agent.send(&write(lsn, 0, vec![lsn as u8; 4096])).await;
        agent.all_durable().await;
        keep(&api, lsn, false).await;
        keep(&api, lsn - 1, true).await;
        let report = api.retention(Some(&vm1())).await.unwrap();
        if report.disks[0].every_point_from.as_ref().unwrap().lsn > Lsn(5) {
            break;
        }
        assert!(report.rounds < begun + 4, "each round makes the images and throws them away: {report:?}");
    }
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_point_that_is_kept_while_images_are_made_stays() {
    let place = Place::new();
    let receiver = slow(&place).await;
    let _agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    api.set_retention(&vm1(), &ladder("any=1h")).await.unwrap();
    // The images are being made: what is to stay has been decided.
    while files(&place, "pack").is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        api.retention(Some(&vm1())).await.unwrap().disks[0].every_point_from.as_ref().unwrap().lsn,
        Lsn(5)
    );
    keep(&api, 33, false).await;
    let folded = loop {
        let report = api.retention(Some(&vm1())).await.unwrap();
        if report.disks[0].every_point_from.as_ref().unwrap().lsn > Lsn(5) {
            break report;
        }
    };
    assert!(folded.disks[0].single_points.iter().any(|point| point.lsn == Lsn(33)), "{folded:?}");
    let mounted = api.mount(&request("lsn:33", None)).await.unwrap();
    assert_content(&place, &mounted, &at(33)).await;
    receiver.shutdown().await;
}

/// Turns over a byte of what a record holds in a segment, wherever that is.
fn flip(place: &Place, lsn: u64) {
    let wanted = &content(lsn)[1000..1064];
    for path in files(place, "seg") {
        let mut bytes = fs::read(&path).unwrap();
        let found = bytes.windows(wanted.len()).position(|window| window[1..] == wanted[1..]);
        if let Some(at) = found {
            bytes[at] ^= 0x40;
            let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes[at..=at], at as u64).unwrap();
            return;
        }
    }
    panic!("no segment has lsn:{lsn}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rotten_record_costs_folding_a_read_a_round_until_it_is_whole() {
    let place = Place::new();
    let receiver = place.start().await;
    let _agent = write_history(&receiver, 6..=95).await;
    let api = client(&receiver);
    flip(&place, 27);
    let first = rounds(&api, &vm1(), TENS).await;
    let why = first.disks[0].error.clone().unwrap_or_default();
    assert!(why.contains("a part of it cannot be read") && why.contains("backtide scrub"), "{first:?}");
    let alarms = api.status().await.unwrap().alarms;
    assert!(alarms.iter().any(|alarm| alarm.contains("a part of it cannot be read")), "{alarms:?}");
    // What the first attempt had made is collected, and nothing is made in vain again.
    let before = rounds(&api, &vm1(), TENS).await;
    for _ in 0..3 {
        let later = rounds(&api, &vm1(), TENS).await;
        assert!(later.rounds > before.rounds);
        assert_eq!(later.freed_bytes, before.freed_bytes, "images were made and removed again");
        assert_eq!(later.disks[0].error, before.disks[0].error);
    }
    flip(&place, 27);
    let folded = rounds(&api, &vm1(), TENS).await;
    assert!(folded.disks[0].error.is_none(), "{folded:?}");
    assert!(folded.disks[0].every_point_from.as_ref().unwrap().lsn > Lsn(60), "{folded:?}");
    let mounted = api.mount(&request("lsn:30", None)).await.unwrap();
    assert_content(&place, &mounted, &at(30)).await;
    receiver.shutdown().await;
}

/// Where the parts of a sealed segment's index lie: its first block, its guide and its bitmap.
fn index_parts(segment: &[u8]) -> [Range<usize>; 3] {
    let trailer = segment.len() - 144;
    let number = |at: usize| u32::from_le_bytes(segment[trailer + at..][..4].try_into().unwrap()) as usize;
    let entries = u64::from_le_bytes(segment[trailer + 96..][..8].try_into().unwrap()) as usize;
    let (guide, summary, bitmap) = (number(112), number(120), number(128));
    let begins = trailer - bitmap - summary - guide;
    [entries..begins, begins..begins + guide, trailer - bitmap..trailer]
}

fn flip_byte(path: &Path, at: usize) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at as u64).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at as u64).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_index_holds_up_only_what_is_not_before_it_until_a_scrub_mends_it() {
    for part in 0..3 {
        let place = Place::new();
        let receiver = place.start().await;
        drop(write_history(&receiver, 6..=95).await);
        receiver.shutdown().await;
        let segment = files(&place, "seg")[3].clone();
        let damaged = index_parts(&fs::read(&segment).unwrap())[part].clone();
        // A start reads the bitmap, and nothing else of these.
        let receiver = place.start().await;
        flip_byte(&segment, damaged.start + damaged.len() / 2);
        let api = client(&receiver);
        // Who asks what would go hears that.
        for wanted in ["any=1h", TENS] {
            let preview = api.preview_retention(&vm1(), &ladder(wanted)).await.unwrap();
            assert!(preview.changes && preview.log_bytes_freed.0 > 0, "{preview:?}");
        }
        // What lies before it is folded, and then it is told what helps.
        let before = loop {
            let report = rounds(&api, &vm1(), TENS).await;
            if report.disks[0].error.is_some() {
                break report;
            }
        };
        let disk = &before.disks[0];
        let why = disk.error.as_ref().unwrap();
        assert!(why.contains(".seg is damaged at byte") && why.contains("backtide scrub"), "{why}");
        let from = disk.every_point_from.unwrap().lsn.0;
        assert!((30..60).contains(&from), "{disk:?}");
        assert!(!disk.single_points.is_empty() && files(&place, "seg")[0] == segment, "{disk:?}");
        // Nothing is made in vain: what was given back until now is what was folded.
        let before = rounds(&api, &vm1(), TENS).await;
        for _ in 0..3 {
            let later = rounds(&api, &vm1(), TENS).await;
            assert!(later.rounds > before.rounds);
            assert_eq!(later.freed_bytes, before.freed_bytes, "images were made and removed again");
            assert_eq!(later.disks[0].error, before.disks[0].error);
        }
        let scrub = scrubbed(&api).await;
        assert!(scrub.sound && !scrub.disks[0].mended.is_empty(), "{scrub:?}");
        let folded = rounds(&api, &vm1(), TENS).await;
        assert!(folded.disks[0].error.is_none(), "{folded:?}");
        assert!(folded.disks[0].every_point_from.unwrap().lsn > Lsn(60), "{folded:?}");
        for lsn in [30, 60] {
            let mount = api.mount(&request(&format!("lsn:{lsn}"), None)).await.unwrap();
            assert_content(&place, &mount, &at(lsn)).await;
        }
        receiver.shutdown().await;
    }
}

/// Turns over a byte of each node of level 2 in the packs of images.
fn flip_nodes(place: &Place) -> usize {
    const NODE_LENGTH: u32 = 10_248;
    let mut flipped = 0;
    for path in files(place, "pack") {
        let bytes = fs::read(&path).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let is_node =
            |at: &usize| bytes[at + 4] == 2 && word(at + 20) == NODE_LENGTH && word(at + 16) <= NODE_LENGTH;
        let nodes: Vec<usize> = (64..bytes.len() - 64).step_by(8).filter(is_node).collect();
        nodes.iter().for_each(|at| flip_byte(&path, at + 64 + 20));
        flipped += nodes.len();
    }
    flipped
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_nothing_mends_costs_folding_a_look_a_round_and_leaves_no_pack_behind() {
    const GIB: u64 = 1 << 30;
    let place = Place::new();
    let receiver = place.start().await;
    // Below the top of its tree are two nodes; the first half of the disk is empty at first.
    let (mut agent, _) =
        Agent::welcomed(&receiver, Hello { size: ByteCount(8 * GIB), ..hello(1, "vm1") }).await;
    agent.first_pass(5).await;
    for lsn in 6..=50 {
        agent.send(&write(lsn, 4 * GIB + (lsn << 16), content(lsn))).await;
    }
    agent.all_durable().await;
    let api = client(&receiver);
    let from = |report: &RetentionReport| report.disks[0].every_point_from.unwrap().lsn;
    let begun = rounds(&api, &vm1(), "any=1h").await;
    assert!(begun.disks[0].error.is_none() && from(&begun) > Lsn(20), "{begun:?}");
    api.set_retention(&vm1(), &RetentionRequest { ladder: None }).await.unwrap();
    for lsn in 51..=95 {
        agent.send(&write(lsn, (lsn % 2) * 4 * GIB + (lsn << 16), content(lsn))).await;
    }
    agent.all_durable().await;
    drop(agent);
    receiver.shutdown().await;
    let packs = files(&place, "pack");
    // The node, and its second.
    assert_eq!(flip_nodes(&place), 2);
    let receiver = place.start().await;
    let api = client(&receiver);
    let mut changed = None;
    for _ in 0..3 {
        let report = rounds(&api, &vm1(), "any=1h").await;
        let why = report.disks[0].error.clone().unwrap_or_default();
        assert!(why.contains("a part of it cannot be read") && why.contains("backtide scrub"), "{report:?}");
        assert_eq!((from(&report), files(&place, "pack")), (from(&begun), packs.clone()), "{report:?}");
        // The first attempt has made a pack in vain, and no other.
        let now = fs::metadata(packs[0].parent().unwrap()).unwrap().modified().unwrap();
        assert_eq!(*changed.get_or_insert(now), now);
    }
    assert_eq!(flip_nodes(&place), 2);
    let folded = rounds(&api, &vm1(), "any=1h").await;
    assert!(folded.disks[0].error.is_none() && from(&folded) > Lsn(60), "{folded:?}");
    let scrub = scrubbed(&api).await;
    assert!(scrub.sound, "{scrub:?}");
    receiver.shutdown().await;
}
