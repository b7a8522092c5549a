//! The disk's record is made durable, as often as it takes.
//!
//! Invariant: one that cannot be saved is not the record. As long as that is so it is told, and tried again.

use super::{local::blocking, thread::Disk, tracking::way_out};
use crate::record::DiskRecord;

impl Disk {
    /// Saves what a person has asked for. Also when that is nothing new any more, where the last attempt failed: what cannot
    /// be saved is told until something can.
    pub(super) async fn save_asked(&mut self) {
        let asked = self.asked();
        if asked != self.record || self.unsaved.is_some() {
            self.save_record(asked).await;
        }
    }

    /// Makes the record durable.
    pub(super) async fn save_record(&mut self, record: DiskRecord) {
        let (records, saved) = (self.records.clone(), record.clone());
        match blocking(move || records.save(&saved)).await {
            Ok(()) => {
                self.record = record;
                self.unsaved = None;
                let bound = self.record.lsn_bound;
                self.engine.happen(|filter, now| filter.lsns_reserved(now, bound));
            }
            Err(error) => {
                let (directory, way) = (self.records.directory(), way_out(&error));
                let directory = directory.display();
                let told = format!(
                    "cannot save the disk's record in {directory}: {error}; {way}, and it is saved by itself"
                );
                // Each second may be the next attempt.
                if self.unsaved.as_ref() != Some(&told) {
                    tracing::error!(disk = %record.name, %error, "cannot save the disk's record");
                }
                self.unsaved = Some(told);
            }
        }
    }
}
