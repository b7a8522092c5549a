use backtide_segment::{AttachOrigin, Entry, PassReason};

use super::*;

fn base() -> Base {
    let mut timeline = Timeline::default();
    let time = CaptureTime(5);
    let reason = || PassReason { code: 3, text: "why".to_owned() };
    let origin = AttachOrigin {
        receiver: "unix:/run/keeper.sock".to_owned(),
        disk: DiskId(Uuid::from_u128(8)),
        name: "golden".parse().unwrap(),
        lsn: Lsn(70),
        time,
    };
    let attach = Entry::Attach {
        epoch: Epoch(2),
        attach: Uuid::from_u128(9),
        next_lsn: Lsn(4),
        size: ByteCount(1 << 20),
        name: "vm1".parse().unwrap(),
        time,
        facts: AttachFacts { before: Seq(0), ack: 3, origin: Some(Box::new(origin)) },
    };
    let Entry::Attach { attach: id, size, ref name, .. } = attach else { unreachable!("made above") };
    let epoch = Epoch(2).taken_over();
    let facts = AttachFacts { before: Seq(1), ..AttachFacts::default() };
    let taken_over =
        Entry::Attach { epoch, attach: id, next_lsn: Lsn(4), size, name: name.clone(), time, facts };
    let entries = [
        attach,
        taken_over,
        Entry::PassBegin { at: Lsn(5), gap_from: Lsn(0), time, reason: reason() },
        Entry::PassEnd { at: Lsn(5), valid_from: Some(Lsn(5)), time },
        Entry::Flush { lsn: Lsn(5), time },
        Entry::Mark { lsn: Lsn(5), time, label: "one".to_owned() },
        Entry::PassBegin { at: Lsn(6), gap_from: Lsn(5), time, reason: reason() },
        Entry::PassEnd { at: Lsn(6), valid_from: Some(Lsn(6)), time },
        Entry::PassBegin { at: Lsn(9), gap_from: Lsn(6), time, reason: reason() },
    ];
    for entry in &entries {
        timeline.check(entry).unwrap();
        timeline.fold(entry);
    }
    let root = Root::decode(&[0; 49]).unwrap();
    let kept = |lsn| KeptPoint { at: TimedLsn { lsn: Lsn(lsn), time }, root };
    Base {
        identity: LogIdentity { disk: DiskId(Uuid::from_u128(1)), history: HistoryId(Uuid::from_u128(2)) },
        generation: 3,
        first_segment: SegmentId(4),
        first_seq: Seq(7),
        timeline,
        floor: Some(kept(5)),
        kept: vec![kept(2), kept(4)],
    }
}

/// The base of a log that has ended.
fn ended() -> Base {
    let before = base();
    let points = [before.kept[0].at, before.kept[1].at];
    let mut timeline = before.timeline.clone();
    timeline.end(Some("a segment is missing"));
    timeline.leave(&points);
    Base { first_segment: SegmentId(u32::MAX), floor: None, timeline, ..before }
}

#[test]
fn a_base_reads_back_and_every_flipped_bit_is_found() {
    for base in [base(), ended()] {
        let good = encode(&base);
        assert_eq!(decode(&good, Path::new("b")).unwrap(), base);
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = decode(&bytes, Path::new("b")).unwrap_err();
            assert!(matches!(error, LogError::Damaged { .. }), "bit {bit}: {error}");
        }
    }
}

#[test]
fn whatever_has_the_right_checksum_is_taken_or_refused_and_never_more() {
    for good in [encode(&base()), encode(&ended())] {
        every_byte_changed(&good);
    }
}

fn every_byte_changed(good: &[u8]) {
    for at in 12..good.len() - 4 {
        for value in [0, 1, 2, 0xff] {
            let mut bytes = good[..good.len() - 4].to_vec();
            bytes[at] = value;
            for length in [bytes.len(), at] {
                let mut bytes = bytes[..length].to_vec();
                let crc = crc32c::crc32c(&bytes);
                bytes.put_u32_le(crc);
                match decode(&bytes, Path::new("b")) {
                    Ok(base) => assert_eq!(encode(&base), bytes, "at {at}"),
                    Err(error) => assert!(matches!(error, LogError::Damaged { .. }), "{error}"),
                }
            }
        }
    }
}

#[test]
fn a_newer_version_is_refused_by_name() {
    let mut bytes = encode(&base());
    bytes.truncate(bytes.len() - 4);
    bytes[8] = 3;
    let crc = crc32c::crc32c(&bytes);
    bytes.put_u32_le(crc);
    let error = decode(&bytes, Path::new("b")).unwrap_err();
    assert_eq!(error.to_string(), "b has format version 3, this program reads up to 2");
}

#[test]
fn the_bytes_of_version_1_stay() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/segment/base.1");
    if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, encode(&base())).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    assert_eq!(decode(&golden, &path).unwrap(), base());
    assert!(encode(&base()) == golden);
}

#[test]
fn the_bytes_of_version_2_stay() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/segment/ended.base");
    if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
        std::fs::write(&path, encode(&ended())).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    assert_eq!(decode(&golden, &path).unwrap(), ended());
    assert!(encode(&ended()) == golden);
}
