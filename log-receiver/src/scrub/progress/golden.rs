//! The golden file of scrubs.

use backtide_receiver_api::OverlayCheck;
use backtide_storage::MemoryStorage;

use super::*;
use crate::golden::{DISK, at, check, touched};

fn content() -> Content {
    let other = DiskId(uuid::Uuid::from_u128(6));
    let segment = |number| format!("/srv/backtide/disks/{DISK}/segments/000000000000000{number}.seg");
    let place = format!("{} is damaged at byte 131648", segment(1));
    let disk = DiskCheck {
        name: Some("vm1".parse().unwrap()),
        segments: 3,
        entries: 90,
        bytes: ByteCount(196_608),
        damage: vec![format!("{place}: cannot be mended: nobody has it")],
        more_damage: 2,
        touched: vec![touched(&place)],
        mended: vec!["/srv/backtide/images/packs/0000000000000001.pack is damaged at byte 7".to_owned()],
        cut: vec!["every point after lsn:40 up to lsn:50 is lost".to_owned()],
        error: Some(format!("read {}: Input/output error", segment(2))),
        ..DiskCheck::unread(DISK)
    };
    let overlay = OverlayCheck {
        id: "vm1-3".to_owned(),
        disk: Some("vm1".parse().unwrap()),
        bytes: ByteCount(4096),
        damage: vec!["block 7 is damaged".to_owned()],
        more_damage: 1,
        error: Some("read /srv/backtide/overlays/vm1-3.data: Input/output error".to_owned()),
        sound: false,
    };
    let status = ScrubStatus {
        running: true,
        cancelled: true,
        started: at(100),
        ended: Some(at(200)),
        done_bytes: ByteCount(196_608),
        total_bytes: ByteCount(1 << 30),
        bytes_per_second_max: ByteCount(64 << 20),
        disks: vec![disk],
        overlays: vec![overlay],
        damage: vec!["/srv/backtide/mounts.json is damaged: it is empty".to_owned()],
        sound: false,
    };
    let outside = [(None, "/srv/backtide/findings.json is damaged"), (Some("vm1-2"), "its map is damaged")];
    Content {
        status: Some(status),
        rest: VecDeque::from([Wanted { disk: other, bytes: ByteCount(65_536) }]),
        overlays: true,
        read: BTreeMap::from([(DISK, at(150)), (other, at(50))]),
        whole: Some(at(60)),
        outside: outside
            .map(|(overlay, why)| Outside { overlay: overlay.map(str::to_owned), why: why.to_owned() })
            .to_vec(),
    }
}

#[test]
fn how_far_a_scrub_is_is_written_as_ever_and_read() {
    let storage = MemoryStorage::new();
    let progress = Progress::open(Arc::new(storage.clone()));
    *progress.content() = content();
    progress.write();
    let store = check(&storage, Path::new(FILE));
    assert_eq!(*Progress::open(Arc::new(store)).content(), content());
}
