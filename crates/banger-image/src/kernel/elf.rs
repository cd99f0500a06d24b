//! The little of ELF that kernels and modules need: 64-bit, little-endian, bounds checked, borrowed.

/// What every ELF file starts with.
pub(crate) const MAGIC: &[u8; 4] = b"\x7fELF";

const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
const ET_REL: u16 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const SHT_NOBITS: u32 = 8;
const SHT_SYMTAB: u32 = 2;
const PT_LOAD: u32 = 1;
/// Sections looked at; modules have below 200, so a header that claims more is damaged.
const SECTIONS_MAX: usize = 4096;

fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(data.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(data.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn usize_at(data: &[u8], at: usize) -> Option<usize> {
    let word = u64::from_le_bytes(data.get(at..at.checked_add(8)?)?.try_into().ok()?);
    usize::try_from(word).ok()
}

/// The file type and machine of a 64-bit little-endian ELF file.
fn identify(file: &[u8]) -> Option<(u16, u16)> {
    if !file.starts_with(MAGIC) || file.get(4..6)? != [2, 1] {
        return None;
    }
    Some((u16_at(file, 16)?, u16_at(file, 18)?))
}

/// Checks that a file is a whole executable with something to load, for a machine we boot.
pub(crate) fn check_executable(file: &[u8]) -> Result<(), &'static str> {
    let (kind, machine) = identify(file).ok_or("it is not a 64-bit little-endian ELF file")?;
    if kind != ET_EXEC && kind != ET_DYN {
        return Err("it is not an executable");
    }
    if machine != EM_X86_64 && machine != EM_AARCH64 {
        return Err("it is for another kind of machine");
    }
    let mut loads = false;
    let headers = || -> Option<(usize, usize, usize)> {
        Some((usize_at(file, 32)?, u16_at(file, 54)?.into(), u16_at(file, 56)?.into()))
    };
    let (table, size, count) = headers().ok_or("its header is truncated")?;
    for n in 0..count {
        let segment = || -> Option<(u32, usize)> {
            let at = table.checked_add(n.checked_mul(size)?)?;
            let end =
                usize_at(file, at.checked_add(8)?)?.checked_add(usize_at(file, at.checked_add(32)?)?)?;
            Some((u32_at(file, at)?, end))
        };
        let (kind, end) = segment().ok_or("its program headers are damaged")?;
        if kind == PT_LOAD {
            if end > file.len() {
                return Err("it is truncated");
            }
            loads = true;
        }
    }
    if loads { Ok(()) } else { Err("it has nothing to load") }
}

#[derive(Debug, Clone, Copy)]
struct Section<'a> {
    name: &'a [u8],
    kind: u32,
    link: usize,
    data: &'a [u8],
}

/// A parsed relocatable file: a kernel module.
#[derive(Debug)]
pub(crate) struct Object<'a> {
    sections: Vec<Section<'a>>,
}

impl<'a> Object<'a> {
    /// Parses the section headers; `None` for anything that isn't a whole module.
    pub(crate) fn parse(file: &'a [u8]) -> Option<Self> {
        let (kind, _) = identify(file)?;
        let (table, size) = (usize_at(file, 40)?, usize::from(u16_at(file, 58)?));
        let (count, names) = (usize::from(u16_at(file, 60)?), usize::from(u16_at(file, 62)?));
        if kind != ET_REL || count > SECTIONS_MAX || names >= count || size < 64 {
            return None;
        }
        let header = |n: usize| file.get(table.checked_add(n * size)?..)?.get(..64);
        let body = |header: &[u8]| -> Option<&'a [u8]> {
            if u32_at(header, 4)? == SHT_NOBITS {
                return Some(&[]);
            }
            let start = usize_at(header, 24)?;
            file.get(start..start.checked_add(usize_at(header, 32)?)?)
        };
        let strings = body(header(names)?)?;
        let sections = (0..count)
            .map(|n| {
                let header = header(n)?;
                Some(Section {
                    name: c_string(strings.get(u32_at(header, 0)? as usize..)?),
                    kind: u32_at(header, 4)?,
                    link: u32_at(header, 40)? as usize,
                    data: body(header)?,
                })
            })
            .collect::<Option<Vec<_>>>()?;
        Some(Self { sections })
    }

    /// Returns the content of the first section of that name.
    pub(crate) fn section(&self, name: &str) -> Option<&'a [u8]> {
        self.sections.iter().find(|s| s.name == name.as_bytes()).map(|s| s.data)
    }

    /// Returns the names in the symbol table.
    pub(crate) fn symbol_names(&self) -> impl Iterator<Item = &'a [u8]> {
        let table = self.sections.iter().find(|s| s.kind == SHT_SYMTAB);
        let strings = table.and_then(|t| self.sections.get(t.link)).map_or(&[][..], |s| s.data);
        let entries = table.map_or(&[][..], |t| t.data).chunks_exact(24);
        entries.filter_map(move |entry| Some(c_string(strings.get(u32_at(entry, 0)? as usize..)?)))
    }
}

fn c_string(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len())]
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Builds a small executable for tests.
    pub(crate) fn executable() -> Vec<u8> {
        let mut file = vec![0u8; 512];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[16..18].copy_from_slice(&ET_EXEC.to_le_bytes());
        file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        file[32..40].copy_from_slice(&64u64.to_le_bytes());
        file[54..56].copy_from_slice(&56u16.to_le_bytes());
        file[56..58].copy_from_slice(&1u16.to_le_bytes());
        file[64..68].copy_from_slice(&PT_LOAD.to_le_bytes());
        file[72..80].copy_from_slice(&256u64.to_le_bytes());
        file[96..104].copy_from_slice(&256u64.to_le_bytes());
        file
    }

    /// Builds a module for tests, with its `.modinfo` and the symbols it exports.
    pub(crate) fn module(modinfo: &[&str], exports: &[&str]) -> Vec<u8> {
        let names = b"\0.modinfo\0.symtab\0.strtab\0.shstrtab\0";
        let info: Vec<u8> = modinfo.iter().flat_map(|line| line.bytes().chain([0])).collect();
        let (mut strings, mut symbols) = (vec![0u8], vec![0u8; 24]);
        for export in exports {
            let mut symbol = [0u8; 24];
            symbol[..4].copy_from_slice(&(strings.len() as u32).to_le_bytes());
            symbols.extend_from_slice(&symbol);
            strings.extend_from_slice(format!("__crc_{export}\0").as_bytes());
        }
        let bodies: [(usize, u32, u32, &[u8]); 5] = [
            (0, 0, 0, &[]),
            (1, 1, 0, &info),
            (10, SHT_SYMTAB, 3, &symbols),
            (18, 3, 0, &strings),
            (26, 3, 0, names),
        ];
        let mut file = vec![0u8; 64];
        let mut headers = Vec::new();
        for (name, kind, link, body) in bodies {
            let mut header = [0u8; 64];
            header[..4].copy_from_slice(&(name as u32).to_le_bytes());
            header[4..8].copy_from_slice(&kind.to_le_bytes());
            header[24..32].copy_from_slice(&(file.len() as u64).to_le_bytes());
            header[32..40].copy_from_slice(&(body.len() as u64).to_le_bytes());
            header[40..44].copy_from_slice(&link.to_le_bytes());
            headers.extend_from_slice(&header);
            file.extend_from_slice(body);
        }
        let table = file.len() as u64;
        file.extend_from_slice(&headers);
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[16..18].copy_from_slice(&ET_REL.to_le_bytes());
        file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
        file[40..48].copy_from_slice(&table.to_le_bytes());
        file[58..60].copy_from_slice(&64u16.to_le_bytes());
        file[60..62].copy_from_slice(&5u16.to_le_bytes());
        file[62..64].copy_from_slice(&4u16.to_le_bytes());
        file
    }

    #[test]
    fn executables() {
        assert_eq!(check_executable(&executable()), Ok(()));
        let file = executable();
        for cut in [3, 20, 60, 70, 110, 500] {
            assert!(check_executable(&file[..cut]).is_err(), "{cut}");
        }
        assert!(check_executable(&module(&[], &[])).is_err());
    }

    #[test]
    fn modules() {
        let file = module(&["depends=a,b", "alias=x"], &["foo", "bar"]);
        let object = Object::parse(&file).unwrap();
        assert_eq!(object.section(".modinfo").unwrap(), b"depends=a,b\0alias=x\0");
        let names: Vec<_> = object.symbol_names().collect();
        assert_eq!(names, [&b""[..], b"__crc_foo", b"__crc_bar"]);
        for cut in 0..file.len() {
            if let Some(object) = Object::parse(&file[..cut]) {
                let _ = object.symbol_names().count();
            }
        }
    }
}
