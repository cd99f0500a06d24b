//! From a distribution's compressed kernel to the plain one that starts fastest.
//!
//! x86: the payload of a bzImage is an ELF file; an emulated machine boots it half a second sooner than the bzImage.
//! arm64 has no ELF to boot: the plain `Image` is the result, whether it came plain, gzipped or as an EFI zboot file.

use std::io::{self, Read};

use flate2::read::GzDecoder;
use lzma_rust2::XzReader;
use thiserror::Error;

use super::elf;

/// The largest kernel accepted, unpacked; Debian's is 60 MB.
const KERNEL_MAX: u64 = 512 << 20;
/// Memory the xz decoder may use, in KiB; kernels use a 32 MiB dictionary.
const XZ_MEMORY_KIB: u32 = 192 << 10;
/// Places that look like the start of a compressed stream and are tried, when there is no header to say where it is.
const GUESSES_MAX: usize = 64;

/// A kernel file can't be used.
#[derive(Debug, Error)]
pub enum VmlinuxError {
    /// Neither a plain nor a compressed kernel.
    #[error("no kernel found in the file: it is neither an ELF vmlinux, a bzImage, nor an arm64 Image")]
    Unrecognised,
    /// The compressed part is damaged or of an unknown kind.
    #[error("could not unpack the kernel's {format} payload")]
    Payload {
        /// The compression.
        format: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// What was unpacked isn't a kernel.
    #[error("the unpacked kernel is not valid: {0}")]
    Invalid(&'static str),
}

/// Returns the plain kernel contained in `file`, checked to be one.
pub fn extract(file: &[u8]) -> Result<Vec<u8>, VmlinuxError> {
    if is_plain(file) {
        check(file)?;
        return Ok(file.to_vec());
    }
    if let Some(payload) = header_payload(file) {
        let kernel = decompress(payload)?;
        check(&kernel)?;
        return Ok(kernel);
    }
    // No header tells where the payload is: try whatever looks like the beginning of one.
    let starts = (0..file.len()).filter(|at| Format::detect(&file[*at..]).is_some()).take(GUESSES_MAX);
    for start in starts {
        if let Ok(kernel) = decompress(&file[start..])
            && check(&kernel).is_ok()
        {
            return Ok(kernel);
        }
    }
    Err(VmlinuxError::Unrecognised)
}

fn is_plain(file: &[u8]) -> bool {
    file.starts_with(elf::MAGIC) || is_arm64_image(file)
}

fn is_arm64_image(file: &[u8]) -> bool {
    file.get(56..60) == Some(b"ARM\x64")
}

fn check(kernel: &[u8]) -> Result<(), VmlinuxError> {
    if is_arm64_image(kernel) {
        return Ok(());
    }
    elf::check_executable(kernel).map_err(VmlinuxError::Invalid)
}

/// Finds the payload through the boot header of x86, or that of an EFI zboot image.
fn header_payload(file: &[u8]) -> Option<&[u8]> {
    let u32_at = |at: usize| Some(u32::from_le_bytes(file.get(at..at + 4)?.try_into().ok()?) as usize);
    if file.get(0x202..0x206) == Some(b"HdrS") {
        // Offsets are relative to the protected-mode part, which follows the real-mode sectors.
        let sectors = match *file.get(0x1f1)? {
            0 => 4,
            n => usize::from(n),
        };
        let start = ((sectors + 1) * 512).checked_add(u32_at(0x248)?)?;
        return file.get(start..start.checked_add(u32_at(0x24c)?)?);
    }
    if file.starts_with(b"MZ") && file.get(4..8) == Some(b"zimg") {
        let start = u32_at(8)?;
        return file.get(start..start.checked_add(u32_at(12)?)?);
    }
    None
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Gzip,
    Xz,
    Zstd,
    Lz4,
}

impl Format {
    fn detect(data: &[u8]) -> Option<Self> {
        let known: [(&[u8], Self); 4] = [
            (b"\x1f\x8b\x08", Self::Gzip),
            (b"\xfd7zXZ\0", Self::Xz),
            (b"\x28\xb5\x2f\xfd", Self::Zstd),
            (b"\x02\x21\x4c\x18", Self::Lz4),
        ];
        known.iter().find(|(magic, _)| data.starts_with(magic)).map(|(_, format)| *format)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }
}

/// Unpacks a payload; bytes after the compressed stream (the kernel build appends a size) are ignored.
fn decompress(payload: &[u8]) -> Result<Vec<u8>, VmlinuxError> {
    let format = Format::detect(payload).ok_or(VmlinuxError::Payload {
        format: "unknown",
        source: io::Error::new(io::ErrorKind::Unsupported, "its compression is not gzip, xz, zstd or lz4"),
    })?;
    let unpacked = match format {
        Format::Gzip => read_bounded(GzDecoder::new(payload)),
        Format::Xz => read_bounded(XzReader::new_mem_limit(payload, false, XZ_MEMORY_KIB)),
        Format::Zstd => zstd::stream::read::Decoder::with_buffer(payload)
            .and_then(|decoder| read_bounded(decoder.single_frame())),
        Format::Lz4 => unpack_lz4(payload),
    };
    unpacked.map_err(|source| VmlinuxError::Payload { format: format.name(), source })
}

fn read_bounded(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    reader.take(KERNEL_MAX + 1).read_to_end(&mut out)?;
    if out.len() as u64 > KERNEL_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(out)
}

/// Unpacks lz4's legacy frame, the only one the kernel build writes: blocks of up to 8 MiB, each with its length.
fn unpack_lz4(payload: &[u8]) -> io::Result<Vec<u8>> {
    const BLOCK_MAX: usize = 8 << 20;
    let bad = || io::Error::from(io::ErrorKind::InvalidData);
    let mut out = Vec::new();
    let mut rest = payload.get(4..).unwrap_or(&[]);
    while let Some((length, tail)) = rest.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        // The last word is the appended size, which isn't followed by that much data.
        let Some(block) = tail.get(..length).filter(|_| length > 0) else { break };
        let before = out.len();
        unpack_lz4_block(block, &mut out, before + BLOCK_MAX).ok_or_else(bad)?;
        if out.len() as u64 > KERNEL_MAX {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        rest = &tail[length..];
    }
    Ok(out)
}

fn unpack_lz4_block(mut block: &[u8], out: &mut Vec<u8>, limit: usize) -> Option<()> {
    let origin = out.len();
    let long = |nibble: u8, block: &mut &[u8]| -> Option<usize> {
        let mut length = usize::from(nibble);
        if nibble == 15 {
            loop {
                let (byte, tail) = block.split_first()?;
                *block = tail;
                length += usize::from(*byte);
                if *byte != 255 {
                    break;
                }
            }
        }
        Some(length)
    };
    while let Some((token, tail)) = block.split_first() {
        block = tail;
        let literals = long(token >> 4, &mut block)?;
        out.extend_from_slice(block.get(..literals)?);
        block = &block[literals..];
        if block.is_empty() {
            break;
        }
        let (offset, tail) = block.split_first_chunk::<2>()?;
        block = tail;
        let offset = usize::from(u16::from_le_bytes(*offset));
        let length = long(token & 15, &mut block)? + 4;
        if offset == 0 || offset > out.len() - origin || out.len() + length > limit {
            return None;
        }
        // The match may overlap what it produces, so it is copied byte by byte.
        for _ in 0..length {
            out.push(out[out.len() - offset]);
        }
    }
    (out.len() <= limit).then_some(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::super::elf::tests::executable;
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut file = vec![0u8; 1024];
        file[0x1f1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        file.extend_from_slice(&[0xcc; 16]);
        file.extend_from_slice(payload);
        file.extend_from_slice(&[0xcc; 100]);
        file
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    /// lz4 with literals only, and one overlapping match at the end of the zeroes.
    fn lz4(data: &[u8]) -> Vec<u8> {
        let mut block = vec![0xf0];
        let mut rest = data.len() - 15;
        while rest >= 255 {
            block.push(255);
            rest -= 255;
        }
        block.push(rest as u8);
        block.extend_from_slice(data);
        let mut out = b"\x02\x21\x4c\x18".to_vec();
        out.extend_from_slice(&(block.len() as u32).to_le_bytes());
        out.extend_from_slice(&block);
        out
    }

    #[test]
    fn unpacks_every_format() {
        let kernel = executable();
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(&kernel).unwrap();
        let xz = xz.finish().unwrap();
        let payloads = [gzip(&kernel), xz, zstd::stream::encode_all(&kernel[..], 1).unwrap(), lz4(&kernel)];
        for mut payload in payloads {
            payload.extend_from_slice(&(kernel.len() as u32).to_le_bytes());
            assert_eq!(extract(&bzimage(&payload)).unwrap(), kernel);
            // The same without a header to say where it is.
            let mut bare = vec![0; 777];
            bare.extend_from_slice(&payload);
            assert_eq!(extract(&bare).unwrap(), kernel);
        }
        assert_eq!(extract(&kernel).unwrap(), kernel);
    }

    #[test]
    fn lz4_matches_may_overlap() {
        let mut out = Vec::new();
        // One literal `a`, then a match of 8 at distance 1, then the literal `b`.
        unpack_lz4_block(&[0x14, b'a', 1, 0, 0x10, b'b'], &mut out, 100).unwrap();
        assert_eq!(out, b"aaaaaaaaab");
        assert!(unpack_lz4_block(&[0x14, b'a', 2, 0], &mut Vec::new(), 100).is_none());
        assert!(unpack_lz4_block(&[0x1f, b'a', 1, 0, 255, 255], &mut Vec::new(), 100).is_none());
        assert!(unpack_lz4_block(&[0x14, b'a', 1, 0], &mut Vec::new(), 5).is_none());
    }

    #[test]
    fn refuses_what_is_no_kernel() {
        assert!(matches!(extract(b""), Err(VmlinuxError::Unrecognised)));
        assert!(matches!(extract(&[0; 4096]), Err(VmlinuxError::Unrecognised)));
        assert!(matches!(extract(&bzimage(b"what is this")), Err(VmlinuxError::Payload { .. })));
        assert!(matches!(extract(&bzimage(&gzip(b"no elf"))), Err(VmlinuxError::Invalid(_))));
        let cut = bzimage(&gzip(&executable()));
        assert!(extract(&cut[..1060]).is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000), magic in 0usize..6) {
            let mut bytes = bytes;
            let magics: [&[u8]; 6] = [b"", b"\x7fELF", b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x02\x21\x4c\x18", b"MZ\0\0zimg"];
            bytes.splice(0..0, magics[magic].iter().copied());
            let _ = extract(&bytes);
        }
    }
}
