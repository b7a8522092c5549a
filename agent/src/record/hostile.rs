//! Records of disks against mutations of what is right: understood or an error, and nothing panics.

use backtide_fuzz::Target;
use backtide_storage::MemoryStorage;

use super::*;

fn saved(record: &DiskRecord) -> Vec<u8> {
    let storage = MemoryStorage::new();
    Records::new(Arc::new(storage.clone())).save(record).unwrap();
    read_file(&storage, &record_path(&record.name), RECORD_BYTES_MAX).unwrap()
}

#[test]
fn records_of_disks() {
    let receiver: Address = "unix:/run/r.sock".parse().unwrap();
    let new = DiskRecord::new("vm1".parse().unwrap(), "/images/vm1".to_owned(), receiver);
    // A seed stands for the same bytes every time.
    let new = DiskRecord { uuid: DiskId(Uuid::from_u128(1)), ..new };
    let used = DiskRecord {
        epoch: Epoch(7),
        history: Some(HistoryId(Uuid::from_u128(2))),
        lsn_bound: Lsn(900),
        acked_durable: Lsn(800),
        size: ByteCount(1 << 30),
        fenced: true,
        own_epoch: Epoch(5),
        ..new.clone()
    };
    let take = |bytes: &[u8]| {
        let storage = MemoryStorage::new();
        let name: DiskName = "vm1".parse().unwrap();
        replace_file(&storage, &record_path(&name), bytes).unwrap();
        let records = Records::new(Arc::new(storage));
        let Ok(Some(record)) = records.load(&name) else {
            let all = records.load_all().unwrap();
            assert!(all.known.is_empty() && all.unreadable.len() == 1);
            return;
        };
        // What is understood can be gone on with, and is the same when it was saved.
        let _ = record.last_own_epoch();
        let mut fenced = record.clone();
        fenced.fence(Epoch(9));
        let again = Records::new(Arc::new(MemoryStorage::new()));
        again.save(&record).unwrap();
        assert_eq!(again.load(&record.name).unwrap(), Some(record));
    };
    let samples = [new, used].iter().map(saved).collect();
    Target { name: "record of a disk", seeds: 4000, samples, mend: |_| {}, take }.run();
}

#[test]
fn what_is_not_understood_of_a_clientele_costs_no_record() {
    let receiver: Address = "unix:/run/r.sock".parse().unwrap();
    let record = DiskRecord::new("vm1".parse().unwrap(), "/images/vm1".to_owned(), receiver);
    let mut value: serde_json::Value = serde_json::from_slice(&saved(&record)).unwrap();
    for strange in [serde_json::json!({"boot": 7, "processes": [1]}), serde_json::json!("nobody")] {
        value["clientele"] = strange;
        let storage = MemoryStorage::new();
        replace_file(&storage, &record_path(&record.name), value.to_string().as_bytes()).unwrap();
        let loaded = Records::new(Arc::new(storage)).load(&record.name).unwrap();
        assert_eq!(loaded.as_ref(), Some(&record), "{value}");
    }
}

#[test]
fn a_record_that_makes_an_outage_of_every_silence_is_one_of_the_usual_time() {
    let receiver: Address = "unix:/run/r.sock".parse().unwrap();
    let mut record = DiskRecord::new("vm1".parse().unwrap(), "/images/vm1".to_owned(), receiver);
    for (saved, loaded) in [(0, 5000), (1, 1), (700, 700)] {
        record.limits.outage_after_ms = saved;
        let records = Records::new(Arc::new(MemoryStorage::new()));
        records.save(&record).unwrap();
        let found = records.load(&record.name).unwrap().unwrap();
        assert_eq!(found.limits.outage_after_ms, loaded);
    }
}
