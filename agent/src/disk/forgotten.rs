//! What a disk behind was told, answered, and does not have: a server that came in place of another has refused it.
//!
//! The guest hears of it with its next flush. The receiver has it as it was told: those blocks are sent again as they are.

use std::rc::Rc;

use super::engine::Engine;

/// Tells the filter, for ever.
pub(super) async fn keep(engine: Rc<Engine>) {
    let Some(disk) = engine.local.behind_a_server() else { return };
    loop {
        let blocks = disk.forgotten().await;
        tracing::error!(disk = %engine.name(), blocks = blocks.count().0, "blocks are not as a guest was told: they are sent again as they are");
        engine.happen(|filter, now| filter.forgotten(now, &blocks));
    }
}
