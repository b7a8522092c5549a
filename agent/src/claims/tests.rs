//! Names and images that are claimed.

use super::*;

fn name(text: &str) -> DiskName {
    text.parse().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_being_changed_holds_up_no_other() {
    let claims = Arc::<Claims>::default();
    let stuck = claims.try_claim(&name("stuck")).unwrap();
    drop(claims.claim(&name("other"), Duration::ZERO).await.unwrap());
    let refused = claims.claim(&name("stuck"), Duration::from_secs(10)).await;
    assert_eq!(refused.unwrap_err(), Claimed::Changing);
    let waiting = tokio::spawn({
        let claims = Arc::clone(&claims);
        async move { claims.claim(&name("stuck"), Duration::MAX).await.map(drop) }
    });
    tokio::task::yield_now().await;
    drop(stuck);
    waiting.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn closed_claims_are_opened_again() {
    let claims = Arc::<Claims>::default();
    let claim = claims.try_claim(&name("vm1")).unwrap();
    assert!(!claims.close(Duration::from_secs(1)).await, "one is out");
    assert_eq!(claims.try_claim(&name("vm2")).unwrap_err(), Claimed::Closed);
    drop(claim);
    assert!(claims.close(Duration::from_secs(1)).await);
    claims.open();
    assert!(claims.try_claim(&name("vm2")).is_ok());
}

#[test]
fn an_image_by_another_name_is_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(path("a"), "").unwrap();
    std::os::unix::fs::symlink(path("a"), path("b")).unwrap();
    let claims = Claims::default();
    assert_eq!(claims.take_image(&name("vm1"), Identity::of(&path("a"))), Ok(false));
    let taken = claims.take_image(&name("vm2"), Identity::of(&path("b")));
    assert_eq!(taken, Err(Shared { disk: name("vm1"), image: None }));
    assert_eq!(claims.take_image(&name("vm1"), Identity::of(&path("b"))), Ok(false));
    claims.hold_image(&name("vm1"), Hold::default());
    assert_eq!(claims.take_image(&name("vm1"), Identity::of(&path("b"))), Ok(true), "it has it");
    claims.take_image(&name("vm3"), Identity::of("nbd://host/a")).unwrap();
    assert!(claims.take_image(&name("vm4"), Identity::of("nbd://host/a")).is_err());
    claims.leave_image(&name("vm3"));
    claims.take_image(&name("vm4"), Identity::of("nbd://host/a")).unwrap();
}
