//! A point of which a part cannot be read.

use backtide_control::ErrorCode;

use super::{Fixture, MIB, code, run};
use crate::{output::progress::Progress, restore::verify};

#[test]
fn what_is_sound_is_restored_around_what_is_damaged() {
    run(async {
        let fixture = Fixture::new().await;
        let mut expected = fixture.ram.bytes.borrow().clone();
        let (from, end) = (5 * MIB - 4096, expected.len());
        // Sound data and damage in one piece.
        expected[from - 4096..].fill(5);
        fixture.ram.bytes.replace(expected.clone());
        fixture.ram.unreadable_from.set(from as u64);
        let output = fixture.path("out.img");
        let target = fixture.open(&output, false).await.unwrap();
        assert_eq!(code(fixture.copy(&target, false).await.unwrap_err()), ErrorCode::Damaged);
        drop(target);
        let target = fixture.open(&output, false).await.unwrap();
        let copied = fixture.copy(&target, true).await.unwrap();
        let lacks: Vec<_> = copied.damaged.iter().map(|range| (range.start().0, range.end().0)).collect();
        assert_eq!(lacks, [(from as u64, end as u64)]);
        verify(&target, &copied, &mut Progress::new(&fixture.context, "verified")).await.unwrap();
        target.publish().await.unwrap();
        expected[from..].fill(0);
        assert!(std::fs::read(&output).unwrap() == expected, "all but what is damaged is there");
    });
}

#[test]
fn what_nobody_can_tell_of_is_read_around_damage() {
    run(async {
        let fixture = Fixture::new().await;
        let mut expected = fixture.ram.bytes.borrow().clone();
        fixture.ram.untold_from.set(2 * MIB as u64 + 4096);
        let output = fixture.path("out.img");
        let target = fixture.open(&output, false).await.unwrap();
        assert_eq!(code(fixture.copy(&target, false).await.unwrap_err()), ErrorCode::Damaged);
        drop(target);
        let from = 3 * MIB + 128 * 1024;
        expected[from..].fill(6);
        fixture.ram.bytes.replace(expected.clone());
        fixture.ram.unreadable_from.set(5 * MIB as u64);
        let target = fixture.open(&output, false).await.unwrap();
        let copied = fixture.copy(&target, true).await.unwrap();
        let lacks: Vec<_> = copied.damaged.iter().map(|range| (range.start().0, range.end().0)).collect();
        assert_eq!(lacks, [(5 * MIB as u64, expected.len() as u64)]);
        verify(&target, &copied, &mut Progress::new(&fixture.context, "verified")).await.unwrap();
        target.publish().await.unwrap();
        expected[5 * MIB..].fill(0);
        assert!(std::fs::read(&output).unwrap() == expected, "where that cannot be told it is read");
    });
}
