//! Client and router against each other, over a socket, with an agent that remembers what it was
//! asked.

use std::sync::{Arc, Mutex};

use backtide_control::{Address, ApiError, ErrorCode, Server};
use backtide_units::{BlockCount, ByteCount, CaptureTime, DiskId, DiskName, Epoch, HistoryId, Lsn};

use crate::{
    AGENT, AckPolicy, Adopted, AgentCache, AgentClient, AgentKeptOverlay, AgentMount, AgentMountRequest,
    AgentMounts, AgentOverlay, AgentOverlayFate, AgentRemountRequest, AgentService, AgentStatus,
    AgentUnmountRequest, AttachRequest, CacheMode, Counters, DetachRequest, Dirty, DiskMark, DiskStatus,
    FailbackReport, FailbackRequest, GoesOn, Lag, Limits, LimitsChange, LimitsRequest, LsnStatus, MarkReport,
    MarkRequest, MarkState, Mode, OnOutage, ResizeReport, ResizeRequest, ResyncExtent, ResyncRequest,
    RewindReport, RewindRequest, VerifyRequest, VerifyState, VerifyStatus, Window, router,
};

mod under_way;

/// Answers for one disk, `vm1`, and notes every call.
#[derive(Default)]
struct Fake {
    calls: Mutex<Vec<String>>,
}

impl Fake {
    fn note(&self, call: &str, disk: &DiskName) -> Result<DiskStatus, ApiError> {
        self.calls.lock().unwrap().push(format!("{call} {}", disk.as_str()));
        if disk.as_str() == "vm1" {
            return Ok(vm1());
        }
        Err(ApiError::new(ErrorCode::NotFound, format!("there is no disk {}", disk.as_str())))
    }
}

fn name(text: &str) -> DiskName {
    text.parse().unwrap()
}

fn vm1() -> DiskStatus {
    DiskStatus {
        name: name("vm1"),
        uuid: DiskId(Default::default()),
        mode: Mode::Sync,
        reason: "every write is forwarded".to_owned(),
        reason_code: "in-sync".to_owned(),
        connected: true,
        receiver: Address::unix("/run/backtide/stream.sock"),
        last_error: None,
        stream_tls: None,
        nbd_uri: "nbd+unix:///vm1?socket=/run/backtide/vm1.nbd".to_owned(),
        image: "/images/vm1.img".to_owned(),
        local_error: None,
        unsaved: None,
        untracked: None,
        size: ByteCount(1 << 30),
        epoch: Epoch(1),
        history: None,
        lsn: LsnStatus { last: Lsn(9), received: Lsn(8), durable: Lsn(7) },
        lag: Lag { records: 2, bytes: ByteCount(8192), seconds: 0.25 },
        dirty: Dirty::default(),
        window: Window { bytes: ByteCount(8192), limit: ByteCount(64 << 20) },
        spill: None,
        resync: None,
        resync_due: false,
        unreadable: None,
        hydration: None,
        rewound: None,
        origin: None,
        ack: AckPolicy::Local,
        on_outage: OnOutage::Continue,
        limits: Limits::default(),
        counters: Counters { writes: 9, ..Counters::default() },
        engine: "pread".to_owned(),
        engine_reason: Some("io_uring cannot be used: Operation not permitted (os error 1)".to_owned()),
        cache: CacheMode::Writeback,
        clients: 1,
        awaited_clients: 0,
        open_elsewhere: false,
        guest_waits: None,
    }
}

fn failed_back(disk: Option<DiskStatus>) -> FailbackReport {
    FailbackReport {
        point: Lsn(90),
        point_time: CaptureTime(5),
        fetched_bytes: ByteCount(8192),
        kept_bytes: ByteCount(4096),
        lost_bytes: ByteCount(0),
        everything_because: None,
        here_already: false,
        disk,
    }
}

fn goes_on(change: &str, seconds: u64) -> ApiError {
    GoesOn { change: change.to_owned(), seconds }.answer()
}

fn refuse_slow(is_slow: bool, change: &str) -> Result<(), ApiError> {
    if is_slow { Err(goes_on(change, 50)) } else { Ok(()) }
}

fn verify() -> VerifyStatus {
    VerifyStatus {
        disk: name("vm1"),
        id: 1,
        state: VerifyState::Running,
        at: Some(Lsn(9)),
        from_lsn: Lsn(9),
        to_lsn: None,
        started: CaptureTime(5),
        ended: None,
        compared_bytes: ByteCount(0),
        total_bytes: ByteCount(1 << 30),
        differing_bytes: ByteCount(0),
        differing: Vec::new(),
        differing_count: 0,
        error: None,
    }
}

fn mount_request() -> AgentMountRequest {
    AgentMountRequest {
        disk: DiskId::random(),
        lsn: Lsn(90),
        receiver: None,
        stream_tls: None,
        changed_since: None,
        nbd: None,
        cache_bytes: Some(ByteCount(7)),
        writable: true,
    }
}

fn mounted() -> AgentMount {
    AgentMount {
        id: "vm1-0a1b2c3d".to_owned(),
        disk: name("vm1"),
        uuid: DiskId::random(),
        receiver: "unix:/run/stream.sock".to_owned(),
        uri: "nbd+unix:///vm1-0a1b2c3d?socket=/run/vm1-0a1b2c3d.nbd".to_owned(),
        lsn: Lsn(90),
        time: CaptureTime(5),
        size: ByteCount(1 << 30),
        mounted: CaptureTime(6),
        clients: 0,
        changed_since: None,
        cache: AgentCache::default(),
        overlay: Some(AgentOverlay {
            bytes: ByteCount(4096),
            limit: ByteCount(1 << 30),
            file_bytes: ByteCount(9296),
        }),
        last_error: None,
    }
}

fn kept() -> AgentKeptOverlay {
    let AgentMount { id, disk, uuid, receiver, lsn, time, size, mounted: created, .. } = mounted();
    let (file_bytes, problem) = (ByteCount(9296), None);
    AgentKeptOverlay { id, disk, uuid, receiver, lsn, time, size, created, file_bytes, problem }
}

impl AgentService for Fake {
    async fn restart(&self) -> Result<AgentStatus, ApiError> {
        self.status(None).await
    }

    async fn status(&self, disk: Option<DiskName>) -> Result<AgentStatus, ApiError> {
        let one = self.note("status", &disk.unwrap_or_else(|| name("vm1")))?;
        Ok(AgentStatus {
            version: "1".to_owned(),
            now: None,
            instance: "one".to_owned(),
            restart_failure: None,
            nbd_listen: None,
            certificate_warnings: Vec::new(),
            disks: vec![one],
        })
    }

    async fn attach(&self, request: AttachRequest) -> Result<DiskStatus, ApiError> {
        if request.name.as_str() == "slow" {
            return Err(goes_on("slow", 50));
        }
        self.note(&format!("attach {} {}", request.image, request.ack.unwrap_or_default()), &request.name)
    }

    async fn detach(&self, disk: DiskName, request: DetachRequest) -> Result<DiskStatus, ApiError> {
        if disk.as_str() == "slow" {
            return Err(goes_on("slow", 50));
        }
        let what = match (request.incomplete, request.force) {
            (true, true) => "detach-incomplete-forced",
            (true, false) => "detach-incomplete",
            (false, true) => "detach-forced",
            (false, false) => "detach",
        };
        self.note(what, &disk)
    }

    async fn pause(&self, disk: DiskName) -> Result<DiskStatus, ApiError> {
        self.note("pause", &disk)
    }

    async fn resume(&self, disk: DiskName) -> Result<DiskStatus, ApiError> {
        self.note("resume", &disk)
    }

    async fn rewind(&self, disk: DiskName, request: RewindRequest) -> Result<RewindReport, ApiError> {
        let disk = self.note(&format!("rewind {} {}", request.to, request.reconnect), &disk)?;
        let (from, to) = (Lsn(90), request.to);
        let (changed_blocks, changed_bytes) = (BlockCount(2), ByteCount(8192));
        let to_time = CaptureTime(5);
        let (blocked_ms, hung_up, under_way) = (9, 0, false);
        Ok(RewindReport {
            from,
            to,
            to_time,
            changed_blocks,
            changed_bytes,
            blocked_ms,
            hung_up,
            under_way,
            disk,
        })
    }

    async fn failback(&self, disk: DiskName, request: FailbackRequest) -> Result<FailbackReport, ApiError> {
        let disk = self.note(&format!("failback {} {}", request.adopt.epoch, request.dry_run), &disk)?;
        match request.dry_run {
            true => Ok(failed_back(None)),
            false => Err(goes_on(disk.name.as_str(), 50)),
        }
    }

    async fn change(&self, id: String) -> Result<serde_json::Value, ApiError> {
        let resized = || ResizeReport { size_before: ByteCount(512), hung_up: 0, disk: vm1() };
        match id.as_str() {
            "slow" => return Ok(serde_json::to_value(vm1()).unwrap()),
            "slow-resize" => return Ok(serde_json::to_value(resized()).unwrap()),
            "slow-mount" => return Ok(serde_json::to_value(mounted()).unwrap()),
            "slow-discard" => return Ok(serde_json::to_value(kept()).unwrap()),
            _ => {}
        }
        self.note("follow", &name(&id))?;
        let follows = self.calls.lock().unwrap().iter().filter(|call| call.starts_with("follow")).count();
        match follows {
            1 => Err(goes_on(&id, 100)),
            _ => Ok(serde_json::to_value(failed_back(Some(vm1()))).unwrap()),
        }
    }

    async fn resize(&self, disk: DiskName, request: ResizeRequest) -> Result<ResizeReport, ApiError> {
        if disk.as_str() == "slow" {
            return Err(goes_on("slow-resize", 50));
        }
        let disk = self.note(&format!("resize {:?} {}", request.size, request.reconnect), &disk)?;
        Ok(ResizeReport { size_before: disk.size, hung_up: 1, disk })
    }

    async fn resync(&self, disk: DiskName, request: ResyncRequest) -> Result<DiskStatus, ApiError> {
        self.note(&format!("resync {:?}", request.extent), &disk)
    }

    async fn set_limits(&self, disk: DiskName, change: LimitsChange) -> Result<DiskStatus, ApiError> {
        self.note(&format!("limits {:?}", change.resync_bytes_per_second_max), &disk)
    }

    async fn mark(&self, request: MarkRequest) -> Result<MarkReport, ApiError> {
        let mut marks = Vec::new();
        for disk in request.disks {
            self.note(&format!("mark {:?}", request.label), &disk)?;
            marks.push(DiskMark {
                disk,
                lsn: Lsn(9),
                time: CaptureTime(5),
                recoverable: true,
                state: MarkState::Kept,
            });
        }
        Ok(MarkReport { label: request.label, marks })
    }

    async fn start_verify(&self, disk: DiskName, _: VerifyRequest) -> Result<VerifyStatus, ApiError> {
        self.note("start_verify", &disk).map(|_| verify())
    }

    async fn verify_status(&self, disk: DiskName) -> Result<VerifyStatus, ApiError> {
        self.note("verify_status", &disk).map(|_| verify())
    }

    async fn cancel_verify(&self, disk: DiskName) -> Result<VerifyStatus, ApiError> {
        self.note("cancel_verify", &disk).map(|_| verify())
    }

    async fn mount(&self, request: AgentMountRequest) -> Result<AgentMount, ApiError> {
        let AgentMountRequest { lsn, cache_bytes, writable, .. } = request;
        refuse_slow(lsn == Lsn(50), "slow-mount")?;
        self.note(&format!("mount {lsn} {cache_bytes:?} {writable}"), &name("vm1"))?;
        Ok(mounted())
    }

    async fn mounts(&self) -> Result<AgentMounts, ApiError> {
        Ok(AgentMounts { mounts: vec![mounted()], kept: vec![kept()] })
    }

    async fn unmount(&self, id: String, request: AgentUnmountRequest) -> Result<AgentMount, ApiError> {
        refuse_slow(id == "slow", "slow-mount")?;
        let how = format!("unmount {id} {:?} {}", request.overlay, request.force);
        self.note(&how, &name("vm1")).map(|_| mounted())
    }

    async fn remount(&self, id: String, request: AgentRemountRequest) -> Result<AgentMount, ApiError> {
        refuse_slow(id == "slow", "slow-mount")?;
        self.note(&format!("remount {id} {:?}", request.nbd), &name("vm1")).map(|_| mounted())
    }

    async fn discard(&self, id: String) -> Result<AgentKeptOverlay, ApiError> {
        refuse_slow(id == "slow", "slow-discard")?;
        self.note(&format!("discard {id}"), &name("vm1")).map(|_| kept())
    }
}

fn attach_request() -> AttachRequest {
    AttachRequest {
        name: name("vm1"),
        image: "/images/vm1.img".to_owned(),
        receiver: Address::unix("/run/backtide/stream.sock"),
        nbd: None,
        ack: Some(AckPolicy::Durable),
        on_outage: Some(OnOutage::Continue),
        cache: Some(CacheMode::Direct),
        limits: LimitsRequest::default(),
        stream_tls: None,
        adopt: None,
        from: None,
        failover: false,
        take_over: false,
        format: None,
    }
}

#[tokio::test]
async fn every_call_reaches_its_method_and_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let address = Address::unix(directory.path().join("agent.sock"));
    let fake = Arc::new(Fake::default());
    let server = Server::bind(&address).await.unwrap();
    let serving = tokio::spawn(server.run(router(Arc::clone(&fake)), std::future::pending()));
    let client = AgentClient::new(&address).unwrap();
    let vm1 = name("vm1");

    assert_eq!(client.status(None).await.unwrap().disks, [self::vm1()]);
    assert_eq!(client.disk(&vm1).await.unwrap(), self::vm1());
    assert_eq!(client.attach(&attach_request()).await.unwrap(), self::vm1());
    client.detach(&vm1).await.unwrap();
    client.detach_even(&vm1, DetachRequest { incomplete: true, ..DetachRequest::default() }).await.unwrap();
    client
        .detach_even(&vm1, DetachRequest { incomplete: true, force: true, nobody_returns: true })
        .await
        .unwrap();
    let rewind = RewindRequest { to: Lsn(40), reconnect: true, clients_max: Some(1), force: false };
    assert_eq!(client.rewind(&vm1, rewind).await.unwrap().from, Lsn(90));
    let (epoch, durable, last_time) = (Epoch(4), Lsn(90), None);
    let adopt = Adopted { uuid: DiskId::random(), history: HistoryId::random(), epoch, durable, last_time };
    let (ack, on_outage) = (Some(AckPolicy::Durable), None);
    let failback = FailbackRequest { adopt, receiver: None, dry_run: true, force: false, ack, on_outage };
    assert_eq!(client.failback(&vm1, &failback).await.unwrap().disk, None);
    // That one takes longer than two calls; it is asked for once.
    let failback = FailbackRequest { dry_run: false, ..failback };
    assert_eq!(client.failback(&vm1, &failback).await.unwrap().disk, Some(self::vm1()));
    client.pause(&vm1).await.unwrap();
    client.resume(&vm1).await.unwrap();
    client.resync(&vm1, ResyncRequest { extent: ResyncExtent::Compare }).await.unwrap();
    let marked = client
        .mark(&MarkRequest { label: "ä b/c".to_owned(), disks: vec![vm1.clone()], wait_ms: 0 })
        .await
        .unwrap();
    assert_eq!((marked.label.as_str(), marked.marks[0].lsn), ("ä b/c", Lsn(9)));
    assert_eq!(client.start_verify(&vm1, VerifyRequest::default()).await.unwrap(), verify());
    assert_eq!(client.verify_status(&vm1).await.unwrap(), verify());
    assert_eq!(client.cancel_verify(&vm1).await.unwrap(), verify());
    assert_eq!(client.mount(&mount_request()).await.unwrap().id, mounted().id);
    assert_eq!(client.mounts().await.unwrap().mounts.len(), 1);
    let id = "vm1-0a1b2c3d";
    assert_eq!(client.mounts().await.unwrap().kept[0].id, id);
    assert_eq!(client.unmount(id, None).await.unwrap().lsn, Lsn(90));
    client.unmount(id, Some(AgentOverlayFate::Keep)).await.unwrap();
    client.unmount(id, Some(AgentOverlayFate::Discard)).await.unwrap();
    for fate in [None, Some(AgentOverlayFate::Keep), Some(AgentOverlayFate::Discard)] {
        client.unmount_by_force(id, fate).await.unwrap();
    }
    let elsewhere = AgentRemountRequest { nbd: Some("nbd://localhost".to_owned()) };
    assert_eq!(client.remount(id, &elsewhere).await.unwrap().overlay, mounted().overlay);
    assert_eq!(client.discard(id).await.unwrap().file_bytes, ByteCount(9296));
    assert_eq!(client.unmount("../disks/vm1", None).await.unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(client.discard("a/../b").await.unwrap_err().code, ErrorCode::NotFound);
    assert_eq!(
        *fake.calls.lock().unwrap(),
        [
            "status vm1",
            "status vm1",
            "attach /images/vm1.img durable vm1",
            "detach vm1",
            "detach-incomplete vm1",
            "detach-incomplete-forced vm1",
            "rewind 40 true vm1",
            "failback 4 true vm1",
            "failback 4 false vm1",
            "follow vm1",
            "follow vm1",
            "pause vm1",
            "resume vm1",
            "resync Compare vm1",
            "mark \"ä b/c\" vm1",
            "start_verify vm1",
            "verify_status vm1",
            "cancel_verify vm1",
            "mount 90 Some(ByteCount(7)) true vm1",
            "unmount vm1-0a1b2c3d None false vm1",
            "unmount vm1-0a1b2c3d Some(Keep) false vm1",
            "unmount vm1-0a1b2c3d Some(Discard) false vm1",
            "unmount vm1-0a1b2c3d None true vm1",
            "unmount vm1-0a1b2c3d Some(Keep) true vm1",
            "unmount vm1-0a1b2c3d Some(Discard) true vm1",
            "remount vm1-0a1b2c3d Some(\"nbd://localhost\") vm1",
            "discard vm1-0a1b2c3d vm1",
        ]
    );

    let unknown = client.pause(&name("vm9")).await.unwrap_err();
    assert_eq!((unknown.code, unknown.message.as_str()), (ErrorCode::NotFound, "there is no disk vm9"));
    let nothing =
        client.mark(&MarkRequest { label: "x".to_owned(), disks: vec![], wait_ms: 0 }).await.unwrap_err();
    assert_eq!(nothing.code, ErrorCode::Usage);
    serving.abort();
}

#[tokio::test]
async fn changes_that_take_long_are_followed_and_a_strange_question_is_answered() {
    let directory = tempfile::tempdir().unwrap();
    let address = Address::unix(directory.path().join("agent.sock"));
    let server = Server::bind(&address).await.unwrap();
    let serving = tokio::spawn(server.run(router(Arc::new(Fake::default())), std::future::pending()));
    let client = AgentClient::new(&address).unwrap();
    let slow = name("slow");
    let attach = AttachRequest { name: slow.clone(), ..attach_request() };
    assert_eq!(client.attach(&attach).await.unwrap(), vm1());
    assert_eq!(client.detach(&slow).await.unwrap(), vm1());
    let resized = client.resize(&slow, ResizeRequest { size: None, reconnect: false }).await.unwrap();
    assert_eq!(resized.size_before, ByteCount(512));
    let mount = AgentMountRequest { lsn: Lsn(50), ..mount_request() };
    assert_eq!(client.mount(&mount).await.unwrap().lsn, Lsn(90));
    assert_eq!(client.unmount("slow", None).await.unwrap().lsn, Lsn(90));
    let elsewhere = AgentRemountRequest { nbd: None };
    assert_eq!(client.remount("slow", &elsewhere).await.unwrap().lsn, Lsn(90));
    assert_eq!(client.discard("slow").await.unwrap().lsn, Lsn(90));

    let raw = backtide_control::Client::new(&address, AGENT).unwrap();
    let answer = raw.delete::<DiskStatus>("/v1/disks/vm1?incomplete=perhaps").await.unwrap_err();
    assert_eq!(answer.code, ErrorCode::Usage, "{answer}");
    serving.abort();
}
