//! The control API's answer when a disk is to be forgotten: whether it may go, and that it goes.
//!
//! From the first look on no agent gets the disk, and no question about it is answered; so what was found to be
//! nobody's stays that. Once its tombstone is durable it goes, whatever happens: whoever asked may leave, and one that a
//! failure stopped half way is gone on with when somebody asks again, or at the next start.

use std::time::Duration;

use backtide_receiver_api::{ApiError, ErrorCode, ForgottenDisk, Mounts, OverlayFate, UnmountRequest};
use backtide_recovery::{Attached, Elsewhere, time_text};
use backtide_storage::KillPoint;
use backtide_units::{ByteCount, DiskId, DiskName, Epoch};
use tokio::sync::oneshot;

use super::{Service, ending};
use crate::{
    Shelf,
    accept::Door,
    clock,
    disk::Disk,
    forgotten::{Asked, Tombstone},
    ingest::{Leaving, Task},
    mounts::Order,
    retention::Policy,
};

/// How long whoever asks waits for it: less than a client does. A log of terabytes takes longer to remove.
const FORGET_TIME: Duration = Duration::from_secs(50);

impl Service {
    /// Forgets a disk, also when the asker goes away meanwhile.
    pub(super) async fn forget_disk(&self, name: DiskName) -> Result<ForgottenDisk, ApiError> {
        let (service, asked) = (self.clone(), name.clone());
        let ended = tokio::spawn(async move { service.forget_to_its_end(asked).await });
        match tokio::time::timeout(FORGET_TIME, ended).await {
            Ok(ended) => ended.map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?,
            Err(_) => {
                let why = format!("disk {name} is still being forgotten after {} s", FORGET_TIME.as_secs());
                Err(ApiError::new(ErrorCode::Busy, why).with_hint("the receiver goes on with it"))
            }
        }
    }

    async fn forget_to_its_end(self, name: DiskName) -> Result<ForgottenDisk, ApiError> {
        let disk = self.find(&name)?;
        // Whatever it was named by.
        let name = self.names.name_of(disk).unwrap_or(name);
        let forgotten = &self.removal.shelf.forgotten;
        let busy = || ApiError::new(ErrorCode::Busy, format!("disk {name} is being forgotten"));
        let _asked: Asked = forgotten.ask(disk).ok_or_else(busy)?;
        let (report, stone) = match forgotten.going_stone(disk) {
            Some(stone) => self.go_on(disk, stone, &name).await?,
            None => self.let_go(disk, &name).await?,
        };
        KillPoint::ForgetNoted.reached();
        tracing::warn!(%disk, name = name.as_str(), log_bytes = %report.log_bytes, "the disk is forgotten");
        let taken: Option<Disk> = self.ask_owner(disk, |answer| Task::Take(disk, answer)).await?;
        // Whoever mounted it while somebody looked has nothing to read any more.
        for mount in self.mounts_of(disk).await?.mounts {
            let (answer, ended) = oneshot::channel();
            let overlay = mount.overlay.is_some().then_some(OverlayFate::Keep);
            let how = UnmountRequest { overlay, force: true };
            self.mounts.send(Order::Unmount(mount.id, how, answer)).await.map_err(|_| ending())?;
            let _ = ended.await;
        }
        let removal = self.removal.clone();
        let removed = self
            .read(move || {
                // It waits for what other threads do to the log's files.
                drop(taken);
                removal.finish(disk, stone)
            })
            .await?;
        self.keeper.collect();
        removed.map_err(|why| {
            ApiError::new(
                ErrorCode::Failed,
                format!("disk {name} is forgotten, but not all of it could be removed: {why}"),
            )
            .with_hint(format!("`backtide forget {disk} --yes` tries again, and the receiver when it starts"))
        })?;
        Ok(report)
    }

    /// What is going already, for something failed: makes sure that this is durable.
    async fn go_on(
        &self,
        disk: DiskId,
        stone: Tombstone,
        name: &DiskName,
    ) -> Result<(ForgottenDisk, Tombstone), ApiError> {
        // Nobody has it in use: that was seen to before, and nobody got it since.
        let leaving: Option<Result<Leaving, String>> =
            self.ask_owner(disk, |answer| Task::Leave(disk, answer)).await?;
        let log_bytes = leaving.and_then(Result::ok).map_or(ByteCount::ZERO, |leaving| leaving.log_bytes);
        let (forgotten, written) = (self.removal.shelf.forgotten.clone(), stone.clone());
        let noted = self.read(move || forgotten.note(disk, written)).await?;
        noted.map_err(|why| ApiError::new(ErrorCode::Failed, why))?;
        Ok((self.report(disk, &stone, name, log_bytes), stone))
    }

    fn report(
        &self,
        disk: DiskId,
        stone: &Tombstone,
        name: &DiskName,
        log_bytes: ByteCount,
    ) -> ForgottenDisk {
        ForgottenDisk {
            name: stone.name.clone().unwrap_or_else(|| name.clone()),
            uuid: disk,
            log_bytes,
            overlays: self.overlays.of_disk(disk),
        }
    }

    /// Notes durably that a disk goes, if nothing stands against that.
    async fn let_go(&self, disk: DiskId, name: &DiskName) -> Result<(ForgottenDisk, Tombstone), ApiError> {
        let policy = self.policies.of(disk);
        self.unless_promised(name, &policy)?;
        if self.scrub.reads(disk) {
            let why = format!("a scrub is reading disk {name}");
            return Err(ApiError::new(ErrorCode::Busy, why)
                .with_hint("wait until it has come to the next disk, or `backtide scrub --cancel`"));
        }
        let mounts = self.mounts_of(disk).await?;
        if let Some(mount) = mounts.mounts.first() {
            let why = format!("disk {name} is mounted: {}", mount.id);
            return Err(
                ApiError::new(ErrorCode::Busy, why).with_hint(format!("backtide unmount {}", mount.id))
            );
        }
        let leaving: Option<Result<Leaving, String>> =
            self.ask_owner(disk, |answer| Task::Leave(disk, answer)).await?;
        let leaving = match leaving {
            Some(leaving) => {
                leaving.map_err(|why| ApiError::new(ErrorCode::Busy, format!("disk {name} {why}")))?
            }
            None if self.has_images_of(disk).await? => Leaving { attached: None, log_bytes: ByteCount::ZERO },
            None => return Err(self.unknown(name.as_str())),
        };
        let Leaving { attached, log_bytes } = leaving;
        let known = attached.as_ref().map(|attached: &Attached| attached.name.clone());
        let stone = Tombstone {
            name: known.or_else(|| self.names.name_of(disk)),
            epoch: attached.as_ref().map_or(Epoch(0), |attached| attached.epoch),
            time: clock::now(),
            gone: false,
        };
        let report = self.report(disk, &stone, name, log_bytes);
        let (policies, forgotten, written) =
            (self.policies.clone(), self.removal.shelf.forgotten.clone(), stone.clone());
        // Nobody locks a point of it between the look and the note.
        let noted = self
            .read(move || policies.while_wanted(disk, &policy, |_| forgotten.note(disk, written)))
            .await?;
        match noted {
            Some(Ok(())) => Ok((report, stone)),
            Some(Err(why)) => {
                let failed = ApiError::new(ErrorCode::Failed, why);
                let stays = self.removal.shelf.forgotten.going_stone(disk).is_none();
                let hint = format!(
                    "no agent gets it until `backtide forget {disk} --yes` goes on or the receiver starts again"
                );
                Err(if stays { failed } else { failed.with_hint(hint) })
            }
            None => {
                let why = format!("what is kept of disk {name} was changed just now, or nobody knows it");
                Err(ApiError::new(ErrorCode::Busy, why).with_hint("`backtide retention show` tells it"))
            }
        }
    }

    /// Whether a disk whose directory is away has images still.
    async fn has_images_of(&self, disk: DiskId) -> Result<bool, ApiError> {
        let storage = self.storage.clone();
        let listed = self.read(move || Elsewhere::list(&*storage)).await?;
        let elsewhere = listed.map_err(|error| ApiError::from_error(ErrorCode::Failed, &error))?;
        Ok(elsewhere.any_of(&Shelf::dir(disk, 1)))
    }

    /// Refuses while anything is promised of a disk that only its history can keep.
    fn unless_promised(&self, name: &DiskName, policy: &Policy) -> Result<(), ApiError> {
        if let Some(why) = self.policies.damage() {
            let why = format!("nobody knows which disks are locked: {why}");
            return Err(ApiError::new(ErrorCode::Refused, why));
        }
        let now = self.policies.moment();
        let single = policy.locks.points.iter().map(|(lsn, locked)| (format!("lsn:{lsn}"), locked.lock));
        let all = policy.locks.all.map(|lock| ("every point".to_owned(), lock));
        let holding = all.into_iter().chain(single).filter(|(_, lock)| lock.holds(now));
        if let Some((point, lock)) = holding.max_by_key(|(_, lock)| lock.ends(now)) {
            let why = format!("{point} of disk {name} is locked until {}", time_text(lock.ends(now)));
            return Err(
                ApiError::new(ErrorCode::Refused, why).with_hint("backtide retention show lists the locks")
            );
        }
        if let Some((owner, held)) = policy.holds.iter().next() {
            let why = format!("an agent still fetches lsn:{} of disk {name} for {owner}", held.lsn);
            return Err(ApiError::new(ErrorCode::Busy, why).with_hint(holder_hint(owner)));
        }
        Ok(())
    }

    async fn mounts_of(&self, disk: DiskId) -> Result<Mounts, ApiError> {
        let (answer, mounts) = oneshot::channel();
        self.mounts.send(Order::List(answer)).await.map_err(|_| ending())?;
        let mut mounts: Mounts = mounts.await.map_err(|_| ending())?;
        mounts.mounts.retain(|mount| mount.disk.uuid == disk);
        Ok(mounts)
    }

    pub(super) async fn ask_owner<T>(
        &self,
        disk: DiskId,
        task: impl FnOnce(oneshot::Sender<T>) -> Task,
    ) -> Result<T, ApiError> {
        let thread = &self.threads[Door::owner(disk, self.threads.len())];
        let (answer, answered) = oneshot::channel();
        thread.send(task(answer)).await.map_err(|_| ending())?;
        answered.await.map_err(|_| ending())
    }
}

/// What ends a hold, which tells whose it is in words for people.
fn holder_hint(owner: &str) -> String {
    let mount = owner.strip_prefix("mount ").and_then(|rest| rest.split(' ').next());
    mount.map_or_else(
        || {
            "`backtide status` of that agent tells how far it is; detaching the disk there gives it up"
                .to_owned()
        },
        |id| format!("`backtide unmount {id} --here` at that agent ends it"),
    )
}
