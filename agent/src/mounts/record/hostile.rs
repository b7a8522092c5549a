//! Records of mounts against mutations of what is right: understood or an error, and nothing panics.

use backtide_fuzz::Target;
use backtide_storage::MemoryStorage;

use super::*;

#[test]
fn records_of_mounts() {
    let receiver: Address = "unix:/run/stream.sock".parse().unwrap();
    let point = SourcePoint {
        receiver: receiver.to_string(),
        disk: DiskId(Uuid::from_u128(1)),
        name: "vm1".parse().unwrap(),
        history: HistoryId(Uuid::from_u128(2)),
        lsn: Lsn(40),
        time: CaptureTime(7),
        size: ByteCount(1 << 40),
    };
    let new = MountRecord::new(&point, receiver, None, CaptureTime(9));
    // A seed stands for the same bytes every time.
    let new = MountRecord { id: "vm1-00000001".to_owned(), uuid: Uuid::from_u128(3), ..new };
    let used = MountRecord {
        changed_since: Some(Lsn(30)),
        uri: "nbd+unix:///vm1?socket=/run/a.sock".to_owned(),
        cache_bytes: ByteCount(1 << 28),
        ended: true,
        ..new.clone()
    };
    let samples = [new, used].map(|record| serde_json::to_vec_pretty(&record).unwrap()).to_vec();
    let take = |bytes: &[u8]| {
        let storage = MemoryStorage::new();
        replace_file(&storage, &path("vm1-00000001"), bytes).unwrap();
        for record in MountRecords::new(Arc::new(storage)).load_all().unwrap() {
            let _ = (record.point(), record.owner());
            assert_eq!(record.version, VERSION);
        }
    };
    Target { name: "record of a mount", seeds: 4000, samples, mend: |_| {}, take }.run();
}
