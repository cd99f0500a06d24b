//! Vms that reach each other: by name, in the network that they were put in, and in no other.

use crate::support::{IMAGE, Owner, is_root, show, skip, wait_for};

/// What each of them listens with, in Perl, which every Debian has: TCP on port 80, which answers with the guest's name
/// and whom it sees, and UDP over both families on port 81, which writes down what begins like a path.
const SERVER: &str = r#"use Socket; $| = 1; my ($name) = @ARGV;
    my @u; for my $f (PF_INET, PF_INET6) { socket(my $u, $f, SOCK_DGRAM, 0) or die "$!"; setsockopt $u, SOL_SOCKET, SO_BROADCAST, 1;
      setsockopt $u, Socket::IPPROTO_IPV6(), Socket::IPV6_V6ONLY(), 1 if $f == PF_INET6;
      bind($u, $f == PF_INET ? sockaddr_in(81, INADDR_ANY) : Socket::pack_sockaddr_in6(81, Socket::inet_pton(PF_INET6, '::'))) or die "$!"; push @u, $u }
    socket(my $l, PF_INET, SOCK_STREAM, 0); setsockopt $l, SOL_SOCKET, SO_REUSEADDR, 1; bind($l, sockaddr_in(80, INADDR_ANY)) or die "$!"; listen $l, 20;
    open my $heard, '>>', '/root/heard'; $heard->autoflush(1); open my $up, '>', '/root/up'; close $up;
    while (1) { my $r = ''; vec($r, fileno $_, 1) = 1 for @u, $l; select($r, undef, undef, undef);
      for my $u (@u) { next unless vec $r, fileno $u, 1; my $from = recv $u, my $text, 9000, 0; my $len = length $text;
        print $heard substr($text, 0, 20), " $len\n" if $text =~ m{^/}; send $u, "$name\n", 0, $from if $text eq "hi\n" }
      if (vec $r, fileno $l, 1) { my $peer = accept my $c, $l or next; my (undef, $from) = sockaddr_in $peer;
        syswrite $c, "$name hears " . inet_ntoa($from) . "\n"; close $c } }"#;

/// Asks one for an echo, as `ping` does.
const PING: &str = r#"use Socket; my $to = inet_aton($ARGV[0]) or die "no such name\n";
    socket(my $s, PF_INET, SOCK_RAW, 1) or die "$!"; my $p = pack "CCnnn", 8, 0, 0, 7, 1; my $sum = 0; $sum += $_ for unpack "n*", $p;
    substr($p, 2, 2) = pack "n", ~$sum & 0xffff; send $s, $p, 0, sockaddr_in(0, $to);
    while (1) { my $from = recv $s, my $a, 1500, 0; my (undef, $f) = sockaddr_in $from; next if unpack("x20 C", $a) != 0; print inet_ntoa($f), "\n"; last }"#;

/// Sends a frame that the guest's kernel has no part in: `SOURCE DESTINATION TEXT [MORE [OPTIONS]]`.
const RAW: &str = r#"use Socket; my ($from, $to, $text, $more, $options) = @ARGV; my $v6 = $from =~ /:/;
    my ($s, $d) = map { Socket::inet_pton($v6 ? AF_INET6 : AF_INET, $_) or die "$_" } $from, $to; $text .= 'x' x ($more || 0);
    sub sum { my $s = 0; $s += $_ for unpack "n*", $_[0] . (length($_[0]) % 2 ? chr(0) : ""); $s = ($s >> 16) + ($s & 0xffff) while $s >> 16; ~$s & 0xffff }
    my $udp = pack("nnnn", 4000, 81, 8 + length $text, 0) . $text;
    my $pseudo = $v6 ? $s . $d . pack("NN", length $udp, 17) : $s . $d . pack("CCn", 0, 17, length $udp);
    substr($udp, 6, 2) = pack "n", sum($pseudo . $udp) || 0xffff;
    my $o = $options ? pack("H*", $options) : ''; my $words = 5 + length($o) / 4; my $packet;
    if ($v6) { $packet = pack("NnCC", 6 << 28, length $udp, 17, 64) . $s . $d . $udp }
    else { my $h = pack("CCnnnCCn", 0x40 | $words, 0, 4 * $words + length $udp, 7, 0, 64, 17, 0) . $s . $d . $o; substr($h, 10, 2) = pack "n", sum($h); $packet = $h . $udp }
    my $frame = pack("H12H12n", "525400e70701", "525400e70702", $v6 ? 0x86dd : 0x0800) . $packet;
    socket(my $sock, 17, 3, 0) or die "socket: $!"; open my $f, "<", "/sys/class/net/eth0/ifindex" or die; chomp(my $index = <$f>);
    send($sock, $frame, 0, pack("SnlSCCa8", 17, 0x0800, $index, 1, 0, 6, pack("H12", "525400e70701"))) or die "send: $!""#;

fn sh(owner: &Owner, vm: &str, script: &str, more: &[&str]) -> String {
    owner.ok(["vm", "exec", vm, "--", "bash", "-c", script, "bash"].iter().chain(more))
}

fn make(owner: &Owner, name: &str, flags: &[&str]) {
    let create = ["vm", "create", "--name", name, "--image", IMAGE, "--memory", "256M", "--wait", "agent"];
    owner.ok(create.iter().chain(flags));
    serve(owner, name);
}

fn serve(owner: &Owner, name: &str) {
    let script = "setsid perl -e \"$1\" $2 </dev/null >/root/server.log 2>&1 & until [ -e /root/up ]; do sleep 0.1; done";
    sh(owner, name, &format!("rm -f /root/up; {script}"), &[SERVER, name]);
}

/// How one vm sees another: `tcp`, `udp` and `ping`, each with what came back within so many seconds.
fn look(owner: &Owner, from: &str, to: &str, seconds: &str) -> String {
    let script = r#"exec 2>/dev/null; cd /root; timeout $3 perl -e "$2" $1 >ping & timeout $3 bash -c "cat </dev/tcp/$1/80" >tcp &
        timeout $3 bash -c "exec 3<>/dev/udp/$1/81 && echo hi >&3 && head -n 1 <&3" >udp & wait
        for way in tcp udp ping; do echo "$way $(cat $way)"; done; rm tcp udp ping"#;
    sh(owner, from, script, &[to, PING, seconds])
}

/// The same where something has to come back, of a guest on a busy machine.
fn sees(owner: &Owner, from: &str, to: &str) -> String {
    look(owner, from, to, "30")
}

/// The same where nothing may.
fn looks_for(owner: &Owner, from: &str, to: &str) -> String {
    look(owner, from, to, "4")
}

fn address(owner: &Owner, vm: &str) -> String {
    let shown = owner.json(&["vm", "show", "--json", vm]);
    assert_eq!(shown["network"]["warning"], serde_json::Value::Null, "{shown}");
    shown["network"]["address"].as_str().unwrap().to_owned()
}

const NOTHING: &str = "tcp \nudp \nping \n";

#[test]
fn vms_of_a_network_reach_each_other_by_name_and_nobody_else_does() {
    let owner = Owner::with_store();
    // The network is all there is, or comes on top.
    make(&owner, "a", &["--net", "none", "--network", "x"]);
    make(&owner, "b", &["--network", "x"]);
    let (a, b) = (address(&owner, "a"), address(&owner, "b"));
    assert_eq!((a.as_str(), b.as_str()), ("10.231.128.1", "10.231.128.2"));
    assert!(owner.ok(["vm", "show", "a"]).contains("x, 10.231.128.1"));
    let seen = |by: &str, to: &str, at: &str| format!("tcp {to} hears {by}\nudp {to}\nping {at}\n");
    for to in ["b", "b.vm", &b] {
        assert_eq!(sees(&owner, "a", to), seen(&a, "b", &b), "{to}");
    }
    assert_eq!(sees(&owner, "b", "a.vm"), seen(&b, "a", &a));
    // There is a name for nobody else, and no other way out.
    let others = sh(
        &owner,
        "a",
        "getent hosts c c.vm localhost.vm deb.debian.org; ip route get 1.1.1.1 2>&1; true",
        &[],
    );
    assert_eq!(others, "RTNETLINK answers: Network is unreachable\n");
    // Others do not see them: neither one in no network, whatever it may reach, nor one of another network.
    for flags in [&["--net", "full"][..], &["--network", "y"]] {
        make(&owner, "c", flags);
        for to in ["b", "b.vm", &b] {
            assert_eq!(looks_for(&owner, "c", to), NOTHING, "{flags:?} {to}");
        }
        assert_eq!(looks_for(&owner, "a", "c"), NOTHING, "{flags:?}");
        owner.ok(["vm", "delete", "--force", "c"]);
    }
    // The same tries succeed from within.
    make(&owner, "c", &["--network", "x"]);
    assert_eq!(sees(&owner, "c", "b"), seen("10.231.128.3", "b", &b));
    assert_eq!(sees(&owner, "a", "c"), seen(&a, "c", "10.231.128.3"));
    owner.ok(["vm", "delete", "--force", "c"]);
    assert_eq!(looks_for(&owner, "a", "c"), NOTHING);
    // One that starts again is who it was, also after it was killed, and not there in between.
    owner.ok(["vm", "stop", "b"]);
    assert_eq!(sh(&owner, "a", "getent hosts b || echo none", &[]), "none\n");
    owner.ok(["vm", "start", "--wait", "agent", "b"]);
    serve(&owner, "b");
    assert_eq!(sees(&owner, "a", "b"), seen(&a, "b", &b));
    let dir = owner.json(&["vm", "show", "--json", "b"])["dir"].as_str().unwrap().to_owned();
    for line in owner.processes().iter().filter(|line| line.contains("supervise") && line.contains(&dir)) {
        let pid = line.split(' ').next().unwrap().parse().unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        // The second goes with the first.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    wait_for("the name goes", || match sh(&owner, "a", "getent hosts b || echo none", &[]).as_str() {
        "none\n" => Ok(()),
        other => Err(other.to_owned()),
    });
    wait_for("the daemon sees it", || {
        let vm = owner.json(&["vm", "show", "--json", "b"]);
        if vm["state"] == "error" || vm["state"] == "stopped" { Ok(()) } else { Err(vm.to_string()) }
    });
    owner.ok(["vm", "start", "--wait", "agent", "b"]);
    serve(&owner, "b");
    assert_eq!(sees(&owner, "a", "b"), seen(&a, "b", &b));
    owner.ok(["vm", "delete", "--force", "a", "b"]);
    owner.assert_nothing_left();
    let left = std::fs::read_dir(owner.state().join("networks")).unwrap().count();
    assert_eq!(left, 0);
}

#[test]
fn a_hostile_member_is_heard_as_itself_or_not_at_all() {
    let owner = Owner::with_store();
    make(&owner, "a", &["--net", "full", "--network", "x"]);
    make(&owner, "b", &["--net", "none", "--network", "x"]);
    make(&owner, "d", &["--network", "y"]);
    // Its kernel takes it for somebody else as well; the filter is outside.
    let script = r#"raw() { perl -e "$RAW" "$@" || echo "failed: $*"; }
        ip addr add 10.231.128.99/32 dev eth0; ip addr add 10.231.128.2/32 dev eth0
        raw 10.231.128.1 10.231.128.2 /honest; raw 10.231.128.1 10.231.128.2 /longest 1464
        for from in 10.231.128.99 10.231.128.2 10.231.128.0 10.231.255.255 10.231.7.2 10.231.7.1 10.231.7.5 127.0.0.1 0.0.0.0 224.0.0.1 8.8.8.8; do
          raw $from 10.231.128.2 /forged; done
        for to in 10.231.7.1 10.231.7.2 10.231.7.5 10.231.7.6 10.231.128.0 10.231.128.1 10.231.255.255 10.231.255.254 10.231.7.3 127.0.0.1 255.255.255.255 224.0.0.1; do
          raw 10.231.128.1 $to /astray; raw 10.231.7.2 $to /astray; done
        for to in ff02::1 fe80::5054:ff:fee7:702 fd32:5b0e:e7:1::2 fd32:5b0e:e7:1::1 ::ffff:10.231.128.2; do
          for from in fe80::5054:ff:fee7:702 fd32:5b0e:e7:1::2; do raw $from $to /six; done; done
        # A way to take, a record of it, and a label of somebody's.
        for options in 8307040ae70702000000 07070400000000 940400000000; do raw 10.231.128.1 10.231.128.2 /options 0 ${options}$([ ${#options} = 14 ] && echo 00)$([ ${#options} = 20 ] && echo 0000)$([ ${#options} = 12 ] && echo 00000000 | cut -c1-4); done
        raw 10.231.128.1 10.231.128.2 /last
        ip addr del 10.231.128.99/32 dev eth0; ip addr del 10.231.128.2/32 dev eth0"#;
    let before = r#"exec 2>&1; perl -e 'use Socket; socket(my $s, PF_INET, SOCK_DGRAM, 0);
          setsockopt $s, 0, 10, pack("i", 0); send($s, "/fragments" . "x" x 5000, 0, sockaddr_in(81, inet_aton("b"))) or print "failed: $!"'"#;
    let output = sh(&owner, "a", &format!("{before}\nRAW=$1\n{script}"), &[RAW]);
    assert_eq!(output, "");
    wait_for("the last one arrives", || {
        let heard = sh(&owner, "b", "cat /root/heard", &[]);
        if heard.contains("/last") { Ok(()) } else { Err(heard) }
    });
    let heard = sh(&owner, "b", "cat /root/heard", &[]);
    assert_eq!(heard, "/fragmentsxxxxxxxxxx 5010\n/honest 7\n/longestxxxxxxxxxxxx 1472\n/last 5\n");
    for other in ["a", "d"] {
        assert_eq!(sh(&owner, other, "cat /root/heard", &[]), "", "{other}");
    }
    // A flood, and one for somebody who is not there, hold up nobody and stay within bounds.
    let flood = "for i in 1 2 3; do dd if=/dev/zero bs=1400 count=3000 status=none >/dev/udp/10.231.128.2/82;
        dd if=/dev/zero bs=1400 count=3000 status=none >/dev/udp/10.231.128.77/82; done 2>/dev/null; true";
    sh(&owner, "a", flood, &[]);
    assert_eq!(sees(&owner, "a", "b"), "tcp b hears 10.231.128.1\nudp b\nping 10.231.128.2\n");
    owner.ok(["vm", "delete", "--force", "a", "b", "d"]);
    owner.assert_nothing_left();
}

#[test]
fn a_vm_goes_to_another_network_with_its_next_start() {
    let owner = Owner::with_store();
    make(&owner, "a", &["--net", "none", "--network", "x"]);
    make(&owner, "b", &["--net", "none", "--network", "y"]);
    let set = |vm: &str, network: &str| owner.ok(["vm", "set", vm, "--network", network]);
    let shown = |vm: &str| {
        let vm = owner.json(&["vm", "show", "--json", vm]);
        (vm["network"]["name"].clone(), vm["network"]["address"].clone(), vm["next_network"].clone())
    };
    let nothing = serde_json::Value::Null;
    let seen = |to: &str, by: &str, at: &str| format!("tcp {to} hears {by}\nudp {to}\nping {at}\n");
    // While it runs it stays where it is, and so much is said.
    let told = "b is in network x from its next start, and in network y until then\n";
    assert_eq!(set("b", "x"), told);
    assert_eq!(shown("b"), ("y".into(), "10.231.128.1".into(), "x".into()));
    assert!(owner.ok(["vm", "show", "b"]).contains("y, 10.231.128.1; x from its next start"));
    assert_eq!(looks_for(&owner, "a", "b"), NOTHING);
    owner.ok(["vm", "restart", "--wait", "agent", "b"]);
    serve(&owner, "b");
    assert_eq!(shown("b"), ("x".into(), "10.231.128.2".into(), nothing.clone()));
    assert_eq!(sees(&owner, "a", "b"), seen("b", "10.231.128.1", "10.231.128.2"));
    // Its former network went with it.
    assert!(!owner.state().join("networks/y").exists());
    // One that does not run is there at once. Its place is another's from then on.
    owner.ok(["vm", "stop", "a"]);
    assert_eq!(set("a", "none"), "a is in no network of vms from its next start\n");
    assert_eq!(shown("a"), (nothing.clone(), nothing.clone(), nothing.clone()));
    make(&owner, "c", &["--net", "none", "--network", "x"]);
    assert_eq!(address(&owner, "c"), "10.231.128.1");
    owner.ok(["vm", "start", "--wait", "agent", "a"]);
    serve(&owner, "a");
    assert_eq!(sh(&owner, "a", "ip -o -4 addr show scope global", &[]), "");
    assert_eq!(looks_for(&owner, "a", "10.231.128.2"), NOTHING);
    assert_eq!(looks_for(&owner, "c", "a"), NOTHING);
    // One that had none, while it runs; and nothing is the matter if the daemon is killed meanwhile.
    let told = "a is in network x from its next start, and in no network of vms until then\n";
    assert_eq!(set("a", "x"), told);
    owner.ok(["daemon", "stop"]);
    assert_eq!(shown("a"), (nothing.clone(), nothing.clone(), "x".into()));
    owner.ok(["vm", "restart", "--wait", "agent", "a"]);
    serve(&owner, "a");
    assert_eq!(shown("a"), ("x".into(), "10.231.128.3".into(), nothing));
    assert_eq!(sees(&owner, "c", "a"), seen("a", "10.231.128.1", "10.231.128.3"));
    owner.ok(["vm", "delete", "--force", "a", "b", "c"]);
    owner.assert_nothing_left();
    assert_eq!(std::fs::read_dir(owner.state().join("networks")).unwrap().count(), 0);
}

#[test]
fn vms_of_root_in_a_network_are_several_users_and_reach_each_other() {
    if !is_root() {
        return skip("vms_of_root_in_a_network_are_several_users_and_reach_each_other: needs root");
    }
    let owner = Owner::root();
    owner.copy_store();
    make(&owner, "a", &["--net", "none", "--network", "x"]);
    make(&owner, "b", &["--net", "none", "--network", "x"]);
    assert_eq!(sees(&owner, "a", "b"), "tcp b hears 10.231.128.1\nudp b\nping 10.231.128.2\n");
    // Who is neither root nor a vm's own user does not get so far.
    let place = owner.state().join("networks/x/1");
    let mut other = std::process::Command::new("setpriv");
    other.args(["--reuid=54321", "--regid=54321", "--clear-groups", "ls"]).arg(place);
    let tried = other.output().unwrap();
    assert!(!tried.status.success(), "{}", show(&tried));
    owner.ok(["vm", "delete", "--force", "a", "b"]);
    owner.assert_nothing_left();
}

#[test]
fn a_name_that_is_none_of_a_network_is_refused() {
    let owner = Owner::new();
    let tried = owner.banger(["vm", "run", "--network", "a/b", "--", "true"]).output().unwrap();
    insta::assert_snapshot!(show(&tried));
}
