//! File systems, volume groups and tables of partitions as a hostile guest may write them, a fixed number of seeds each;
//! `BACKTIDE_FUZZ_SECONDS=60` goes on for so long, `SEED=N` runs one seed.

use backtide_fuzz::targets::volume;

#[test]
fn ext() {
    volume("ext").run();
}

#[test]
fn fat() {
    volume("fat").run();
}

#[test]
fn ntfs() {
    volume("ntfs").run();
}

#[test]
fn xfs() {
    volume("xfs").run();
}

#[test]
fn lvm() {
    volume("lvm").run();
}

#[test]
fn partitions() {
    volume("partitions").run();
}
