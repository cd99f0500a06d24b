//! Writes kmod's binary index: a trie of strings with values, as in `modules.dep.bin`.
//!
//! ```text
//! u32 magic, u32 version, u32 root            all numbers big-endian
//! node: [prefix, zero]                        if PREFIX
//!       [u8 first, u8 last, u32 child × n]    if CHILDREN; a child of 0 is absent
//!       [u32 count, (u32 priority, value, zero) × count]   if VALUES
//! ```
//!
//! The upper bits of a child's offset say which parts its node has. The format is described in kmod's
//! `libkmod-index`; `modprobe` in a guest reads nothing else.

use std::collections::BTreeMap;

const MAGIC: u32 = 0xb007_f457;
const VERSION: u32 = 0x0002_0001;
const PREFIX: u32 = 0x8000_0000;
const VALUES: u32 = 0x4000_0000;
const CHILDREN: u32 = 0x2000_0000;
/// The longest key stored; the trie is written recursively, and real aliases end below 300 characters.
const KEY_MAX: usize = 1024;

/// An index under construction.
#[derive(Debug, Default)]
pub struct KmodIndex {
    entries: BTreeMap<Vec<u8>, Vec<(u32, String)>>,
}

impl KmodIndex {
    /// Adds a value; of several with the same key those with a lower priority number come first.
    ///
    /// The format holds 7-bit keys only; others can't be looked up by kmod either and are left out.
    pub fn add(&mut self, key: &str, value: &str, priority: u32) {
        if key.is_ascii() && key.len() <= KEY_MAX && !key.contains('\0') && !value.contains('\0') {
            self.entries.entry(key.as_bytes().to_vec()).or_default().push((priority, value.to_owned()));
        }
    }

    /// Renders the index.
    pub fn render(mut self) -> Vec<u8> {
        for values in self.entries.values_mut() {
            values.sort();
            values.dedup();
        }
        let mut out = Vec::new();
        for word in [MAGIC, VERSION, 0] {
            out.extend_from_slice(&word.to_be_bytes());
        }
        let entries: Vec<_> =
            self.entries.iter().map(|(key, values)| (key.as_slice(), values.as_slice())).collect();
        let root = write_node(&entries, 0, &mut out);
        out[8..12].copy_from_slice(&root.to_be_bytes());
        out
    }
}

/// A key and its values, each with a priority.
type KeyValues<'a> = (&'a [u8], &'a [(u32, String)]);

/// Writes the node for sorted entries that agree in their first `depth` bytes, children first; returns its offset and
/// flags.
fn write_node(entries: &[KeyValues<'_>], depth: usize, out: &mut Vec<u8>) -> u32 {
    // Sorted, so what the first and the last key share is shared by all.
    let shared = match (entries.first(), entries.last()) {
        (Some((first, _)), Some((last, _))) => {
            first[depth..].iter().zip(&last[depth..]).take_while(|(a, b)| a == b).count()
        }
        _ => 0,
    };
    let end = depth + shared;
    let (own, below) = match entries.first() {
        Some((key, values)) if key.len() == end => (*values, &entries[1..]),
        _ => (&[][..], entries),
    };
    let mut children: Vec<(u8, u32)> = Vec::new();
    for group in below.chunk_by(|(a, _), (b, _)| a[end] == b[end]) {
        children.push((group[0].0[end], write_node(group, end + 1, out)));
    }
    let mut offset = out.len() as u32;
    if shared > 0 {
        offset |= PREFIX;
        out.extend_from_slice(&entries[0].0[depth..end]);
        out.push(0);
    }
    if let (Some((first, _)), Some((last, _))) = (children.first(), children.last()) {
        offset |= CHILDREN;
        out.extend_from_slice(&[*first, *last]);
        for byte in *first..=*last {
            let child = children.iter().find(|(at, _)| *at == byte).map_or(0, |(_, child)| *child);
            out.extend_from_slice(&child.to_be_bytes());
        }
    }
    if !own.is_empty() {
        offset |= VALUES;
        out.extend_from_slice(&(own.len() as u32).to_be_bytes());
        for (priority, value) in own {
            out.extend_from_slice(&priority.to_be_bytes());
            out.extend_from_slice(value.as_bytes());
            out.push(0);
        }
    }
    offset
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads a key's values back the way kmod walks the trie.
    fn find(index: &[u8], key: &str) -> Vec<String> {
        let word = |at: usize| u32::from_be_bytes(index[at..at + 4].try_into().unwrap());
        let text = |at: usize| {
            let end = index[at..].iter().position(|b| *b == 0).unwrap();
            &index[at..at + end]
        };
        assert_eq!((word(0), word(4)), (MAGIC, VERSION));
        let (mut node, mut key) = (word(8), key.as_bytes());
        loop {
            let mut at = (node & 0x0fff_ffff) as usize;
            if node & PREFIX != 0 {
                let prefix = text(at);
                let Some(rest) = key.strip_prefix(prefix) else { return vec![] };
                (key, at) = (rest, at + prefix.len() + 1);
            }
            let mut children = None;
            if node & CHILDREN != 0 {
                let (first, last) = (index[at], index[at + 1]);
                children = Some((first, last, at + 2));
                at += 2 + 4 * usize::from(last - first + 1);
            }
            let Some((byte, rest)) = key.split_first() else {
                let mut values = Vec::new();
                if node & VALUES != 0 {
                    let count = word(at);
                    at += 4;
                    for _ in 0..count {
                        let value = text(at + 4);
                        values.push(String::from_utf8(value.to_vec()).unwrap());
                        at += 5 + value.len();
                    }
                }
                return values;
            };
            match children {
                Some((first, last, table)) if (first..=last).contains(byte) => {
                    node = word(table + 4 * usize::from(byte - first));
                    key = rest;
                    if node == 0 {
                        return vec![];
                    }
                }
                _ => return vec![],
            }
        }
    }

    #[test]
    fn every_key_is_found() {
        let keys = ["virtio_net", "virtio", "virtio_blk", "v", "ext4", "", "a-b*[0-9]"];
        let mut index = KmodIndex::default();
        for key in keys {
            index.add(key, &format!("value of {key}"), 1);
        }
        index.add("virtio", "first", 0);
        index.add("not ascii: \u{fc}", "x", 0);
        let bytes = index.render();
        for key in keys.iter().filter(|key| **key != "virtio") {
            assert_eq!(find(&bytes, key), [format!("value of {key}")]);
        }
        assert_eq!(find(&bytes, "virtio"), ["first", "value of virtio"]);
        for key in ["virt", "virtio_", "virtio_nett", "w", "ext"] {
            assert!(find(&bytes, key).is_empty(), "{key}");
        }
    }

    #[test]
    fn an_empty_index_is_valid() {
        assert!(find(&KmodIndex::default().render(), "x").is_empty());
    }
}
