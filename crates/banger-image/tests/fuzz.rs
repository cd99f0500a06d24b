//! Every decoder against damaged input, for a bounded time each: `BANGER_FUZZ_SECONDS`, 1 where it is not set.
//!
//! Each target takes a valid input apart at random places and must answer with a value or an error: no panic, no endless
//! loop, no memory beyond its limits. Runs are the same unless `BANGER_FUZZ_SEED` says otherwise; a failure prints what
//! repeats it.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a test")]

use std::io::{Read as _, Write as _};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use banger_image::debian::deb::Deb;
use banger_image::debian::dependency::{parse_groups, parse_provides};
use banger_image::debian::index::Index;
use banger_image::debian::keyring::Keyring;
use banger_image::debian::release::{Expect, Release};
use banger_image::debian::version::Version;
use banger_image::filesystem::Filesystem;
use banger_image::kernel::module::{self, Module};
use banger_image::kernel::vmlinux;
use banger_image::oci::{Archive, Digest, Limits, LocalImage, Platform, Reference};
use banger_image::tar::TarReader;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

/// No input of these lengths takes a decoder this long, on the busiest machine.
const ONE_MAX: Duration = Duration::from_secs(20);
/// What numbers in formats go wrong at.
const NUMBERS: [u64; 8] = [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];

/// Damages an input in one to eight places.
fn damage(rng: &mut StdRng, input: &mut Vec<u8>) {
    for _ in 0..rng.gen_range(1..=8) {
        let len = input.len();
        let at = if len == 0 { 0 } else { rng.gen_range(0..len) };
        let until = (at + rng.gen_range(1..=32)).min(len);
        match rng.gen_range(0..8) {
            0 if len > 0 => input[at] ^= 1 << rng.gen_range(0..8),
            1 if len > 0 => input[at] = rng.gen_range(0..=255),
            2 => input.truncate(at),
            3 => drop(input.drain(at..until)),
            4 => {
                let piece = input[at..until].to_vec();
                let to = rng.gen_range(0..=input.len());
                input.splice(to..to, piece);
            }
            5 => {
                let number = NUMBERS[rng.gen_range(0..NUMBERS.len())];
                let bytes = if rng.gen_bool(0.5) { number.to_le_bytes() } else { number.to_be_bytes() };
                let count = [1, 2, 4, 8][rng.gen_range(0..4)].min(len - at);
                input.splice(at..at + count, bytes[..count].iter().copied());
            }
            6 => {
                let number = NUMBERS[rng.gen_range(0..NUMBERS.len())].to_string();
                input.splice(at..until, number.bytes());
            }
            _ => {
                let words: [&[u8]; 8] = [b"../", b"\0", b"\n", b"\"", b"{}", b"null", b"-1", b"\xff\xfe"];
                let word = words[rng.gen_range(0..words.len())];
                input.splice(at..at, word.iter().copied());
            }
        }
    }
}

/// Runs one target for its time.
fn fuzz(name: &str, seeds: &[Vec<u8>], decode: impl Fn(&[u8])) {
    let var = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let time = Duration::from_secs(var("BANGER_FUZZ_SECONDS").unwrap_or(1));
    let base = var("BANGER_FUZZ_SEED").unwrap_or(0);
    let started = Instant::now();
    let mut round = 0;
    for input in seeds {
        decode(input);
    }
    while started.elapsed() < time {
        let mut rng = StdRng::seed_from_u64(base.wrapping_add(round));
        let mut input = seeds[rng.gen_range(0..seeds.len())].clone();
        damage(&mut rng, &mut input);
        let begun = Instant::now();
        let ended = std::panic::catch_unwind(AssertUnwindSafe(|| decode(&input)));
        let repeat = format!("repeat it with BANGER_FUZZ_SEED={}", base.wrapping_add(round));
        assert!(ended.is_ok(), "{name} panicked at an input of {} bytes; {repeat}", input.len());
        assert!(begun.elapsed() < ONE_MAX, "{name} took {:?}; {repeat}", begun.elapsed());
        round += 1;
    }
    println!("{name}: {round} inputs in {:.1} s", started.elapsed().as_secs_f64());
}

/// A tar entry with a correct checksum.
fn entry(name: &str, kind: u8, data: &[u8]) -> Vec<u8> {
    let mut header = [0; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000755");
    header[124..135].copy_from_slice(format!("{:011o}", data.len()).as_bytes());
    header[148..156].fill(b' ');
    header[156] = kind;
    header[257..265].copy_from_slice(b"ustar  \0");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut out = header.to_vec();
    out.extend_from_slice(data);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn layer() -> Vec<u8> {
    let pax = b"30 mtime=1700000000.123456789\n27 SCHILY.xattr.user.a=text\n22 GNU.sparse.size=9\n";
    let sparse = b"23 GNU.sparse.major=0\n25 GNU.sparse.map=0,2,5,1\n22 GNU.sparse.size=9\n";
    [
        entry("./", b'5', b""),
        entry("etc/", b'5', b""),
        entry("pax", b'x', pax),
        entry("etc/passwd", b'0', b"root:x:0:0::/root:/bin/sh\n"),
        entry("././@LongLink", b'L', &[b'n'; 200]),
        entry("short", b'0', b"long"),
        entry("pax", b'x', sparse),
        entry("holes", b'0', b"abc"),
        entry("etc/.wh.gone", b'0', b""),
        entry("fifo", b'6', b""),
        vec![0; 1024],
    ]
    .concat()
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// What `docker save` writes: its files have no digests, so damage gets to their readers.
fn saved() -> Vec<u8> {
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["A=b"],"Cmd":["/x"]}},"rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
        Digest::of(&layer())
    );
    let manifest = r#"[{"Config":"c.json","RepoTags":["a.example/b:1"],"Layers":["l.tar"]}]"#;
    [
        entry("c.json", b'0', config.as_bytes()),
        entry("l.tar", b'0', &layer()),
        entry("manifest.json", b'0', manifest.as_bytes()),
        vec![0; 1024],
    ]
    .concat()
}

/// A layout as an archive, whose documents are named by their digests: damage comes before those are computed.
fn layout(manifest: &[u8], index: &[u8]) -> Vec<u8> {
    let blob = |bytes: &[u8]| entry(&format!("blobs/sha256/{}", Digest::of(bytes).hex()), b'0', bytes);
    [entry("index.json", b'0', index), blob(manifest), vec![0; 1024]].concat()
}

fn load(archive: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { unpacked_bytes: 64 << 20, entries: 1000, ..Limits::default() };
    let Ok(archive) = Archive::spool(&mut &archive[..], dir.path(), &limits, &AtomicBool::new(false)) else {
        return;
    };
    let platform: Platform = "linux/amd64".parse().unwrap();
    let Ok(images) = LocalImage::in_archive(&archive, None, &platform, &limits) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    for (number, image) in images.iter().enumerate().take(2) {
        let rootfs = dir.path().join(format!("rootfs-{number}"));
        let written = runtime.block_on(image.write_to(&rootfs)).is_ok();
        assert_eq!(rootfs.exists(), written, "a file that is not whole was left");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn tar() {
    fuzz("tar", &[layer(), saved()], |input| {
        let mut reader = TarReader::new(input);
        while let Ok(Some(_)) = reader.next_entry() {
            let _ = reader.read_data(1 << 20);
        }
    });
}

#[test]
fn archives_of_images() {
    fuzz("archives of images", &[saved(), gzip(&saved()), zstd::encode_all(&saved()[..], 1).unwrap()], load);
}

#[test]
fn documents_of_images() {
    let digest = Digest::of(b"x");
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"digest":"{digest}","size":1}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar+gzip","digest":"{digest}","size":1}}]}}"#
    );
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"{digest}","size":9,"platform":{{"os":"linux","architecture":"amd64","variant":"v2"}}}}]}}"#
    );
    fuzz("documents of images", &[manifest.into_bytes(), index.into_bytes()], |input| {
        let named = |size: usize| {
            let digest = Digest::of(input);
            format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{digest}","size":{size}}}]}}"#)
        };
        load(&layout(input, named(input.len()).as_bytes()));
        load(&layout(b"{}", input));
    });
}

#[test]
fn names_of_images() {
    let seeds = [
        "docker.io/library/debian:12",
        "localhost:5000/a/b@sha256:",
        "linux/arm/v7",
        &Digest::of(b"").to_string(),
    ];
    let seeds: Vec<Vec<u8>> = seeds.iter().map(|seed| seed.as_bytes().to_vec()).collect();
    fuzz("names of images", &seeds, |input| {
        let text = text(input);
        if let Ok(reference) = text.parse::<Reference>() {
            assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
        }
        let _ = (text.parse::<Digest>(), text.parse::<Platform>());
    });
}

#[test]
fn filesystems() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ext4");
    banger_image::ext4::format_empty(&path, 128 << 20, [1; 16]).unwrap();
    let mut ext4 = vec![0; 4096];
    std::fs::File::open(&path).unwrap().read_exact(&mut ext4).unwrap();
    let mut erofs = vec![0; 4096];
    erofs[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
    let squashfs = [&b"hsqs"[..], &[4; 4092]].concat();
    fuzz("filesystems", &[ext4, erofs, squashfs], |input| {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(input).unwrap();
        let _ = Filesystem::detect(&file);
    });
}

/// The smallest ELF file of a kind, with a section of strings.
fn elf(kind: u8) -> Vec<u8> {
    let mut file = vec![0; 64 + 64 * 3 + 32];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    (file[16], file[18], file[20]) = (kind, 62, 1);
    (file[40], file[52], file[58], file[60], file[62]) = (64, 64, 64, 3, 2);
    file[64 + 64 * 3..][..21].copy_from_slice(b"depends=a,b\0alias=c-d");
    file
}

#[test]
fn kernels() {
    let mut bzimage = vec![0; 1024];
    bzimage[0x1f1] = 1;
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    let payload = gzip(&elf(2));
    bzimage[0x24c] = payload.len() as u8;
    bzimage.extend(payload);
    let lz4 = b"\x02\x21\x4c\x18\x06\0\0\0\x14a\x01\0\x10b".to_vec();
    let zstd = zstd::encode_all(&elf(2)[..], 1).unwrap();
    fuzz("kernels", &[bzimage, lz4, zstd, elf(2), b"MZ\0\0zimg\x10\0\0\0\x10\0\0\0".to_vec()], |input| {
        let _ = vmlinux::extract(input);
    });
}

#[test]
fn modules() {
    fuzz("modules", &[elf(1), gzip(&elf(1)), zstd::encode_all(&elf(1)[..], 1).unwrap()], |input| {
        for name in ["a.ko", "a.ko.gz", "a.ko.xz", "a.ko.zst"] {
            if let Ok(file) = module::unpack(name, input) {
                let _ = Module::parse(name, module::without_signature(&file));
            }
        }
    });
}

#[test]
fn debian_packages() {
    let member = |name: &str, data: &[u8]| {
        let mut out =
            format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, "100644", data.len()).into_bytes();
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(2), b'\n');
        out
    };
    let control = [entry("./control", b'0', b"Package: a\nVersion: 1\n"), vec![0; 1024]].concat();
    let package = [
        b"!<arch>\n".to_vec(),
        member("debian-binary", b"2.0\n"),
        member("control.tar.gz", &gzip(&control)),
        member("data.tar.gz", &gzip(&layer())),
    ]
    .concat();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.deb");
    fuzz("Debian packages", &[package], |input| {
        std::fs::write(&path, input).unwrap();
        read_deb(&path);
    });
}

fn read_deb(path: &Path) {
    let Ok(deb) = Deb::open(path) else { return };
    let _ = deb.control();
    let mut reader = TarReader::new(deb.data());
    while let Ok(Some(_)) = reader.next_entry() {
        let _ = reader.read_data(1 << 20);
    }
}

#[test]
fn debian_indexes() {
    let index = "Package: a\nVersion: 1:2.0-1\nArchitecture: amd64\nDepends: b (>= 1) | c, d [amd64]\nProvides: e (= 1)\n\
                 Filename: pool/a.deb\nSize: 9\nSHA256: 0000000000000000000000000000000000000000000000000000000000000000\n\
                 Essential: yes\n\nPackage: b\nVersion: 2~rc1+b1\n\n";
    let release = "Origin: Debian\nSuite: stable\nCodename: bookworm\nDate: Sat, 01 Jan 2000 00:00:00 UTC\nSHA256:\n \
                   0000000000000000000000000000000000000000000000000000000000000000 9 main/Packages.xz\n";
    fuzz(
        "Debian indexes",
        &[index.into(), release.into(), b"b (>= 1:2~3) | c [!amd64], d".to_vec()],
        |input| {
            let text = text(input);
            let mut packages = Index::default();
            packages.add("http://mirror.example/debian", text.clone());
            let _ = (packages.best("a"), packages.best("b"), packages.providers("e"), packages.essential());
            let _ = (parse_groups(&text), parse_provides(&text), Version::parse(&text));
            let expect = Expect { suite: "bookworm", now: 0, check_valid_until: true };
            let _ = Release::parse(&text, &expect);
        },
    );
}

#[test]
fn debian_signatures() {
    let keyrings = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
    let Ok(keyring) = std::fs::read(keyrings) else {
        println!("skipped: fuzzing of signatures: no keyring of Debian here");
        return;
    };
    let signed = b"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\nOrigin: Debian\n-----BEGIN PGP SIGNATURE-----\n\n\
                   iQEzBAEBCAAdFiEEAAAAAAAAAAAAAAAAAAAAAAAAAAAFAmAAAAAACgkQAAAAAAAA\n=AAAA\n-----END PGP SIGNATURE-----\n";
    let good = Keyring::from_bytes("good", &keyring).unwrap();
    fuzz("Debian signatures", &[signed.to_vec()], |input| {
        let _ = good.verify(input);
    });
    fuzz("Debian keyrings", &[keyring], |input| {
        let _ = Keyring::from_bytes("damaged", input);
    });
}
