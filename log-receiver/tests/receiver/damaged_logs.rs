//! Retention of a disk whose newest log is damaged, and whose agent does not come again: it grows old as any other.

use std::{
    fs,
    path::{Path, PathBuf},
};

use backtide_log_receiver::{Receiver, Repair, fsck, repair};
use backtide_protocol::{CloseCode, Hello};
use backtide_receiver_api::{PointsReport, ReceiverClient};
use backtide_units::{Epoch, Lsn};

use crate::{
    agent::*,
    away_logs::refused,
    ended_logs::*,
    fixture::*,
    retention::{TENS, at, go_on, rounds, vm1, write_history},
};

/// Points from LSN 5 to 95, of a log in use before.
async fn written(place: &Place) -> Vec<PathBuf> {
    let receiver = place.start().await;
    drop(write_history(&receiver, 6..=95).await);
    receiver.shutdown().await;
    segments(place)
}

fn flip_in_header(segment: &Path) {
    let mut bytes = fs::read(segment).unwrap();
    bytes[40] ^= 0x10;
    fs::write(segment, bytes).unwrap();
}

async fn points(api: &ReceiverClient) -> PointsReport {
    api.points(&vm1()).await.unwrap()
}

/// All that it says is damaged.
async fn damage(api: &ReceiverClient) -> Vec<String> {
    api.disks(Some(&vm1())).await.unwrap().disks.remove(0).damage
}

async fn reads(place: &Place, receiver: &Receiver, lsns: impl IntoIterator<Item = u64>) {
    for lsn in lsns {
        reads_as(place, &client(receiver), lsn, &at(lsn)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_log_whose_agent_stays_away_grows_old_up_to_its_damage() {
    let place = Place::new();
    let all = written(&place).await;
    let lost = all.len() - 3;
    fs::remove_file(&all[lost]).unwrap();
    let receiver = place.start().await;
    let api = client(&receiver);
    let before = points(&api).await;
    let last = before.last.unwrap().lsn.0;
    assert!((50..90).contains(&last) && before.first.unwrap().lsn == Lsn(5), "{last}");
    let said = damage(&api).await;
    assert!(said[0].contains("is missing"), "{said:?}");
    api.keep(&keep(33, false)).await.unwrap();

    let found = single(&api, TENS).await;
    // What is before the last point that can be read is folded but for the segment that has it; what is behind the damage
    // stays.
    let mut stay = all[lost - 1..].to_vec();
    stay.remove(1);
    assert_eq!(segments(&place), stay);
    let tens = (1..).map(|tens| tens * 10).take_while(|lsn| *lsn < last).chain([33]);
    let mut expected: Vec<u64> = tens.collect();
    expected.sort_unstable();
    assert_eq!(found, expected);
    let after = points(&api).await;
    let end = (after.last.unwrap().lsn.0, after.holes.last().unwrap().clone());
    assert_eq!((end.0, &end.1), (last, before.holes.last().unwrap()), "the hole behind it is what it was");
    assert_eq!((damage(&api).await, after.damage.is_some()), (said.clone(), true));
    reads(&place, &receiver, [10, 33, last]).await;
    assert_eq!(single(&api, TENS).await, found, "there is no more to do");

    // So it is after a start, and for those who check.
    receiver.shutdown().await;
    assert!(!fsck(&place.store(), &mut |_| {}).unwrap().sound);
    let receiver = place.start().await;
    let api = client(&receiver);
    assert_eq!((single(&api, TENS).await, damage(&api).await), (found.clone(), said.clone()));
    assert_eq!(points(&api).await.holes.last().unwrap(), &end.1);
    reads(&place, &receiver, [10, 33, last]).await;

    // The agent comes at last: a new log begins behind it, above all that it had.
    let agent = begin_anew(&receiver).await;
    let stale = Agent::refused(&receiver, hello(1, "vm1")).await;
    assert_eq!(stale.code, CloseCode::Fenced, "{stale:?}");
    drop(agent);
    let joined = points(&api).await;
    let hole = joined.holes.iter().find(|hole| hole.after_lsn == Lsn(last)).unwrap();
    assert_eq!((hole.before_lsn, hole.reason_code.as_str()), (Some(Lsn(NEXT)), "damaged"), "{hole:?}");
    // It goes as a whole when somebody has it cut where the segment is missing.
    let why = refused(&api, TENS).await;
    assert!(why.contains(&said[0]), "{why}");
    receiver.shutdown().await;
    assert!(repair(&place.store(), Repair::Everything, &mut |_| {}).unwrap().sound);
    let receiver = place.start().await;
    let api = client(&receiver);
    let of_both = single(&api, TENS).await;
    assert!(of_both.starts_with(&found), "{found:?} {of_both:?}");
    assert_eq!(segments(&place), Vec::<PathBuf>::new());
    reads(&place, &receiver, [10, 33]).await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_comes_while_the_receiver_runs_finds_a_folded_log_as_it_is() {
    let place = Place::new();
    let all = written(&place).await;
    fs::remove_file(&all[all.len() - 2]).unwrap();
    let receiver = place.start().await;
    let api = client(&receiver);
    let last = points(&api).await.last.unwrap().lsn.0;
    let found = single(&api, TENS).await;
    assert!(segments(&place).len() < 3, "{:?}", segments(&place));
    let _agent = begin_anew(&receiver).await;
    reads(&place, &receiver, found.iter().copied().chain([last])).await;
    assert_eq!(points(&api).await.last.unwrap().lsn, Lsn(NEXT));
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_that_costs_no_point_goes_with_the_segment_that_has_it() {
    let place = Place::new();
    let all = written(&place).await;
    flip_in_header(&all[1]);
    let receiver = place.start().await;
    let api = client(&receiver);
    assert!(damage(&api).await[0].contains("is damaged at byte 0"));
    assert_eq!(points(&api).await.last.unwrap().lsn, Lsn(95));
    let found = single(&api, TENS).await;
    assert_eq!(segments(&place), all[all.len() - 1..]);
    receiver.shutdown().await;
    // What is left is whole.
    let checked = fsck(&place.store(), &mut |_| {}).unwrap();
    assert!(checked.sound, "{checked:?}");
    let receiver = place.start().await;
    assert_eq!(damage(&client(&receiver)).await, Vec::<String>::new());
    reads(&place, &receiver, found.into_iter().chain([95])).await;
    receiver.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logs_before_a_damaged_one_grow_old_too_and_stay_where_nothing_of_that_can_be_read() {
    for all_is_lost in [false, true] {
        let place = Place::new();
        let (receiver, mut agent) = with_two_logs(&place).await;
        go_on(&mut agent, NEXT + 1..=130).await;
        drop(agent);
        receiver.shutdown().await;
        let newer = older_log(&place).join("log-2/segments");
        let mut listed: Vec<_> = fs::read_dir(&newer).unwrap().map(|entry| entry.unwrap().path()).collect();
        listed.retain(|path| path.extension().is_some_and(|name| name == "seg"));
        listed.sort();
        match all_is_lost {
            false => flip_in_header(listed.last().unwrap()),
            true => listed.iter().for_each(|path| fs::remove_file(path).unwrap()),
        }
        let older = segments(&place);
        let receiver = place.start().await;
        let api = client(&receiver);
        let report = rounds(&api, &vm1(), "any=1h").await;
        assert_eq!(report.disks[0].error, None);
        let left = points(&api).await;
        if all_is_lost {
            // What stands before it is the newest that the disk has.
            assert_eq!((left.first.unwrap().lsn, left.last.unwrap().lsn), (Lsn(5), Lsn(95)));
            assert_eq!(segments(&place), older);
            reads(&place, &receiver, [5, 95]).await;
        } else {
            assert_eq!(left.last.unwrap().lsn, Lsn(130));
            assert_eq!(segments(&place), Vec::<PathBuf>::new());
            reads_as(&place, &api, 130, &later(130)).await;
        }
        receiver.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_are_all_that_a_disk_has_left_stay() {
    let place = Place::new();
    let (receiver, agent) = with_two_logs(&place).await;
    let api = client(&receiver);
    let found = single(&api, TENS).await;
    assert_eq!(segments(&place), Vec::<PathBuf>::new());
    drop(agent);
    receiver.shutdown().await;
    fs::remove_dir_all(older_log(&place).join("log-2")).unwrap();
    let receiver = place.start().await;
    assert_eq!(single(&client(&receiver), "any=1h").await, found);
    reads(&place, &receiver, found).await;
    receiver.shutdown().await;
}

/// The newest segment of a log, by its number.
fn newest_segment(place: &Place, log: u64) -> PathBuf {
    let dir = if log == 1 { older_log(place) } else { older_log(place).join(format!("log-{log}")) };
    let listed = fs::read_dir(dir.join("segments")).unwrap().map(|entry| entry.unwrap().path());
    listed.filter(|path| path.extension().is_some_and(|name| name == "seg")).max().unwrap()
}

/// As many logs as a disk may have, all damaged.
const LOGS_MAX: u64 = 16;

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_was_damaged_often_goes_on_when_its_older_logs_are_old() {
    let place = Place::new();
    let of = |log: u64| Hello { epoch: Epoch(log), ..hello(1, "vm1") };
    let mut receiver = place.start().await;
    for log in 1..=LOGS_MAX {
        let (mut agent, _) = Agent::welcomed(&receiver, of(log)).await;
        agent.first_pass(log * 10).await;
        agent.all_durable().await;
        drop(agent);
        receiver.shutdown().await;
        flip_in_header(&newest_segment(&place, log));
        receiver = place.start().await;
    }
    let refused = Agent::refused(&receiver, of(LOGS_MAX + 1)).await;
    assert_eq!(refused.code, CloseCode::Store, "{refused:?}");
    assert!(
        refused.message.contains("16 logs of this disk are damaged, the last is number 16"),
        "{refused:?}"
    );
    let api = client(&receiver);
    assert_eq!(points(&api).await.first.unwrap().lsn, Lsn(10));
    // Nothing is left of those before the last, whose point is the newest.
    assert_eq!(single(&api, "any=1h").await, Vec::<u64>::new());
    for log in LOGS_MAX + 1..=LOGS_MAX + 2 {
        let (mut agent, welcome) = Agent::welcomed(&receiver, of(log)).await;
        assert_eq!(welcome.highest, Lsn((log - 1) * 10), "LSNs go on above those of all before");
        agent.first_pass(log * 10).await;
        agent.all_durable().await;
        drop(agent);
        receiver.shutdown().await;
        flip_in_header(&newest_segment(&place, log));
        receiver = place.start().await;
        let stale = Agent::refused(&receiver, of(log - 1)).await;
        assert_eq!(stale.code, CloseCode::Fenced, "{stale:?}");
        let last = points(&client(&receiver)).await.last.unwrap().lsn;
        assert_eq!(last, Lsn(log * 10), "a log of any number is found again");
    }
    receiver.shutdown().await;
}
