//! KVM, tried out: the guest of the probe under a KVM that is known to run kernels.
//!
//! An emulated processor has AMD's virtualisation, so a vm of banger's with its kernel's own KVM module is such a machine.

use crate::support::{IMAGE, Owner, programs, show, skip};
use std::fs::File;
use std::process::Output;

#[test]
fn a_real_kvm_lets_the_probe_through() {
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--name", "host", "--image", IMAGE, "--net", "none", "--vmm", "qemu"]);
    let exec = |script: &str| -> Output {
        owner.banger(["vm", "exec", "host", "--", "sh", "-c", script]).output().unwrap()
    };
    let output = exec("modprobe kvm_amd && test -c /dev/kvm && echo there");
    if output.stdout != b"there\n" {
        return skip(&format!("a_real_kvm_lets_the_probe_through: no KVM in a vm here: {}", show(&output)));
    }
    let mut copy = owner.banger([
        "vm",
        "exec",
        "host",
        "--",
        "sh",
        "-c",
        "cat >/root/bangerd; chmod 755 /root /root/bangerd",
    ]);
    let output = copy.stdin(File::open(programs().join("bangerd")).unwrap()).output().unwrap();
    assert!(output.status.success(), "{}", show(&output));
    if !exec("/root/bangerd apparmor-profile").status.success() {
        return skip("a_real_kvm_lets_the_probe_through: `bangerd` does not run on the image's C library");
    }
    let output = exec("/root/bangerd kvm-probe");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.ends_with("\"passed\"\n"), "{}", show(&output));
    assert_eq!(said.matches("reached").count(), 7, "{said}");
    let output = exec("setpriv --reuid=1000 --regid=1000 --clear-groups /root/bangerd kvm-probe");
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("{\"denied\":"), "{}", show(&output));
    owner.ok(["vm", "delete", "-f", "host"]);
    owner.assert_nothing_left();
}
