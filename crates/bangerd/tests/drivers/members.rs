//! Two guests in a network of vms: what they send goes through tap, packet filter and supervisors, and comes back so.

use crate::Bench;
use crate::frames::{GUEST_MAC, UDP_LEN_MAX, gateway_has, udp, who_has_gateway, who_is};
use crate::guest::Script;
use crate::vm::Vm;
use banger_wire::vm::{EndReason, VmRequest};
use serde_json::json;
use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

const A: Ipv4Addr = Ipv4Addr::new(10, 231, 128, 1);
const B: Ipv4Addr = Ipv4Addr::new(10, 231, 128, 2);
const PORT: u16 = 81;

/// A guest that knows its neighbour, and how to find the other.
fn joined(bench: &Bench) -> Script {
    let script = Script::default().open_net(bench.is_qemu()).ask(&who_has_gateway(), &gateway_has());
    script.ask(&who_is("b"), &B.octets()).print("joined\n")
}

fn start(bench: &Bench, network: &Path, number: u8, script: &Script) -> Vm {
    Vm::start(&bench.vmm, &bench.kernel(), script, |plan| {
        let place = network.join(number.to_string());
        fs::create_dir(&place).unwrap();
        fs::set_permissions(&place, PermissionsExt::from_mode(0o711)).unwrap();
        let user = plan["run_as"].as_u64().map(|user| u32::try_from(user).unwrap());
        chown(&place, user, user).unwrap();
        let nft = bench.nft.as_ref().unwrap();
        let member = json!({ "network": "x", "number": number, "dir": network });
        plan["net"] = json!({ "mode": "none", "nft": nft, "pasta": null, "member": member });
    })
}

pub(crate) fn frames_come_and_go_and_forged_ones_do_not(bench: &Bench) {
    if bench.nft.is_none() {
        return println!("skipped: frames_come_and_go_and_forged_ones_do_not: `nft` is not installed");
    }
    let network = tempfile::tempdir().unwrap();
    fs::set_permissions(network.path(), PermissionsExt::from_mode(0o711)).unwrap();
    symlink("2", network.path().join("b.vm")).unwrap();
    let said = |text: &str, len: usize| {
        let mut data = format!("!{text}\n").into_bytes();
        data.resize(len.max(data.len()), b'.');
        data
    };
    let a_says = |text: &str, len| udp(GUEST_MAC, A, B, PORT, &said(text, len));
    let b_says = |text: &str| udp(GUEST_MAC, B, A, PORT, &said(text, UDP_LEN_MAX));
    let listen = joined(bench).ask(&[], b"!first\n").frame(&b_says("heard"));
    let listen = listen.ask(&b_says("heard"), b"!last\n").ask(&b_says("all"), b"!done\n").print("end\n");
    let b = start(bench, network.path(), 2, &listen);
    b.wait_for_console("joined\n");
    let mut talk = joined(bench).ask(&a_says("first", UDP_LEN_MAX), b"!heard\n");
    // Of another machine, another member, and nobody; and what is nobody's to send or carry.
    let text = said("forged", 0);
    for (mac, from) in [
        ([0x52, 0x54, 0, 0, 0, 0x99], A),
        (GUEST_MAC, Ipv4Addr::new(10, 231, 128, 3)),
        (GUEST_MAC, Ipv4Addr::new(10, 231, 7, 2)),
        (GUEST_MAC, Ipv4Addr::new(10, 231, 7, 9)),
        (GUEST_MAC, Ipv4Addr::LOCALHOST),
    ] {
        talk = talk.frame(&udp(mac, from, B, PORT, &text));
    }
    talk = talk.frame(&a_says("last", 0)).ask(&a_says("last", 0), b"!all\n").frame(&a_says("done", 0));
    let a = start(bench, network.path(), 1, &talk.print("end\n"));
    a.wait_for_console("end\n");
    b.wait_for_console("end\n");
    let lines = |vm: &Vm| {
        let console = vm.console();
        let mut lines: Vec<_> =
            console.lines().filter(|line| line.starts_with('!')).map(str::to_owned).collect();
        lines.dedup();
        lines
    };
    assert_eq!(lines(&a), ["!heard", "!all"]);
    assert_eq!(lines(&b), ["!first", "!last", "!done"]);
    for vm in [a, b] {
        vm.request(VmRequest::Kill);
        assert_eq!(vm.end().reason, EndReason::Killed);
    }
}
