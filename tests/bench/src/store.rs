//! What the receiver's store costs: what is written to it, and what is read from it.

use crate::tracking::Row;

/// All rows, in the order they run in.
pub(crate) const ROWS: &[Row] = &[];
