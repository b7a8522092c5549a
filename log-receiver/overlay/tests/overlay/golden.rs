//! The bytes of version 1, as files: what this program writes is equal to them, and it reads them.
//!
//! `testdata/v1/overlay/` is made by this test when `BACKTIDE_WRITE_GOLDEN` is set; the files are never
//! made again for a version that was released.

use std::{fs, path::Path};

use crate::common::*;
use backtide_overlay::{Existing, OverlayOptions};
use backtide_storage::{MemoryStorage, Storage};
use backtide_units::{ByteCount, ByteOffset};

fn steps() -> Vec<Step> {
    vec![
        Step::Write(range(0, 8192), 0x11),
        Step::Flush,
        Step::Write(range(4608, 512), 0x22),
        Step::Zero(range(10 * 4096, 5 * 4096), false),
        Step::Flush,
        Step::Write(range(SIZE.0 - 512, 512), 0x33),
    ]
}

#[test]
fn what_is_written_is_equal_to_the_golden_files_and_they_are_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/v1/overlay");
    let storage = MemoryStorage::new();
    storage.create_dir(Path::new("overlays")).unwrap();
    let options = OverlayOptions::alone(ByteCount(1 << 20));
    let overlay = open_with(&storage, Existing::Create, options).unwrap();
    let mut image = below();
    for step in steps() {
        step.run(&overlay).unwrap();
        step.run_on(&mut image);
    }
    let again = MemoryStorage::new();
    again.create_dir(Path::new("overlays")).unwrap();
    for (path, bytes) in storage.files() {
        let golden = dir.join(path.file_name().unwrap());
        if std::env::var_os("BACKTIDE_WRITE_GOLDEN").is_some() {
            fs::create_dir_all(&dir).unwrap();
            fs::write(&golden, &bytes).unwrap();
        }
        let golden = fs::read(golden).unwrap();
        assert!(golden == bytes, "{} is not the golden one", path.display());
        again.create_new(&path).unwrap().write_at(ByteOffset::ZERO, &golden).unwrap();
    }
    assert_eq!(content(&open(&again, Existing::Open).unwrap()).unwrap(), image);
}
