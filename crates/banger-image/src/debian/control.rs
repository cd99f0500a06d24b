//! The archive's text format (RFC 822-like paragraphs): Release files, package indexes, control files, apt sources.
//!
//! A parser over borrowed text; it allocates one small vector a paragraph and never fails: what isn't a field is
//! skipped, because the meaning of a missing field is the caller's.

/// One paragraph: its fields in order, values as written (continuation lines included).
#[derive(Debug, Clone, Default)]
pub(crate) struct Paragraph<'a> {
    fields: Vec<(&'a str, &'a str)>,
}

impl<'a> Paragraph<'a> {
    /// Returns the value of the first field of that name (case does not matter), trimmed.
    pub(crate) fn get(&self, name: &str) -> Option<&'a str> {
        self.fields.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    }

    /// Parses the first paragraph of a text.
    pub(crate) fn parse(text: &'a str) -> Self {
        paragraphs(text).next().unwrap_or_default()
    }
}

/// Iterates over the paragraphs of a text; lines that start with `#` are comments.
pub(crate) fn paragraphs(text: &str) -> impl Iterator<Item = Paragraph<'_>> {
    blocks(text).map(parse_block).filter(|p| !p.fields.is_empty())
}

/// Iterates over the texts between blank lines.
pub(crate) fn blocks(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        loop {
            // Leading blank lines belong to nobody.
            let line_end = rest.find('\n').map_or(rest.len(), |at| at + 1);
            if line_end == 0 {
                return None;
            }
            if !rest[..line_end].trim().is_empty() {
                break;
            }
            rest = &rest[line_end..];
        }
        let mut end = 0;
        while end < rest.len() {
            let line_end = rest[end..].find('\n').map_or(rest.len(), |at| end + at + 1);
            if rest[end..line_end].trim().is_empty() {
                break;
            }
            end = line_end;
        }
        let (block, tail) = rest.split_at(end);
        rest = tail;
        Some(block)
    })
}

fn parse_block(block: &str) -> Paragraph<'_> {
    let mut fields: Vec<(&str, &str)> = Vec::new();
    // The value being read: name, and where it starts and ends in `block`.
    let mut open: Option<(&str, usize, usize)> = None;
    let mut at = 0;
    for line in block.split_inclusive('\n') {
        let (start, end) = (at, at + line.len());
        at = end;
        if line.starts_with('#') {
            continue;
        }
        if line.starts_with([' ', '\t']) {
            if let Some((_, _, value_end)) = &mut open {
                *value_end = end;
            }
            continue;
        }
        if let Some((name, from, to)) = open.take() {
            fields.push((name, block[from..to].trim_end()));
        }
        if let Some(colon) = line.find(':') {
            open = Some((line[..colon].trim(), start + colon + 1, end));
        }
    }
    if let Some((name, from, to)) = open {
        fields.push((name, block[from..to].trim_end()));
    }
    Paragraph { fields }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paragraphs_and_continuations() {
        let text = "\n# note\nPackage: a\nDescription: one\n two\n .\n three\n\n \nPackage: b\nbroken\nX:y\n";
        let found: Vec<_> = paragraphs(text).collect();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].get("package"), Some("a"));
        assert_eq!(found[0].get("Description"), Some("one\n two\n .\n three"));
        assert_eq!(found[1].get("X"), Some("y"));
        assert_eq!(found[1].get("broken"), None);
    }

    #[test]
    fn empty_texts() {
        assert_eq!(paragraphs("").count(), 0);
        assert_eq!(paragraphs("\n\n \n").count(), 0);
        assert_eq!(paragraphs("# only\n# comments\n").count(), 0);
        assert_eq!(paragraphs("a: b").count(), 1);
    }
}
