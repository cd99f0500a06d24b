//! What a guest reaches, and what not: real vms in a little internet of network namespaces.
//!
//! Needs root (to make the networks), `ip`, `pasta`, `nft`, QEMU, the `banger` program beside `bangerd`, and in
//! `BANGER_TEST_STORE` a state directory that has an image and a kernel. Nothing is sent outside of the machine: the
//! namespaces have no link to it. Without a prerequisite a test says `skipped` and why.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::print_stdout, reason = "a test")]

mod store;
mod world;

use std::collections::HashMap;
use store::Store;
use world::{HOST, HOST_LAN, LAN, METADATA, NEIGHBOUR, PUBLIC, World};

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
        name rebinding rebinding.test; web rebinding-web rebinding.test
        web host {HOST}; udp host-udp {HOST}; web host-lan {HOST_LAN}; web neighbour {NEIGHBOUR}; web lan {LAN}; udp lan-udp {LAN}
        web metadata {METADATA}
        web gateway 10.231.7.1; web outer 10.231.7.5; web outer-gateway 10.231.7.6; web loopback 127.0.0.1
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

fn internet_is_all_there_is(test: &str, uid: u32) {
    let Some((world, store)) = prepare(test, uid) else { return };
    let (output, errors) = store.run(&world, &["--net", "internet"], &script());
    let found = results(&output);
    let context = format!("{found:#?}\n{errors}");
    for key in ["public", "public-udp", "by-name"] {
        assert_eq!(found[key], "public", "{key} {context}");
    }
    for key in ["name", "name-tcp"] {
        assert_eq!(found[key], PUBLIC, "{key} {context}");
    }
    assert_eq!(found["rebinding"], "", "{context}");
    for key in [
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
    for word in ["host", "host-lan", "neighbour", "lan", "metadata", "loopback"] {
        assert!(!heard.iter().any(|line| line.starts_with(&format!("{word} "))), "{heard:?}");
    }
}

#[test]
fn internet_of_a_vm_of_root() {
    internet_is_all_there_is("internet_of_a_vm_of_root", 0);
}

#[test]
fn internet_of_a_vm_of_an_ordinary_user() {
    internet_is_all_there_is("internet_of_a_vm_of_an_ordinary_user", ORDINARY_UID);
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
        ("rebinding-web", "lan"),
        ("direct-dns", "yes"),
    ] {
        assert_eq!(found[key], word, "{key} {found:#?}\n{errors}");
    }
    for key in ["gateway", "outer", "outer-gateway", "loopback"] {
        assert_eq!(found[key], "none", "{key} {found:#?}\n{errors}");
    }
    assert!(!world.heard().iter().any(|line| line.starts_with("loopback ")));
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
    // The guest asks for the public address until it gets nothing any more: by then it is the host's own.
    let script = format!(
        "curl -sS -m 4 http://{PUBLIC}/before && for i in $(seq 40); do \
         curl -sS -m 4 http://{PUBLIC}/again || {{ echo refused; exit; }}; sleep 0.25; done"
    );
    let (output, errors) = std::thread::scope(|scope| {
        scope.spawn(|| {
            world.wait_heard("public tcp /before");
            world.take_public_address();
        });
        store.run(&world, &[], &script)
    });
    assert!(output.starts_with("public") && output.trim_end().ends_with("refused"), "{output}\n{errors}");
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
