//! Ports of guests on the host: they open and close by themselves, for their owner only.

use crate::support::{IMAGE, Owner, has, is_root, show, skip, wait_for};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

fn sh(owner: &Owner, vm: &str, script: &str) -> String {
    owner.ok(["vm", "exec", vm, "--", "sh", "-c", script])
}

/// Answers each request with its first line, in Perl, which every Debian has.
const HTTP: &str = r#"use IO::Socket::INET; $SIG{CHLD} = 'IGNORE';
    my ($address, $port) = @ARGV;
    my $l = IO::Socket::INET->new(LocalAddr => $address, LocalPort => $port, Listen => 128, ReuseAddr => 1) or die "$!";
    while (my $c = $l->accept) { next if fork; my $line = <$c>; while (<$c>) { last if /^\r?\n$/ }
      print $c "HTTP/1.0 200 OK\r\nContent-Length: ", length $line, "\r\n\r\n$line"; close $c; exit }"#;

/// Gives everything back, and after the end of its input a last word.
const ECHO: &str = r#"use IO::Socket::INET; use IO::Select; $SIG{PIPE} = 'IGNORE';
    my $l = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => $ARGV[0], Listen => 4096, ReuseAddr => 1) or die "$!";
    my $s = IO::Select->new($l);
    while (1) { for my $c ($s->can_read) {
      if ($c == $l) { my $n = $l->accept; $s->add($n) if $n; next }
      my $len = sysread $c, my $b, 65536;
      if (!$len) { syswrite $c, 'bye'; $s->remove($c); close $c; next }
      my $at = 0; while ($at < $len) { my $w = syswrite $c, $b, $len - $at, $at; last unless defined $w; $at += $w } } }"#;

/// Starts a server, and returns its process id.
fn serve(owner: &Owner, vm: &str, program: &str, args: &[&str]) -> String {
    let script = r#"setsid perl -e "$0" "$@" </dev/null >/tmp/server.log 2>&1 & echo $!"#;
    let pid = owner.ok(["vm", "exec", vm, "--", "sh", "-c", script, program].iter().chain(args));
    pid.trim().to_owned()
}

/// Where a port is reached, once it is.
fn open(owner: &Owner, vm: &str, port: u16) -> SocketAddr {
    let mut found = None;
    wait_for("the port opens", || {
        let ports = owner.json(&["vm", "ports", "--json", "--no-probe", vm]);
        let host = ports[0]["ports"]
            .as_array()
            .unwrap()
            .iter()
            .find(|of| of["port"] == port)
            .map(|of| of["host"].clone());
        match host.as_ref().and_then(|host| host.as_str()) {
            Some(host) => {
                found = Some(host.parse().unwrap());
                Ok(())
            }
            None => Err(format!("{ports:#}{}", sh(owner, vm, "cat /tmp/server.log /proc/net/tcp"))),
        }
    });
    found.unwrap()
}

fn closed(at: SocketAddr) {
    wait_for("the port closes", || match TcpStream::connect(at) {
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

/// Fetches a page as this user; none is root, or whoever runs the tests.
fn curl(uid: Option<u32>, url: &str) -> Output {
    let mut command = match uid {
        Some(uid) => {
            let mut command = Command::new("setpriv");
            command
                .args([format!("--reuid={uid}"), format!("--regid={uid}")])
                .args(["--clear-groups", "curl"]);
            command
        }
        None => Command::new("curl"),
    };
    command.args(["-sS", "--noproxy", "*", "--max-time", "20", url]).output().unwrap()
}

#[test]
fn ports_open_and_close_by_themselves_for_their_owner_only() {
    let owner = Owner::with_store();
    // There is no network in the guest, and nothing of ssh.
    owner.ok(["vm", "create", "--name", "web", "--image", IMAGE, "--net", "none", "--publish", "45678:80"]);
    let one = serve(&owner, "web", HTTP, &["127.0.0.1", "3000"]);
    let other = serve(&owner, "web", HTTP, &["0.0.0.0", "80"]);
    let (own, low) = (open(&owner, "web", 3000), open(&owner, "web", 80));
    let address = owner.json(&["vm", "show", "--json", "web"])["address"].as_str().unwrap().to_owned();
    assert_eq!((own.to_string(), low.to_string()), (format!("{address}:3000"), format!("{address}:8080")));
    assert!(address.starts_with("127.77."), "{address}");
    assert!(owner.ok(["vm", "list"]).contains(&address));
    for at in [own, low, "127.0.0.1:45678".parse().unwrap()] {
        let got = curl(owner.uid(), &format!("http://{at}/who"));
        assert_eq!(got.stdout, b"GET /who HTTP/1.1\r\n", "{at}: {}", show(&got));
        // Root may.
        let got = curl(None, &format!("http://{at}/who"));
        assert_eq!(got.stdout, b"GET /who HTTP/1.1\r\n", "{at}: {}", show(&got));
        match owner.uid() {
            Some(uid) => {
                let got = curl(Some(uid ^ 1), &format!("http://{at}/who"));
                assert!(!got.status.success() && got.stdout.is_empty(), "{at}: {}", show(&got));
            }
            None => skip("ports_open_and_close_by_themselves: no other user without root"),
        }
    }
    let table = owner.ok(["vm", "ports", "web"]);
    for part in [
        format!("http://{own}"),
        format!("http://{low}"),
        "http://127.0.0.1:45678".to_owned(),
        "perl".to_owned(),
    ] {
        assert!(table.contains(&part), "{part}: {table}");
    }
    // No daemon is needed for any of it, and one that comes back finds it as it is.
    let daemon = owner.processes().into_iter().find(|line| line.contains("bangerd serve")).unwrap();
    let pid: i32 = daemon.split(' ').next().unwrap().parse().unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    let got = curl(owner.uid(), &format!("http://{own}/still"));
    assert_eq!(got.stdout, b"GET /still HTTP/1.1\r\n", "{}", show(&got));
    assert!(owner.ok(["vm", "ports", "web"]).contains(&format!("http://{own}")));
    sh(&owner, "web", &format!("kill {one} {other}"));
    closed(own);
    closed(low);
    // Published is published: it takes connections, and breaks them.
    assert!(TcpStream::connect("127.0.0.1:45678").is_ok());
    owner.ok(["vm", "delete", "-f", "web"]);
    closed("127.0.0.1:45678".parse().unwrap());
    closed(format!("{address}:42069").parse().unwrap());
    owner.assert_nothing_left();
}

#[test]
fn what_is_taken_on_the_host_opens_elsewhere() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "one", "--image", IMAGE, "--net", "none"]);
    let address = owner.json(&["vm", "show", "--json", "one"])["address"].as_str().unwrap().to_owned();
    // Anybody may listen there before the vm does.
    let squatter = TcpListener::bind(format!("{address}:4000")).unwrap();
    serve(&owner, "one", HTTP, &["127.0.0.1", "4000"]);
    assert_eq!(open(&owner, "one", 4000).to_string(), format!("{address}:24000"));
    drop(squatter);
    // Its address at the next start is taken, too.
    owner.ok(["vm", "stop", "one"]);
    let squatter = TcpListener::bind(format!("{address}:42069")).unwrap();
    owner.ok(["vm", "start", "one"]);
    let other = owner.json(&["vm", "show", "--json", "one"])["address"].as_str().unwrap().to_owned();
    assert_ne!(address, other);
    drop(squatter);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let publish = format!("{port}:80");
    let output = owner
        .banger(["vm", "run", "--rm", "--image", IMAGE, "--publish", &publish, "--", "true"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", show(&output));
    let said = String::from_utf8_lossy(&output.stderr);
    let expected = format!("publish port 80 at 127.0.0.1:{port}: Address already in use (os error 98)");
    assert!(said.contains(&expected), "{said}");
    owner.ok(["vm", "prune", "-f"]);
    owner.ok(["vm", "delete", "-f", "one"]);
    owner.assert_nothing_left();
}

#[test]
fn ten_thousand_connections_lose_nothing() {
    if !is_root() {
        return skip("ten_thousand_connections_lose_nothing: the tests themselves connect, as root");
    }
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "echo", "--image", IMAGE, "--net", "none"]);
    serve(&owner, "echo", ECHO, &["5000"]);
    let at = open(&owner, "echo", 5000);
    // The end of one direction is not the end of the other.
    let large: Vec<u8> = (0..4_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let stream = TcpStream::connect(at).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let (mut writer, mut reader) = (stream.try_clone().unwrap(), stream);
    let sent = large.clone();
    let sender = std::thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    reader.read_to_end(&mut back).unwrap();
    sender.join().unwrap();
    assert!(
        back.len() == large.len() + 3 && back.starts_with(&large) && back.ends_with(b"bye"),
        "{}",
        back.len()
    );
    // Who reads nothing holds nobody else up, and gets everything later.
    let slow = TcpStream::connect(at).unwrap();
    slow.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut written = 0;
    while let Ok(len) = (&slow).write(&large[written % (1 << 20)..][..65536]) {
        written += len;
        assert!(written < 64 << 20, "nothing holds it back");
    }
    drop(slow);
    let began = Instant::now();
    let threads: Vec<_> = (0..50)
        .map(|thread| {
            std::thread::spawn(move || {
                for number in 0..200 {
                    let text = format!("{thread} {number}");
                    let mut stream = TcpStream::connect(at).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
                    stream.write_all(text.as_bytes()).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                    let mut back = String::new();
                    stream.read_to_string(&mut back).unwrap_or_else(|error| panic!("{text}: {error}"));
                    assert_eq!(back, format!("{text}bye"));
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    println!("10000 connections in {:.1} s", began.elapsed().as_secs_f64());
    owner.ok(["vm", "delete", "-f", "echo"]);
    owner.assert_nothing_left();
}

/// What `dig` says: the status, the flags, and the answers.
fn dig(args: &[&str]) -> String {
    let output = Command::new("dig")
        .args(["+tries=1", "+time=5", "+noall", "+comments", "+answer"])
        .args(args)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let status = text.split("status: ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or("none");
    let flags = text.split("flags: ").nth(1).and_then(|rest| rest.split(';').next()).unwrap_or_default();
    let answers: Vec<&str> = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with(';'))
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    format!("{status} {} {}", if flags.contains("aa") { "aa" } else { "-" }, answers.join(" "))
}

#[test]
fn names_of_vms_resolve_while_they_run() {
    if !has("dig") {
        return skip("names_of_vms_resolve_while_they_run: `dig` is not installed");
    }
    let owner = Owner::with_store();
    // Another owner on this machine may have the usual port.
    let port = 42_100 + std::process::id() % 1000;
    let at = format!("127.0.0.1:{port}");
    let config = owner.home().join(".config/banger");
    owner.program("mkdir").args(["-p"]).arg(&config).status().unwrap();
    std::fs::write(config.join("config.toml"), format!("dns_listen = '{at}'\n")).unwrap();
    owner.ok(["vm", "create", "--name", "web", "--image", IMAGE, "--net", "none"]);
    let address = owner.json(&["vm", "show", "--json", "web"])["address"].as_str().unwrap().to_owned();
    let server = ["@127.0.0.1", "-p", &port.to_string()].map(str::to_owned);
    let ask = |args: &[&str]| {
        dig(&server.iter().map(String::as_str).chain(args.iter().copied()).collect::<Vec<_>>())
    };
    for how in [&["web.vm"][..], &["WEB.VM"], &["+tcp", "web.vm"], &["+noedns", "web.vm"]] {
        assert_eq!(ask(how), format!("NOERROR aa {address}"), "{how:?}");
    }
    assert_eq!(ask(&["web.vm", "AAAA"]), "NOERROR aa ");
    assert_eq!(ask(&["nobody.vm"]), "NXDOMAIN aa ");
    assert_eq!(ask(&["example.org"]), "REFUSED - ");
    if has("dnsmasq") {
        // A resolver with what `dns setup` writes.
        let recipe = owner.ok(["dns", "setup", "--resolver", "dnsmasq", "--listen", &at]);
        let line = recipe.lines().find(|line| line.starts_with("server=")).unwrap();
        let (dir, resolver) = (owner.home().join("dnsmasq.conf"), port + 1000);
        std::fs::write(
            &dir,
            format!("{line}\nno-resolv\nport={resolver}\nlisten-address=127.0.0.1\nbind-interfaces\n"),
        )
        .unwrap();
        let mut dnsmasq = Command::new("dnsmasq").args(["-k", "-C"]).arg(&dir).spawn().unwrap();
        wait_for("dnsmasq answers", || {
            let said = dig(&["@127.0.0.1", "-p", &resolver.to_string(), "web.vm"]);
            if said.ends_with(&address) { Ok(()) } else { Err(said) }
        });
        let said = dig(&["@127.0.0.1", "-p", &resolver.to_string(), "nobody.vm"]);
        dnsmasq.kill().unwrap();
        dnsmasq.wait().unwrap();
        assert!(said.starts_with("NXDOMAIN"), "{said}");
    } else {
        skip("names_of_vms_resolve_while_they_run: `dnsmasq` is not installed, so it did not ask");
    }
    owner.ok(["vm", "stop", "web"]);
    assert_eq!(ask(&["web.vm"]), "NOERROR aa ");
    owner.ok(["vm", "delete", "web"]);
    assert_eq!(ask(&["web.vm"]), "NXDOMAIN aa ");
    // Where the port is taken, everything else goes on, and doctor says who has it.
    owner.ok(["daemon", "stop"]);
    let taken = std::net::UdpSocket::bind(&at).unwrap();
    let told = owner.banger(["doctor", "--json"]).output().unwrap();
    let told = String::from_utf8_lossy(&told.stdout).into_owned();
    let expected = format!("not answered: can't listen at {at}, which ");
    assert!(told.contains(&expected), "{told}");
    drop(taken);
    owner.assert_nothing_left();
}

#[test]
fn ports_of_a_vm_of_root_are_roots() {
    if !is_root() {
        return skip("ports_of_a_vm_of_root_are_roots: not root");
    }
    let owner = Owner::root();
    owner.copy_store();
    owner.ok(["vm", "create", "--name", "rooted", "--image", IMAGE, "--net", "none"]);
    serve(&owner, "rooted", HTTP, &["127.0.0.1", "3000"]);
    let at = open(&owner, "rooted", 3000);
    let got = curl(None, &format!("http://{at}/who"));
    assert_eq!(got.stdout, b"GET /who HTTP/1.1\r\n", "{}", show(&got));
    // Nobody else, and not the user either that the vm's own processes run as.
    for uid in [1_800_000_001, 1_900_000_000] {
        let got = curl(Some(uid), &format!("http://{at}/who"));
        assert!(!got.status.success() && got.stdout.is_empty(), "{uid}: {}", show(&got));
    }
    owner.ok(["vm", "delete", "-f", "rooted"]);
    owner.assert_nothing_left();
}
