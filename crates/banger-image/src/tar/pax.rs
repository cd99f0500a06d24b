//! What long-name and PAX headers say of the entry behind them.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use super::TarError;
use super::sparse::PaxSparse;

const BAD: TarError = TarError::Damaged("an extended header can't be read");

/// Fields that replace those of the header.
#[derive(Debug, Default)]
pub(super) struct Overrides {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) sparse: Option<PaxSparse>,
    /// The name of a sparse file, whose `path` is an invented one.
    sparse_name: Option<Vec<u8>>,
    /// Attributes: whether the value is the raw form, which wins over the encoded one, and the value.
    pub(super) xattrs: BTreeMap<Vec<u8>, (bool, Vec<u8>)>,
}

impl Overrides {
    /// Adds the records of a PAX header.
    pub(super) fn parse(&mut self, mut data: &[u8]) -> Result<(), TarError> {
        while !data.is_empty() {
            let space = data.iter().take(8).position(|b| *b == b' ').ok_or(BAD)?;
            let length = usize::try_from(integer(&data[..space])?).map_err(|_| BAD)?;
            // The length counts itself, the blank and the newline.
            let record = data.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or(BAD)?;
            data = &data[length..];
            let equals = record.iter().position(|b| *b == b'=').ok_or(BAD)?;
            self.record(&record[..equals], &record[equals + 1..])?;
        }
        if let Some(name) = self.sparse_name.take() {
            self.path = Some(name);
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), TarError> {
        // No value: the header's own field counts again.
        let some = !value.is_empty();
        match key {
            b"path" => self.path = some.then(|| value.to_vec()),
            b"linkpath" => self.link = some.then(|| value.to_vec()),
            b"size" => self.size = some.then(|| integer(value)).transpose()?,
            b"mtime" => self.mtime = some.then(|| time(value)).transpose()?,
            b"uid" => self.uid = some.then(|| integer(value)).transpose()?,
            b"gid" => self.gid = some.then(|| integer(value)).transpose()?,
            b"GNU.sparse.name" => self.sparse_name = some.then(|| value.to_vec()),
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.get_or_insert_default().record(key, value)?;
                } else if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name.to_vec(), (true, value.to_vec()));
                } else if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                    let value = STANDARD.decode(value).or_else(|_| STANDARD_NO_PAD.decode(value));
                    let (name, value) = (url_decoded(name), value.map_err(|_| BAD)?);
                    let slot = self.xattrs.entry(name).or_default();
                    if !slot.0 {
                        slot.1 = value;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Parses a whole number without sign; a fraction is cut off.
pub(super) fn integer(value: &[u8]) -> Result<u64, TarError> {
    let text = std::str::from_utf8(value).map_err(|_| BAD)?;
    let digits = text.split('.').next().unwrap_or("");
    if digits.starts_with('+') {
        return Err(BAD);
    }
    digits.parse().map_err(|_| BAD)
}

/// Parses seconds with a fraction, also before 1970.
fn time(value: &[u8]) -> Result<(i64, u32), TarError> {
    let text = std::str::from_utf8(value).map_err(|_| BAD)?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    if fraction.bytes().any(|b| !b.is_ascii_digit()) {
        return Err(BAD);
    }
    let nanos: u32 = format!("{fraction:0<9}")[..9].parse().map_err(|_| BAD)?;
    let seconds: i64 = if whole == "-" { 0 } else { whole.parse().map_err(|_| BAD)? };
    if whole.starts_with('-') && nanos > 0 {
        Ok((seconds.checked_sub(1).ok_or(BAD)?, 1_000_000_000 - nanos))
    } else {
        Ok((seconds, nanos))
    }
}

fn url_decoded(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((first, behind)) = rest.split_first() {
        let hex = |b: u8| char::from(b).to_digit(16);
        match (first, behind) {
            (b'%', [high, low, ..]) if hex(*high).is_some() && hex(*low).is_some() => {
                out.push((hex(*high).unwrap_or(0) * 16 + hex(*low).unwrap_or(0)) as u8);
                rest = &behind[2..];
            }
            _ => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    out
}
