//! What a guest under a real Firecracker reaches and is reached by: the outer vm of `nested` plays the host, and a
//! network namespace in it everything around that, since nothing there has a link to this machine.

use crate::nested::{FIRECRACKER, Host, find};
use crate::support::{Owner, run, show, skip};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

/// A server in Perl, which every Debian has. Of each argument `WORD=ADDRESS` it answers TCP and UDP on port 80 with the
/// word and gives back on port 7 what it gets; of `names=ADDRESS` it is a resolver. Whom it heard is in `/tmp/heard`.
const SERVER: &str = r#"use Socket; $SIG{CHLD} = 'IGNORE'; my (%tcp, %udp, @echo, $names);
    sub at { my ($type, $address, $port) = @_; my $v6 = $address =~ /:/; socket(my $s, $v6 ? PF_INET6 : PF_INET, $type, 0) or die "$!"; setsockopt $s, SOL_SOCKET, SO_REUSEADDR, 1;
      bind($s, $v6 ? Socket::pack_sockaddr_in6($port, Socket::inet_pton(PF_INET6, $address)) : sockaddr_in($port, inet_aton($address))) or die "$address: $!";
      listen $s, 20 if $type == SOCK_STREAM; $s }
    for (@ARGV) { my ($word, $address) = split /=/; if ($word eq 'names') { $names = at(SOCK_DGRAM, $address, 53); next }
      $tcp{$word} = at(SOCK_STREAM, $address, 80); $udp{$word} = at(SOCK_DGRAM, $address, 80); push @echo, at(SOCK_STREAM, $address, 7) }
    my %known = ("\6public\4test\0" => ['93.184.216.34', '2606:2800:220:1::34'], "\11rebinding\4test\0" => ['192.168.77.1', 'fd77::1']);
    sub answer { my ($q) = @_; my $end = index($q, "\0", 12) + 5; my ($name, $type) = (substr($q, 12, $end - 16), unpack 'n', substr($q, $end - 4, 2));
      my $found = $known{$name}; my $address = $found && $found->[$type == 1 ? 0 : $type == 28 ? 1 : 2]; my $a = substr($q, 0, $end);
      substr($a, 2, 2) = pack 'n', 0x8180 | ($found ? 0 : 3); substr($a, 6, 6) = pack 'nnn', $address ? 1 : 0, 0, 0; return $a unless $address;
      my $data = Socket::inet_pton($type == 1 ? PF_INET : PF_INET6, $address); $a . pack('nnnNn', 0xc00c, $type, 1, 0, length $data) . $data }
    open my $heard, '>>', '/tmp/heard'; $heard->autoflush(1);
    while (1) { my $r = ''; vec($r, fileno $_, 1) = 1 for values %tcp, values %udp, @echo, $names || (); next if select($r, undef, undef, undef) < 1;
      if ($names && vec $r, fileno $names, 1) { my $from = recv $names, my $q, 1500, 0; send $names, answer($q), 0, $from }
      for my $l (@echo) { next unless vec $r, fileno $l, 1; accept my $c, $l or next; next if fork;
        while (sysread $c, my $data, 65536) { while (length $data) { my $n = syswrite $c, $data or last; substr($data, 0, $n) = '' } } exit }
      for my $word (keys %udp) { my $s = $udp{$word}; next unless vec $r, fileno $s, 1; my $from = recv $s, my $q, 1500, 0; print $heard "$word udp\n"; send $s, "$word\n", 0, $from }
      for my $word (keys %tcp) { my $s = $tcp{$word}; next unless vec $r, fileno $s, 1; accept my $c, $s or next; print $heard "$word tcp\n"; sysread $c, my $q, 1500;
        my $body = "$word\n"; syswrite $c, "HTTP/1.0 200 OK\r\nContent-Length: " . length($body) . "\r\n\r\n$body" } }"#;

/// The little internet of bangerd's network tests, in the outer vm.
const WORLD: &str = "set -e; modprobe -a veth nf_tables; ip netns add around; ip link add up0 type veth peer name w0 netns around
    w() { ip -n around $@; }
    for a in 91.198.7.2/24 192.168.77.2/24; do ip addr add $a dev up0; done
    for a in 2a01:4f8:0:7::2/64 fd77::2/64; do ip addr add $a dev up0 nodad; done
    for a in 91.198.7.1/24 192.168.77.1/24; do w addr add $a dev w0; done
    for a in 2a01:4f8:0:7::1/64 fd77::1/64; do w addr add $a dev w0 nodad; done
    for a in 93.184.216.34/32 169.254.169.254/32; do w addr add $a dev lo; done
    for a in 2606:2800:220:1::34/128 fd00:ec2::254/128; do w addr add $a dev lo nodad; done
    ip link set up0 up; w link set lo up; w link set w0 up
    ip route add default via 91.198.7.1; ip -6 route add default via 2a01:4f8:0:7::1
    echo nameserver 192.168.77.1 >/etc/resolv.conf
    serve() { setsid \"$@\" </dev/null >>/root/servers.log 2>&1 & }
    serve perl -e \"$0\" loopback=127.0.0.1 host=91.198.7.2 host-lan=192.168.77.2 loopback6=::1 host6=2a01:4f8:0:7::2 host-lan6=fd77::2
    serve ip netns exec around perl -e \"$0\" public=93.184.216.34 neighbour=91.198.7.1 lan=192.168.77.1 metadata=169.254.169.254 \\
      public6=2606:2800:220:1::34 neighbour6=2a01:4f8:0:7::1 lan6=fd77::1 metadata6=fd00:ec2::254 names=192.168.77.1
    for at in public.test 169.254.169.254 [fd77::1] 91.198.7.2 127.0.0.1; do
      for i in $(seq 100); do curl -sS -g -m 20 http://$at/ && continue 2; sleep 0.1; done; exit 1; done";

/// Everything a guest may try at once, a line for each.
const TRIES: &str = r#"web() { echo "$1 $(curl -sS -g -m 60 http://$1/ 2>/dev/null || echo none)"; }
    udp() { echo "udp $1 $(timeout $2 bash -c "exec 3<>/dev/udp/$1/80 && echo hi >&3 && head -n 1 <&3" 2>/dev/null || echo none)"; }
    for at in 93.184.216.34 public.test [2606:2800:220:1::34] 91.198.7.1 91.198.7.2 192.168.77.1 192.168.77.2 169.254.169.254 \
      10.231.7.1 10.231.7.5 10.231.7.6 rebinding.test [2a01:4f8:0:7::1] [2a01:4f8:0:7::2] [fd77::1] [fd77::2] [fd00:ec2::254] \
      [fd32:5b0e:e7:1::1] [fd32:5b0e:e7:2::6]; do web $at & done; wait
    udp 93.184.216.34 60; udp 2606:2800:220:1::34 60; udp 192.168.77.1 4
    getent ahostsv4 public.test | head -n 1; getent ahostsv6 public.test | head -n 1"#;

/// Sends 1 MB to each address, and has them back.
const THERE_AND_BACK: &str = r#"head -c 1000000 /dev/urandom >/tmp/sent; for at; do exec 3<>/dev/tcp/$at/7 || exit 1
    cat /tmp/sent >&3 & head -c 1000000 <&3 | cmp - /tmp/sent || exit 1; exec 3>&-; done"#;

/// What the file has `ldd` find, so that it runs where the same C library is.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let listed = run(Command::new("ldd").arg(program));
    let found = listed.lines().filter_map(|line| line.split_once(" => ")?.1.split(' ').next());
    found.filter(|path| !path.contains("/libc.so")).map(PathBuf::from).collect()
}

/// Has the host's programs for networks in the outer vm, and everything around it.
fn build_world(host: &Host) -> Result<(), &'static str> {
    let mut programs = Vec::new();
    let mut needed = BTreeSet::new();
    for name in ["nft", "pasta"] {
        let Some(program) = find(name) else { return Err("`nft` or `pasta` is not on PATH") };
        needed.extend(libraries(&program));
        // What pasta becomes where the processor has more.
        programs.extend(Some(program.with_extension("avx2")).filter(|path| path.exists()));
        programs.push(program);
    }
    host.copy_into(&programs, "/usr/local/bin");
    host.copy_into(&needed, "/usr/local/lib");
    if !host.exec("ldconfig && nft --version && pasta --version").status.success() {
        return Err("the programs do not run in the image");
    }
    let built = host.command(&["sh", "-c", WORLD, SERVER]).output().unwrap();
    assert_eq!(built.stdout, b"public6\nmetadata\nlan6\nhost\nloopback\n", "{}", show(&built));
    Ok(())
}

/// Runs a script in a vm of this user's, which has to succeed.
fn inner(host: &Host, vm: &str, script: &str, more: &[&str]) -> String {
    host.banger(&[&["vm", "exec", vm, "--", "bash", "-c", script, "bash"], more].concat())
}

/// Starts a server in a vm, which says its name.
fn serve(host: &Host, vm: &str) {
    let script = r#"rm -f /tmp/heard; setsid perl -e "$1" $2=0.0.0.0 </dev/null >/root/server.log 2>&1 & echo $! >/root/server
        until [ -e /tmp/heard ]; do sleep 0.1; done"#;
    inner(host, vm, script, &[SERVER, vm]);
}

/// Asks a server, and says so where there is no answer.
fn ask(host: &Host, vm: &str, url: &str) -> String {
    inner(host, vm, "curl -sS -g -m 60 $1 2>&1 || true", &[url])
}

fn forget(host: &Host) {
    host.ok(": >/tmp/heard");
}

fn heard(host: &Host) -> BTreeSet<String> {
    host.ok("cat /tmp/heard").lines().map(str::to_owned).collect()
}

#[test]
fn network_and_ssh_under_firecracker() {
    let name = "network_and_ssh_under_firecracker";
    let owner = Owner::new();
    let root = match Host::start(&owner) {
        Ok(host) => host,
        Err(reason) => return skip(&format!("{name}: {reason}")),
    };
    if let Err(reason) = build_world(&root) {
        return skip(&format!("{name}: {reason}"));
    }
    let dev = root.user();
    dev.create_first("--name a --memory 192M --publish 7001:80 --wait agent");
    let shown = dev.banger(&["vm", "show", "a"]);
    assert!(
        shown.contains("firecracker, KVM, process") && shown.contains("network:      internet\n"),
        "{shown}"
    );
    let begun = Instant::now();
    let said = |what: &str| println!("{what} after {:.0} s", begun.elapsed().as_secs_f64());
    reaches_the_internet_only(&root, &dev);
    rules_change(&dev);
    said("policy");
    ports_open(&root, &dev);
    files_come_and_go(&dev);
    said("ports and files");
    ssh_gets_in(&dev);
    said("ssh");
    members_reach_each_other(&dev);
    said("a network of vms");
    is_heard_as_itself(&root, &dev);
    dev.banger(&["vm", "delete", "-f", "a"]);
    nothing_left(&dev);
    roots_vms_do_too(&root, &dev);
    nothing_left(&root);
    said("root's");
    println!("with {}", run(Command::new("sh").args(["-c", "firecracker --version | head -n 1"])).trim());
    owner.ok(["vm", "delete", "-f", "host"]);
    owner.assert_nothing_left();
}

fn reaches_the_internet_only(root: &Host, dev: &Host) {
    forget(root);
    let tried = inner(dev, "a", TRIES, &[]);
    let mut reached: Vec<_> = tried.lines().filter(|line| !line.ends_with(" none")).collect();
    reached.sort_unstable();
    assert_eq!(
        reached,
        [
            "2606:2800:220:1::34 STREAM public.test",
            "93.184.216.34   STREAM public.test",
            "93.184.216.34 public",
            "[2606:2800:220:1::34] public6",
            "public.test public",
            "udp 2606:2800:220:1::34 public6",
            "udp 93.184.216.34 public",
        ],
        "{tried}"
    );
    assert_eq!(tried.lines().count(), reached.len() + 17, "{tried}");
    assert_eq!(
        heard(root),
        ["public tcp", "public udp", "public6 tcp", "public6 udp"].map(str::to_owned).into()
    );
    let denials: Value = serde_json::from_str(&dev.banger(&["vm", "net", "denials", "a", "--json"])).unwrap();
    for (protocol, address) in [
        ("tcp", "169.254.169.254"),
        ("tcp", "192.168.77.1"),
        ("udp", "192.168.77.1"),
        ("tcp", "fd77::1"),
        ("dns", "fd77::1"),
    ] {
        let is_it = |denial: &Value| denial["protocol"] == protocol && denial["address"] == address;
        assert!(denials.as_array().unwrap().iter().any(is_it), "{protocol} {address}: {denials:#}");
    }
    // Segments larger than a frame, which Firecracker takes from a guest and gives it, both ways.
    inner(dev, "a", THERE_AND_BACK, &["93.184.216.34", "2606:2800:220:1::34"]);
}

fn rules_change(dev: &Host) {
    let allowed = dev.banger(&["vm", "net", "allow", "a", "192.168.77.1:80"]);
    assert_eq!(allowed, "network:  internet\nallowed:  192.168.77.1:80\nin force: now\n");
    assert_eq!(ask(dev, "a", "http://192.168.77.1/"), "lan\n");
    assert_eq!(ask(dev, "a", "http://rebinding.test/"), "lan\n");
    dev.banger(&["vm", "net", "deny", "a", "93.184.216.34", "2606:2800:220:1::/64"]);
    for url in ["http://93.184.216.34/", "http://[2606:2800:220:1::34]/"] {
        let said = ask(dev, "a", url);
        assert!(said.starts_with("curl: (7) Failed to connect"), "{url}: {said}");
    }
    dev.banger(&["vm", "net", "allow", "a", "93.184.216.34", "2606:2800:220:1::/64"]);
    assert_eq!(ask(dev, "a", "http://public.test/"), "public\n");
}

/// Where a vm's port 80 opens. Nobody's vm has the right to open that number, so it is another.
fn opens(host: &Host, vm: &str) -> String {
    let port = "for i in $(seq 300); do banger vm ports --json --no-probe $0 | tr -d ' \\n' |
        grep -o '\"port\":80,[^}]*\"host\":\"[^\"]*' | grep -o '127.77.*' && exit 0; sleep 0.1; done; exit 1";
    let output = host.command(&["sh", "-c", port, vm]).output().unwrap();
    let at = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    assert!(at.ends_with(":8080"), "{}", show(&output));
    at
}

fn ports_open(root: &Host, dev: &Host) {
    serve(dev, "a");
    let at = opens(dev, "a");
    for at in [&at, "127.0.0.1:7001"] {
        let get = format!("curl -sS -m 60 http://{at}/");
        assert_eq!((dev.ok(&get), root.ok(&get)), ("a\n".to_owned(), "a\n".to_owned()));
        let tried = root.exec(&format!("setpriv --reuid=54321 --regid=54321 --clear-groups {get}"));
        assert!(!tried.status.success() && tried.stdout.is_empty(), "{at}: {}", show(&tried));
    }
    let listed = dev.banger(&["vm", "ports", "a"]);
    assert!(listed.contains(&format!("http://{at}")) && listed.contains("http://127.0.0.1:7001"), "{listed}");
    // The name leads there: a question of DNS for `a.vm`.
    let name = "perl -MSocket -e 'socket my $s, PF_INET, SOCK_DGRAM, 0; \
        send $s, pack(\"n6\", 7, 256, 1, 0, 0, 0) . \"\\1a\\2vm\\0\\0\\1\\0\\1\", 0, sockaddr_in(42069, INADDR_LOOPBACK); \
        recv $s, my $answer, 512, 0; print inet_ntoa(substr $answer, -4), \":8080\"'";
    assert_eq!(dev.ok(name), at);
    inner(dev, "a", "kill $(cat /root/server)", &[]);
    dev.ok(&format!(
        "for i in $(seq 300); do curl -s -m 60 http://{at}/; [ $? = 7 ] && exit 0; sleep 0.1; done; exit 1"
    ));
    let listed = dev.banger(&["vm", "ports", "a"]);
    assert!(!listed.contains(&at), "{listed}");
}

fn files_come_and_go(dev: &Host) {
    let tree = "mkdir -p tree/sub && head -c 1000000 /dev/urandom >tree/large && ln -s large tree/link && echo text >tree/sub/run &&
        chmod 750 tree/sub/run && truncate -s 5M tree/sparse";
    dev.ok(tree);
    let list = "cd; for f in $(find tree | LC_ALL=C sort); do stat -c '%A %s %Y %n' $f; [ -d $f ] || sha256sum <$f; done | sed 's/^d\\(.*\\) [0-9]* \\([0-9]* .*\\)/d\\1 \\2/'";
    let here = dev.ok(list);
    assert_eq!(here.lines().count(), 10, "{here}");
    dev.banger(&["vm", "cp", "tree", "a:"]);
    assert_eq!(inner(dev, "a", list, &[]), here);
    dev.ok("rm -r tree; banger vm cp a:tree .");
    assert_eq!(dev.ok(list), here);
}

fn ssh_gets_in(dev: &Host) {
    let output = dev.exec("banger vm ssh a -- 'echo out; echo err >&2; exit 42'");
    assert_eq!(output.status.code(), Some(42), "{}", show(&output));
    assert_eq!((&*output.stdout, &*output.stderr), (&b"out\n"[..], &b"err\n"[..]));
    serve(dev, "a");
    // There and back: the vm's port here, and one of here in the vm, where its own network does not lead.
    let forward = "banger vm ssh a -L 5555:localhost:80 -N & forward=$!
        for i in $(seq 300); do curl -s -m 60 http://127.0.0.1:5555/ && break; sleep 0.1; done; kill $forward; wait $forward
        banger vm ssh a -R 6000:91.198.7.2:80 -- curl -sS -m 60 http://127.0.0.1:6000/";
    assert_eq!(dev.ok(forward), "a\nhost\n");
    dev.banger(&["ssh-config", "--install"]);
    let copy = "scp -qpr tree a.vm:/srv/ && scp -qpr a.vm:/srv/tree back && diff -r tree back && stat -c %a back/sub/run &&
        printf 'cd /srv/tree\\nget sub/run got\\n' | sftp -q -b - a.vm >/dev/null && cat got";
    assert_eq!(dev.ok(copy), "750\ntext\n");
    // The agent of whoever asks, in a vm that runs and in one that is made for it.
    let keys = format!(
        "eval $(ssh-agent) >/dev/null; trap 'kill $SSH_AGENT_PID' EXIT; ssh-keygen -q -t ed25519 -N '' -f key -C mine; ssh-add -q key; ssh-add -l
        banger vm ssh a -A -- ssh-add -l; banger vm exec -A a -- ssh-add -l
        banger vm run --rm -A --net none --memory 192M {FIRECRACKER} -- ssh-add -l; banger vm exec a -- ssh-add -l 2>&1"
    );
    let listed = dev.exec(&keys);
    let lines: Vec<_> = std::str::from_utf8(&listed.stdout).unwrap().lines().collect();
    let told = show(&listed);
    assert!(lines.len() == 5 && lines[0].ends_with(" mine (ED25519)"), "{told}");
    assert!(lines[1..4].iter().all(|line| *line == lines[0]), "{told}");
    assert_eq!(lines[4], "Could not open a connection to your authentication agent.", "{told}");
}

fn members_reach_each_other(dev: &Host) {
    for vm in ["b", "c"] {
        let create =
            format!("vm create --name {vm} --net none --network x --memory 192M --wait agent {FIRECRACKER}");
        dev.banger(&create.split(' ').collect::<Vec<_>>());
        serve(dev, vm);
    }
    for (from, to) in [("b", "c"), ("b", "c.vm"), ("c", "b")] {
        assert_eq!(ask(dev, from, &format!("http://{to}/")), format!("{}\n", &to[..1]), "{from} {to}");
    }
    inner(dev, "b", THERE_AND_BACK, &["c"]);
    // The network is all there is.
    let said = ask(dev, "b", "http://93.184.216.34/");
    assert!(said.starts_with("curl: (7) Failed to connect"), "{said}");
    // Whoever is not in it neither reaches them nor is reached.
    for (from, url) in [("a", "http://b.vm/"), ("a", "http://10.231.128.1/"), ("b", "http://a.vm/")] {
        let said = ask(dev, from, url);
        assert!(
            said.starts_with("curl: (6) Could not resolve") || said.starts_with("curl: (7) Failed"),
            "{url}: {said}"
        );
    }
    dev.banger(&["vm", "stop", "b"]);
    assert_eq!(inner(dev, "c", "getent hosts b b.vm || echo none", &[]), "none\n");
    dev.banger(&["vm", "delete", "-f", "b", "c"]);
}

/// A guest that sends under addresses that it was not given is not heard.
fn is_heard_as_itself(root: &Host, dev: &Host) {
    forget(root);
    let script = r#"get() { curl -sS -m $1 ${@:2} http://93.184.216.34/ 2>&1; }
        ip addr add 10.231.7.9/32 dev eth0; get 4 --interface 10.231.7.9; get 60
        ip link set eth0 down; ip link set eth0 address 52:54:00:00:00:99; ip link set eth0 up; ip route add default via 10.231.7.1; get 4
        ip link set eth0 down; ip link set eth0 address 52:54:00:e7:07:02; ip link set eth0 up; ip route add default via 10.231.7.1; get 60"#;
    let said = inner(dev, "a", script, &[]);
    let lines: Vec<_> =
        said.lines().map(|line| if line.contains("timed out") { "timed out" } else { line }).collect();
    assert_eq!(lines, ["timed out", "public", "timed out", "public"], "{said}");
    assert_eq!(root.ok("cat /tmp/heard"), "public tcp\npublic tcp\n");
}

/// The main parts for root, whose vms are users of their own.
fn roots_vms_do_too(root: &Host, dev: &Host) {
    root.create_first("--name r --memory 192M --network y --wait agent");
    serve(root, "r");
    let asked =
        ["r/", "93.184.216.34/", "[2606:2800:220:1::34]/"].map(|at| ask(root, "r", &format!("http://{at}")));
    assert_eq!(asked, ["r\n", "public\n", "public6\n"]);
    assert!(ask(root, "r", "http://192.168.77.1/").starts_with("curl: (7) Failed to connect"));
    let get = format!("curl -sS -m 60 http://{}/", opens(root, "r"));
    assert_eq!(root.ok(&get), "r\n");
    let tried = dev.exec(&get);
    assert!(!tried.status.success() && tried.stdout.is_empty(), "{}", show(&tried));
    assert_eq!(root.ok("banger vm ssh r -- id -un"), "root\n");
    root.ok("echo text >file; banger vm cp file r:; banger vm cp r:file back; cmp file back");
    root.banger(&["vm", "delete", "-f", "r"]);
}

fn nothing_left(host: &Host) {
    let programs = "for i in $(seq 300); do pgrep 'firecracker|pasta' >/dev/null || exit 0; sleep 0.1; done; ps ax; exit 1";
    host.ok(programs);
    assert_eq!(host.ok(&format!("ls {0}/vms {0}/networks | grep -v :", host.state())).trim(), "");
}
