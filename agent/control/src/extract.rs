//! Request bodies: JSON, and refused in our words when it is not.

use axum::{
    Json,
    extract::{FromRequest, Request, rejection::JsonRejection},
};
use serde::de::DeserializeOwned;

use crate::{ApiError, ErrorCode};

/// A JSON body. What cannot be read is answered with an [`ApiError`] of code `usage`.
#[derive(Clone, Copy, Debug)]
pub struct ApiJson<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for ApiJson<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(refusal(&rejection)),
        }
    }
}

fn refusal(rejection: &JsonRejection) -> ApiError {
    let text = rejection.body_text();
    ApiError::new(ErrorCode::Usage, format!("the request cannot be read: {text}"))
        .with_hint("the request bodies are in docs/api.md")
}
