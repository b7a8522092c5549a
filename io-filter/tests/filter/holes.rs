//! What a hole is called, and what is none: a person who asks for a resync makes no point go away.

use backtide_io_filter::{MarkError, Mode, ResyncKind};
use backtide_protocol::Message;
use backtide_units::{LogPosition, Reason};

use crate::{common::at, interruptions::Disk};

#[test]
fn a_comparison_that_somebody_asked_for_does_not_name_the_hole_of_an_outage_or_a_pause() {
    for kind in [ResyncKind::Compare, ResyncKind::Full] {
        let mut disk = Disk::in_sync();
        disk.filter.disconnected(at(0));
        disk.filter.force_resync(at(0), kind);
        disk.overflow();
        disk.reconnect();
        disk.send();
        assert_eq!(disk.passes, [Reason::ReceiverAway], "{kind:?}");
    }
    // It begins to be looked for in sync, or is still to be.
    for is_connected in [true, false] {
        let mut disk = Disk::in_sync();
        if !is_connected {
            disk.filter.disconnected(at(0));
        }
        disk.filter.force_resync(at(0), ResyncKind::Full);
        disk.filter.pause(at(0));
        disk.write(0);
        disk.filter.resume(at(0));
        disk.reconnect();
        disk.send();
        assert_eq!(disk.passes, [Reason::Paused], "{is_connected}");
    }
}

#[test]
fn what_is_asked_for_during_a_pass_begins_in_sync() {
    for kind in [ResyncKind::Compare, ResyncKind::Full] {
        let mut disk = Disk::in_sync();
        disk.filter.force_resync(at(0), ResyncKind::Changed);
        disk.send();
        disk.filter.force_resync(at(0), kind);
        let (received, durable) = (disk.last, disk.last);
        disk.filter.receive(at(0), Message::Ack { received, durable, position: LogPosition::default() });
        assert_eq!(disk.filter.mode(), Mode::Sync, "{kind:?}: nothing is missing");
        disk.write(0);
        disk.send();
        assert_eq!(disk.passes, [Reason::Forced; 2]);
    }
}

#[test]
fn a_pass_that_goes_without_a_block_offers_no_point_and_takes_no_mark() {
    let mut disk = Disk::in_sync();
    disk.filter.pause(at(0));
    disk.write(0);
    disk.filter.resume(at(0));
    disk.unreadable = true;
    let before = disk.filter.status().durable_lsn;
    disk.reconnect();
    let pass = disk.filter.status().pass.expect("a pass");
    assert!(pass.incomplete && !pass.forfeited);
    assert!(matches!(disk.filter.mark(at(0), "here"), Err(MarkError::NotForwarding { .. })));
    disk.write(1);
    disk.send();
    disk.acknowledge();
    assert_eq!(disk.filter.status().durable_lsn, before, "what was forwarded beside it is none either");
    disk.unreadable = false;
    disk.settle();
    assert_eq!(disk.filter.mode(), Mode::Sync);
    assert!(disk.filter.status().durable_lsn > before);
}
