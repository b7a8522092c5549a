//! Overlays against a model: contents, power cuts, damage, and the bytes of their files.

mod common;
mod contents;
mod golden;
mod power_cuts;
