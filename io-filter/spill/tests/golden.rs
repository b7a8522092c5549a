//! Files of every version stay readable, and what is written stays as it is.
//!
//! `testdata/v1/spill/` is made by this test when `BACKTIDE_WRITE_GOLDEN` is set; the files are never
//! made again once a version with them was released.

mod common;

use std::path::{Path, PathBuf};

use backtide_protocol::{Message, Ping, Record, RecordBody};
use backtide_storage::Storage;
use backtide_units::{ByteCount, ByteOffset, ByteRange, CaptureTime, Lsn};
use common::{DISK, Spill, limits, write};

const NAME: &str = "0000000000000001.spill";

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/spill").join(NAME)
}

fn path() -> PathBuf {
    Path::new(&DISK.to_string()).join(NAME)
}

/// One of each kind of frame.
fn messages() -> Vec<Message> {
    let range = ByteRange::new(ByteOffset(8192), ByteCount(1 << 20)).unwrap();
    let time = CaptureTime(1_700_000_000_000_000);
    let zero =
        |lsn: u64, body| Message::Record(Record { lsn: Lsn(lsn), previous: Lsn(lsn - 1), time, range, body });
    vec![
        write(101, 100, 600),
        zero(102, RecordBody::Zero),
        zero(103, RecordBody::Trim),
        Message::Flush { lsn: Lsn(103), time },
        Message::Mark { lsn: Lsn(103), time, label: "before-upgrade".to_owned() },
        Message::Ping(Ping::default()),
    ]
}

#[test]
fn what_is_written_is_the_golden_file() {
    let mut spill = Spill::new(1 << 20);
    assert!(spill.append(&messages()).unwrap());
    let (found, bytes) = spill.storage.files().remove(0);
    assert_eq!(found, path());
    if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
        std::fs::write(golden(), &bytes).unwrap();
    }
    assert!(std::fs::read(golden()).unwrap() == bytes, "{NAME} is written differently now");
}

#[test]
fn the_golden_file_says_what_was_written() {
    let spill = Spill::new(1 << 20);
    spill.storage.create_dir(Path::new(&DISK.to_string())).unwrap();
    let file = spill.storage.create_new(&path()).unwrap();
    file.write_at(ByteOffset::ZERO, &std::fs::read(golden()).unwrap()).unwrap();
    let recovered = spill.files.recover(limits(1 << 20)).unwrap();
    assert_eq!(recovered.cut, None);
    assert_eq!((recovered.ring.base(), recovered.ring.end()), (Lsn(100), Lsn(103)));
    assert_eq!(spill.read_all(&recovered.ring), messages());
}
