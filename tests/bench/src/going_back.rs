//! What going back costs: a mount's first byte, a restore, a boot.

mod boot;
mod first_byte;
mod restore;

use crate::tracking::Row;

/// All rows, in the order they run in.
pub(crate) const ROWS: [Row; 3] = [
    Row { name: "mount-first-byte", run: first_byte::run },
    Row { name: "restore", run: restore::run },
    Row { name: "boot", run: boot::run },
];
