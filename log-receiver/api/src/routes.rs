//! Which HTTP call is which method of the service. The client has the same paths.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Query, State, rejection::QueryRejection},
    routing::{delete, get, post},
};
use backtide_control::{ApiError, ApiJson, ErrorCode, json_fallbacks};
use backtide_units::DiskName;

use crate::{
    AroundReport, DiffReport, DiffRequest, Dismissed, FindChangeRequest, ForgottenDisk, FoundChange,
    KeepRequest, KeptOverlay, LockRequest, Mount, MountRequest, Mounts, PointsReport, ReceiverDisks,
    ReceiverService, ReceiverStatus, RemountRequest, ResolveRequest, ResolvedPoint, RetentionPreview,
    RetentionReport, RetentionRequest, ScrubRequest, ScrubStatus, UnmountRequest,
};

type Answer<T> = Result<Json<T>, ApiError>;

/// The receiver's control API over a service.
pub fn router<S: ReceiverService>(service: Arc<S>) -> Router {
    let router = Router::new()
        .route("/v1/status", get(status::<S>))
        .route("/v1/disks", get(disks::<S>))
        .route("/v1/disks/{disk}", get(disk::<S>).merge(delete(forget::<S>)))
        .route("/v1/disks/{disk}/shortfalls", delete(dismiss::<S>))
        .route("/v1/disks/{disk}/points", get(points::<S>))
        .route("/v1/disks/{disk}/around", post(around::<S>))
        .route("/v1/disks/{disk}/resolve", post(resolve::<S>))
        .route("/v1/disks/{disk}/diff", post(diff::<S>))
        .route("/v1/disks/{disk}/find-change", post(find_change::<S>))
        .route("/v1/disks/{disk}/retention", get(disk_retention::<S>).merge(post(set_retention::<S>)))
        .route("/v1/disks/{disk}/retention/preview", post(preview_retention::<S>))
        .route("/v1/retention", get(retention::<S>))
        .route("/v1/retention/keep", post(keep::<S>))
        .route("/v1/retention/lock", post(lock::<S>))
        .route("/v1/scrub", get(scrub_status::<S>).merge(post(scrub::<S>)).merge(delete(cancel_scrub::<S>)))
        .route("/v1/mounts", get(mounts::<S>).merge(post(mount::<S>)))
        .route("/v1/mounts/{id}", delete(unmount::<S>))
        .route("/v1/overlays/{id}", delete(discard::<S>))
        .route("/v1/overlays/{id}/mount", post(remount::<S>))
        .with_state(service);
    json_fallbacks(router)
}

fn disk_named(text: &str) -> Result<DiskName, ApiError> {
    text.parse().map_err(|error| ApiError::from_error(ErrorCode::Usage, &error))
}

async fn status<S: ReceiverService>(State(service): State<Arc<S>>) -> Answer<ReceiverStatus> {
    service.status().await.map(Json)
}

async fn disks<S: ReceiverService>(State(service): State<Arc<S>>) -> Answer<ReceiverDisks> {
    service.disks(None).await.map(Json)
}

async fn disk<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<ReceiverDisks> {
    service.disks(Some(disk_named(&disk)?)).await.map(Json)
}

async fn forget<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<ForgottenDisk> {
    service.forget(disk_named(&disk)?).await.map(Json)
}

async fn dismiss<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<Dismissed> {
    service.dismiss(disk_named(&disk)?).await.map(Json)
}

async fn points<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<PointsReport> {
    service.points(disk_named(&disk)?).await.map(Json)
}

async fn around<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<ResolveRequest>,
) -> Answer<AroundReport> {
    service.around(disk_named(&disk)?, request).await.map(Json)
}

async fn resolve<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<ResolveRequest>,
) -> Answer<ResolvedPoint> {
    service.resolve(disk_named(&disk)?, request).await.map(Json)
}

async fn diff<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<DiffRequest>,
) -> Answer<DiffReport> {
    service.diff(disk_named(&disk)?, request).await.map(Json)
}

async fn find_change<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<FindChangeRequest>,
) -> Answer<FoundChange> {
    service.find_change(disk_named(&disk)?, request).await.map(Json)
}

async fn retention<S: ReceiverService>(State(service): State<Arc<S>>) -> Answer<RetentionReport> {
    service.retention(None).await.map(Json)
}

async fn disk_retention<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<RetentionReport> {
    service.retention(Some(disk_named(&disk)?)).await.map(Json)
}

async fn set_retention<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<RetentionRequest>,
) -> Answer<RetentionReport> {
    service.set_retention(disk_named(&disk)?, request).await.map(Json)
}

async fn preview_retention<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<RetentionRequest>,
) -> Answer<RetentionPreview> {
    service.preview_retention(disk_named(&disk)?, request).await.map(Json)
}

async fn keep<S: ReceiverService>(
    State(service): State<Arc<S>>,
    ApiJson(request): ApiJson<KeepRequest>,
) -> Answer<RetentionReport> {
    service.keep(request).await.map(Json)
}

async fn lock<S: ReceiverService>(
    State(service): State<Arc<S>>,
    ApiJson(request): ApiJson<LockRequest>,
) -> Answer<RetentionReport> {
    service.lock(request).await.map(Json)
}

async fn mounts<S: ReceiverService>(State(service): State<Arc<S>>) -> Answer<Mounts> {
    service.mounts().await.map(Json)
}

async fn mount<S: ReceiverService>(
    State(service): State<Arc<S>>,
    ApiJson(request): ApiJson<MountRequest>,
) -> Answer<Mount> {
    service.mount(request).await.map(Json)
}

async fn scrub<S: ReceiverService>(
    State(service): State<Arc<S>>,
    ApiJson(request): ApiJson<ScrubRequest>,
) -> Answer<ScrubStatus> {
    service.scrub(request).await.map(Json)
}

async fn scrub_status<S: ReceiverService>(State(service): State<Arc<S>>) -> Answer<ScrubStatus> {
    service.scrub_status().await.map(Json)
}

async fn cancel_scrub<S: ReceiverService>(State(service): State<Arc<S>>) -> Answer<ScrubStatus> {
    service.cancel_scrub().await.map(Json)
}

async fn remount<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(id): Path<String>,
    ApiJson(request): ApiJson<RemountRequest>,
) -> Answer<Mount> {
    service.remount(id, request).await.map(Json)
}

async fn discard<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(id): Path<String>,
) -> Answer<KeptOverlay> {
    service.discard(id).await.map(Json)
}

async fn unmount<S: ReceiverService>(
    State(service): State<Arc<S>>,
    Path(id): Path<String>,
    request: Result<Query<UnmountRequest>, QueryRejection>,
) -> Answer<Mount> {
    let Query(request) = request.map_err(|error| ApiError::new(ErrorCode::Usage, error.body_text()))?;
    service.unmount(id, request).await.map(Json)
}
