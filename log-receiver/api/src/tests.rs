//! Client and router against each other, over a socket, with a receiver that remembers what it was
//! asked.

use std::sync::{Arc, Mutex};

use backtide_control::{Address, ApiError, ErrorCode, Server};
use backtide_units::{ByteCount, ByteOffset, CaptureTime, DiskId, DiskName, Lsn};

use crate::{
    AroundReport, BlockChange, ByteSpan, ChangedBy, CommitCounts, DiffReport, DiffRequest, DiskRef,
    Dismissed, FindChangeRequest, FlushPoints, ForgottenDisk, FoundChange, Hole, KeepRequest, KeptOverlay,
    LockRequest, Mount, MountOverlay, MountRequest, Mounts, OverlayFate, Point, PointsReport, ReceiverClient,
    ReceiverDisks, ReceiverService, ReceiverStatus, RemountRequest, ResolveRequest, ResolvedPoint,
    RetentionPreview, RetentionReport, RetentionRequest, ScrubRequest, ScrubStatus, Touched, TouchedKnown,
    TouchedPoints, UnavailablePoint, UnmountRequest, router,
};

/// Notes every call.
#[derive(Default)]
struct Fake {
    calls: Mutex<Vec<String>>,
}

impl Fake {
    fn note(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }
}

fn vm1() -> DiskRef {
    DiskRef { name: "vm1".parse().unwrap(), uuid: DiskId(Default::default()), size: ByteCount(1 << 20) }
}

fn point(asked: &str) -> ResolvedPoint {
    let (disk, asked, time) = (vm1(), asked.to_owned(), CaptureTime(5));
    ResolvedPoint { disk, asked, lsn: Lsn(4), time, warning: None, unheard: false }
}

fn mount() -> Mount {
    Mount {
        id: "vm1-1".to_owned(),
        disk: vm1(),
        uri: "nbd+unix:///?socket=/run/backtide/vm1-1.nbd".to_owned(),
        lsn: Lsn(4),
        time: CaptureTime(5),
        size: ByteCount(1 << 20),
        mounted: CaptureTime(6),
        clients: 0,
        overlay: Some(MountOverlay { bytes: ByteCount(1), limit: ByteCount(2), file_bytes: ByteCount(3) }),
        changed_since: None,
        warning: None,
    }
}

fn found() -> FoundChange {
    let before = Some(Point { lsn: Lsn(3), time: CaptureTime(4) });
    let change = BlockChange { lsn: Lsn(4), time: CaptureTime(5), by: ChangedBy::Resync, before };
    let block = ByteSpan { offset: ByteOffset(4096), length: ByteCount(4096) };
    FoundChange { at: point("latest"), block, change: Some(change) }
}

fn in_a_hole(asked: &str) -> UnavailablePoint {
    let hole = Hole {
        after_lsn: Lsn(4),
        before_lsn: Some(Lsn(9)),
        from_time: CaptureTime(5),
        to_time: Some(CaptureTime(8)),
        reason: "the receiver was away".to_owned(),
        reason_code: "receiver-away".to_owned(),
        open: false,
    };
    let before = Some(Point { lsn: Lsn(4), time: CaptureTime(5) });
    let after = Some(Point { lsn: Lsn(9), time: CaptureTime(8) });
    UnavailablePoint { asked: asked.to_owned(), hole: Some(hole), before, after }
}

fn kept() -> KeptOverlay {
    KeptOverlay {
        id: "vm1-1".to_owned(),
        disk: Some(vm1()),
        lsn: Some(Lsn(5)),
        time: Some(CaptureTime(1)),
        created: Some(CaptureTime(2)),
        file_bytes: ByteCount(4096),
        problem: None,
    }
}

fn scrubbed() -> ScrubStatus {
    ScrubStatus {
        running: false,
        cancelled: false,
        started: CaptureTime(1),
        ended: Some(CaptureTime(2)),
        done_bytes: ByteCount(3),
        total_bytes: ByteCount(3),
        bytes_per_second_max: ByteCount(0),
        disks: Vec::new(),
        overlays: Vec::new(),
        damage: Vec::new(),
        sound: true,
    }
}

fn retained() -> RetentionReport {
    RetentionReport {
        default: "forever".to_owned(),
        on_full: "refuse".to_owned(),
        low: None,
        error: None,
        image_bytes: ByteCount(1),
        freed_bytes: ByteCount(2),
        rounds: 3,
        disks: Vec::new(),
    }
}

impl ReceiverService for Fake {
    async fn status(&self) -> Result<ReceiverStatus, ApiError> {
        self.note("status".to_owned());
        Ok(ReceiverStatus {
            version: "1".to_owned(),
            now: None,
            store: "/store".to_owned(),
            store_id: "s".to_owned(),
            listen: vec!["tcp://127.0.0.1:7300".parse().unwrap()],
            nbd_listen: None,
            log_bytes: ByteCount(1),
            store_error: None,
            free_bytes: ByteCount(2),
            free_bytes_min: ByteCount(3),
            growth: None,
            disks: 1,
            connected: 1,
            mounts: 0,
            overlays: 0,
            overlay_bytes: ByteCount(0),
            commits: CommitCounts::default(),
            alarms: Vec::new(),
            scrub: None,
            scrub_next: None,
            certificate: None,
            certificate_warnings: Vec::new(),
        })
    }

    async fn disks(&self, disk: Option<DiskName>) -> Result<ReceiverDisks, ApiError> {
        self.note(format!("disks {}", disk.map_or_else(String::new, |disk| disk.as_str().to_owned())));
        Ok(ReceiverDisks { disks: Vec::new() })
    }

    async fn points(&self, disk: DiskName) -> Result<PointsReport, ApiError> {
        self.note(format!("points {}", disk.as_str()));
        Ok(PointsReport {
            disk: vm1(),
            intervals: Vec::new(),
            holes: Vec::new(),
            marks: Vec::new(),
            flush_points: FlushPoints::default(),
            first: None,
            last: None,
            origin: None,
            locks: Vec::new(),
            density: None,
            damage: None,
            touched: Vec::new(),
            connected: None,
        })
    }

    async fn around(&self, disk: DiskName, request: ResolveRequest) -> Result<AroundReport, ApiError> {
        self.note(format!("around {} {}", disk.as_str(), request.point));
        Ok(around(request.point))
    }

    async fn resolve(&self, disk: DiskName, request: ResolveRequest) -> Result<ResolvedPoint, ApiError> {
        self.note(format!("resolve {} {}", disk.as_str(), request.point));
        if request.point == "lsn:6" {
            return Err(ApiError::new(ErrorCode::PointInHole, "lsn:6 lies in a hole")
                .with_details(in_a_hole(&request.point)));
        }
        Ok(point(&request.point))
    }

    async fn diff(&self, disk: DiskName, request: DiffRequest) -> Result<DiffReport, ApiError> {
        self.note(format!("diff {} {} {}", disk.as_str(), request.from, request.to));
        Ok(DiffReport {
            from: point(&request.from),
            to: point(&request.to),
            granularity: ByteCount(4096),
            bytes: ByteCount(0),
            ranges: Vec::new(),
        })
    }

    async fn find_change(&self, disk: DiskName, request: FindChangeRequest) -> Result<FoundChange, ApiError> {
        self.note(format!("find-change {} {} {}", disk.as_str(), request.offset, request.at));
        Ok(found())
    }

    async fn retention(&self, disk: Option<DiskName>) -> Result<RetentionReport, ApiError> {
        self.note(format!("retention {}", disk.map_or_else(String::new, |disk| disk.as_str().to_owned())));
        Ok(retained())
    }

    async fn set_retention(
        &self,
        disk: DiskName,
        request: RetentionRequest,
    ) -> Result<RetentionReport, ApiError> {
        self.note(format!("set retention {} {:?}", disk.as_str(), request.ladder));
        Ok(retained())
    }

    async fn preview_retention(
        &self,
        disk: DiskName,
        request: RetentionRequest,
    ) -> Result<RetentionPreview, ApiError> {
        self.note(format!("preview {} {:?}", disk.as_str(), request.ladder));
        Ok(RetentionPreview {
            disk: vm1(),
            ladder: "forever".to_owned(),
            every_point_from: None,
            keep: Vec::new(),
            drop: Vec::new(),
            drop_marks: Vec::new(),
            locked_until: None,
            log_bytes_freed: ByteCount(1),
            fold_read_bytes: ByteCount(2),
            fold_write_bytes_max: ByteCount(3),
            changes: true,
            away: None,
        })
    }

    async fn keep(&self, request: KeepRequest) -> Result<RetentionReport, ApiError> {
        self.note(format!("keep {} {} {}", request.name.as_str(), request.at, request.release));
        Ok(retained())
    }

    async fn lock(&self, request: LockRequest) -> Result<RetentionReport, ApiError> {
        self.note(format!("lock {} {:?} {}", request.name.as_str(), request.at, request.until));
        Ok(retained())
    }

    async fn mount(&self, request: MountRequest) -> Result<Mount, ApiError> {
        self.note(format!("mount {} {}", request.name.as_str(), request.at));
        Ok(mount())
    }

    async fn scrub(&self, request: ScrubRequest) -> Result<ScrubStatus, ApiError> {
        self.note(format!("scrub {}", request.name.unwrap().as_str()));
        Ok(scrubbed())
    }

    async fn scrub_status(&self) -> Result<ScrubStatus, ApiError> {
        self.note("scrub-status".to_owned());
        Ok(scrubbed())
    }

    async fn cancel_scrub(&self) -> Result<ScrubStatus, ApiError> {
        self.note("cancel-scrub".to_owned());
        Ok(scrubbed())
    }

    async fn mounts(&self) -> Result<Mounts, ApiError> {
        self.note("mounts".to_owned());
        Ok(Mounts { mounts: vec![mount()], kept: vec![kept()] })
    }

    async fn remount(&self, id: String, request: RemountRequest) -> Result<Mount, ApiError> {
        self.note(format!("remount {id} {:?}", request.nbd));
        Ok(mount())
    }

    async fn forget(&self, disk: DiskName) -> Result<ForgottenDisk, ApiError> {
        self.note(format!("forget {disk}"));
        let DiskRef { name, uuid, .. } = vm1();
        Ok(ForgottenDisk { name, uuid, log_bytes: ByteCount(1), overlays: vec!["vm1-1".to_owned()] })
    }

    async fn dismiss(&self, disk: DiskName) -> Result<Dismissed, ApiError> {
        self.note(format!("dismiss {disk}"));
        Ok(Dismissed { uuid: vm1().uuid, shortfalls: vec!["gone".to_owned()] })
    }

    async fn discard(&self, id: String) -> Result<KeptOverlay, ApiError> {
        self.note(format!("discard {id}"));
        Ok(kept())
    }

    async fn unmount(&self, id: String, request: UnmountRequest) -> Result<Mount, ApiError> {
        self.note(format!("unmount {id} {:?} {}", request.overlay, request.force));
        Ok(mount())
    }
}

fn around(asked: String) -> AroundReport {
    AroundReport {
        disk: vm1(),
        asked,
        time: CaptureTime(4),
        point: None,
        hole: None,
        before: None,
        after: None,
        flush_before: None,
        mark_before: None,
        mark_after: None,
        warning: None,
        damage: None,
        touched: Vec::new(),
    }
}

#[tokio::test]
async fn every_call_reaches_its_method_and_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let address = Address::unix(directory.path().join("receiver.sock"));
    let fake = Arc::new(Fake::default());
    let server = Server::bind(&address).await.unwrap();
    let serving = tokio::spawn(server.run(router(Arc::clone(&fake)), std::future::pending()));
    let client = ReceiverClient::new(&address).unwrap();
    let vm1: DiskName = "vm1".parse().unwrap();

    assert_eq!(client.status().await.unwrap().listen[0].to_string(), "tcp://127.0.0.1:7300");
    client.disks(None).await.unwrap();
    client.disks(Some(&vm1)).await.unwrap();
    assert_eq!(client.forget(&vm1).await.unwrap().overlays, ["vm1-1"]);
    assert_eq!(client.dismiss(&vm1).await.unwrap().shortfalls, ["gone"]);
    client.points(&vm1).await.unwrap();
    assert_eq!(client.around(&vm1, "-5m").await.unwrap(), around("-5m".to_owned()));
    assert_eq!(client.resolve(&vm1, "mark:a b/ü").await.unwrap(), point("mark:a b/ü"));
    let diff = DiffRequest { from: "-5m".to_owned(), to: "latest".to_owned() };
    assert_eq!(client.diff(&vm1, &diff).await.unwrap().granularity, ByteCount(4096));
    let at = "latest".to_owned();
    let wanted = FindChangeRequest { offset: ByteOffset(5000), at: at.clone() };
    assert_eq!(client.find_change(&vm1, &wanted).await.unwrap(), found());
    let request = MountRequest {
        name: vm1.clone(),
        at,
        nbd: None,
        temporary: false,
        writable: true,
        changed_since: None,
    };
    assert_eq!(client.mount(&request).await.unwrap(), mount());
    assert_eq!(client.mounts().await.unwrap().mounts, [mount()]);
    assert_eq!(client.unmount("vm1-1", None).await.unwrap(), mount());
    assert_eq!(client.unmount("vm1-2", Some(OverlayFate::Keep)).await.unwrap(), mount());
    assert_eq!(client.unmount("vm1-3", Some(OverlayFate::Discard)).await.unwrap(), mount());
    for fate in [None, Some(OverlayFate::Keep), Some(OverlayFate::Discard)] {
        assert_eq!(client.unmount_by_force("vm1-4", fate).await.unwrap(), mount());
    }
    assert_eq!(client.remount("vm1-2", &RemountRequest::default()).await.unwrap(), mount());
    assert_eq!(client.discard("vm1-2").await.unwrap(), kept());
    let request = ScrubRequest { name: Some(vm1.clone()), bytes_per_second_max: None };
    assert_eq!(client.scrub(&request).await.unwrap(), scrubbed());
    client.scrub_status().await.unwrap();
    client.cancel_scrub().await.unwrap();
    client.retention(None).await.unwrap();
    assert_eq!(client.retention(Some(&vm1)).await.unwrap(), retained());
    let request = RetentionRequest { ladder: Some("any=24h".to_owned()) };
    client.set_retention(&vm1, &request).await.unwrap();
    assert!(client.preview_retention(&vm1, &RetentionRequest::default()).await.unwrap().changes);
    let request = KeepRequest { name: vm1.clone(), at: "mark:x".to_owned(), release: true, held: None };
    client.keep(&request).await.unwrap();
    let request = LockRequest { name: vm1.clone(), at: None, until: "30d".to_owned() };
    client.lock(&request).await.unwrap();
    for strange in ["", "..", "a/b", "a?b"] {
        assert_eq!(client.unmount(strange, None).await.unwrap_err().code, ErrorCode::NotFound, "{strange}");
    }
    assert_eq!(
        *fake.calls.lock().unwrap(),
        [
            "status",
            "disks ",
            "disks vm1",
            "forget vm1",
            "dismiss vm1",
            "points vm1",
            "around vm1 -5m",
            "resolve vm1 mark:a b/ü",
            "diff vm1 -5m latest",
            "find-change vm1 5000 latest",
            "mount vm1 latest",
            "mounts",
            "unmount vm1-1 None false",
            "unmount vm1-2 Some(Keep) false",
            "unmount vm1-3 Some(Discard) false",
            "unmount vm1-4 None true",
            "unmount vm1-4 Some(Keep) true",
            "unmount vm1-4 Some(Discard) true",
            "remount vm1-2 None",
            "discard vm1-2",
            "scrub vm1",
            "scrub-status",
            "cancel-scrub",
            "retention ",
            "retention vm1",
            "set retention vm1 Some(\"any=24h\")",
            "preview vm1 None",
            "keep vm1 mark:x true",
            "lock vm1 None 30d"
        ]
    );

    let refused = client.resolve(&vm1, "lsn:6").await.unwrap_err();
    let details: UnavailablePoint = serde_json::from_value(refused.details.unwrap()).unwrap();
    assert_eq!((refused.code, details), (ErrorCode::PointInHole, in_a_hole("lsn:6")));
    serving.abort();
}

#[test]
fn unknown_fields_of_requests_are_refused() {
    fn refuses<T: serde::de::DeserializeOwned>(text: &str) {
        let good: Result<T, _> = serde_json::from_str(text);
        assert!(good.is_ok(), "{text}");
        let bad = text.replacen('{', r#"{"forse": true, "#, 1);
        let error = serde_json::from_str::<T>(&bad).err().expect("it is refused").to_string();
        assert!(error.contains("forse") && error.contains("expected"), "{error}");
    }
    refuses::<MountRequest>(r#"{"name": "vm1", "at": "latest"}"#);
    refuses::<ScrubRequest>(r#"{"name": null}"#);
    refuses::<LockRequest>(r#"{"name": "vm1", "until": "30d"}"#);
    refuses::<ResolveRequest>(r#"{"point": "latest"}"#);
    refuses::<DiffRequest>(r#"{"from": "-5m", "to": "latest"}"#);
}

#[test]
fn damage_touches_the_points_that_it_names_and_later_ones_while_it_is_open() {
    let point = |lsn| Some(Point { lsn: Lsn(lsn), time: CaptureTime(lsn) });
    let span = |from, to, open, lost| TouchedPoints { bytes: None, from, to, open, lost };
    let of = |points| Touched {
        place: "a place".to_owned(),
        points,
        known: TouchedKnown::Exact,
        text: String::new(),
    };
    let touched = of(vec![span(point(4), point(6), false, false), span(point(9), point(10), true, false)]);
    let touches: Vec<u64> = (1..14).filter(|lsn| touched.touches(Lsn(*lsn))).collect();
    assert_eq!(touches, [4, 5, 6, 9, 10, 11, 12, 13]);
    assert!(!of(vec![span(point(4), point(6), false, true)]).touches(Lsn(5)), "a hole is no point");
    assert!(!of(vec![]).touches(Lsn(5)));
}
