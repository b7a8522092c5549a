//! `backtide`: everything a person does.
fn main() {}
