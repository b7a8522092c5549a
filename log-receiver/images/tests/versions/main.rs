//! Images in memory, against a plain model.

mod common;
mod kept;
mod killed;
mod mending;
mod putting_back;
