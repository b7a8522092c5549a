//! Stories in which the simulation found a promise broken; each is short enough to be read.

use backtide_io_filter::{
    AckPolicy, Change, Effect, Filter, IoId, LocalData, LocalOp, Mode, Now, RequestId, Resume, ResyncKind,
    Settings,
};
use backtide_protocol::{Message, ReceiverState, Welcome};
use backtide_tracking::DirtyBitmap;
use backtide_units::{
    BlockIndex, BlockRange, ByteCount, ByteOffset, ByteRange, HistoryId, LogPosition, Lsn, Reason,
};
use bytes::Bytes;
use uuid::Uuid;

use crate::common::{self, at, write};

pub(crate) fn filter(ack: AckPolicy) -> Filter {
    Filter::new(settings(ack), Resume::New, at(0))
}

fn settings(ack: AckPolicy) -> Settings {
    Settings { ack, ..common::settings() }
}

fn welcome(state: ReceiverState) -> Welcome {
    common::welcome(state, Lsn::ZERO)
}

/// Of a receiver that has the beginning of a pass, and so many entries.
fn within_pass(at: Lsn, position: LogPosition) -> Welcome {
    Welcome { durable: at, highest: at, position, in_pass: true, ..welcome(ReceiverState::Known) }
}

fn trim(block: u64) -> Change {
    let range = ByteRange::new(ByteOffset(block * 4096), ByteCount(4096)).unwrap();
    Change::Zero { range, trim: true, fua: false }
}

fn effects(filter: &mut Filter) -> Vec<Effect> {
    std::iter::from_fn(|| filter.next_effect()).collect()
}

/// The one local I/O that was asked for.
fn local(filter: &mut Filter) -> (IoId, LocalOp) {
    let local = |effect| if let Effect::Local(io, op) = effect { Some((io, op)) } else { None };
    let asked: Vec<_> = effects(filter).into_iter().filter_map(local).collect();
    let [(io, op)] = &asked[..] else { panic!("expected one local I/O, found {asked:?}") };
    (*io, op.clone())
}

/// The scan that was asked for.
fn scan(filter: &mut Filter) -> IoId {
    let scan = |effect| if let Effect::Scan(io) = effect { Some(io) } else { None };
    effects(filter).into_iter().find_map(scan).expect("a scan was asked for")
}

fn is_answered(filter: &mut Filter, number: u64) -> bool {
    let answer = |effect: &Effect| matches!(effect, Effect::Complete { request, .. } if request.0 == number);
    effects(filter).iter().any(answer)
}

/// In sync with a receiver that is new to it.
pub(crate) fn come_into_sync(filter: &mut Filter) {
    filter.connected(at(0), &welcome(ReceiverState::New));
    let scan = scan(filter);
    filter.scanned(at(0), scan, &DirtyBitmap::new());
    let last = send_all(filter, at(0));
    filter.receive(at(0), Message::Ack { received: last, durable: last, position: LogPosition(last) });
    assert_eq!(filter.mode(), Mode::Sync);
    effects(filter);
}

/// Sends all there is; gives the last frame.
fn send_all(filter: &mut Filter, now: Now) -> u64 {
    std::iter::from_fn(|| filter.poll_send(now)).last().map_or(1, |(seq, _)| seq)
}

#[test]
fn a_lost_first_welcome_is_no_reason_for_an_alarm() {
    let mut filter = filter(AckPolicy::Local);
    filter.connected(at(0), &welcome(ReceiverState::Foreign));
    let effects = effects(&mut filter);
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Alarm(_))), "{effects:?}");
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Scan(_))), "{effects:?}");
}

/// What a filter is alarmed of when it is welcomed so, and whether it asks for the disk to be compared or sent.
fn alarms_of(filter: &mut Filter, welcome: &Welcome) -> Vec<String> {
    filter.connected(at(0), welcome);
    let effects = effects(filter);
    assert!(effects.iter().any(|effect| matches!(effect, Effect::Scan(_))), "{effects:?}");
    let alarm = |effect| if let Effect::Alarm(text) = effect { Some(text) } else { None };
    effects.into_iter().filter_map(alarm).collect()
}

#[test]
fn an_agent_that_died_before_it_had_noted_its_history_is_no_other_one() {
    // The receiver had begun it for this agent, and everything of a small disk was durable already.
    let mut first = filter(AckPolicy::Local);
    let told = Welcome { durable: Lsn(7), highest: Lsn(7), ..welcome(ReceiverState::Foreign) };
    assert_eq!(alarms_of(&mut first, &told), Vec::<String>::new());

    // It had begun it in place of one that was lost: that is the alarm, as it was before the agent died.
    let known_of = |history, durable| {
        let (history, last_lsn) = (Some(history), Lsn(90));
        let resume = Resume::Lost { reason: Reason::AgentCrashed, history, last_lsn, acked_durable: Lsn(80) };
        let mut filter = Filter::new(settings(AckPolicy::Local), resume, at(0));
        alarms_of(&mut filter, &Welcome { durable, highest: durable, ..welcome(ReceiverState::Foreign) })
    };
    let known = |durable| known_of(HistoryId(Uuid::from_u128(4)), durable);
    let [lost] = &known(Lsn::ZERO)[..] else { panic!("one alarm") };
    assert!(lost.contains("has lost the history"), "{lost}");
    let [other] = &known(Lsn(3))[..] else { panic!("one alarm") };
    assert!(other.contains("keeps another history"), "{other}");

    // Its own history, which the receiver says to have lost something of, is no other one.
    let [damaged] = &known_of(common::HISTORY, Lsn(3))[..] else { panic!("one alarm") };
    assert!(damaged.contains("is damaged"), "{damaged}");
}

#[test]
fn a_resync_that_begins_keeps_no_answer_waiting() {
    let mut filter = filter(AckPolicy::DurableEveryWrite);
    come_into_sync(&mut filter);

    filter.submit(at(1), RequestId(1), write(0));
    let (io, _) = local(&mut filter);
    filter.local_done(at(2), io, Ok(LocalData::Changed));
    assert!(!is_answered(&mut filter, 1), "the receiver has not made it durable");
    filter.force_resync(at(3), ResyncKind::Changed);
    assert_eq!(filter.mode(), Mode::Resync);
    assert!(is_answered(&mut filter, 1), "it would wait for the whole pass");
}

#[test]
fn a_change_whose_pass_is_lost_does_not_wait_for_its_copy() {
    let mut filter = filter(AckPolicy::Local);
    filter.connected(at(0), &welcome(ReceiverState::New));
    let scan = scan(&mut filter);
    let mut allocated = DirtyBitmap::of((0..4).into());
    allocated.insert((10..14).into());
    filter.scanned(at(0), scan, &allocated);
    let (drain, _) = local(&mut filter);
    // The first run fills the buffer: the change of the second has to wait for room.
    filter.submit(at(1), RequestId(1), write(10));
    filter.local_done(at(1), drain, Ok(LocalData::Read(Bytes::from(vec![1; 4 * 4096]))));
    assert!(effects(&mut filter).is_empty());
    while filter.poll_send(at(1)).is_some() {}
    let block = BlockRange::between(BlockIndex(10), BlockIndex(11)).bytes(ByteCount(64 * 4096));
    let (copy, op) = local(&mut filter);
    assert_eq!(op, LocalOp::Read(block), "the old content is copied first");

    filter.disconnected(at(2));
    let (io, op) = local(&mut filter);
    assert_eq!(op, LocalOp::Change(write(10)), "there is no pass any more that needs the copy");
    filter.local_done(at(3), io, Ok(LocalData::Changed));
    assert!(is_answered(&mut filter, 1));
    filter.local_done(at(60), copy, Ok(LocalData::Read(Bytes::from(vec![1; 4096]))));
    assert!(effects(&mut filter).is_empty());
}

#[test]
fn a_scan_that_outlived_its_connection_says_nothing() {
    let mut filter = filter(AckPolicy::Local);
    filter.connected(at(0), &welcome(ReceiverState::New));
    let first = scan(&mut filter);
    filter.disconnected(at(1));
    // The first scan has passed this block, the second has not begun.
    filter.submit(at(2), RequestId(1), write(5));
    let (io, _) = local(&mut filter);
    filter.local_done(at(3), io, Ok(LocalData::Changed));
    filter.connected(at(4), &welcome(ReceiverState::New));
    let second = scan(&mut filter);
    filter.scanned(at(5), first, &DirtyBitmap::new());
    assert_eq!(filter.mode(), Mode::Tracking, "the second scan is waited for");
    filter.scanned(at(6), second, &DirtyBitmap::of((5..6).into()));
    assert_eq!(filter.status().pass.expect("a pass has begun").total, ByteCount(4096));
}

/// Found by the model checker: a pass without a block was taken for one that had moved nothing in its
/// time. The next one was then held to be long, did not forward, and was followed by another, for ever.
#[test]
fn a_pass_with_nothing_to_move_is_the_last() {
    let settings = Settings { window_bytes: ByteCount(450), ..filter(AckPolicy::Local).settings().clone() };
    let mut filter = Filter::new(settings, Resume::New, at(0));
    come_into_sync(&mut filter);
    // The window overflows with the receiver there: the link counts as too slow.
    for number in 0..3 {
        filter.submit(at(1), RequestId(number), trim(number));
        let (io, _) = local(&mut filter);
        filter.local_done(at(1), io, Ok(LocalData::Changed));
    }
    let frozen = filter.status().pass.expect("a pass has begun").at;
    let (read, _) = local(&mut filter);
    filter.local_done(at(2), read, Ok(LocalData::Read(Bytes::from(vec![0; 3 * 4096]))));
    // All its blocks are durable, its end is not, when the stream is lost.
    let last = send_all(&mut filter, at(3));
    filter.receive(
        at(4),
        Message::Ack { received: last - 1, durable: last - 1, position: LogPosition(last - 1) },
    );
    filter.disconnected(at(5));
    filter.connected(at(6), &within_pass(frozen, LogPosition(last - 1)));
    for millis in 7..10 {
        let last = send_all(&mut filter, at(millis));
        filter
            .receive(at(millis), Message::Ack { received: last, durable: last, position: LogPosition(last) });
    }
    assert_eq!(filter.mode(), Mode::Sync, "{:?}", filter.status());
}

/// A store put back from a copy made within a pass: its LSN is what was acknowledged, the blocks that had
/// come by then and were clean from then on are not there.
#[test]
fn a_store_put_back_to_the_middle_of_a_pass_is_noticed() {
    let mut filter = filter(AckPolicy::Local);
    filter.connected(at(0), &welcome(ReceiverState::New));
    let scan = scan(&mut filter);
    filter.scanned(at(0), scan, &DirtyBitmap::of((0..2).into()));
    let frozen = filter.status().pass.expect("a pass has begun").at;
    let (read, _) = local(&mut filter);
    filter.local_done(at(1), read, Ok(LocalData::Read(Bytes::from(vec![7; 8192]))));
    let last = send_all(&mut filter, at(2));
    let begun = LogPosition(2);
    filter.receive(at(3), Message::Ack { received: last - 1, durable: last - 1, position: LogPosition(3) });
    assert_eq!(filter.acked_durable(), frozen, "the block's entry moves no LSN");
    filter.disconnected(at(4));
    effects(&mut filter);
    filter.connected(at(5), &within_pass(frozen, begun));
    assert_eq!(filter.status().reason, Some(Reason::ReceiverRolledBack));
    let alarms = effects(&mut filter).into_iter();
    let alarms: Vec<_> = alarms.filter(|effect| matches!(effect, Effect::Alarm(_))).collect();
    assert!(matches!(&alarms[..], [Effect::Alarm(why)] if why.contains("log entry 2)")), "{alarms:?}");
}

/// Found by a guest that read while a resync was held to a rate: its read ended just after the drain might have gone on,
/// and just before the driver's timer said so. The timer was called off, and nothing else came.
#[test]
fn a_guests_read_does_not_take_the_turn_of_the_drain() {
    let mut filter = filter(AckPolicy::Local);
    filter.limit_resync(at(0), ByteCount(1 << 20));
    filter.connected(at(0), &welcome(ReceiverState::New));
    let scan = scan(&mut filter);
    filter.scanned(at(0), scan, &DirtyBitmap::of((0..200).into()));
    let (io, op) = local(&mut filter);
    let LocalOp::Read(range) = op else { panic!("a drain reads, found {op:?}") };
    let bytes = usize::try_from(range.count().0).unwrap();
    filter.local_done(at(1), io, Ok(LocalData::Read(Bytes::from(vec![7; bytes]))));
    send_all(&mut filter, at(1));
    assert_eq!(effects(&mut filter), []);
    let due = filter.next_deadline().expect("the drain goes on then");
    let late = Now { monotonic: due, wall: at(1).wall };
    let watch = filter.watch_read(late);
    filter.read_took(late, watch, ByteCount(4096));
    assert!(filter.next_deadline().is_some_and(|deadline| deadline <= due), "{:?}", filter.next_deadline());
    filter.tick(late);
    assert!(matches!(local(&mut filter), (_, LocalOp::Read(_))));
}
