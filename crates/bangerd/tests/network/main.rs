//! What a guest reaches, and what not: real vms in a little internet of network namespaces.
//!
//! Needs root (to make the networks), `ip`, `pasta`, `nft`, `tcpdump`, QEMU, the `banger` program beside `bangerd`, and in
//! `BANGER_TEST_STORE` a state directory that has an image and a kernel. Nothing is sent outside of the machine: the
//! namespaces have no link to it. Without a prerequisite a test says `skipped` and why.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "a test")]

mod capture;
mod store;
mod world;

use capture::Captured;
use std::collections::HashMap;
use store::Store;
use world::{
    HOST, HOST_LAN, HOST_LAN6, HOST6, LAN, LAN6, METADATA, METADATA6, NEIGHBOUR, NEIGHBOUR6, OTHER, PUBLIC,
    PUBLIC6, SIX_TO_FOUR6, TRANSLATED6, World,
};

/// An ordinary user; having no name is no hindrance.
const ORDINARY_UID: u32 = 54_321;

/// Prints `key=value` for each thing tried.
fn script() -> String {
    format!(
        r#"
        web() {{ echo "$1=$(curl -sS -m 4 ${{3:-}} http://$2/ 2>/dev/null || echo none)"; }}
        udp() {{ echo "$1=$(timeout 4 bash -c "exec 3<>/dev/udp/$2/80 && echo hi >&3 && head -n 1 <&3" 2>/dev/null || echo none)"; }}
        name() {{ echo "$1=$(getent ahostsv4 $2 2>/dev/null | head -n 1 | cut -d' ' -f1)"; }}
        web public {PUBLIC}; udp public-udp {PUBLIC}
        web by-name public.test
        name name public.test; RES_OPTIONS=use-vc name name-tcp public.test
        name rebinding rebinding.test; web rebinding-web rebinding.test -4
        web host {HOST}; udp host-udp {HOST}; web host-lan {HOST_LAN}; web neighbour {NEIGHBOUR}; web lan {LAN}; udp lan-udp {LAN}
        web metadata {METADATA}
        web gateway 10.231.7.1; web outer 10.231.7.5; web outer-gateway 10.231.7.6; web loopback 127.0.0.1
        web6() {{ web $1 "[$2]" -g; }}
        web6 public6 {PUBLIC6}; web6 host6 {HOST6}; web6 host-lan6 {HOST_LAN6}; web6 neighbour6 {NEIGHBOUR6}
        web6 lan6 {LAN6}; web6 metadata6 {METADATA6}; web6 translated6 {TRANSLATED6}; web6 6to4 {SIX_TO_FOUR6}
        web6 mapped6 ::ffff:{LAN}; web6 loopback6 ::1; web6 gateway6 fd32:5b0e:e7:1::1; web6 outer6 fd32:5b0e:e7:2::5
        web6 outer-gateway6 fd32:5b0e:e7:2::6; web6 link-gateway6 fe80::5054:ff:fee7:701%25eth0
        name6() {{ echo "$1=$(getent ahostsv6 $2 2>/dev/null | head -n 1 | cut -d' ' -f1)"; }}
        name6 name6 public.test; name6 rebinding6 rebinding.test
        echo "direct-dns=$(timeout 4 bash -c 'exec 3<>/dev/tcp/{LAN}/53 && echo yes' 2>/dev/null || echo none)"
        "#
    )
}

/// Sends under an address, and then under a hardware address, that is not the guest's.
fn forgeries() -> String {
    format!(
        r#"
        ip addr add 10.231.7.9/32 dev eth0
        curl -sS -m 3 --interface 10.231.7.9 http://{PUBLIC}/address 2>/dev/null
        ip link set eth0 down; ip link set eth0 address 52:54:00:00:00:99; ip link set eth0 up
        ip route add default via 10.231.7.1
        curl -sS -m 3 http://{PUBLIC}/hardware 2>/dev/null
        ip link set eth0 down; ip link set eth0 address 52:54:00:e7:07:02; ip link set eth0 up
        ip route add default via 10.231.7.1
        curl -sS -m 4 http://{PUBLIC}/honest
        "#
    )
}

fn results(text: &str) -> HashMap<&str, &str> {
    text.lines().filter_map(|line| line.trim().split_once('=')).collect()
}

/// Everything a test needs, or none and a line that says why.
fn prepare(test: &str, uid: u32) -> Option<(World, Store)> {
    match Store::prepare(uid) {
        Ok(store) => Some((World::create(), store)),
        Err(reason) => {
            println!("skipped: {test}: {reason}");
            None
        }
    }
}

fn internet_is_all_there_is(test: &str, uid: u32, flags: &[&str]) {
    let Some((world, store)) = prepare(test, uid) else { return };
    let (output, errors) = store.run(&world, &[&["--net", "internet"], flags].concat(), &script());
    let found = results(&output);
    let context = format!("{found:#?}\n{errors}");
    for key in ["public", "public-udp", "by-name"] {
        assert_eq!(found[key], "public", "{key} {context}");
    }
    for key in ["name", "name-tcp"] {
        assert_eq!(found[key], PUBLIC, "{key} {context}");
    }
    assert_eq!((found["public6"], found["name6"]), ("public6", PUBLIC6), "{context}");
    assert_eq!((found["rebinding"], found["rebinding6"]), ("", ""), "{context}");
    for key in [
        "host6",
        "host-lan6",
        "neighbour6",
        "lan6",
        "metadata6",
        "translated6",
        "6to4",
        "mapped6",
        "loopback6",
        "gateway6",
        "outer6",
        "outer-gateway6",
        "link-gateway6",
        "rebinding-web",
        "host",
        "host-udp",
        "host-lan",
        "neighbour",
        "lan",
        "lan-udp",
        "metadata",
        "gateway",
        "outer",
        "outer-gateway",
        "loopback",
        "direct-dns",
    ] {
        assert_eq!(found[key], "none", "{key} {context}");
    }
    // What the guest did not hear might have arrived all the same.
    let heard = world.heard();
    assert!(
        heard.iter().all(|line| line.starts_with("public ") || line.starts_with("public6 ")),
        "{heard:?}"
    );
    let sent = world.sent();
    assert!(
        sent.contains(&format!("{PUBLIC} . tcp . 80")) && sent.contains(&format!("{PUBLIC6} . tcp . 80")),
        "{sent}"
    );
    for inner in
        [HOST, HOST_LAN, NEIGHBOUR, METADATA, HOST6, HOST_LAN6, NEIGHBOUR6, LAN6, METADATA6, TRANSLATED6]
    {
        assert!(!sent.contains(&format!("{inner} . ")), "{inner}: {sent}");
    }
    // The host's resolver is asked there, by the supervisor.
    for to in [
        format!("{LAN} . tcp . 80"),
        format!("{LAN} . udp . 80"),
        format!("{SIX_TO_FOUR6} . "),
        "::1 . ".to_owned(),
    ] {
        assert!(!sent.contains(&to), "{to}: {sent}");
    }
    let captured = Captured::of(&world);
    captured.assert_only(&[(PUBLIC, 80), (PUBLIC6, 80), (LAN, 53)]);
    assert!(captured.has(PUBLIC, 80) && captured.has(PUBLIC6, 80) && captured.has(LAN, 53), "{context}");
}

#[test]
fn internet_of_a_vm_of_root() {
    internet_is_all_there_is("internet_of_a_vm_of_root", 0, &[]);
}

#[test]
fn internet_of_a_vm_of_an_ordinary_user() {
    internet_is_all_there_is("internet_of_a_vm_of_an_ordinary_user", ORDINARY_UID, &[]);
}

#[test]
fn internet_of_a_vm_in_a_network() {
    internet_is_all_there_is("internet_of_a_vm_in_a_network", ORDINARY_UID, &["--network", "x"]);
}

#[test]
fn a_network_of_vms_opens_nothing_else() {
    let Some((world, store)) = prepare("a_network_of_vms_opens_nothing_else", ORDINARY_UID) else { return };
    // Also as the address it has in the network, and by a route it gave itself.
    let more = format!(
        "ip route add default via 10.231.7.1 src 10.231.128.1
        web own {PUBLIC} '--interface 10.231.128.1'; web own-lan {LAN} '--interface 10.231.128.1'; web routed {PUBLIC}
        web own-gateway 10.231.7.1 '--interface 10.231.128.1'"
    );
    let (output, errors) = store.run(&world, &["--net", "none", "--network", "x"], &(script() + &more));
    let found = results(&output);
    assert!(found.len() > 30 && !errors.contains("warning"), "{found:#?}\n{errors}");
    for (key, value) in &found {
        assert!(["", "none"].contains(value), "{key} {found:#?}\n{errors}");
    }
    assert_eq!(world.heard(), [""; 0], "{errors}");
    let sent = world.sent();
    assert!(!sent.contains(PUBLIC) && !sent.contains(LAN), "{sent}");
    Captured::of(&world).assert_only(&[]);
}

#[test]
fn full_reaches_what_the_host_reaches() {
    let Some((world, store)) = prepare("full_reaches_what_the_host_reaches", ORDINARY_UID) else { return };
    let (output, errors) = store.run(&world, &["--net", "full"], &script());
    let found = results(&output);
    // The same tries as above arrive, so those can fail.
    for (key, word) in [
        ("public", "public"),
        ("public-udp", "public"),
        ("host", "host"),
        ("host-udp", "host"),
        ("host-lan", "host-lan"),
        ("neighbour", "neighbour"),
        ("lan", "lan"),
        ("lan-udp", "lan"),
        ("metadata", "metadata"),
        ("rebinding", LAN),
        ("public6", "public6"),
        ("host6", "host6"),
        ("host-lan6", "host-lan6"),
        ("neighbour6", "neighbour6"),
        ("lan6", "lan6"),
        ("metadata6", "metadata6"),
        ("translated6", "translated6"),
        ("6to4", "6to4"),
        ("rebinding6", LAN6),
        ("rebinding-web", "lan"),
        ("direct-dns", "yes"),
    ] {
        assert_eq!(found[key], word, "{key} {found:#?}\n{errors}");
    }
    for key in ["gateway", "outer", "outer-gateway", "loopback", "loopback6", "gateway6", "outer6"] {
        assert_eq!(found[key], "none", "{key} {found:#?}\n{errors}");
    }
    assert!(!world.heard().iter().any(|line| line.starts_with("loopback")));
    // The boundary sees what arrives, so what it does not see elsewhere was not sent.
    let sent = world.sent();
    assert!(
        [HOST, HOST6, LAN6, METADATA].iter().all(|to| sent.contains(&format!("{to} . tcp . 80"))),
        "{sent}"
    );
    let captured = Captured::of(&world);
    for to in [PUBLIC, HOST, HOST_LAN, NEIGHBOUR, LAN, METADATA] {
        assert!(captured.has(to, 80), "{to}");
    }
    for to in [PUBLIC6, HOST6, HOST_LAN6, NEIGHBOUR6, LAN6, METADATA6, TRANSLATED6, SIX_TO_FOUR6] {
        assert!(captured.has(to, 80), "{to}");
    }
}

#[test]
fn a_vm_sends_no_faster_than_it_may() {
    let Some((world, store)) = prepare("a_vm_sends_no_faster_than_it_may", ORDINARY_UID) else { return };
    // Datagrams, of which nothing but a limit holds any back.
    let script = format!(
        "begun=$EPOCHREALTIME; dd if=/dev/zero bs=1000 count=8000 status=none >/dev/udp/{PUBLIC}/80
        awk \"BEGIN {{ print $EPOCHREALTIME - $begun }}\"; sleep 1"
    );
    let sent = || {
        let (output, errors) = store.run(&world, &[], &script);
        let seconds: f64 = output.trim().parse().unwrap_or_else(|_| panic!("{output}{errors}"));
        let heard = world.heard().iter().filter(|line| *line == "public udp").count();
        (heard, seconds)
    };
    let (all, seconds) = sent();
    store.configure("net_rate = '1M'\n");
    let (both, limited_seconds) = sent();
    // With 28 bytes of headers; a quarter of a mebibyte may go at once, and what waits in the guest goes during the pause.
    let most = (limited_seconds + 1.0 + 0.25) * f64::from(1 << 20) / 1028.0 + 20.0;
    let limited = both - all;
    let told = format!("{all} in {seconds} s; {limited} in {limited_seconds} s");
    assert!((limited as f64) < most && limited * 2 < all, "{told}");
}

#[test]
fn forged_packets_do_not_leave() {
    let Some((world, store)) = prepare("forged_packets_do_not_leave", ORDINARY_UID) else { return };
    // Also in full: what a guest may say its address is does not depend on what it may reach.
    let (output, errors) = store.run(&world, &["--net", "full"], &forgeries());
    assert!(output.contains("public"), "{output}\n{errors}");
    let heard = world.heard();
    assert_eq!(heard, ["public tcp /honest"], "{output}\n{errors}");
    let captured = Captured::of(&world);
    captured.assert_only(&[(PUBLIC, 80)]);
    assert!(captured.says("GET /honest "), "{output}\n{errors}");
    assert!(!captured.says("GET /address ") && !captured.says("GET /hardware "), "{output}\n{errors}");
}

/// Frames that the guest's kernel has no part in: `send KIND SOURCE-MAC SOURCE DESTINATION TEXT`.
fn raw_frames() -> &'static str {
    r#"
    cat >/root/raw.pl <<'END'
    use strict; use Socket;
    my ($type, $mac, $from, $to, $text) = @ARGV;
    sub sum { my $s = 0; $s += $_ for unpack "n*", $_[0] . (length($_[0]) % 2 ? chr(0) : ""); $s = ($s >> 16) + ($s & 0xffff) while $s >> 16; ~$s & 0xffff }
    my $v6 = $from =~ /:/;
    my ($s, $d) = map { $v6 ? Socket::inet_pton(Socket::AF_INET6(), $_) : inet_aton($_) } $from, $to;
    my $udp = pack("nnnn", 4000, 80, 8 + length $text, 0) . $text;
    my $pseudo = $v6 ? $s . $d . pack("NN", length $udp, 17) : $s . $d . pack("CCn", 0, 17, length $udp);
    substr($udp, 6, 2) = pack "n", sum($pseudo . $udp) || 0xffff;
    my $packet;
    if ($v6) { $packet = pack("NnCC", 6 << 28, length $udp, 17, 64) . $s . $d . $udp }
    else { my $h = pack("CCnnnCCn", 0x45, 0, 20 + length $udp, 7, 0, 64, 17, 0) . $s . $d; substr($h, 10, 2) = pack "n", sum($h); $packet = $h . $udp }
    my $proto = $v6 ? 0x86dd : 0x0800;
    if ($type eq "tunnel") { my $o = pack("CCnnnCCn", 0x45, 0, 20 + length $packet, 7, 0, 64, $v6 ? 41 : 4, 0) . inet_aton("10.231.7.2") . inet_aton("93.184.216.34"); substr($o, 10, 2) = pack "n", sum($o); $packet = $o . $packet; $proto = 0x0800 }
    if ($type eq "vlan") { $packet = pack("nn", 1, $proto) . $packet; $proto = 0x8100 }
    (my $hex = $mac) =~ s/://g;
    my $frame = pack("H12H12n", "525400e70701", $hex, $proto) . $packet;
    socket(my $sock, 17, 3, 0) or die "socket: $!";
    open my $f, "<", "/sys/class/net/eth0/ifindex" or die; chomp(my $index = <$f>);
    send($sock, $frame, 0, pack("SnlSCCa8", 17, $proto, $index, 1, 0, 6, pack("H12", "525400e70701"))) or die "send: $!";
END
    MAC=52:54:00:e7:07:02; FROM=10.231.7.2; FROM6=fd32:5b0e:e7:1::2
    raw() { perl /root/raw.pl "$@" || echo "failed: $*"; }
    "#
}

#[test]
fn forged_frames_do_not_leave() {
    let Some((world, store)) = prepare("forged_frames_do_not_leave", ORDINARY_UID) else { return };
    let script = format!(
        r#"{raw}
        # The kernel has asked for its neighbours before, as the host's side asks for the guest.
        curl -sS -m 4 -o /dev/null http://{PUBLIC}/; curl -sS -m 4 -g -o /dev/null "http://[{PUBLIC6}]/"
        for to in {PUBLIC} {LAN} {HOST}; do raw plain $MAC 10.231.7.9 $to /address; raw plain 52:54:00:00:00:99 $FROM $to /hardware
          raw plain $MAC 127.0.0.1 $to /loopback; raw plain $MAC $to $FROM /reflected; raw vlan $MAC $FROM $to /vlan; done
        for to in {PUBLIC6} {LAN6} {HOST6}; do raw plain $MAC fd32:5b0e:e7:1::9 $to /address6; raw plain 52:54:00:00:00:99 $FROM6 $to /hardware6
          raw plain $MAC ::1 $to /loopback6; raw plain $MAC fe80::5054:ff:fee7:702 $to /link6; raw plain $MAC {HOST6} $to /host6; raw vlan $MAC $FROM6 $to /vlan6; done
        raw tunnel $MAC $FROM {LAN} /tunnel; raw tunnel $MAC $FROM6 {LAN6} /tunnel6
        for to in {HOST} {LAN} {METADATA} {NEIGHBOUR} 127.0.0.1 10.231.7.1 10.231.7.5 10.231.7.6 255.255.255.255 224.0.0.1; do raw plain $MAC $FROM $to /inside; done
        for to in {HOST6} {HOST_LAN6} {LAN6} {METADATA6} {NEIGHBOUR6} {TRANSLATED6} {SIX_TO_FOUR6} ::1 ::ffff:{LAN} ::{LAN} fe80::1 ff02::1           fd32:5b0e:e7:1::1 fd32:5b0e:e7:2::5 fd32:5b0e:e7:2::6; do raw plain $MAC $FROM6 $to /inside6; done
        raw plain $MAC $FROM {PUBLIC} /honest; raw plain $MAC $FROM6 {PUBLIC6} /honest6
        curl -sS -m 4 http://{PUBLIC}/end"#,
        raw = raw_frames()
    );
    let (output, errors) = store.run(&world, &["--net", "internet"], &script);
    assert!(
        output.trim().ends_with("public") && !output.contains("failed"),
        "{output}
{errors}"
    );
    let heard = world.heard();
    // That the honest ones arrive shows that the others could.
    let expected =
        ["public tcp /", "public6 tcp /", "public udp /honest", "public6 udp /honest6", "public tcp /end"];
    assert_eq!(
        heard, expected,
        "{output}
{errors}"
    );
    let sent = world.sent();
    for to in [HOST, LAN, METADATA, HOST6, LAN6, METADATA6, TRANSLATED6, SIX_TO_FOUR6] {
        assert!(!sent.contains(&format!("{to} . udp . 80")), "{to}: {sent}");
    }
    let captured = Captured::of(&world);
    captured.assert_only(&[(PUBLIC, 80), (PUBLIC6, 80)]);
    for text in ["/honest", "/honest6"] {
        assert!(captured.says(text), "{text}\n{output}\n{errors}");
    }
    for text in [
        "/address",
        "/hardware",
        "/loopback",
        "/reflected",
        "/vlan",
        "/link6",
        "/host6",
        "/tunnel",
        "/inside",
    ] {
        assert!(!captured.says(text), "{text}\n{output}\n{errors}");
    }
}

#[test]
fn only_what_is_allowed_is_reached() {
    let Some((world, store)) = prepare("only_what_is_allowed_is_reached", ORDINARY_UID) else { return };
    // Ten seconds, in which an address is open all the same.
    let script = format!(
        "web_before=$(curl -sS -m 4 http://{PUBLIC}/ 2>/dev/null || echo none); echo before=$web_before
{}
        name other other.test; web other-web {OTHER}; web lan-81 {LAN}:81",
        script()
    );
    let allow = format!("allow=public.test:80,{LAN}/32:80,[{LAN6}]:80,169.0.0.0/8");
    let (output, errors) = store.run(&world, &["--net", &allow], &script);
    let found = results(&output);
    let context = format!(
        "{found:#?}
{errors}"
    );
    // Not before its name was asked for.
    assert_eq!((found["before"], found["public"]), ("none", "none"), "{context}");
    for (key, value) in [
        ("by-name", "public"),
        ("name", PUBLIC),
        ("name-tcp", PUBLIC),
        ("name6", PUBLIC6),
        ("lan", "lan"),
        ("lan-udp", "lan"),
        ("lan6", "lan6"),
        ("other", ""),
        ("rebinding", ""),
    ] {
        assert_eq!(found[key], value, "{key} {context}");
    }
    for key in [
        "host",
        "host-lan",
        "neighbour",
        "metadata",
        "host6",
        "host-lan6",
        "metadata6",
        "translated6",
        "other-web",
        "rebinding-web",
    ] {
        assert_eq!(found[key], "none", "{key} {context}");
    }
    let heard = world.heard();
    let allowed = ["public ", "public6 ", "lan ", "lan6 "];
    assert!(heard.iter().all(|line| allowed.iter().any(|word| line.starts_with(word))), "{heard:?}");
    let captured = Captured::of(&world);
    captured.assert_only(&[(PUBLIC, 80), (PUBLIC6, 80), (LAN, 80), (LAN6, 80), (LAN, 53)]);
    assert!(captured.has(LAN, 80) && captured.has(LAN6, 80), "{context}");
}

#[test]
fn rules_change_while_a_vm_runs_and_stay() {
    let Some((world, store)) = prepare("rules_change_while_a_vm_runs_and_stay", ORDINARY_UID) else { return };
    let banger = |args: &[&str]| store.banger(&world, args);
    let (_, errors, made) =
        banger(&["vm", "create", "--name", "v", "--image", store.image(), "--net", "allow=public.test"]);
    assert!(made, "{errors}");
    let get = |url: &str| {
        let (output, errors, _) = banger(&["vm", "exec", "v", "--", "curl", "-sS", "-m", "4", "-g", url]);
        let output = output.trim().to_owned();
        if output.is_empty() { format!("none: {errors}") } else { output }
    };
    let other = format!("http://{OTHER}/");
    assert_eq!(get("http://public.test/"), "public");
    assert!(get("http://other.test/").starts_with("none"));
    assert!(get(&other).starts_with("none"));
    let (denials, errors, told) = banger(&["vm", "net", "denials", "v", "--json"]);
    assert!(told, "{errors}");
    let denials: serde_json::Value = serde_json::from_str(&denials).unwrap();
    let denied = |protocol: &str, key: &str, value: &str| {
        denials
            .as_array()
            .unwrap()
            .iter()
            .any(|denial| denial["protocol"] == protocol && denial[key] == value)
    };
    assert!(denied("dns", "name", "other.test") && denied("tcp", "address", OTHER), "{denials:#}");

    // Allowed at once, by name, and so the address it leads to.
    let (shown, errors, changed) = banger(&["vm", "net", "allow", "v", "other.test:80"]);
    assert!(changed && shown.contains("other.test:80") && shown.contains("now"), "{shown}{errors}");
    assert_eq!(get("http://other.test/"), "other");
    assert_eq!(get(&other), "other");
    // A connection that is open goes on when something else changes, and ends when its name is not allowed any more.
    let held = |path: &str, change: &[&str]| {
        let hold = format!(
            "rm -f /tmp/go; exec 3<>/dev/tcp/{OTHER}/80; touch /tmp/held; until [ -e /tmp/go ]; do sleep 0.1; done; \
             printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' >&3; timeout 5 cat <&3"
        );
        std::thread::scope(|scope| {
            let held = scope.spawn(|| banger(&["vm", "exec", "v", "--", "bash", "-c", &hold]).0);
            let wait = "until [ -e /tmp/held ]; do sleep 0.1; done; rm /tmp/held";
            assert!(banger(&["vm", "exec", "v", "--", "bash", "-c", wait]).2);
            let (_, errors, changed) = banger(change);
            assert!(changed, "{errors}");
            assert!(banger(&["vm", "exec", "v", "--", "touch", "/tmp/go"]).2);
            held.join().unwrap()
        })
    };
    let kept = held("/kept", &["vm", "net", "allow", "v", "10.9.9.9"]);
    assert!(kept.contains("other"), "{kept}");
    let cut = held("/cut", &["vm", "net", "deny", "v", "other.test:80"]);
    assert!(!cut.contains("other") && !world.heard().contains(&"other tcp /cut".to_owned()), "{cut}");
    assert!(get("http://other.test/").starts_with("none") && get(&other).starts_with("none"));
    assert_eq!(get("http://public.test/"), "public");

    let (_, errors, changed) = banger(&["vm", "net", "allow", "v", "other.test"]);
    assert!(changed, "{errors}");
    let (_, errors, restarted) = banger(&["vm", "restart", "v"]);
    assert!(restarted, "{errors}");
    assert_eq!(get("http://other.test/"), "other");
    let (_, errors, changed) = banger(&["vm", "net", "allow", "v", "169.254.169.254"]);
    assert!(!changed && errors.contains("is never reached"), "{errors}");

    // All that is allowed, at once; another mode comes with the next start.
    let (said, errors, _) = banger(&["vm", "set", "v", "--net", "allow=other.test:80"]);
    assert_eq!(said, "v has network allow, and its rules are in force\n", "{errors}");
    assert!(get("http://public.test/").starts_with("none"));
    assert_eq!(get("http://other.test/"), "other");
    let (said, errors, _) = banger(&["vm", "set", "v", "--net", "internet"]);
    assert_eq!(said, "v has network internet from its next start, and allow until then\n", "{errors}");
    let (shown, errors, _) = banger(&["vm", "net", "show", "v", "--json"]);
    let shown: serde_json::Value = serde_json::from_str(&shown).expect(&errors);
    assert_eq!((&shown["mode"], &shown["next_mode"]), (&"allow".into(), &"internet".into()));
    assert!(get("http://public.test/").starts_with("none"));
    let (_, errors, restarted) = banger(&["vm", "restart", "v"]);
    assert!(restarted, "{errors}");
    assert_eq!(get("http://public.test/"), "public");
    let (_, errors, deleted) = banger(&["vm", "delete", "v", "--force"]);
    assert!(deleted, "{errors}");
}

#[test]
fn without_ipv6_on_the_host_there_is_none_in_the_vm() {
    let name = "without_ipv6_on_the_host_there_is_none_in_the_vm";
    let Some((world, store)) = prepare(name, ORDINARY_UID) else { return };
    world.cut_ipv6();
    let script = format!(
        "ip -6 -o addr show dev eth0 scope global; curl -sS -m 4 http://{PUBLIC}/; curl -sS -m 4 http://{LAN}/ || echo none"
    );
    let (output, errors) = store.run(&world, &[], &script);
    assert_eq!(output, "public\nnone\n", "{errors}");
}

#[test]
fn none_reaches_nothing() {
    let Some((world, store)) = prepare("none_reaches_nothing", ORDINARY_UID) else { return };
    let (output, errors) = store.run(&world, &["--net", "none"], &script());
    let found = results(&output);
    assert!(found.len() > 15, "{output}\n{errors}");
    assert!(found.values().all(|value| ["none", ""].contains(value)), "{found:#?}\n{errors}");
    assert_eq!(world.heard(), [""; 0]);
    assert!(!errors.contains("warning"), "{errors}");
    Captured::of(&world).assert_only(&[]);
}

#[test]
fn without_a_route_a_vm_boots_and_says_so() {
    let Some((world, store)) = prepare("without_a_route_a_vm_boots_and_says_so", ORDINARY_UID) else {
        return;
    };
    world.cut();
    let (output, errors) = store.run(&world, &[], "echo booted");
    assert_eq!(output.trim(), "booted", "{errors}");
    let warnings: Vec<&str> = errors.lines().filter(|line| line.starts_with("warning")).collect();
    assert_eq!(warnings, ["warning: no way out to the network: the host has no default route"], "{errors}");
}

#[test]
fn an_address_the_host_gets_later_is_out_of_reach() {
    let name = "an_address_the_host_gets_later_is_out_of_reach";
    let Some((world, store)) = prepare(name, ORDINARY_UID) else { return };
    // The guest asks for the public addresses until it gets nothing any more: by then they are the host's own.
    let script = format!(
        "ask() {{ curl -sS -m 4 -g http://$1/$2; }}; ask {PUBLIC} before && ask [{PUBLIC6}] before || exit
        for address in {PUBLIC} [{PUBLIC6}]; do for i in $(seq 40); do \
        ask $address again || {{ echo refused; continue 2; }}; sleep 0.25; done; done"
    );
    let (output, errors) = std::thread::scope(|scope| {
        scope.spawn(|| {
            world.wait_heard("public6 tcp /before");
            world.take_public_addresses();
        });
        store.run(&world, &[], &script)
    });
    assert!(
        output.starts_with("publicpublic6") || output.starts_with("public\npublic6"),
        "{output}\n{errors}"
    );
    assert_eq!(output.matches("refused").count(), 2, "{output}\n{errors}");
}

#[test]
fn what_is_missing_is_said_and_the_vm_boots() {
    let name = "what_is_missing_is_said_and_the_vm_boots";
    let script = format!("curl -sS -m 4 http://{PUBLIC}/ || echo unreachable");
    for (path, cover, told) in [
        ("/usr/bin/pasta", "/dev/null", "`pasta` is not installed"),
        ("/usr/sbin/nft", "/dev/null", "`nft` is not installed"),
        // There, and failing: no policy, so no way out.
        ("/usr/sbin/nft", "/bin/false", "`nft` refused the policy"),
        ("/dev/net/tun", "/dev/null", "open `/dev/net/tun`"),
    ] {
        let Some((world, store)) = prepare(name, ORDINARY_UID) else { return };
        world.cover(path, cover);
        let (output, errors) = store.run(&world, &[], &script);
        assert_eq!(output.trim(), "unreachable", "{path}\n{errors}");
        let warnings: Vec<&str> = errors.lines().filter(|line| line.starts_with("warning")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains(told), "{path}\n{errors}");
        assert_eq!(world.heard(), [""; 0], "{path}");
    }
}

/// The other kind of what is missing: nobody else of its network is there, and so much is said.
#[test]
fn a_network_that_can_not_be_joined_is_said_and_the_vm_boots() {
    let name = "a_network_that_can_not_be_joined_is_said_and_the_vm_boots";
    for (path, cover, net, told) in [
        ("/usr/bin/pasta", "/dev/null", "none", &[][..]),
        ("/usr/bin/pasta", "/dev/null", "internet", &["no way out to the network: `pasta` is not installed"]),
        ("/usr/sbin/nft", "/dev/null", "none", &["no way to the vms of network `x`: `nft` is not installed"]),
        (
            "/dev/net/tun",
            "/dev/null",
            "internet",
            &[
                "no way out to the network: open `/dev/net/tun`",
                "no way to the vms of network `x`: open `/dev/net/tun`",
            ],
        ),
    ] {
        let Some((world, store)) = prepare(name, ORDINARY_UID) else { return };
        world.cover(path, cover);
        let (output, errors) =
            store.run(&world, &["--net", net, "--network", "x", "--name", "web"], "getent hosts web.vm");
        let is_joined = !told.iter().any(|told| told.contains("of network"));
        assert_eq!(output.starts_with("10.231.128.1 "), is_joined, "{path}\n{output}\n{errors}");
        let warnings: Vec<&str> = errors.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
        assert_eq!(warnings.len(), told.len(), "{path}\n{errors}");
        for (warning, told) in warnings.iter().zip(told) {
            assert!(warning.starts_with(told), "{path}\n{errors}");
        }
    }
}
