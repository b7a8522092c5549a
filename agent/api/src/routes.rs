//! Which HTTP call is which method of the service. The client has the same paths.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Path, Query, State, rejection::QueryRejection},
    routing::{MethodRouter, delete, get, post},
};
use backtide_control::{ApiError, ApiJson, ErrorCode, json_fallbacks};
use backtide_units::DiskName;

use crate::{
    AgentKeptOverlay, AgentMount, AgentMountRequest, AgentMounts, AgentRemountRequest, AgentService,
    AgentStatus, AgentUnmountRequest, AttachRequest, DetachRequest, DiskStatus, FailbackReport,
    FailbackRequest, LimitsChange, MarkReport, MarkRequest, ResizeReport, ResizeRequest, ResyncRequest,
    RewindReport, RewindRequest, VerifyRequest, VerifyStatus,
};

type Answer<T> = Result<Json<T>, ApiError>;

/// The agent's control API over a service.
pub fn router<S: AgentService>(service: Arc<S>) -> Router {
    let router = Router::new()
        .route("/v1/status", get(status::<S>))
        .route("/v1/restart", post(restart::<S>))
        .route("/v1/disks", post(attach::<S>))
        .route("/v1/disks/{disk}", get(disk_status::<S>).merge(delete(detach::<S>)))
        .route("/v1/disks/{disk}/pause", post(pause::<S>))
        .route("/v1/disks/{disk}/resume", post(resume::<S>))
        .route("/v1/disks/{disk}/resync", post(resync::<S>))
        .route("/v1/disks/{disk}/resize", post(resize::<S>))
        .route("/v1/disks/{disk}/rewind", post(rewind::<S>))
        .route("/v1/disks/{disk}/failback", post(failback::<S>))
        .route("/v1/disks/{disk}/limits", post(limits::<S>))
        .route("/v1/disks/{disk}/verify", verify::<S>())
        .route("/v1/marks", post(mark::<S>))
        .route("/v1/mounts", get(mounts::<S>).merge(post(mount::<S>)))
        .route("/v1/mounts/{id}", delete(unmount::<S>))
        .route("/v1/overlays/{id}", delete(discard::<S>))
        .route("/v1/overlays/{id}/mount", post(remount::<S>))
        .route("/v1/changes/{id}", get(change::<S>))
        .with_state(service);
    json_fallbacks(router)
}

fn disk_named(text: &str) -> Result<DiskName, ApiError> {
    text.parse().map_err(|error| ApiError::from_error(ErrorCode::Usage, &error))
}

async fn status<S: AgentService>(State(service): State<Arc<S>>) -> Answer<AgentStatus> {
    service.status(None).await.map(Json)
}

async fn restart<S: AgentService>(State(service): State<Arc<S>>) -> Answer<AgentStatus> {
    service.restart().await.map(Json)
}

async fn disk_status<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<AgentStatus> {
    service.status(Some(disk_named(&disk)?)).await.map(Json)
}

async fn attach<S: AgentService>(
    State(service): State<Arc<S>>,
    ApiJson(request): ApiJson<AttachRequest>,
) -> Answer<DiskStatus> {
    service.attach(request).await.map(Json)
}

async fn detach<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    request: Result<Query<DetachRequest>, QueryRejection>,
) -> Answer<DiskStatus> {
    let Query(request) = request.map_err(|error| ApiError::new(ErrorCode::Usage, error.body_text()))?;
    service.detach(disk_named(&disk)?, request).await.map(Json)
}

async fn pause<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<DiskStatus> {
    service.pause(disk_named(&disk)?).await.map(Json)
}

async fn resume<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<DiskStatus> {
    service.resume(disk_named(&disk)?).await.map(Json)
}

async fn resync<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<ResyncRequest>,
) -> Answer<DiskStatus> {
    service.resync(disk_named(&disk)?, request).await.map(Json)
}

async fn resize<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<ResizeRequest>,
) -> Answer<ResizeReport> {
    service.resize(disk_named(&disk)?, request).await.map(Json)
}

async fn rewind<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<RewindRequest>,
) -> Answer<RewindReport> {
    service.rewind(disk_named(&disk)?, request).await.map(Json)
}

async fn failback<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<FailbackRequest>,
) -> Answer<FailbackReport> {
    service.failback(disk_named(&disk)?, request).await.map(Json)
}

async fn limits<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(change): ApiJson<LimitsChange>,
) -> Answer<DiskStatus> {
    service.set_limits(disk_named(&disk)?, change).await.map(Json)
}

async fn mark<S: AgentService>(
    State(service): State<Arc<S>>,
    ApiJson(request): ApiJson<MarkRequest>,
) -> Answer<MarkReport> {
    if request.disks.is_empty() {
        return Err(ApiError::new(ErrorCode::Usage, "a mark needs at least one disk"));
    }
    service.mark(request).await.map(Json)
}

async fn mount<S: AgentService>(
    State(service): State<Arc<S>>,
    ApiJson(request): ApiJson<AgentMountRequest>,
) -> Answer<AgentMount> {
    service.mount(request).await.map(Json)
}

async fn mounts<S: AgentService>(State(service): State<Arc<S>>) -> Answer<AgentMounts> {
    service.mounts().await.map(Json)
}

async fn unmount<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(id): Path<String>,
    request: Result<Query<AgentUnmountRequest>, QueryRejection>,
) -> Answer<AgentMount> {
    let Query(request) = request.map_err(|error| ApiError::new(ErrorCode::Usage, error.body_text()))?;
    service.unmount(id, request).await.map(Json)
}

async fn remount<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(id): Path<String>,
    ApiJson(request): ApiJson<AgentRemountRequest>,
) -> Answer<AgentMount> {
    service.remount(id, request).await.map(Json)
}

async fn discard<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(id): Path<String>,
) -> Answer<AgentKeptOverlay> {
    service.discard(id).await.map(Json)
}

async fn change<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(id): Path<String>,
) -> Answer<serde_json::Value> {
    service.change(id).await.map(Json)
}

async fn start_verify<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
    ApiJson(request): ApiJson<VerifyRequest>,
) -> Answer<VerifyStatus> {
    service.start_verify(disk_named(&disk)?, request).await.map(Json)
}

fn verify<S: AgentService>() -> MethodRouter<Arc<S>> {
    get(verify_status::<S>).merge(post(start_verify::<S>)).merge(delete(cancel_verify::<S>))
}

async fn cancel_verify<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<VerifyStatus> {
    service.cancel_verify(disk_named(&disk)?).await.map(Json)
}

async fn verify_status<S: AgentService>(
    State(service): State<Arc<S>>,
    Path(disk): Path<String>,
) -> Answer<VerifyStatus> {
    service.verify_status(disk_named(&disk)?).await.map(Json)
}
