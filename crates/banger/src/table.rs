//! Aligned columns and key-value lists.

use crate::text::escape;

/// Spaces between two columns.
const GAP: &str = "  ";

/// Rows under a heading. Cells are escaped as they are added.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Returns a table with its heading.
    pub(crate) fn new(heading: &[&str]) -> Self {
        Self { rows: vec![heading.iter().map(ToString::to_string).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| escape(&cell)).collect());
    }

    /// Returns the text, one line a row.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|column| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| width(cell)).max())
            .map(Option::unwrap_or_default)
            .collect();
        let mut out = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, &wanted) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.push_str(&" ".repeat(wanted - width(cell)));
                line.push_str(GAP);
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        out
    }
}

fn width(cell: &str) -> usize {
    cell.chars().count()
}

/// Returns `key: value` lines with the values aligned; what has no value is left out.
pub(crate) fn render_pairs(pairs: &[(&str, Option<String>)]) -> String {
    let shown = || pairs.iter().filter_map(|(key, value)| value.as_ref().map(|value| (key, value)));
    let widest = shown().map(|(key, _)| key.len()).max().unwrap_or(0);
    shown()
        .map(|(key, value)| {
            format!("{key}:{:pad$} {}\n", "", escape(value), pad = widest - key.len()).trim_end().to_owned()
                + "\n"
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align_and_cells_are_escaped() {
        let mut table = Table::new(&["NAME", "IMAGE"]);
        table.row(["größe".to_owned(), "a\u{1b}[2J".to_owned()]);
        table.row(["x".to_owned(), String::new()]);
        assert_eq!(table.render(), "NAME   IMAGE\ngröße  a\\x1b[2J\nx\n");
    }

    #[test]
    fn pairs_align() {
        let pairs = [("a", Some("1".to_owned())), ("none", None), ("long", Some("2\n3".to_owned()))];
        assert_eq!(render_pairs(&pairs), "a:    1\nlong: 2\\n3\n");
    }
}
