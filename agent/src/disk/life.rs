//! The sign of life of an agent that has a disk: renewed while the disk may change, it tells the next attach
//! until when the image was written by nobody else.
//!
//! Invariant: while nothing of this agent may write the image, the sign goes on telling of the image as this agent left
//! it, whatever the time: somebody else's write is noticed after a crash, and by the agent itself. That the image is not in
//! its place, or cannot be looked at, takes nothing away from that.

use std::{path::Path, rc::Rc, sync::Arc};

use backtide_export::Server;
use backtide_io_filter::Filter;
use backtide_storage::ImageFile;
use backtide_tracking::{ImageSeen, SignOfLife};
use backtide_units::{ByteCount, CaptureTime};

use super::{
    engine::Engine,
    in_place::{Displaced, InPlace, look_at_length},
    local::blocking,
    tracking::Tracking,
    trust,
};
use crate::record::ImageStamp;

/// The file systems of which it is known that a file's time is that of the last write, as soon as that has ended. One of
/// another host may have it later, when nobody writes any more.
const TIMES_OF_WRITES: [u32; 5] = [
    0xef53,      // ext2, ext3, ext4
    0x5846_5342, // XFS
    0x9123_683e, // Btrfs
    0xf2f5_2010, // F2FS
    0x0102_1994, // tmpfs
];

/// What this agent does to the image, as of one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Own {
    /// Changes so far, those that failed among them.
    changes: u64,
    /// Others may be under way, or come at any moment: somebody uses the disk, blocks are brought, or one is on its way.
    may_change: bool,
}

impl Own {
    pub(super) fn now(engine: &Engine, server: &Server) -> Self {
        let status = engine.look(Filter::status);
        let (counters, traffic) = (status.counters, &engine.traffic);
        // One that was under way when a pass froze the disk has no record of its own.
        let answered = traffic.writes.get() + traffic.zeroes.get() + traffic.errors.get();
        // What is missing is written by nobody's wish.
        let used = server.connections() > 0 || engine.local.hydration().is_some();
        let is_under_way = status.waiting_answers > 0 || !engine.look(Filter::is_quiet);
        let changes = counters.records + counters.failed_changes + answered;
        Self { changes, may_change: used || is_under_way }
    }
}

/// The tracking file's sign of life, renewed as long as clients may change something.
pub(super) struct Life {
    tracking: Rc<Tracking>,
    /// None where the image is no file.
    image: Option<InPlace>,
    /// What became of it, as of the last look.
    pub(super) displaced: Option<Displaced>,
    /// It was cut short, and not everything was compared since: what it had behind that is nowhere any more, however long it is
    /// now.
    was_cut: bool,
    /// That was told when it was as long as it has to be again.
    cut_is_told: bool,
    /// How long the image is where its time tells of each write, and nothing of this agent writes it but the disk itself: no
    /// server.
    told: Option<ByteCount>,
    /// The raw file as it is open, wherever its path leads.
    open: Option<Arc<ImageFile>>,
    /// As of just before the last look that found the image, and how it was then.
    own: Own,
    seen: Option<ImageSeen>,
    /// The last look found it in its place.
    in_place: bool,
    /// The image may be another than the file says, and that is in order.
    news: bool,
}

impl Life {
    /// Of an attach that begins, with a sign of it in the file. Until the first look an agent that was killed may have
    /// written the image last.
    pub(super) fn new(tracking: Rc<Tracking>, image: Option<InPlace>, open: Option<Arc<ImageFile>>) -> Self {
        let told = open.as_ref().filter(|open| tells_of_writes(open.path())).map(|open| open.size());
        let (own, displaced, seen) = (Own::default(), None, None);
        let (was_cut, cut_is_told, in_place, news) = (false, false, false, false);
        Self { tracking, image, displaced, was_cut, cut_is_told, told, open, own, seen, in_place, news }
    }

    /// Looks at the image; whether somebody else has written it since the last look that found it: it is another than it was,
    /// and nothing of this agent was under way before that look, between them, or after this one, as `now` says. Whoever
    /// cut it short has, whatever was under way: that is told when it is as long as it has to be again.
    pub(super) async fn look_for_others(&mut self, now: impl Fn() -> Own, disk: &str) -> bool {
        let before = now();
        let in_place = self.look(disk).await;
        self.in_place = in_place.is_some();
        let stamp = match in_place {
            Some(stamp) => Some(stamp),
            None => self.look_at_open().await,
        };
        let found = stamp.as_ref().map(trust::seen);
        // What was under way at the look was begun before, or is under way or counted by now.
        let after = now();
        let idle = !self.own.may_change && !before.may_change && !after.may_change;
        let unchanged = idle && after.changes == self.own.changes;
        self.news |= !unchanged;
        // Who has made it longer does what is asked for before a resize, and may write there.
        let is_disk = self.told.is_some() && stamp.map(|stamp| stamp.size) == self.told;
        let others = is_disk && unchanged && found.is_some() && self.seen.is_some() && found != self.seen;
        // What was not found now is compared with how it was when it is found again, and so is what this agent does.
        if found.is_some() || self.image.is_none() {
            (self.own, self.seen) = (before, found);
        }
        // What was in order before is not what is there.
        self.news &= !others;
        let grew_again = self.was_cut && self.displaced.is_none() && !self.cut_is_told;
        self.cut_is_told |= grew_again;
        others || grew_again
    }

    /// Everything was compared since somebody else has written the image.
    pub(super) fn was_compared(&mut self) {
        if std::mem::take(&mut self.cut_is_told) {
            self.was_cut = self.displaced.is_some();
        }
    }

    /// From now on the image as it was seen last is in order, whoever wrote it.
    pub(super) fn renew(&mut self) {
        self.news = true;
    }

    /// Says what there is to say since the last time, as of the last look at the image.
    pub(super) async fn keep(&mut self, captured: CaptureTime, disk: &str) {
        let is_known = self.in_place || self.image.is_none();
        // Of an image that is not in its place the file says what it said.
        let said = self.tracking.sign();
        let sign = if is_known && std::mem::take(&mut self.news) {
            trust::alive_now(self.seen, captured)
        } else if captured != said.captured {
            // That an idle disk has not changed is captured too, and changes no image.
            SignOfLife { captured, ..said }
        } else {
            return;
        };
        // An old sign is a doubt the next attach settles by comparing everything.
        if let Err(error) = self.tracking.renew(sign).await {
            tracing::warn!(disk, %error, "cannot renew the sign of life in the tracking file");
        }
    }

    /// Looks whether the image is where it was, on a thread that may wait for the file system. The image as it is now; none
    /// of one that is not a file, or not in its place.
    pub(super) async fn look(&mut self, disk: &str) -> Option<ImageStamp> {
        let (image, open) = (self.image.clone(), self.open.clone());
        let look = move || match (image.map_or(Ok(None), |image| image.look()), open) {
            // The length of a device is told where it is open alone.
            (Ok(stamp), Some(open)) => Ok(look_at_length(&open)?.map(|()| stamp)),
            (found, _) => Ok(found),
        };
        // No look is no news.
        let (displaced, stamp) = match blocking(look).await.ok()? {
            Ok(stamp) => (None, stamp),
            Err(displaced) => (Some(displaced), None),
        };
        match &displaced {
            found if *found == self.displaced => {}
            Some(error) => tracing::error!(disk, %error, "the image is not where it was"),
            None => tracing::info!(disk, "the image is where it was again"),
        }
        if matches!(displaced, Some(Displaced::Shorter { .. })) {
            (self.was_cut, self.cut_is_told) = (true, false);
        }
        self.displaced = displaced;
        stamp
    }

    /// The same of the raw file that is open, which others may write by another name.
    async fn look_at_open(&self) -> Option<ImageStamp> {
        let open = Arc::clone(self.open.as_ref()?);
        ImageStamp::found(&blocking(move || open.metadata()).await.ok()?)
    }

    /// Whether what the guest wrote need not be where the image's path leads to.
    pub(super) fn has_lost_its_image(&self) -> bool {
        self.displaced.is_some() || self.was_cut
    }
}

/// Whether a file's time is that of the last write of it.
fn tells_of_writes(file: &Path) -> bool {
    // The kernel's numbers have 32 bits, of which the type on some machines makes a negative one.
    rustix::fs::statfs(file).is_ok_and(|found| TIMES_OF_WRITES.contains(&(found.f_type as u32)))
}

#[cfg(test)]
mod tests {
    use backtide_storage::{MemoryStorage, Storage};
    use backtide_tracking::{ActivityLimits, Loaded, SavedTracking, Snapshot};
    use backtide_units::DiskId;

    use super::*;
    use crate::{claims::Identity, record::Records};

    const TRACKING: &str = "vm1.tracking";

    /// Of an image that is as long as it has to be, in a storage of its own.
    fn life_of(image: &Path) -> Life {
        life_in(&MemoryStorage::new(), image)
    }

    fn told(storage: &dyn Storage) -> SignOfLife {
        Loaded::from_file(storage, Path::new(TRACKING)).unwrap().unwrap().alive.unwrap()
    }

    /// A look while the agent has made so many changes; whether somebody else has written the image.
    async fn keep(life: &mut Life, changes: u64, captured: u64, may_change: bool) -> bool {
        let others = life.look_for_others(|| Own { changes, may_change }, "vm1").await;
        life.keep(CaptureTime(captured), "vm1").await;
        others
    }

    /// As if it was written then.
    fn touch(image: &Path, seconds: u64) {
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        std::fs::File::options().write(true).open(image).unwrap().set_modified(time).unwrap();
    }

    fn seconds(sign: SignOfLife) -> u64 {
        sign.image.unwrap().modified_ns / 1_000_000_000
    }

    fn life_in(storage: &MemoryStorage, image: &Path) -> Life {
        let (records, disk) = (Records::new(Arc::new(storage.clone())), "vm1".parse().unwrap());
        let snapshot = Snapshot::first(SavedTracking::unknown(DiskId::random()), false, true);
        let kind = (ActivityLimits::default(), ByteCount(1 << 20));
        let file = records.create_tracking(&disk, kind.0, kind.1, &snapshot).unwrap();
        let stamp = ImageStamp::of(image).unwrap();
        let sign = trust::alive_since(Some(&stamp), CaptureTime(1));
        let text = image.to_str().unwrap();
        let image = InPlace::new(text, Identity::of(text), stamp.size);
        let (tracking, _) = Tracking::new((file, sign), kind, records, disk, None);
        Life { told: Some(stamp.size), ..Life::new(tracking, image, None) }
    }

    #[tokio::test]
    async fn a_foreign_write_while_the_disk_is_idle_is_not_taken_for_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        std::fs::write(&image, "content").unwrap();
        let storage = MemoryStorage::new();
        let mut life = life_in(&storage, &image);
        assert!(!life.has_lost_its_image());
        let told = || told(&storage);
        assert!(!keep(&mut life, 1, 2, false).await);
        let at_first = told();
        let touch = |seconds| touch(&image, seconds);
        touch(1000);
        assert!(keep(&mut life, 1, 30, false).await);
        assert_eq!(
            told(),
            SignOfLife { captured: CaptureTime(30), ..at_first },
            "it says nothing new of the image"
        );
        assert!(!keep(&mut life, 1, 30, false).await, "once");
        // When everything was compared, that is as it is to be.
        life.renew();
        assert!(!keep(&mut life, 1, 30, false).await);
        assert_eq!(told().image.unwrap().modified_ns, 1000 * 1_000_000_000);
        // A client, or a change of its own, may have been what changed it.
        touch(2000);
        assert!(!keep(&mut life, 1, 30, true).await);
        assert_eq!(told().image.unwrap().modified_ns, 2000 * 1_000_000_000);
        touch(3000);
        assert!(!keep(&mut life, 1, 30, false).await, "the client was there at the last look");
        touch(4000);
        assert!(!keep(&mut life, 2, 31, false).await);
        assert_eq!(told().image.unwrap().modified_ns, 4000 * 1_000_000_000);
        // One that comes and goes while it is looked at.
        let looks = std::cell::Cell::new(0);
        let passing = || Own { changes: 2 + looks.replace(looks.get() + 1), may_change: false };
        touch(5000);
        assert!(!life.look_for_others(passing, "vm1").await);
        touch(6000);
        assert!(!keep(&mut life, 3, 31, false).await, "it may have been written after the look");
        touch(7000);
        assert!(keep(&mut life, 3, 31, false).await);
        let longer = std::fs::File::options().append(true).open(&image).unwrap();
        longer.set_len(100).unwrap();
        touch(8000);
        assert!(!keep(&mut life, 3, 31, false).await, "it is to be resized");
        longer.set_len(7).unwrap();
        assert!(keep(&mut life, 3, 31, false).await);
        life.told = None;
        touch(8000);
        assert!(!keep(&mut life, 3, 31, false).await, "its server writes it when it likes");
        // Another file by that name: nothing is known of it.
        std::fs::copy(&image, directory.path().join("copy")).unwrap();
        std::fs::rename(directory.path().join("copy"), &image).unwrap();
        let last = told();
        assert!(!keep(&mut life, 3, 32, true).await);
        assert_eq!(told(), SignOfLife { captured: CaptureTime(32), ..last });
        assert_eq!(life.look("vm1").await, None);
        assert_eq!(life.displaced, Some(Displaced::Other(image)));
        assert!(life.has_lost_its_image());
    }

    #[tokio::test]
    async fn a_write_is_noticed_after_looks_that_failed_and_the_guests_own_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let (image, link) = (directory.path().join("vm1.img"), directory.path().join("link"));
        std::fs::write(&image, "content").unwrap();
        let leads_to = |target: &Path| {
            let _ = std::fs::remove_file(&link);
            std::os::unix::fs::symlink(target, &link).unwrap();
        };
        leads_to(&image);
        let storage = MemoryStorage::new();
        let mut life = life_in(&storage, &link);
        keep(&mut life, 1, 2, false).await;
        let at_first = told(&storage);
        // Too many links, as storage in trouble has its own errors: it says nothing of where the file is.
        leads_to(&link);
        assert!(!keep(&mut life, 1, 2, false).await && !life.has_lost_its_image());
        touch(&image, 1000);
        assert!(!keep(&mut life, 1, 2, false).await);
        leads_to(&image);
        assert!(keep(&mut life, 1, 2, false).await);
        assert_eq!(told(&storage), at_first);
        life.renew();
        assert!(!keep(&mut life, 1, 2, false).await);
        assert_eq!(seconds(told(&storage)), 1000);
        // Writes of the guest, which is gone again when the image is found.
        leads_to(&link);
        assert!(!keep(&mut life, 2, 2, true).await);
        touch(&image, 2000);
        assert!(!keep(&mut life, 2, 2, false).await);
        assert_eq!(seconds(told(&storage)), 1000, "it was not looked at");
        leads_to(&image);
        assert!(!keep(&mut life, 2, 2, false).await);
        assert_eq!(seconds(told(&storage)), 2000);
        // One that was there at the last look may have written since.
        assert!(!keep(&mut life, 2, 2, true).await);
        leads_to(&link);
        assert!(!keep(&mut life, 2, 2, false).await);
        touch(&image, 3000);
        leads_to(&image);
        assert!(!keep(&mut life, 2, 2, false).await);
    }

    #[tokio::test]
    async fn a_write_of_an_image_that_has_another_name_is_noticed_and_the_guests_own_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let (image, away) = (directory.path().join("vm1.img"), directory.path().join("away.img"));
        std::fs::write(&image, [1; 8192]).unwrap();
        let storage = MemoryStorage::new();
        let mut life = life_in(&storage, &image);
        life.open = Some(Arc::new(ImageFile::open(&image).unwrap()));
        keep(&mut life, 1, 2, false).await;
        let at_first = told(&storage);
        std::fs::rename(&image, &away).unwrap();
        assert!(!keep(&mut life, 1, 2, false).await && life.has_lost_its_image());
        touch(&away, 1000);
        assert!(keep(&mut life, 1, 2, false).await);
        assert!(!keep(&mut life, 1, 2, false).await, "once");
        touch(&away, 2000);
        assert!(!keep(&mut life, 2, 2, true).await, "its guest");
        assert!(!keep(&mut life, 2, 2, false).await);
        touch(&away, 3000);
        assert!(keep(&mut life, 2, 2, false).await, "the guest has gone");
        std::fs::rename(&away, &image).unwrap();
        assert!(!keep(&mut life, 2, 2, false).await && !life.has_lost_its_image());
        assert_eq!(told(&storage), at_first, "it is not as this agent left it");
        life.renew();
        // With a guest there is news, which waits until it is in its place.
        std::fs::rename(&image, &away).unwrap();
        touch(&away, 4000);
        assert!(!keep(&mut life, 3, 2, false).await);
        assert_eq!(told(&storage), at_first);
        std::fs::rename(&away, &image).unwrap();
        assert!(!keep(&mut life, 3, 2, false).await);
        assert_eq!(seconds(told(&storage)), 4000);
        // Cut short, and as long as it was: not by the agent.
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.set_len(4096).unwrap();
        assert!(!keep(&mut life, 3, 2, false).await);
        file.set_len(8192).unwrap();
        assert!(keep(&mut life, 3, 2, false).await);
    }

    #[tokio::test]
    async fn what_was_cut_off_does_not_come_back_and_what_was_renamed_does() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        std::fs::write(&image, [1; 8192]).unwrap();
        let mut life = life_of(&image);
        let kept = directory.path().join("kept");
        std::fs::rename(&image, &kept).unwrap();
        assert_eq!((life.look("vm1").await, life.has_lost_its_image()), (None, true));
        std::fs::rename(&kept, &image).unwrap();
        assert_eq!((life.look("vm1").await, life.has_lost_its_image()), (ImageStamp::of(&image), false));
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        for length in [4096, 8192] {
            file.set_len(length).unwrap();
            life.look("vm1").await;
            assert!(life.has_lost_its_image(), "{length}");
        }
        assert_eq!(life.displaced, None);
    }

    #[tokio::test]
    async fn what_was_cut_short_is_written_by_others_when_it_is_as_long_again_whoever_uses_it() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("vm1.img");
        std::fs::write(&image, "content").unwrap();
        let mut life = life_of(&image);
        assert!(!keep(&mut life, 1, 2, true).await);
        let resize =
            |bytes| std::fs::File::options().write(true).open(&image).unwrap().set_len(bytes).unwrap();
        for _ in 0..2 {
            resize(3);
            assert!(!keep(&mut life, 2, 3, true).await && life.has_lost_its_image());
            life.was_compared();
            assert!(life.has_lost_its_image(), "it has");
            resize(7);
            assert!(keep(&mut life, 3, 4, true).await, "what it had is gone");
            assert!(!keep(&mut life, 4, 5, true).await && life.has_lost_its_image(), "once");
        }
        life.was_compared();
        assert!(!life.has_lost_its_image() && !keep(&mut life, 5, 6, true).await);
    }
}
