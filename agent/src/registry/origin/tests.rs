//! Two disks that are to begin in one new image.

use backtide_agent_api::{AttachRequest, DetachRequest};
use backtide_export::{Client, NbdUri};
use backtide_hydration::SourcePoint;
use backtide_units::{ByteOffset, DiskId, DiskName, HistoryId};
use tokio::sync::Semaphore;

use super::*;
use crate::{
    disk::source::{Fetching, PointSource, Sources, fake::FakeSource},
    registry::tests::registry,
};

/// Points of disks, of which one is told only when it is let go on.
struct Points {
    held: DiskId,
    asked: Arc<Semaphore>,
    go_on: Arc<Semaphore>,
}

/// The one that is held is half as large as the others.
fn point(half: bool) -> Rc<dyn PointSource> {
    Rc::new(FakeSource::new(vec![0; if half { 1 << 19 } else { 1 << 20 }]))
}

impl Sources for Points {
    fn open(&self, _point: SourcePoint, _dialer: Dialer) -> Rc<dyn PointSource> {
        point(false)
    }

    fn find(
        &self,
        _dialer: Dialer,
        disk: DiskId,
        _history: Option<HistoryId>,
        _lsn: Option<Lsn>,
    ) -> Fetching<'static, Rc<dyn PointSource>> {
        let (held, asked, go_on) = (disk == self.held, Arc::clone(&self.asked), Arc::clone(&self.go_on));
        Box::pin(async move {
            if held {
                asked.add_permits(1);
                go_on.acquire().await.unwrap().forget();
            }
            Ok(point(held))
        })
    }
}

fn begin(name: &str, image: &Path, disk: DiskId) -> AttachRequest {
    let receiver = image.with_file_name("nobody.sock");
    let request = serde_json::json!({
        "name": name,
        "image": image,
        "receiver": format!("unix:{}", receiver.display()),
        "from": { "disk": disk, "lsn": 40 },
    });
    serde_json::from_value(request).unwrap()
}

/// The receiver takes its time to tell the one; the other goes by another name of the image, which is not there yet.
#[tokio::test]
async fn of_two_disks_that_begin_in_one_image_the_later_leaves_it_as_it_is() {
    for (same_name, detaches) in [(true, false), (false, false), (false, true)] {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        std::fs::create_dir(directory.join("images")).unwrap();
        std::os::unix::fs::symlink(directory.join("images"), directory.join("link")).unwrap();
        let (image, alias) = (directory.join("images/new"), directory.join("link/new"));
        let mut registry = registry(directory);
        let (held, asked, go_on) =
            (DiskId::random(), Arc::new(Semaphore::new(0)), Arc::new(Semaphore::new(0)));
        let points = Points { held, asked: Arc::clone(&asked), go_on: Arc::clone(&go_on) };
        Arc::get_mut(&mut registry).unwrap().sources = Arc::new(points);
        let slow = tokio::spawn({
            let (registry, request) = (Arc::clone(&registry), begin("slow", &image, held));
            async move { registry.attach(request).await }
        });
        asked.acquire().await.unwrap().forget();

        let path = if same_name { &image } else { &alias };
        let quick = registry.attach(begin("quick", path, DiskId::random())).await;
        if same_name {
            let refused = quick.unwrap_err();
            assert_eq!(refused.code, ErrorCode::Locked, "{refused}");
            assert!(refused.message.contains("it is disk slow of this agent"), "{refused}");
            go_on.add_permits(1);
            slow.await.unwrap().unwrap();
            assert_eq!(std::fs::metadata(&image).unwrap().len(), 1 << 19);
            registry.shut_down().await;
            continue;
        }
        let uri: NbdUri = quick.unwrap().nbd_uri.parse().unwrap();
        let guest = Client::connect(&uri).await.unwrap();
        guest.write(ByteOffset((1 << 20) - 4096), vec![0x11; 4096].into(), true).await.unwrap();
        drop(guest);
        if detaches {
            let (name, incomplete): (DiskName, _) = ("quick".parse().unwrap(), true);
            registry
                .detach(&name, DetachRequest { incomplete, force: true, nobody_returns: false })
                .await
                .unwrap();
        }
        go_on.add_permits(1);
        let refused = slow.await.unwrap().unwrap_err();
        let expected = if detaches { ErrorCode::Exists } else { ErrorCode::Locked };
        assert_eq!(refused.code, expected, "{refused}");
        let found = std::fs::read(&image).unwrap();
        assert_eq!((found.len(), &found[found.len() - 4096..]), (1 << 20, &[0x11; 4096][..]));
        // Nothing of it is left that keeps another from beginning there.
        std::fs::remove_file(&image).unwrap();
        if detaches {
            go_on.add_permits(1);
            registry.attach(begin("slow", &image, held)).await.unwrap();
        }
        registry.shut_down().await;
    }
}
