//! Medians, ratios and the table.

use std::fmt::Write;

use crate::{
    fio::{Figure, ROWS, Row, speed_text},
    servers::Kind,
};

/// Everything measured.
pub(crate) struct Table {
    kinds: Vec<Kind>,
    figures: Vec<(Kind, &'static str, Figure)>,
    facts: Vec<(Kind, String, f64)>,
}

impl Table {
    pub(crate) fn new(kinds: &[Kind]) -> Self {
        Self { kinds: kinds.to_vec(), figures: Vec::new(), facts: Vec::new() }
    }

    pub(crate) fn add(&mut self, kind: Kind, row: Row, figure: Figure) {
        self.figures.push((kind, row.name, figure));
    }

    pub(crate) fn note(&mut self, kind: Kind, facts: Vec<(String, f64)>) {
        self.facts.extend(facts.into_iter().map(|(what, value)| (kind, what, value)));
    }

    fn median(&self, kind: Kind, row: Row, of: impl Fn(&Figure) -> f64) -> Option<f64> {
        median(self.rounds(kind, row).map(of).collect())
    }

    /// What each round brought, in their order.
    fn rounds(&self, kind: Kind, row: Row) -> impl Iterator<Item = &Figure> {
        let of_this =
            move |(other, name, _): &&(Kind, &'static str, Figure)| *other == kind && *name == row.name;
        self.figures.iter().filter(of_this).map(|(_, _, figure)| figure)
    }

    /// The tables of docs/performance.md.
    pub(crate) fn markdown(&self, setting: &str) -> String {
        let mut text = format!("Medians of {setting}.\n\n");
        self.speeds(&mut text);
        self.ratios(&mut text);
        self.latencies(&mut text);
        self.maxima(&mut text);
        text
    }

    fn head(&self, text: &mut String, title: &str, kinds: &[Kind]) {
        let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
        let _ = writeln!(text, "| {title} | {} |\n|---|{}", names.join(" | "), "---|".repeat(kinds.len()));
    }

    fn speeds(&self, text: &mut String) {
        self.head(text, "speed", &self.kinds);
        for row in ROWS {
            let cell = |kind: &Kind| {
                self.median(*kind, row, |figure| figure.speed(row))
                    .map_or("-".into(), |speed| speed_text(speed, row))
            };
            let cells: Vec<String> = self.kinds.iter().map(cell).collect();
            let _ = writeln!(text, "| {} | {} |", row.name, cells.join(" | "));
        }
        text.push('\n');
    }

    fn ratios(&self, text: &mut String) {
        const PAIRS: [(Kind, Kind, &str); 8] = [
            (Kind::Tracking, Kind::QemuNbd, "tracking / qemu-nbd"),
            (Kind::Tracking, Kind::NbdkitFile, "tracking / nbdkit"),
            (Kind::Sync, Kind::QemuNbd, "sync / qemu-nbd"),
            (Kind::Sync, Kind::NbdkitFile, "sync / nbdkit"),
            (Kind::Sync, Kind::Mirror, "sync / mirror"),
            (Kind::SyncDirect, Kind::QemuNbdDirect, "direct: sync / qemu-nbd"),
            (Kind::SyncDurable, Kind::NbdkitFile, "sync durable / nbdkit"),
            (Kind::SyncTls, Kind::SyncTcp, "sync: tls / tcp"),
        ];
        let names: Vec<&str> = PAIRS.iter().map(|(_, _, name)| *name).collect();
        let _ = writeln!(text, "| ratio | {} |\n|---|{}", names.join(" | "), "---|".repeat(PAIRS.len()));
        for row in ROWS {
            let cells = PAIRS.map(|(ours, peer, _)| {
                let (ours, peer) = (self.rounds(ours, row), self.rounds(peer, row));
                let ratios = ours.zip(peer).map(|(ours, peer)| ours.speed(row) / peer.speed(row));
                median(ratios.collect()).map_or("-".into(), |ratio| format!("{ratio:.2}"))
            });
            let _ = writeln!(text, "| {} | {} |", row.name, cells.join(" | "));
        }
        text.push('\n');
    }

    fn latencies(&self, text: &mut String) {
        self.head(text, "p99 latency, µs", &self.kinds);
        for row in ROWS {
            let cell = |kind: &Kind| {
                self.median(*kind, row, |figure| figure.p99_us).map_or("-".into(), |us| format!("{us:.0}"))
            };
            let cells: Vec<String> = self.kinds.iter().map(cell).collect();
            let _ = writeln!(text, "| {} | {} |", row.name, cells.join(" | "));
        }
        text.push('\n');
    }

    fn maxima(&self, text: &mut String) {
        text.push_str("| the highest of all rounds | |\n|---|---|\n");
        for kind in &self.kinds {
            let mut seen: Vec<&str> = Vec::new();
            for (_, what, _) in self.facts.iter().filter(|(other, _, _)| other == kind) {
                if !seen.contains(&what.as_str()) {
                    seen.push(what);
                    let values = self.facts.iter().filter(|(other, fact, _)| other == kind && fact == what);
                    let highest = values.map(|(_, _, value)| *value).fold(0.0, f64::max);
                    let _ = writeln!(text, "| {}: {what} | {highest:.0} |", kind.name());
                }
            }
        }
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some(f64::midpoint(values[middle - 1], values[middle])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_one_outlier() {
        assert_eq!(median(vec![1.0, 100.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![1.0, 3.0]), Some(2.0));
        assert_eq!(median(Vec::new()), None);
    }
}
