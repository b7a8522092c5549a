//! The stories that a timeline tells: what is offered, what is a hole, and why.

use backtide_recovery::{
    Entry, Interval, InvalidEntry, PassContent, PassReason, PointError, TimedLsn, Timeline,
};
use backtide_segment::{AttachFacts, AttachOrigin, Seq};
use backtide_units::{
    ByteCount, ByteOffset, ByteRange, CaptureTime, DiskId, Epoch, Lsn, PayloadChecksum, Reason,
};

fn at(number: u64) -> TimedLsn {
    TimedLsn { lsn: Lsn(number), time: CaptureTime(number * 10) }
}

fn one_block() -> ByteRange {
    ByteRange::between(ByteOffset(0), ByteOffset(4096))
}

fn record(lsn: u64) -> Entry {
    Entry::Zero { lsn: Lsn(lsn), time: at(lsn).time, range: one_block(), trim: false }
}

fn begin(t: u64, gap_from: u64) -> Entry {
    let reason = PassReason { code: 2, text: format!("reason {t}") };
    Entry::PassBegin { at: Lsn(t), gap_from: Lsn(gap_from), time: at(t).time, reason }
}

fn data(t: u64) -> Entry {
    Entry::PassData { at: Lsn(t), range: one_block(), content: PassContent::Zeroes }
}

fn end(t: u64, valid_from: Option<u64>) -> Entry {
    Entry::PassEnd { at: Lsn(t), valid_from: valid_from.map(Lsn), time: CaptureTime(t * 10 + 5) }
}

fn told(entries: &[Entry]) -> Timeline {
    let mut timeline = Timeline::default();
    for entry in entries {
        timeline.check(entry).unwrap_or_else(|error| panic!("{entry:?}: {error}"));
        timeline.fold(entry);
    }
    timeline
}

fn intervals(timeline: &Timeline) -> Vec<(u64, u64)> {
    timeline.intervals().iter().map(|Interval { from, to }| (from.lsn.0, to.lsn.0)).collect()
}

fn holes(timeline: &Timeline) -> Vec<(Option<u64>, Option<u64>, u64)> {
    let lsn = |end: Option<TimedLsn>| end.map(|end| end.lsn.0);
    timeline.holes().iter().map(|hole| (lsn(hole.from), lsn(hole.to), hole.passes)).collect()
}

#[test]
fn first_protection_begins_at_t_and_every_record_is_a_point() {
    let timeline = told(&[begin(1, 0), record(2), data(1), record(3)]);
    assert_eq!(intervals(&timeline), []);
    assert!(!timeline.in_sync());
    let timeline = told(&[begin(1, 0), record(2), data(1), record(3), end(1, Some(1)), record(5)]);
    assert_eq!(intervals(&timeline), [(1, 5)]);
    assert_eq!(holes(&timeline), []);
    assert!(timeline.offers(Lsn(4)), "an LSN that was never used is the state before it");
    assert!(!timeline.offers(Lsn(6)));
    assert_eq!(timeline.latest(), Some(at(5)));
}

#[test]
fn an_outage_is_a_hole_from_the_last_record_to_t() {
    let story = [begin(1, 0), end(1, Some(1)), record(2), begin(9, 2), record(10), data(9)];
    let timeline = told(&story);
    assert_eq!(intervals(&timeline), [(1, 2)]);
    assert_eq!(holes(&timeline), [(Some(2), None, 1)]);
    let timeline = told(&[&story[..], &[end(9, Some(9)), record(11)]].concat());
    assert_eq!(intervals(&timeline), [(1, 2), (9, 11)]);
    assert_eq!(holes(&timeline), [(Some(2), Some(9), 1)]);
    assert_eq!(timeline.hole_at(Lsn(5)).map(|hole| hole.reason.text.as_str()), Some("reason 9"));
    assert!(timeline.hole_at(Lsn(2)).is_none() && timeline.hole_at(Lsn(9)).is_none());
}

#[test]
fn a_point_in_a_hole_is_refused_with_the_reason_and_the_nearest_points() {
    let timeline = told(&[begin(1, 0), end(1, Some(1)), record(2), begin(9, 2), end(9, Some(9)), record(11)]);
    let refusal = timeline.refusal(Lsn(5), "lsn:5".to_owned());
    assert!(matches!(refusal, PointError::InHole { .. }));
    assert_eq!(
        refusal.to_string(),
        "lsn:5 lies in a hole: after lsn:2 (1970-01-01T00:00:00.00002Z) until lsn:9 \
         (1970-01-01T00:00:00.00009Z), because reason 9; the nearest points are lsn:2 \
         (1970-01-01T00:00:00.00002Z) before and lsn:9 (1970-01-01T00:00:00.00009Z) after"
    );
    let beyond = timeline.refusal(Lsn(12), "lsn:12".to_owned());
    assert!(matches!(beyond, PointError::Outside { .. }), "{beyond}");
    let before = timeline.refusal(Lsn(0), "lsn:0".to_owned());
    assert!(matches!(before, PointError::Outside { .. }), "{before}");
}

#[test]
fn an_aborted_pass_gives_no_points_and_the_hole_goes_on() {
    let story = [begin(1, 0), end(1, Some(1)), record(2), begin(9, 2), data(9), record(12), begin(20, 12)];
    let timeline = told(&story);
    assert_eq!(intervals(&timeline), [(1, 2)]);
    assert_eq!(holes(&timeline), [(Some(2), None, 2)]);
    let timeline = told(&[&story[..], &[end(20, Some(20))]].concat());
    assert_eq!(intervals(&timeline), [(1, 2), (20, 20)]);
    assert_eq!(holes(&timeline), [(Some(2), Some(20), 2)]);
}

#[test]
fn an_open_hole_gets_the_reason_of_a_pass_that_finds_acknowledged_changes_gone() {
    let because = |t: u64, gap_from, reason: Reason| {
        let reason = PassReason { code: reason.code(), text: format!("reason {t}") };
        Entry::PassBegin { at: Lsn(t), gap_from: Lsn(gap_from), time: at(t).time, reason }
    };
    let (away, put_back, damaged) = (Reason::ReceiverAway, Reason::ReceiverRolledBack, Reason::Damaged);
    for (reasons, told) in [
        (vec![away, put_back], "reason 20"),
        (vec![away, damaged], "reason 20"),
        (vec![put_back, away], "reason 10"),
        (vec![damaged, put_back, away], "reason 10"),
        (vec![away, put_back, damaged], "reason 30"),
        (vec![put_back, put_back], "reason 10"),
        (vec![Reason::Paused, Reason::AgentCrashed], "reason 10"),
    ] {
        let mut story = vec![begin(1, 0), end(1, Some(1)), record(2)];
        story.extend(
            reasons
                .iter()
                .zip(1..)
                .map(|(reason, n)| because(n * 10, if n == 1 { 2 } else { n * 10 - 10 }, *reason)),
        );
        let timeline = self::told(&story);
        let hole = &timeline.holes()[0];
        assert_eq!((hole.reason.text.as_str(), hole.passes), (told, reasons.len() as u64), "{reasons:?}");
    }
}

#[test]
fn a_pass_without_points_leaves_the_hole_open() {
    let story = [begin(1, 0), end(1, Some(1)), record(2), begin(9, 2), end(9, None), record(12)];
    let timeline = told(&story);
    assert_eq!(intervals(&timeline), [(1, 2)]);
    assert_eq!(holes(&timeline), [(Some(2), None, 1)]);
    assert_eq!(timeline.covered(), Lsn(12));
}

#[test]
fn a_forfeited_pass_gives_points_from_a_later_record() {
    let timeline = told(&[begin(1, 0), record(3), record(7), end(1, Some(3)), record(9)]);
    assert_eq!(intervals(&timeline), [(3, 9)]);
}

#[test]
fn a_seam_without_a_gap_is_no_hole() {
    let timeline = told(&[begin(1, 0), end(1, Some(1)), record(2), begin(3, 2), end(3, Some(3)), record(4)]);
    assert_eq!(intervals(&timeline), [(1, 4)]);
    assert_eq!(holes(&timeline), []);
}

#[test]
fn an_attach_alone_leaves_no_hole() {
    let attach = Entry::Attach {
        epoch: Epoch(2),
        attach: uuid::Uuid::from_u128(2),
        next_lsn: Lsn(100),
        size: ByteCount(1 << 20),
        name: "vm1".parse().expect("a name"),
        time: CaptureTime(1),
        facts: AttachFacts::default(),
    };
    let timeline = told(&[begin(1, 0), end(1, Some(1)), record(2), attach.clone(), record(100)]);
    assert_eq!(intervals(&timeline), [(1, 100)]);
    assert_eq!(timeline.highest_lsn(), Lsn(100));
    assert_eq!(timeline.attached().map(|attached| attached.epoch), Some(Epoch(2)));
    assert_eq!(told(&[attach.clone(), attach]).highest_lsn(), Lsn(99));
}

#[test]
fn a_takeover_tells_how_far_the_log_was_and_from_whom() {
    let attach = |epoch: u64, next_lsn, before| Entry::Attach {
        epoch: Epoch(epoch),
        attach: uuid::Uuid::from_u128(epoch.into()),
        next_lsn: Lsn(next_lsn),
        size: ByteCount(1 << 20),
        name: "vm1".parse().expect("a name"),
        time: CaptureTime(1),
        facts: AttachFacts { before: Seq(before), ..AttachFacts::default() },
    };
    let second = Epoch(3).taken_over();
    let third = Epoch(second.0 + 5).taken_over();
    let timeline = told(&[
        attach(3, 1, 0),
        begin(1, 0),
        end(1, Some(1)),
        record(7),
        // An agent that says hello with LSNs of which nothing came brings nothing of them.
        attach(4, 90, 4),
        attach(second.0, 91, 5),
        attach(second.0 + 1, 91, 6),
        record(99),
        attach(third.0, 100, 8),
    ]);
    let from = |epoch| {
        let takeover = timeline.takeover_from(Epoch(epoch));
        takeover.map(|takeover| (takeover.epoch, takeover.covered, takeover.entries))
    };
    assert_eq!(from(4), Some((second, Lsn(7), Seq(5))));
    assert_eq!(from(5), Some((second, Lsn(7), Seq(5))), "it may have tried again while it was cut off");
    assert_eq!(from(3), None, "an attach of its own came after that one");
    assert_eq!(from(second.0), None, "that had another attach");
    assert_eq!(from(second.0 + 1), Some((third, Lsn(99), Seq(8))));
    assert_eq!(from(third.0), None, "nobody has taken it");
}

#[test]
fn what_a_disk_began_as_outlives_the_agent_that_knew_it() {
    let attach = |epoch: u64, facts| Entry::Attach {
        epoch: Epoch(epoch),
        attach: uuid::Uuid::from_u128(epoch.into()),
        next_lsn: Lsn(1),
        size: ByteCount(1 << 20),
        name: "vm1".parse().expect("a name"),
        time: CaptureTime(1),
        facts,
    };
    let origin = Box::new(AttachOrigin {
        receiver: "tcp://keeper:7400".to_owned(),
        disk: DiskId(uuid::Uuid::from_u128(9)),
        name: "golden".parse().expect("a name"),
        lsn: Lsn(5),
        time: CaptureTime(1),
    });
    let first = AttachFacts { before: Seq(0), ack: 3, origin: Some(origin.clone()) };
    let timeline = told(&[attach(1, first), attach(2, AttachFacts::default())]);
    assert_eq!((timeline.origin(), timeline.ack()), (Some(&*origin), 3));
}

#[test]
fn what_breaks_the_order_is_refused() {
    let timeline = told(&[begin(5, 0), record(8)]);
    let refused = |entry: Entry| timeline.check(&entry).expect_err("refused");
    assert!(matches!(refused(record(8)), InvalidEntry::NotAbove { .. }));
    assert!(matches!(refused(begin(8, 8)), InvalidEntry::PassNotAbove { .. }));
    assert!(matches!(refused(begin(12, 9)), InvalidEntry::GapAhead { .. }));
    assert!(matches!(refused(data(6)), InvalidEntry::NotThisPass { .. }));
    assert!(matches!(refused(end(6, None)), InvalidEntry::NotThisPass { .. }));
    assert!(matches!(refused(end(5, Some(4))), InvalidEntry::ValidFromOutside { .. }));
    assert!(matches!(refused(end(5, Some(9))), InvalidEntry::ValidFromOutside { .. }));
    let empty = ByteRange::between(ByteOffset(5), ByteOffset(5));
    let zero = Entry::Zero { lsn: Lsn(9), time: CaptureTime(0), range: empty, trim: true };
    assert!(matches!(refused(zero), InvalidEntry::Range { .. }));
    let far = ByteRange::between(ByteOffset(1 << 48), ByteOffset((1 << 48) + 1));
    let zero = Entry::Zero { lsn: Lsn(9), time: CaptureTime(0), range: far, trim: true };
    assert!(matches!(refused(zero), InvalidEntry::Range { .. }));
    let payload = bytes::Bytes::from_static(b"short");
    let write = Entry::Write {
        lsn: Lsn(9),
        time: CaptureTime(0),
        range: one_block(),
        payload,
        checksum: PayloadChecksum::default(),
    };
    assert!(matches!(refused(write), InvalidEntry::Length { .. }));
    let mark = Entry::Mark { lsn: Lsn(8), time: CaptureTime(0), label: "x".repeat(1025) };
    assert!(matches!(refused(mark), InvalidEntry::Length { .. }));
}
