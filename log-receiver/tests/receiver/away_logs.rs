//! Retention of a log that has ended while a part of it is away: what may be wanted of that part does not go with the rest.

use std::{fs, ops::Range, path::PathBuf};

use backtide_log_receiver::{Config, OnFull, Receiver, Repair, Retention, repair};
use backtide_receiver_api::ReceiverClient;
use backtide_storage::{RealStorage, Storage};
use backtide_units::{ByteCount, Lsn};

use crate::{
    agent::*,
    ended_logs::*,
    fixture::*,
    retention::{TENS, at, go_on, ladder, rounds, vm1, write_history},
};

/// A receiver with the older log, of which some segments are away, and one behind it.
async fn with_segments_away(place: &Place, away: Range<usize>) -> (Receiver, Agent, Vec<(PathBuf, PathBuf)>) {
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=95).await);
    receiver.shutdown().await;
    let all = segments(place);
    let lost = all[away.start..away.end.min(all.len())].to_vec();
    let moved = |(nth, path): (usize, PathBuf)| (place.path(&format!("away-{nth}.seg")), path);
    let moved: Vec<(PathBuf, PathBuf)> = lost.into_iter().enumerate().map(moved).collect();
    moved.iter().for_each(|(away, path)| fs::rename(path, away).unwrap());
    let receiver = place.start().await;
    let agent = begin_anew(&receiver).await;
    (receiver, agent, moved)
}

/// What is said of the older log when all of it is folded that can be.
pub(crate) async fn refused(api: &ReceiverClient, wanted: &str) -> String {
    let mut said = None;
    for _ in 0..4 {
        said = rounds(api, &vm1(), wanted).await.disks.remove(0).error.or(said);
    }
    said.expect("it is refused")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_ladder_keeps_of_a_part_of_an_ended_log_that_is_away_does_not_go_with_the_rest() {
    // In the middle; where it begins; all of it.
    for away in [2..3, 0..1, 0..usize::MAX] {
        let place = Place::new();
        let (receiver, agent, moved) = with_segments_away(&place, away.clone()).await;
        let api = client(&receiver);
        let why = refused(&api, TENS).await;
        assert!(why.contains("is away: ") && why.contains("`backtide fsck --repair`"), "{why}");
        assert_eq!(refused(&api, TENS).await, why);
        let begins = api.points(&vm1()).await.unwrap().first.unwrap().lsn;
        assert_eq!(begins, Lsn(if away.start > 0 { 10 } else { NEXT }), "what is before it is folded");
        drop(agent);
        receiver.shutdown().await;
        // It is there again.
        moved.iter().for_each(|(away, path)| fs::rename(away, path).unwrap());
        let receiver = place.start().await;
        let api = client(&receiver);
        assert_eq!(single(&api, TENS).await, (1..=9).map(|tens| tens * 10).collect::<Vec<_>>());
        for lsn in [10, 40, 60, 90] {
            reads_as(&place, &api, lsn, &at(lsn)).await;
        }
        assert_eq!(segments(&place), Vec::<PathBuf>::new());
        receiver.shutdown().await;
    }
}

/// Of both logs.
fn all_segment_bytes(place: &Place) -> u64 {
    let newer = fs::read_dir(older_log(place).join("log-2/segments")).unwrap();
    let newer = newer.map(|entry| entry.unwrap().path());
    segments(place).into_iter().chain(newer).map(|path| fs::metadata(path).unwrap().len()).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_preview_tells_of_a_part_that_is_away_and_frees_no_more_than_what_goes_then() {
    // In the middle; where it begins; all of it.
    for away in [2..3, 0..1, 0..usize::MAX] {
        let place = Place::new();
        let (receiver, _agent, _) = with_segments_away(&place, away.clone()).await;
        let api = client(&receiver);
        let preview = api.preview_retention(&vm1(), &ladder(TENS)).await.unwrap();
        let told = preview.away.unwrap();
        assert!(told.contains("is away, and") && told.contains("`backtide fsck --repair`"), "{told}");
        let before = all_segment_bytes(&place);
        refused(&api, TENS).await;
        assert_eq!(preview.log_bytes_freed.0, before - all_segment_bytes(&place), "{away:?}");
        let left = api.retention(Some(&vm1())).await.unwrap().disks.remove(0);
        assert_eq!(preview.keep, left.single_points, "{away:?}");
        receiver.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_an_ended_log_that_is_never_found_again_is_let_go_by_who_has_the_log_cut() {
    for away in [2..3, 0..usize::MAX] {
        let place = Place::new();
        let (receiver, agent, _) = with_segments_away(&place, away.clone()).await;
        let api = client(&receiver);
        refused(&api, TENS).await;
        let before = api.retention(Some(&vm1())).await.unwrap().disks.remove(0).single_points;
        drop(agent);
        receiver.shutdown().await;
        let repaired = repair(&place.store(), Repair::Everything, &mut |_| {}).unwrap();
        assert!(repaired.sound, "{repaired:?}");
        let receiver = place.start().await;
        let api = client(&receiver);
        let found = single(&api, TENS).await;
        // Up to there it goes as any other.
        let before: Vec<u64> = before.iter().map(|point| point.lsn.0).collect();
        assert!(
            found.starts_with(&before) && found.len() > before.len() || away.start == 0,
            "{before:?} {found:?}"
        );
        for lsn in &found {
            reads_as(&place, &api, *lsn, &at(*lsn)).await;
        }
        assert_eq!(segments(&place), Vec::<PathBuf>::new());
        receiver.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_without_room_lets_go_of_a_log_that_has_ended_though_a_part_of_it_is_away() {
    let place = Place::new();
    let (receiver, mut agent, _) = with_segments_away(&place, 2..3).await;
    go_on(&mut agent, NEXT + 1..=190).await;
    drop(agent);
    receiver.shutdown().await;
    let free = RealStorage::open(&place.store()).unwrap().free_space().unwrap();
    // It never has as much room as that.
    let low_bytes = ByteCount(free.0 * 2);
    let retention = Retention { on_full: OnFull::Shrink, low_bytes, interval_ms: 20, ..Retention::default() };
    let receiver = Receiver::start(Config { retention, ..place.config() }).await.unwrap();
    let api = client(&receiver);
    while api.retention(None).await.unwrap().rounds < 20 {}
    assert_eq!(segments(&place), Vec::<PathBuf>::new());
    receiver.shutdown().await;
}
