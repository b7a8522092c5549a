//! What going back costs: a mount's first byte, a restore, a rewind, a boot.

mod boot;
mod first_byte;
mod restore;
mod rewind;

use crate::tracking::Row;

/// All rows, in the order they run in.
pub(crate) const ROWS: [Row; 5] = [
    Row { name: "mount-first-byte", run: first_byte::run },
    Row { name: "mount-here-first-byte", run: first_byte::run_here },
    Row { name: "restore", run: restore::run },
    Row { name: "rewind", run: rewind::run },
    Row { name: "boot", run: boot::run },
];
