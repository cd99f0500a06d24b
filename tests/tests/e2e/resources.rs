//! What a vm takes of the host: memory that it has freed, and how fast its drives are.

use crate::support::{IMAGE, Owner, wait_for};

/// What the guest fills and frees, in MiB. It reports whole blocks of 2 MiB, and keeps parts of some.
const FILLED_MIB: u64 = 200;

#[test]
fn memory_the_guest_frees_goes_back_to_the_host() {
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--name", "on", "--memory", "512M", "--net", "none", "--image", IMAGE]);
    let exec = |script: &str| owner.ok(["vm", "exec", "on", "--", "sh", "-c", script]);
    let pid = owner.json(&["vm", "show", "--json", "on"])["vmm_pid"].as_u64().unwrap();
    let used_mib = || {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    };
    // Kernels pulled by an earlier version have it among the image's modules only.
    exec("modprobe virtio_balloon");
    let before = used_mib();
    exec(&format!("head -c {FILLED_MIB}M /dev/zero >/dev/shm/filler"));
    let full = used_mib();
    assert!(full >= before + FILLED_MIB * 3 / 4, "{before} MiB, then {full} MiB");
    exec("rm /dev/shm/filler");
    wait_for("the VMM has less memory", || {
        let now = used_mib();
        if now + FILLED_MIB / 2 <= full { Ok(()) } else { Err(format!("{full} MiB, now {now} MiB")) }
    });
    println!("{before} MiB; {full} MiB with {FILLED_MIB} MiB in use; {} MiB afterwards", used_mib());
    owner.ok(["vm", "delete", "-f", "on"]);
    owner.assert_nothing_left();
}

#[test]
fn a_drive_is_as_fast_as_the_config_says() {
    let owner = Owner::with_store();
    let config = owner.home().join(".config/banger");
    std::fs::create_dir_all(&config).unwrap();
    // Past the guest's cache. What is timed is within the guest.
    let script = "begun=$(date +%s%N); dd if=/dev/vda of=/dev/null bs=64k count=320 iflag=direct status=none;
        echo $((($(date +%s%N) - begun) / 1000000))";
    let took_ms = |rate: &str| -> u64 {
        std::fs::write(config.join("config.toml"), rate).unwrap();
        let output = owner.ok([
            "vm", "run", "--rm", "--memory", "256M", "--net", "none", "--image", IMAGE, "--", "sh", "-c",
            script,
        ]);
        output.trim().parse().unwrap()
    };
    let (fast, slow) = (took_ms(""), took_ms("disk_rate = '4M'\n"));
    // 20 MiB; the boot has used up what may go at once.
    assert!(slow > 4_000 && fast < slow, "{fast} ms, with a limit {slow} ms");
    owner.assert_nothing_left();
}
