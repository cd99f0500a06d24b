//! What a kernel module says about itself: name, dependencies, aliases, soft dependencies, exported symbols.

use std::io::{self, Read};

use flate2::read::GzDecoder;
use lzma_rust2::XzReader;
use thiserror::Error;

use super::elf::Object;

/// The largest module accepted, unpacked; the largest in Debian's kernels is below 20 MB.
const MODULE_MAX: u64 = 128 << 20;
/// Memory the xz decoder may use, in KiB; modules use a 2 MiB dictionary.
const XZ_MEMORY_KIB: u32 = 64 << 10;

/// A module can't be read.
#[derive(Debug, Error)]
pub enum ModuleError {
    /// It can't be unpacked.
    #[error("could not unpack module `{}`", .path.escape_debug())]
    Unpack {
        /// Path in the module tree.
        path: String,
        /// Why not.
        source: io::Error,
    },
    /// It isn't a module.
    #[error("`{}` is not a kernel module", .0.escape_debug())]
    Format(String),
}

/// One module of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Name as the kernel knows it, with underscores.
    pub name: String,
    /// Path below `/lib/modules/<release>`, as stored (possibly compressed).
    pub path: String,
    /// Names of the modules it needs directly.
    pub depends: Vec<String>,
    /// Patterns of devices and names it serves.
    pub aliases: Vec<String>,
    /// `softdep` lines, without the module's own name.
    pub softdeps: Vec<String>,
    /// Symbols it exports.
    pub symbols: Vec<String>,
}

/// Returns the name of a module from its file name: `virtio-blk.ko.xz` is `virtio_blk`.
pub fn name_of(path: &str) -> Option<String> {
    let file = path.rsplit('/').next()?;
    let end = file.find(".ko")?;
    Some(file[..end].replace('-', "_"))
}

/// Unpacks a module file according to its name.
pub fn unpack(path: &str, data: &[u8]) -> Result<Vec<u8>, ModuleError> {
    let mut out = Vec::with_capacity(data.len() * 4);
    let mut read = |reader: &mut dyn Read| reader.take(MODULE_MAX + 1).read_to_end(&mut out);
    let result = match path.rsplit('.').next().unwrap_or("") {
        "xz" => read(&mut XzReader::new_mem_limit(data, true, XZ_MEMORY_KIB)),
        "zst" => zstd::stream::read::Decoder::with_buffer(data).and_then(|mut decoder| read(&mut decoder)),
        "gz" => read(&mut GzDecoder::new(data)),
        _ => read(&mut &data[..]),
    };
    let unpack = |source| ModuleError::Unpack { path: path.to_owned(), source };
    result.map_err(unpack)?;
    if out.len() as u64 > MODULE_MAX {
        return Err(unpack(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(out)
}

/// What a signed module ends with (`MODULE_SIG_STRING` of the kernel's `module_signature.h`).
const SIGNATURE_MARK: &[u8] = b"~Module signature appended~\n";
/// Length of `struct module_signature`, which is before the mark; its last four bytes are the signature's length.
const SIGNATURE_INFO_LEN: usize = 12;

/// Returns a module without the signature at its end.
///
/// The package it is from was verified, and under software emulation the kernel takes 0.1 s to check it once more. A
/// kernel that insists on signatures would refuse such a module; Debian's doesn't.
pub fn without_signature(module: &[u8]) -> &[u8] {
    let signed = || {
        let rest = module.strip_suffix(SIGNATURE_MARK)?;
        let (rest, info) = rest.split_at_checked(rest.len().checked_sub(SIGNATURE_INFO_LEN)?)?;
        let len = u32::from_be_bytes(info[8..].try_into().ok()?);
        // The names of signer and key, which no kernel of today writes, are counted in two bytes.
        let len = usize::try_from(len).ok()? + usize::from(info[3]) + usize::from(info[4]);
        rest.get(..rest.len().checked_sub(len)?)
    };
    signed().unwrap_or(module)
}

impl Module {
    /// Reads what an unpacked module file says about itself.
    pub fn parse(path: &str, file: &[u8]) -> Result<Self, ModuleError> {
        let format = || ModuleError::Format(path.to_owned());
        let object = Object::parse(file).ok_or_else(format)?;
        let mut module = Self {
            name: name_of(path).ok_or_else(format)?,
            path: path.to_owned(),
            depends: Vec::new(),
            aliases: Vec::new(),
            softdeps: Vec::new(),
            symbols: Vec::new(),
        };
        for line in object.section(".modinfo").ok_or_else(format)?.split(|b| *b == 0) {
            let Some((key, value)) = std::str::from_utf8(line).ok().and_then(|line| line.split_once('='))
            else {
                continue;
            };
            match key {
                "depends" => {
                    let names = value.split(',').filter(|name| !name.is_empty());
                    module.depends.extend(names.map(|name| name.replace('-', "_")));
                }
                "alias" => module.aliases.push(normalise_alias(value)),
                "softdep" => module.softdeps.push(value.to_owned()),
                _ => {}
            }
        }
        let exported = object.symbol_names().filter_map(|name| name.strip_prefix(b"__crc_"));
        module.symbols = exported.filter_map(|name| String::from_utf8(name.to_vec()).ok()).collect();
        module.symbols.sort_unstable();
        module.symbols.dedup();
        Ok(module)
    }
}

/// Turns hyphens into underscores except inside brackets, as every reader of the alias index expects.
pub fn normalise_alias(alias: &str) -> String {
    let mut depth = 0u32;
    alias
        .chars()
        .map(|c| {
            match c {
                '[' => depth += 1,
                ']' => depth = depth.saturating_sub(1),
                '-' if depth == 0 => return '_',
                _ => {}
            }
            c
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::elf::tests::module;
    use super::*;

    #[test]
    fn reads_modinfo() {
        let file = module(
            &[
                "license=GPL",
                "depends=net-failover,failover",
                "alias=virtio:d00000001v*",
                "softdep=pre: a",
                "broken",
            ],
            &["zeta", "alpha"],
        );
        let found = Module::parse("kernel/drivers/net/virtio-net.ko", &file).unwrap();
        assert_eq!(found.name, "virtio_net");
        assert_eq!(found.depends, ["net_failover", "failover"]);
        assert_eq!(found.aliases, ["virtio:d00000001v*"]);
        assert_eq!(found.softdeps, ["pre: a"]);
        assert_eq!(found.symbols, ["alpha", "zeta"]);
    }

    #[test]
    fn aliases_keep_ranges() {
        assert_eq!(normalise_alias("net-pf-16-proto-[0-9]-x"), "net_pf_16_proto_[0-9]_x");
    }

    #[test]
    fn compressed_modules() {
        let file = module(&["depends="], &[]);
        let packed = zstd::stream::encode_all(&file[..], 1).unwrap();
        assert_eq!(unpack("a/x.ko.zst", &packed).unwrap(), file);
        assert!(unpack("a/x.ko.xz", &packed).is_err());
        assert!(Module::parse("a/x.ko", b"\x7fELF").is_err());
    }

    #[test]
    fn a_signature_is_cut_off_and_nothing_else() {
        let mut signed = b"\x7fELF the module".to_vec();
        let plain = signed.clone();
        assert_eq!(super::without_signature(&plain), plain);
        signed.extend([7; 300]);
        signed.extend([0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 44]);
        signed.extend(super::SIGNATURE_MARK);
        assert_eq!(super::without_signature(&signed), plain);
        // A length that can't be is no signature.
        let at = signed.len() - super::SIGNATURE_MARK.len() - 4;
        signed[at] = 0xff;
        assert_eq!(super::without_signature(&signed), signed);
        assert_eq!(super::without_signature(super::SIGNATURE_MARK), super::SIGNATURE_MARK);
    }
}
