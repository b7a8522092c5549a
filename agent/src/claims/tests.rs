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
    assert_eq!(claims.settled(Duration::from_secs(1)).await, Err(vec![name("vm1")]));
    drop(claims.try_claim(&name("vm2")).expect("nothing is closed"));
    assert_eq!(claims.close(Duration::from_secs(1)).await, Err(vec![name("vm1")]), "one is out");
    assert_eq!(claims.try_claim(&name("vm2")).unwrap_err(), Claimed::Closed);
    drop(claim);
    assert_eq!(claims.close(Duration::from_secs(1)).await, Ok(()));
    assert_eq!(claims.settled(Duration::ZERO).await, Ok(()));
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
    let take = |disk: &str, image: &str| claims.take_image(&name(disk), Identity::of(image));
    assert!(matches!(take("vm1", &path("a")), Ok(TakenImage::ToHold { before: None })));
    assert_eq!(take("vm2", &path("b")).unwrap_err(), Shared { disk: name("vm1"), image: None });
    assert!(matches!(take("vm1", &path("b")), Ok(TakenImage::ToHold { before: None })));
    claims.hold_image(&name("vm1"), Hold::default());
    assert!(matches!(take("vm1", &path("b")), Ok(TakenImage::Kept)), "it has it");
    take("vm3", "nbd://host/a").unwrap();
    assert!(take("vm4", "nbd://host/a").is_err());
    claims.leave_image(&name("vm3"));
    take("vm4", "nbd://host/a").unwrap();
}

#[test]
fn what_held_an_image_that_is_another_now_is_for_its_disk_to_drop() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a").display().to_string();
    let claims = Claims::default();
    std::fs::write(&image, "").unwrap();
    claims.take_image(&name("vm1"), Identity::of(&image)).unwrap();
    claims.hold_image(&name("vm1"), Hold::default());
    std::fs::write(directory.path().join("b"), "").unwrap();
    std::fs::rename(directory.path().join("b"), &image).unwrap();
    // Not in here, where everybody would wait for its device.
    let taken = claims.take_image(&name("vm1"), Identity::of(&image));
    assert!(matches!(taken, Ok(TakenImage::ToHold { before: Some(_) })), "{taken:?}");
}
