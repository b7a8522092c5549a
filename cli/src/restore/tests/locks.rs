//! Who may have what a restore writes to, and when.

use std::path::Path;

use backtide_control::ErrorCode;
use backtide_units::ByteCount;

use super::{Fixture, code, disk, run};

#[test]
fn an_image_that_an_agent_has_locked_is_not_replaced_even_by_force() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("live.img");
        std::fs::write(&output, "live").unwrap();
        let agents = std::fs::File::open(&output).unwrap();
        rustix::fs::flock(&agents, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let refused = fixture.restore(output.to_str().unwrap(), true).await.unwrap_err();
        assert_eq!(code(refused), ErrorCode::Locked);
        assert_eq!(std::fs::read(&output).unwrap(), b"live");
    });
}

/// Whether somebody has the lock that an agent would take.
fn is_locked(path: &Path) -> bool {
    let file = std::fs::File::open(path).unwrap();
    let taken = rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    taken == Err(rustix::io::Errno::WOULDBLOCK)
}

#[test]
fn no_agent_gets_a_file_that_is_going_to_be_replaced() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        std::fs::write(&output, "old").unwrap();
        let target = fixture.open(&output, true).await.unwrap();
        assert!(is_locked(&output), "an agent could attach it now, and would lose it at the end");
        fixture.copy(&target, false).await.unwrap();
        assert!(is_locked(&output));
        target.publish().await.unwrap();
        drop(target);
        assert!(!is_locked(&output), "it is there to be used");
        assert!(std::fs::read(&output).unwrap() == disk());
    });
}

#[test]
fn what_came_under_the_name_meanwhile_and_is_protected_is_not_replaced() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        // Of another file at the beginning, and of none.
        for old in [Some("old"), None] {
            if let Some(old) = old {
                std::fs::write(&output, old).unwrap();
            }
            let target = fixture.open(&output, true).await.unwrap();
            fixture.copy(&target, false).await.unwrap();
            if old.is_some() {
                std::fs::remove_file(&output).unwrap();
            }
            std::fs::write(&output, "live").unwrap();
            let agents = std::fs::File::open(&output).unwrap();
            rustix::fs::flock(&agents, rustix::fs::FlockOperation::LockExclusive).unwrap();
            assert_eq!(code(target.publish().await.unwrap_err()), ErrorCode::Locked);
            assert_eq!(std::fs::read(&output).unwrap(), b"live");
            drop((target, agents));
            // Nothing that was done is lost.
            let (written, resumed) =
                fixture.restore_way(output.to_str().unwrap(), true, false).await.unwrap();
            assert_eq!(written, ByteCount::ZERO, "{resumed} were there");
            assert!(std::fs::read(&output).unwrap() == disk());
            assert_eq!(fixture.names(), ["out.img", "source"]);
            std::fs::remove_file(&output).unwrap();
        }
    });
}

#[test]
fn a_file_that_nobody_has_is_replaced_also_when_it_is_another_than_at_the_beginning() {
    run(async {
        let fixture = Fixture::new().await;
        let output = fixture.path("out.img");
        for between in ["removed", "another"] {
            std::fs::write(&output, "old").unwrap();
            let target = fixture.open(&output, true).await.unwrap();
            fixture.copy(&target, false).await.unwrap();
            std::fs::remove_file(&output).unwrap();
            if between == "another" {
                std::fs::write(&output, "another").unwrap();
            }
            target.publish().await.unwrap();
            assert!(std::fs::read(&output).unwrap() == disk(), "{between}");
        }
    });
}
