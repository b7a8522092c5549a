//! Which overlays are served when a receiver starts, and which wait for that.

use super::{Known, Overlays, record::Record};

impl Overlays {
    /// The records of all that are served.
    pub(crate) fn served(&self) -> Vec<Record> {
        let table = self.table();
        let records = table.values().filter_map(|known| known.record.as_ref().ok());
        records.filter(|record| record.uri.is_some()).cloned().collect()
    }

    /// Keeps those that another store serves, of which this one is a copy, and serves them no more, durably. What this one has
    /// served under another name has its sockets where it is now.
    pub(crate) fn leave_to_the_original(&self) {
        let Some(own) = &self.place else { return };
        for record in self.served() {
            let (Some(uri), Some(store)) = (record.uri, record.store) else { continue };
            if store.is(own) {
                let now = own.moved_from(&store, &uri);
                if now != uri {
                    self.serve_where_it_is(&record.id, Some(now));
                }
                continue;
            }
            let why = format!(
                "it is kept and not served, for this store is a copy of {}, or was moved from there, and what that serves at {uri} \
                 stays its own; `backtide mount --kept {}` serves it from here",
                store.path.display(),
                record.id
            );
            tracing::warn!(overlay = record.id, why, "a writable mount of another store");
            self.serve_where_it_is(&record.id, None);
            self.note(&record.id, &why);
        }
    }

    /// As [`Overlays::serve_at`], until the next start at least.
    fn serve_where_it_is(&self, id: &str, uri: Option<String>) {
        let Err(error) = self.serve_at(id, uri.clone()) else { return };
        tracing::warn!(overlay = id, why = error.message, "where an overlay is served cannot be noted");
        if let Some(Known { record: Ok(record), .. }) = self.table().get_mut(id) {
            record.uri = uri;
        }
    }

    /// Notes why an overlay that is to be served could not be; whether that is new.
    pub(crate) fn wait(&self, id: &str, why: &str) -> bool {
        let mut table = self.table();
        let Some(known) = table.get_mut(id) else { return false };
        known.waits = true;
        known.problem.replace(why.to_owned()).as_deref() != Some(why)
    }

    /// The records of those that are to be served and could not be.
    pub(crate) fn waiting(&self) -> Vec<Record> {
        let table = self.table();
        let waiting = table.values().filter(|known| known.waits && known.open.strong_count() == 0);
        waiting
            .filter_map(|known| known.record.as_ref().ok())
            .filter(|record| record.uri.is_some())
            .cloned()
            .collect()
    }
}
