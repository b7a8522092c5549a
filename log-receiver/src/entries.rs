//! From the stream's messages to the log's entries: the same facts in the log's words.
//!
//! Pure. Payloads are shared, not copied, and keep the checksum they got where they were captured.

use backtide_protocol::{Data, Hello, OriginPoint, Record, RecordBody};
use backtide_segment::{AttachFacts, AttachOrigin, Entry, PassContent, PassReason, Seq};
use backtide_units::{ByteRange, CaptureTime, Lsn, Reason};

/// The entry of a guest's write, zeroing or trim.
pub fn record(record: Record) -> Entry {
    let Record { lsn, previous: _, time, range, body } = record;
    match body {
        RecordBody::Write(data) => {
            let (payload, checksum) = (data.bytes().clone(), data.checksum().clone());
            Entry::Write { lsn, time, range, payload, checksum }
        }
        RecordBody::Zero => Entry::Zero { lsn, time, range, trim: false },
        RecordBody::Trim => Entry::Zero { lsn, time, range, trim: true },
    }
}

/// The entry that begins a pass; the reason's sentence is kept beside its code, so that the log can
/// be read without this build's table.
pub fn pass_begin(at: Lsn, gap_from: Lsn, time: CaptureTime, reason: Reason) -> Entry {
    let reason = PassReason { code: reason.code(), text: reason.to_string() };
    Entry::PassBegin { at, gap_from, time, reason }
}

/// The entry of a pass's data; on the stream no payload means zeroes.
pub fn pass_data(at: Lsn, range: ByteRange, data: &Data) -> Entry {
    let content = if data.bytes().is_empty() {
        PassContent::Zeroes
    } else {
        PassContent::Bytes { payload: data.bytes().clone(), checksum: data.checksum().clone() }
    };
    Entry::PassData { at, range, content }
}

/// The entry with which an agent claims the disk for its epoch, behind `before` others.
pub fn attach(hello: &Hello, before: Seq, time: CaptureTime) -> Entry {
    let origin = hello.origin.clone().map(|origin| {
        let OriginPoint { receiver, disk, name, lsn, time } = origin;
        Box::new(AttachOrigin { receiver, disk, name, lsn, time })
    });
    let on_outage = hello.on_outage.unwrap_or_default();
    let ack = hello.ack.map_or(0, |ack| ack.code(on_outage));
    Entry::Attach {
        facts: AttachFacts { before, ack, origin },
        epoch: hello.epoch,
        attach: hello.attach,
        next_lsn: hello.next_lsn,
        size: hello.size,
        name: hello.name.clone(),
        time,
    }
}
