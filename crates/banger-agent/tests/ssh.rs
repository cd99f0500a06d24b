//! The agent's ssh server with OpenSSH's own programs as its clients, on an ordinary machine: no vm needed.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "a test")]

use banger_wire::bytes::ByteString;
use banger_wire::ssh::SshSpec;
use ring::signature::KeyPair as _;
use sha2::{Digest as _, Sha256};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const AGENT: &str = env!("CARGO_BIN_EXE_banger-agent");
const SEED: [u8; 32] = [5; 32];
/// No single thing may take longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client with a key, and a server that lets it in.
struct Pair {
    dir: tempfile::TempDir,
}

fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap()
}

fn said(output: &Output) -> (String, String, Option<i32>) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.code())
}

impl Pair {
    /// None, and a line that says so, without OpenSSH.
    fn new(test: &str) -> Option<Self> {
        if !has("ssh") || !has("ssh-keygen") {
            println!("skipped: {test}: there is no OpenSSH client here");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        let made = run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
        assert!(made.status.success());
        let pair = Self { dir };
        let public = std::fs::read_to_string(pair.path("key.pub")).unwrap();
        pair.serve(&public);
        std::fs::write(pair.path("known_hosts"), known_host(&SEED)).unwrap();
        let config = format!(
            "Host guest\nUser root\nProxyCommand cat '{start}' - | '{AGENT}' ssh\nIdentityFile {key}\n\
             IdentitiesOnly yes\nUserKnownHostsFile {known}\nGlobalKnownHostsFile /dev/null\n\
             StrictHostKeyChecking yes\nBatchMode yes\nLogLevel ERROR\n",
            start = pair.path("start").display(),
            key = key.display(),
            known = pair.path("known_hosts").display()
        );
        std::fs::write(pair.path("config"), config).unwrap();
        Some(pair)
    }

    /// Has the server let this key in.
    fn serve(&self, public: &str) {
        let blob = unbase64(public.split(' ').nth(1).unwrap());
        let client_key = ByteString(blob[blob.len() - 32..].to_vec());
        let spec = SshSpec { host_key: ByteString(SEED.to_vec()), client_key };
        let env = [(ByteString::from("IMAGE"), ByteString::from("says this"))];
        let start = serde_json::to_vec(&serde_json::json!({ "spec": spec, "env": env })).unwrap();
        let bytes = [&(start.len() as u32).to_be_bytes()[..], &start].concat();
        std::fs::write(self.path("start"), bytes).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(name);
        command.arg("-F").arg(self.path("config"));
        command
    }

    fn ssh(&self, args: &[&str]) -> Command {
        let mut command = self.program("ssh");
        command.args(args);
        command
    }
}

/// A line of a file of known hosts, for the host key of this seed.
fn known_host(seed: &[u8]) -> String {
    let host = ring::signature::Ed25519KeyPair::from_seed_unchecked(seed).unwrap();
    let blob = [&b"\0\0\0\x0bssh-ed25519\0\0\0\x20"[..], host.public_key().as_ref()].concat();
    format!("guest ssh-ed25519 {}\n", base64(&blob))
}

fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    assert_eq!(bytes.len() % 3, 0, "no test needs a filling");
    let groups = bytes.chunks(3).flat_map(|part| {
        let bits = u32::from(part[0]) << 16 | u32::from(part[1]) << 8 | u32::from(part[2]);
        [18, 12, 6, 0].map(|shift| LETTERS[(bits >> shift & 63) as usize] as char)
    });
    groups.collect()
}

fn unbase64(text: &str) -> Vec<u8> {
    let decoded = Command::new("base64").arg("-d").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut decoded = decoded.unwrap();
    decoded.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    decoded.wait_with_output().unwrap().stdout
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Connects to what is about to be there.
fn connect<T>(mut connect: impl FnMut() -> std::io::Result<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match connect() {
            Ok(stream) => return stream,
            Err(error) if Instant::now() > deadline => panic!("{error}"),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn commands_have_their_streams_status_and_environment() {
    let Some(pair) = Pair::new("commands_have_their_streams_status_and_environment") else { return };
    let ran = run(&mut pair.ssh(&["guest", "echo out; echo err >&2; exit 42"]));
    assert_eq!(said(&ran), ("out\n".into(), "err\n".into(), Some(42)));
    let ran =
        run(&mut pair.ssh(&["-o", "SetEnv=GIVEN=here", "guest", "echo $GIVEN, $IMAGE, $SSH_CONNECTION"]));
    assert_eq!(said(&ran).0, "here, says this, UNKNOWN 65535 UNKNOWN 65535\n");
    // A program that a signal ended: OpenSSH says so by 255.
    assert_eq!(said(&run(&mut pair.ssh(&["guest", "kill -TERM $$"]))).2, Some(255));
    // A process in the background that keeps the pipes open is not waited for.
    let begun = Instant::now();
    let ran = run(&mut pair.ssh(&["guest", "sleep 100 & echo $!"]));
    assert!(begun.elapsed() < Duration::from_secs(50));
    let left: i32 = said(&ran).0.trim().parse().unwrap();
    let left = rustix::process::Pid::from_raw(left).unwrap();
    rustix::process::kill_process(left, rustix::process::Signal::KILL).expect("it goes on");
}

#[test]
fn terminals_have_a_size_and_keys() {
    let Some(pair) = Pair::new("terminals_have_a_size_and_keys") else { return };
    let mut shell = pair.ssh(&["-tt", "guest"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let script = "stty cols 91 rows 17; stty size; test -t 2 && echo has a $TERM; exit 7\n";
    shell.stdin.as_mut().unwrap().write_all(script.as_bytes()).unwrap();
    let ended = shell.wait_with_output().unwrap();
    let (text, _, status) = said(&ended);
    assert!(text.contains("17 91") && text.contains("has a ") && status == Some(7), "{text} {status:?}");
}

#[test]
fn a_filter_of_much_data_is_exact_and_keys_change_meanwhile() {
    let Some(pair) = Pair::new("a_filter_of_much_data_is_exact_and_keys_change_meanwhile") else { return };
    // More than every buffer on the way has, in both directions, and a new key for each mebibyte.
    let bytes: Vec<u8> = (0..24_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let sum = Sha256::digest(&bytes);
    for options in [&["guest", "cat"][..], &["-o", "RekeyLimit=1M", "guest", "cat"]] {
        let mut filter = pair.ssh(options).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdin = filter.stdin.take().unwrap();
        let bytes = bytes.clone();
        let writer = std::thread::spawn(move || stdin.write_all(&bytes));
        let mut output = Vec::new();
        // Only after a while, so that the filter can't write and does not read.
        std::thread::sleep(Duration::from_millis(500));
        filter.stdout.take().unwrap().read_to_end(&mut output).unwrap();
        writer.join().unwrap().unwrap();
        assert!(filter.wait().unwrap().success());
        assert_eq!(Sha256::digest(&output), sum, "{options:?}");
    }
}

#[test]
fn a_channel_that_nobody_reads_holds_up_no_other() {
    let Some(pair) = Pair::new("a_channel_that_nobody_reads_holds_up_no_other") else { return };
    let socket = pair.path("master");
    let socket = socket.to_str().unwrap();
    let master = pair.ssh(&["-M", "-S", socket, "-N", "guest"]).stdin(Stdio::null()).spawn().unwrap();
    let _master = Killed(master);
    connect(|| UnixStream::connect(socket).map(drop));
    let zeroes = std::fs::File::open("/dev/zero").unwrap();
    let full = pair.ssh(&["-S", socket, "guest", "sleep 300"]).stdin(zeroes).stdout(Stdio::null()).spawn();
    let _full = Killed(full.unwrap());
    std::thread::sleep(Duration::from_secs(1));
    let begun = Instant::now();
    assert_eq!(said(&run(&mut pair.ssh(&["-S", socket, "guest", "echo hi"]))).0, "hi\n");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn nobody_else_comes_in() {
    let Some(pair) = Pair::new("nobody_else_comes_in") else { return };
    let (_, why, status) = said(&run(&mut pair.ssh(&["-l", "no-such-user", "guest", "true"])));
    assert_eq!(status, Some(255));
    // The banner is what `LogLevel ERROR` hides.
    assert!(why.contains("Permission denied (publickey)"), "{why}");
    let mut spoken = pair.ssh(&["-o", "LogLevel=INFO", "-l", "no-such-user", "guest", "true"]);
    assert!(said(&run(&mut spoken)).1.contains("banger: no user `no-such-user` in the image's /etc/passwd"));
    // Another host key than the known one.
    std::fs::write(pair.path("known_hosts"), known_host(&[6; 32])).unwrap();
    assert!(
        said(&run(&mut pair.ssh(&["guest", "true"]))).1.contains("REMOTE HOST IDENTIFICATION HAS CHANGED")
    );
    std::fs::write(pair.path("known_hosts"), known_host(&SEED)).unwrap();
    // Another client's key.
    let key = pair.path("key");
    std::fs::remove_file(&key).unwrap();
    run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
    let (_, why, status) = said(&run(&mut pair.ssh(&["guest", "true"])));
    assert!(why.contains("Permission denied (publickey)") && status == Some(255), "{why}");
    pair.serve(&std::fs::read_to_string(pair.path("key.pub")).unwrap());
    assert_eq!(said(&run(&mut pair.ssh(&["guest", "true"]))).2, Some(0));
}

/// Answers each connection with what it was sent, in capitals, once that is all.
fn echo_in_capitals(mut stream: impl std::io::Read + std::io::Write) {
    let mut text = [0; 5];
    stream.read_exact(&mut text).unwrap();
    stream.write_all(&text.to_ascii_uppercase()).unwrap();
}

#[test]
fn ports_and_sockets_are_forwarded_both_ways() {
    let Some(pair) = Pair::new("ports_and_sockets_are_forwarded_both_ways") else { return };
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || server.incoming().for_each(|stream| echo_in_capitals(stream.unwrap())));
    let socket = pair.path("server");
    let server = UnixListener::bind(&socket).unwrap();
    std::thread::spawn(move || server.incoming().for_each(|stream| echo_in_capitals(stream.unwrap())));
    let [local, named, remote] = [free_port(), free_port(), free_port()];
    let [to_socket, from_guest] = [pair.path("to"), pair.path("from")];
    let forwards = [
        ("-L", format!("{local}:127.0.0.1:{port}")),
        ("-L", format!("{named}:localhost:{port}")),
        ("-L", format!("{}:{}", to_socket.display(), socket.display())),
        ("-R", format!("{remote}:127.0.0.1:{port}")),
        ("-R", format!("{}:127.0.0.1:{port}", from_guest.display())),
    ];
    let mut ssh = pair.ssh(&["-N", "-o", "ExitOnForwardFailure=yes"]);
    for (flag, what) in &forwards {
        ssh.arg(flag).arg(what);
    }
    let ssh = Killed(ssh.arg("guest").stdin(Stdio::null()).spawn().unwrap());
    let ask = |mut stream: Box<dyn ReadWrite>| {
        stream.write_all(b"hello").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "HELLO");
    };
    for port in [local, named, remote] {
        ask(Box::new(connect(|| TcpStream::connect(("127.0.0.1", port)))));
    }
    for path in [&to_socket, &from_guest] {
        ask(Box::new(connect(|| UnixStream::connect(path))));
    }
    drop(ssh);
    connect(|| if from_guest.exists() { Err(std::io::Error::other("it stays")) } else { Ok(()) });
}

#[test]
fn connections_that_break_off_amid_data_end_no_other() {
    let Some(pair) = Pair::new("connections_that_break_off_amid_data_end_no_other") else { return };
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    // It talks without end.
    std::thread::spawn(move || {
        for stream in server.incoming() {
            std::thread::spawn(move || while stream.as_ref().unwrap().write_all(&[7; 65_536]).is_ok() {});
        }
    });
    let local = free_port();
    let mut ssh = pair.ssh(&["-N", "-o", "ExitOnForwardFailure=yes", "-L"]);
    ssh.arg(format!("{local}:127.0.0.1:{port}")).arg("guest").stdin(Stdio::null());
    let mut ssh = Killed(ssh.spawn().unwrap());
    let mut lasting = connect(|| TcpStream::connect(("127.0.0.1", local)));
    let mut piece = vec![0; 100_000];
    for _ in 0..100 {
        let mut hasty = TcpStream::connect(("127.0.0.1", local)).unwrap();
        hasty.read_exact(&mut piece[..1000]).unwrap();
        // With bytes unread, this resets the connection.
        drop(hasty);
        lasting.read_exact(&mut piece).unwrap();
    }
    assert!(ssh.0.try_wait().unwrap().is_none(), "ssh has ended");
}

trait ReadWrite: std::io::Read + std::io::Write {}
impl<T: std::io::Read + std::io::Write> ReadWrite for T {}

#[test]
fn the_clients_agent_is_reached() {
    let Some(pair) = Pair::new("the_clients_agent_is_reached") else { return };
    let socket = pair.path("agent");
    let agent =
        Command::new("ssh-agent").args(["-D", "-a"]).arg(&socket).stdout(Stdio::null()).spawn().unwrap();
    let _agent = Killed(agent);
    connect(|| UnixStream::connect(&socket).map(drop));
    let key = pair.path("key");
    assert!(run(Command::new("ssh-add").arg(&key).env("SSH_AUTH_SOCK", &socket)).status.success());
    let listed =
        run(pair.ssh(&["-A", "guest", "ssh-add -L; echo $SSH_AUTH_SOCK"]).env("SSH_AUTH_SOCK", &socket));
    let (text, why, _) = said(&listed);
    let public = std::fs::read_to_string(pair.path("key.pub")).unwrap();
    let mut lines = text.lines();
    let same = |line: &str| line.split(' ').nth(1).map(str::to_owned);
    assert_eq!(same(lines.next().unwrap()), same(&public), "{text}{why}");
    let forwarded = Path::new(lines.next().unwrap());
    connect(|| if forwarded.exists() { Err(std::io::Error::other("its socket stays")) } else { Ok(()) });
    let without = run(pair.ssh(&["guest", "echo $SSH_AUTH_SOCK"]).env("SSH_AUTH_SOCK", &socket));
    assert_eq!(said(&without).0, "\n");
}

/// A tree with what trees have, and its description.
fn tree(at: &Path) {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::create_dir_all(at.join("a/deep/er")).unwrap();
    std::fs::write(at.join("a/empty"), "").unwrap();
    std::fs::write(at.join("a/deep/er/large"), vec![b'x'; 3_000_001]).unwrap();
    std::fs::write(at.join("a/run"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(at.join("a/run"), std::fs::Permissions::from_mode(0o750)).unwrap();
    std::fs::write(at.join("a").join(std::ffi::OsStr::from_bytes(b"na\xefve")), "latin").unwrap();
    std::os::unix::fs::symlink("deep/er/large", at.join("a/link")).unwrap();
    for number in 0..150 {
        std::fs::write(at.join(format!("a/deep/{number}")), number.to_string()).unwrap();
    }
}

fn differences(one: &Path, other: &Path) -> String {
    said(&run(Command::new("diff").args(["-r", "--no-dereference"]).arg(one).arg(other))).0
}

#[test]
fn files_travel_by_scp_sftp_and_rsync() {
    let Some(pair) = Pair::new("files_travel_by_scp_sftp_and_rsync") else { return };
    tree(&pair.path("here"));
    let (here, there) = (pair.path("here/a"), pair.path("there"));
    let copied = run(pair.program("scp").args(["-rp"]).arg(&here).arg(format!("guest:{}", there.display())));
    assert!(copied.status.success(), "{:?}", said(&copied));
    // `scp` follows links.
    std::fs::remove_file(there.join("link")).unwrap();
    std::os::unix::fs::symlink("deep/er/large", there.join("link")).unwrap();
    assert_eq!(differences(&here, &there), "");
    let mode = |path: &Path| std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(path).unwrap());
    assert_eq!(mode(&there.join("run")), mode(&here.join("run")));
    let back = pair.path("back");
    let copied = run(pair.program("scp").args(["-rpq"]).arg(format!("guest:{}", there.display())).arg(&back));
    assert!(copied.status.success(), "{:?}", said(&copied));
    assert_eq!(said(&run(Command::new("diff").arg("-r").arg(&there).arg(&back))).0, "");

    let script = format!(
        "cd {there}\nmkdir new\nput {here}/run new/run\nchmod 600 new/run\nln new/run new/hard\nln -s run new/soft\n\
         rename new/soft new/softer\nls -l new\ndf\nrm new/hard\nreget deep/er/large {back}/large\npwd\n",
        there = there.display(),
        here = here.display(),
        back = back.display()
    );
    std::fs::write(pair.path("script"), script).unwrap();
    let ran = run(pair.program("sftp").arg("-b").arg(pair.path("script")).arg("guest"));
    let (text, why, status) = said(&ran);
    assert_eq!(status, Some(0), "{text}{why}");
    // Newer versions ask for names of owners and write the line themselves, without the number of links.
    assert!(
        text.contains("-rw-------    ") && text.contains(&format!("directory: {}", there.display())),
        "{text}"
    );
    assert_eq!(std::fs::read_link(there.join("new/softer")).unwrap(), Path::new("run"));
    assert!(!there.join("new/hard").exists() && back.join("large").exists());

    if !has("rsync") {
        println!("skipped: files_travel_by_scp_sftp_and_rsync: there is no rsync here");
        return;
    }
    let shell = format!("ssh -F {}", pair.path("config").display());
    let synced = pair.path("synced");
    for changed in ["as it was", "changed"] {
        std::fs::write(here.join("empty"), changed).unwrap();
        let to = format!("guest:{}/", synced.display());
        let ran =
            run(Command::new("rsync").args(["-a", "--delete", "-e", &shell]).arg(here.join("")).arg(to));
        assert!(ran.status.success(), "{:?}", said(&ran));
        assert_eq!(differences(&here, &synced), "");
    }
}
