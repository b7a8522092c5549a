//! Answers as text for people. JSON needs nothing here: the API's types are the shapes.

pub(crate) mod checks;
pub(crate) mod mounts;
pub(crate) mod points;
pub(crate) mod progress;
pub(crate) mod status;

use comfy_table::{Cell, ContentArrangement, Table, presets};

/// A table without lines: columns of text, the first row its titles.
pub(crate) fn plain_table(titles: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(titles.iter().map(Cell::new));
    for row in rows {
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let text = table.to_string();
    text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// Labels and values below each other, the values in one column.
pub(crate) fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(label, _)| label.len()).max().unwrap_or(0);
    let line = |(label, value): &(&str, String)| format!("{label:<width$}  {value}");
    facts.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A guest's name without what a terminal would take for an order.
pub(crate) fn printable(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// The same of a text of several lines.
pub(crate) fn printable_lines(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}
