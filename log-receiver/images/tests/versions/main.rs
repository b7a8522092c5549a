//! Images in memory, against a plain model.

mod common;
mod kept;
mod mending;
mod putting_back;
