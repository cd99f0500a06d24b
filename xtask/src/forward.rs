//! Bytes into a vm and out of it: commands' streams, `vm cp`, forwarded ports and ssh, each against the plainest stream
//! there is by the same kind of channel. What a program in the guest costs by reading from a pipe is shown beside it: that
//! is part of every command's stream.

use crate::bare::RawChannel;
use crate::bench::spread;
use crate::programs::{Built, Profile, Store};
use anyhow::{Context as _, bail};
use std::cell::RefCell;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

const IMAGE: &str = "debian-bookworm-slim";
const LEN: usize = 64 << 20;
/// Runs of each kind, in turn; the median counts.
const RUNS: usize = 5;
/// How long the port may take to open.
const OPENS: Duration = Duration::from_secs(60);
const PORT: u16 = 5000;
/// Sends as much as it is asked for in a line, else takes what comes, and says so at its end.
const SERVER: &str = r#"use IO::Socket::INET; $SIG{PIPE} = 'IGNORE';
    my $l = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 5000, Listen => 9, ReuseAddr => 1) or die;
    my $z = "\0" x 65536;
    while (my $c = $l->accept) { sysread $c, my $how, 1;
      if ($how eq 'g') { for (1 .. 1024) { my $at = 0;
        while ($at < 65536) { my $n = syswrite $c, $z, 65536 - $at, $at; last unless $n; $at += $n } } }
      else { 1 while sysread $c, my $b, 65536; syswrite $c, 'k' }
      close $c }"#;

/// Measures all of it in one vm.
pub(crate) fn run(profile: Profile) -> anyhow::Result<()> {
    let store = Built::new(profile)?.store(&[IMAGE])?;
    store.ok(&["vm", "create", "--name", "bench", "--image", IMAGE, "--net", "none"])?;
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("file");
    std::fs::write(&file, vec![7; LEN])?;
    let here = file.to_str().context("a name")?;
    let back = dir.path().join("back");
    let there = back.to_str().context("a name")?;
    store.ok(&[
        "vm",
        "exec",
        "bench",
        "--",
        "sh",
        "-c",
        "setsid perl -e \"$0\" </dev/null >/dev/null 2>&1 &",
        SERVER,
    ])?;
    let at = opened(&store)?;
    let raw = RefCell::new(RawChannel::open(&store)?);
    let dd = ["dd", "if=/dev/zero", "bs=64k", "count=1024", "status=none"];
    let exec = [&["vm", "exec", "bench", "--"][..], &dd].concat();
    let ssh = [&["vm", "ssh", "bench", "--"][..], &dd].concat();
    let into: [(&str, &dyn Fn() -> anyhow::Result<()>); 6] = [
        ("the bare channel", &|| raw.borrow_mut().send(LEN, false)),
        ("a pipe there", &|| raw.borrow_mut().send(LEN, true)),
        ("vm exec", &|| {
            stream(&store, &["vm", "exec", "bench", "--", "sh", "-c", "cat > /dev/null"], Some(&file))
        }),
        ("vm cp", &|| store.ok(&["vm", "cp", here, "bench:/root/file"]).map(drop)),
        ("a port", &|| send(&at)),
        ("vm ssh", &|| stream(&store, &["vm", "ssh", "bench", "--", "cat > /dev/null"], Some(&file))),
    ];
    let out_of: [(&str, &dyn Fn() -> anyhow::Result<()>); 6] = [
        ("the bare channel", &|| raw.borrow_mut().fetch(LEN, false)),
        ("a pipe there", &|| raw.borrow_mut().fetch(LEN, true)),
        ("vm exec", &|| stream(&store, &exec, None)),
        ("vm cp", &|| store.ok(&["vm", "cp", "bench:/root/file", there]).map(drop)),
        ("a port", &|| fetch(&at)),
        ("vm ssh", &|| stream(&store, &ssh, None)),
    ];
    for (way, kinds) in [("into the vm", into), ("out of it", out_of)] {
        let mut times: [Vec<f64>; 6] = Default::default();
        for _ in 0..RUNS {
            for (times, (_, work)) in times.iter_mut().zip(&kinds) {
                let started = Instant::now();
                work()?;
                times.push(started.elapsed().as_secs_f64());
            }
        }
        let [bare, ours @ ..] = &times;
        let rate: Vec<f64> = bare.iter().map(|time| (LEN >> 20) as f64 / time).collect();
        println!("{way}: {}    {}", kinds[0].0, spread(&rate, "MiB/s"));
        for ((what, _), ours) in kinds.iter().skip(1).zip(ours) {
            let ratios: Vec<f64> = bare.iter().zip(ours).map(|(bare, ours)| bare / ours).collect();
            println!("  {what:12} of that   {}", spread(&ratios, "x"));
        }
    }
    store.ok(&["vm", "delete", "-f", "bench"]).map(drop)
}

fn opened(store: &Store) -> anyhow::Result<String> {
    let deadline = Instant::now() + OPENS;
    while Instant::now() < deadline {
        let output = store.ok(&["vm", "ports", "--json", "--no-probe", "bench"])?;
        let vms: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let mut ports = vms[0]["ports"].as_array().into_iter().flatten();
        if let Some(host) = ports.find(|port| port["port"] == PORT).and_then(|port| port["host"].as_str()) {
            return Ok(host.to_owned());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    bail!("port {PORT} did not open")
}

/// Runs a command in the vm, with a file as its input or with output that nobody keeps.
fn stream(store: &Store, args: &[&str], input: Option<&Path>) -> anyhow::Result<()> {
    let input = input.map(std::fs::File::open).transpose()?;
    let mut command = store.banger(args);
    command.stdin(input.map_or_else(Stdio::null, Stdio::from)).stdout(Stdio::null());
    if command.status()?.success() { Ok(()) } else { bail!("{args:?} failed") }
}

fn send(at: &str) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(at)?;
    let chunk = [7; 65536];
    stream.write_all(b"p")?;
    (0..LEN / chunk.len()).try_for_each(|_| stream.write_all(&chunk))?;
    stream.shutdown(Shutdown::Write)?;
    let mut said = Vec::new();
    stream.read_to_end(&mut said)?;
    if said == b"k" { Ok(()) } else { bail!("the port said {said:?}") }
}

fn fetch(at: &str) -> anyhow::Result<()> {
    let mut stream = TcpStream::connect(at)?;
    stream.write_all(b"g")?;
    let len = std::io::copy(&mut stream, &mut std::io::sink())?;
    if len == LEN as u64 { Ok(()) } else { bail!("{len} bytes came") }
}
