//! A receiver whose numbers fit and whose log another attach has written is not one that goes on.

use backtide_io_filter::{Effect, Filter, Mode, Resume, ResyncKind, Settings};
use backtide_protocol::{ReceiverState, Welcome};
use backtide_tracking::{DirtyBitmap, SavedTracking};
use backtide_units::{Epoch, LogPosition, Lsn, Reason};
use uuid::Uuid;

use crate::common::{self, DISK, HISTORY, at, settings};

fn id(number: u128) -> Uuid {
    Uuid::from_u128(number)
}

/// An agent that was in sync up to LSN 7 and attaches again, as attach 3.
fn resumed() -> Filter {
    let settings = Settings { epoch: Epoch(3), attach: id(3), ..settings() };
    let saved = SavedTracking {
        history: Some(HISTORY),
        last_lsn: Lsn(7),
        gap_from: Lsn(7),
        acked_durable: Lsn(7),
        acked_position: LogPosition(9),
        ..SavedTracking::unknown(DISK)
    };
    Filter::new(settings, Resume::Clean(saved), at(0))
}

/// A receiver that stands where the agent left it.
fn welcome(last_attach: Option<Uuid>) -> Welcome {
    Welcome { position: LogPosition(9), last_attach, ..common::welcome(ReceiverState::Known, Lsn(7)) }
}

/// What is alarmed of, and whether everything is compared.
fn looks(filter: &mut Filter, welcome: &Welcome) -> (Option<String>, bool) {
    filter.connected(at(1), welcome);
    let (mut alarm, mut scans) = (None, false);
    while let Some(effect) = filter.next_effect() {
        match effect {
            Effect::Alarm(text) => alarm = Some(text),
            Effect::Scan(_) => scans = true,
            _ => {}
        }
    }
    (alarm, scans)
}

#[test]
fn the_attach_that_was_admitted_last_and_any_since_may_have_written_the_log() {
    for last in [1, 2, 3] {
        let mut filter = resumed();
        filter.follows(Some(vec![id(1), id(2), id(3)]));
        assert!(!filter.was_welcomed());
        assert_eq!(looks(&mut filter, &welcome(Some(id(last)))), (None, false), "{last}");
        assert!(filter.was_welcomed());
        assert_eq!(filter.attaches(), Some(&[id(3)][..]), "the log ends with it from now on");
    }
}

#[test]
fn a_log_that_another_attach_has_written_is_compared_whatever_its_numbers_are() {
    let mut filter = resumed();
    filter.follows(Some(vec![id(1), id(3)]));
    let (alarm, scans) = looks(&mut filter, &welcome(Some(id(2))));
    assert!(alarm.is_some_and(|why| why.contains("put back from a copy")) && scans);
    assert_eq!(filter.attaches(), Some(&[id(3)][..]), "it has the disk now");
    assert_eq!(filter.last_lsn(), Lsn(8), "what this disk had at 7 is not in that log: it gets a hole there");
}

#[test]
fn a_receiver_put_in_the_place_of_the_one_that_is_connected_is_found_too() {
    let mut filter = resumed();
    filter.follows(Some(vec![id(1), id(3)]));
    assert_eq!(looks(&mut filter, &welcome(Some(id(1)))), (None, false));
    filter.disconnected(at(2));
    // The same stream again, and then a store that an earlier attach had written last.
    assert_eq!(looks(&mut filter, &welcome(Some(id(3)))), (None, false));
    filter.disconnected(at(3));
    let (alarm, scans) = looks(&mut filter, &welcome(Some(id(1))));
    assert!(alarm.is_some() && scans);
    assert_eq!(filter.mode(), Mode::Tracking);
}

#[test]
fn nothing_is_made_of_what_nobody_knows() {
    // A state of before attaches were noted, and a receiver that does not say.
    let mut filter = resumed();
    filter.follows(None);
    assert_eq!(looks(&mut filter, &welcome(Some(id(2)))), (None, false));
    let mut filter = resumed();
    filter.follows(Some(vec![id(1), id(3)]));
    assert_eq!(looks(&mut filter, &welcome(None)), (None, false));
}

#[test]
fn what_is_compared_anyway_is_no_reason_for_an_alarm() {
    // As of a disk that another agent has had since, which a person takes back.
    let settings = Settings { epoch: Epoch(3), attach: id(3), ..settings() };
    let (history, last_lsn, acked_durable) = (Some(HISTORY), Lsn(7), Lsn(7));
    let resume = Resume::Lost { reason: Reason::AgentRolledBack, history, last_lsn, acked_durable };
    let mut filter = Filter::new(settings, resume, at(0));
    filter.follows(Some(vec![id(1), id(3)]));
    assert_eq!(looks(&mut filter, &welcome(Some(id(2)))), (None, true));
}

/// An agent that died, of a disk that was in sync up to LSN 7: its activity log names one block.
fn crashed() -> Filter {
    let settings = Settings { epoch: Epoch(3), attach: id(3), ..settings() };
    let resume = Resume::Crashed {
        reason: Reason::AgentCrashed,
        history: Some(HISTORY),
        last_lsn: Lsn(1000),
        acked_durable: Lsn(7),
        acked_position: LogPosition(9),
        candidates: DirtyBitmap::of((3..4).into()),
    };
    Filter::new(settings, resume, at(0))
}

#[test]
fn after_a_crash_a_log_that_another_attach_has_written_is_compared_as_a_whole() {
    let mut filter = crashed();
    filter.follows(Some(vec![id(1), id(3)]));
    assert_eq!(looks(&mut filter, &welcome(Some(id(1)))), (None, true));
    assert_eq!(filter.unsettled_blocks().unwrap().count().0, 1, "what the activity log names");

    let mut filter = crashed();
    filter.follows(Some(vec![id(1), id(3)]));
    let (alarm, scans) = looks(&mut filter, &welcome(Some(id(2))));
    assert!(alarm.as_ref().is_some_and(|alarm| alarm.contains("put back from a copy")) && scans, "{alarm:?}");
    assert!(filter.unsettled_blocks().is_none(), "everything may differ");
    // The hello of the one that died has named LSNs that it had not noted yet.
    let mut filter = crashed();
    filter.follows(Some(vec![id(1), id(3)]));
    let above = Welcome { highest: Lsn(1001), ..welcome(Some(id(1))) };
    assert_eq!(looks(&mut filter, &above), (None, true));
}

#[test]
fn a_comparison_that_somebody_asked_for_in_sync_forwards_nothing_to_a_log_that_is_not_the_disks() {
    let above = Welcome { highest: Lsn(8), ..welcome(Some(id(1))) };
    for (forced, told) in [(true, welcome(Some(id(2)))), (true, above.clone()), (false, above)] {
        let mut filter = resumed();
        filter.follows(Some(vec![id(1), id(3)]));
        if forced {
            filter.force_resync(at(0), ResyncKind::Compare);
        }
        let (alarm, scans) = looks(&mut filter, &told);
        assert!(alarm.is_some() && scans, "{forced}");
        assert_eq!(filter.mode(), Mode::Tracking);
    }
}
