//! What is left of a restore that was ended, and another that goes on with it.

use std::path::Path;

use backtide_control::ErrorCode;
use backtide_units::{ByteCount, Lsn};

use super::{Fixture, Goal, MIB, code, disk, goal, run, wanted};
use crate::restore::{Target, Wanted};

#[test]
fn a_killed_restore_is_gone_on_with_and_what_it_wrote_is_checked() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        let name = output.to_str().unwrap();
        fixture.ram.unreadable_from.set(3 * MIB as u64);
        let target = Target::open(name, wanted(fixture.source.size(), false)).await.unwrap();
        fixture.copy(&target, false).await.unwrap_err();
        // As when it is killed: nothing of it is cleared away, and its lock is gone.
        target.leave();
        drop(target);
        let left = fixture.names();
        assert_eq!(left.len(), 3, "a partial file and its notes: {left:?}");
        fixture.ram.unreadable_from.set(u64::MAX);
        let before = fixture.ram.read.get();
        let (_, resumed) = fixture.restore_way(name, false, false).await.unwrap();
        assert_eq!(resumed, ByteCount(MIB as u64));
        assert_eq!(
            fixture.ram.read.get() - before,
            MIB as u64 + MIB as u64 / 256 + 512,
            "two pieces are read"
        );
        assert!(std::fs::read(&output).unwrap() == disk(), "the file differs from the disk");
        assert_eq!(fixture.names(), ["out.img", "source"]);
    });
}

#[test]
fn a_hole_that_holds_something_is_found() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        let name = output.to_str().unwrap();
        let target = Target::open(name, wanted(fixture.source.size(), false)).await.unwrap();
        target.leave();
        drop(target);
        let partial = fixture.names().into_iter().find(|name| name.ends_with(".restoring")).unwrap();
        let file = std::fs::File::options().write(true).open(fixture.path(&partial)).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1], 2 * MIB as u64 + 5).unwrap();
        assert_eq!(code(fixture.restore(name, false).await.unwrap_err()), ErrorCode::Damaged);
        assert!(!output.exists());
    });
}

#[test]
fn what_is_left_of_another_point_or_was_lost_since_is_not_taken() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        let name = output.to_str().unwrap();
        for lost in [false, true] {
            let size = fixture.source.size();
            let other = if lost { goal(size) } else { Goal { lsn: Lsn(6), ..goal(size) } };
            let target = Target::open(name, Wanted { goal: other, ..wanted(size, true) }).await.unwrap();
            fixture.copy(&target, false).await.unwrap();
            target.leave();
            drop(target);
            let partial = fixture.names().into_iter().find(|name| name.ends_with(".restoring")).unwrap();
            // As a power cut may leave it: notes of what is not there.
            std::fs::write(fixture.path(&partial), vec![0; disk().len()]).unwrap();
            let (_, resumed) = fixture.restore_way(name, true, false).await.unwrap();
            assert_eq!(resumed, ByteCount(0));
            assert!(std::fs::read(&output).unwrap() == disk(), "the file differs from the disk");
            assert_eq!(fixture.names(), ["out.img", "source"]);
        }
    });
}

#[test]
fn what_somebody_else_may_have_put_there_is_not_gone_on_with() {
    use std::{fs, os::unix::fs::PermissionsExt};
    type Tamper = fn(&Path, &Path);
    // Each is given the partial file or its notes, and a place that must not be written to.
    let link: Tamper = |path, victim| {
        fs::rename(path, victim).unwrap();
        std::os::unix::fs::symlink(victim, path).unwrap();
    };
    let second_name: Tamper = |path, victim| fs::hard_link(path, victim).unwrap();
    let open_to_all: Tamper = |path, victim| {
        fs::copy(path, victim).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    };
    run(async {
        for (number, tamper) in [link, second_name, open_to_all].into_iter().enumerate() {
            for which in [".restoring", ".restoring.notes"] {
                let fixture = Fixture::new().await;
                let (output, victim) = (fixture.path("out.img"), fixture.path("victim"));
                let name = output.to_str().unwrap();
                let target = Target::open(name, wanted(fixture.source.size(), false)).await.unwrap();
                fixture.copy(&target, false).await.unwrap();
                target.leave();
                drop(target);
                let path = fixture.names().into_iter().find(|name| name.ends_with(which)).unwrap();
                tamper(&fixture.path(&path), &victim);
                let before = fs::read(&victim).unwrap();
                let (_, resumed) = fixture.restore_way(name, false, false).await.unwrap();
                assert_eq!(resumed, ByteCount(0), "{number} {which}");
                assert!(fs::read(&output).unwrap() == disk(), "{number} {which}");
                assert!(fs::symlink_metadata(&output).unwrap().is_file(), "{number} {which}");
                assert!(fs::read(&victim).unwrap() == before, "{number} {which}: it is untouched");
                fs::write(&victim, "changed").unwrap();
                assert!(fs::read(&output).unwrap() == disk(), "{number} {which}: it is another file");
            }
        }
    });
}
