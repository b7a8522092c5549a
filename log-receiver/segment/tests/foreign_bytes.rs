//! Readers of foreign bytes give an error or entries, never a panic and never memory without bound.

use std::path::Path;

use backtide_segment::{SealedSegment, SegmentFile, Seq, inspect, scan};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::ByteOffset;
use proptest::prelude::*;

fn read_everything(bytes: &[u8]) {
    let storage = MemoryStorage::new();
    let path = Path::new("x.seg");
    let file = storage.create_new(path).expect("create");
    file.write_at(ByteOffset(0), bytes).expect("write");
    let file = SegmentFile::new(file, path.to_owned());
    let mut out = Vec::new();
    inspect(&storage, path, &mut out).expect("a listing");
    let Ok(header) = file.header() else { return };
    let _ = scan(&file, header, Seq(0), Seq(0));
    let _ = scan(&file, header, Seq(1000), Seq(0));
    if let Ok(Some(sealed)) = SealedSegment::open(&file, header) {
        let _ = sealed.verify(&file);
    }
}

fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/segment").join(name);
    std::fs::read(path).expect("a golden file")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn random_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..4000)) {
        read_everything(&bytes);
    }

    #[test]
    fn changed_and_cut_files_are_read_without_a_panic(
        sealed in any::<bool>(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        end in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = golden(if sealed { "sealed.seg" } else { "open.seg" });
        for (place, byte) in changes {
            let place = place.index(bytes.len());
            bytes[place] = byte;
        }
        if cut {
            bytes.truncate(end.index(bytes.len()));
        }
        read_everything(&bytes);
    }
}
