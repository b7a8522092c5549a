//! Mounts as text.

use backtide_receiver_api::Mount;

use crate::{
    output::{facts, plain_table},
    quantity::{size_both, time_text},
};

/// One mount that was made just now.
pub(crate) fn mount_text(mount: &Mount) -> String {
    facts(&[
        ("mount", mount.id.clone()),
        ("disk", mount.disk.name.as_str().to_owned()),
        ("point", format!("lsn:{}  {}", mount.lsn, time_text(mount.time))),
        ("size", size_both(mount.size)),
        ("NBD", mount.uri.clone()),
    ])
}

/// All mounts.
pub(crate) fn table(mounts: &[Mount]) -> String {
    if mounts.is_empty() {
        return "no mounts; `backtide mount NAME --at POINT` makes one".to_owned();
    }
    let row = |mount: &Mount| {
        vec![
            mount.id.clone(),
            mount.disk.name.as_str().to_owned(),
            format!("lsn:{}", mount.lsn),
            time_text(mount.time),
            mount.clients.to_string(),
            mount.uri.clone(),
        ]
    };
    plain_table(&["MOUNT", "DISK", "POINT", "TIME", "CLIENTS", "NBD"], mounts.iter().map(row))
}
