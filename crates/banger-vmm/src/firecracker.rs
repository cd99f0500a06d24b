//! The Firecracker driver (1.12 and later): a configuration file, a vsock for the agent, an API on a Unix socket.
//!
//! Firecracker needs KVM. Its machine has no firmware and no switch: a guest ends it by a reset, which it answers by
//! ending, with success. Switching off is not among the things a guest can do, so one that wants it stands still; its
//! kernel says so on the console ([`says_halted`]), and whoever reads that ends the VMM.
//!
//! The API is used for what a configuration file can't say: saving the machine, and going on with a saved one. Its socket
//! is in the vm's private root, where the supervisor alone connects; a guest reaches sockets of another form of name.

use crate::api::Request;
use crate::machine::{AgentSocket, Control, Counters, Drive, Launch, MachinePlan, NetDevice, NetLink, Saved};
use banger_wire::guest::VSOCK_PORT;
use serde::Deserialize;
use serde_json::{Value, json};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The oldest version, the first that starts a kernel by PVH.
pub const VERSION_MIN: (u32, u32) = (1, 12);
/// The first version that may understand neither these arguments nor this configuration.
pub const VERSION_END: (u32, u32) = (2, 0);
/// The first version that puts devices on a PCI bus.
pub const PCI_SINCE: (u32, u32) = (1, 13);
/// The first version whose balloon takes reports of free pages.
pub const REPORTING_SINCE: (u32, u32) = (1, 14);

/// The guest's address on its vsock; the same in every vm, since each has a vsock of its own. 0 to 2 have a meaning.
const GUEST_CID: u32 = 3;
/// What a guest may draw from the host's random numbers: this many bytes in each period.
const ENTROPY_BYTES: u32 = 64 * 1024;
/// That period, in milliseconds.
const ENTROPY_PERIOD_MS: u32 = 100;
/// A rate is kept to in periods of this many milliseconds.
const RATE_PERIOD_MS: u64 = 100;
/// What makes a Debian cloud kernel start quickly and reset the machine when it can't go on.
///
/// The keyboard controller resets it (`reboot=k`); a triple fault counts as an error. Nothing else is on that controller,
/// so it isn't searched. Firecracker adds `pci=off` where there is no bus.
const CMDLINE: [&str; 12] = [
    "console=ttyS0",
    "quiet",
    "cryptomgr.notests=1",
    "panic=-1",
    "reboot=k",
    "i8042.noaux",
    "i8042.nomux",
    "i8042.dumbkbd",
    "net.ifnames=0",
    "apparmor=0",
    "fstab=no",
    "systemd.firstboot=no",
];

/// Returns where the configuration is put for the VMM to read.
#[must_use]
pub fn config_path(plan: &MachinePlan) -> PathBuf {
    plan.run_dir.join("firecracker.json")
}

/// Returns where the pipe is that it counts into.
#[must_use]
pub fn counters_path(plan: &MachinePlan) -> PathBuf {
    plan.run_dir.join("counters")
}

/// Says how to start the machine with Firecracker. The console goes to the VMM's standard output.
///
/// A guest reaches every socket `<vsock>_<port>` of the directory; there has to be none but the agent's.
///
/// A saved machine brings its configuration along. Of drives only the names are saved: what is there when it goes on
/// counts, with its length. The tap and the vsock's path are as they were as well.
#[must_use]
pub fn launch(plan: &MachinePlan) -> Launch {
    let socket = plan.run_dir.join("api.sock");
    let vsock = plan.run_dir.join("vsock");
    let agent = plan.run_dir.join(format!("vsock_{VSOCK_PORT}"));
    let words = CMDLINE.iter().copied().chain(plan.cmdline.iter().map(String::as_str));
    let cmdline = words.collect::<Vec<_>>().join(" ");
    // What is below errors is about Firecracker itself, and would stand between the guest's lines.
    let mut args: Vec<OsString> = ["--level", "Error", "--api-sock"].map(OsString::from).into();
    args.push(socket.clone().into());
    if plan.pci {
        args.push("--enable-pci".into());
    }
    let counters = counters_path(plan);
    let (mut files, mut first) = (Vec::new(), Vec::new());
    if let Some(Saved::Files { memory, state }) = &plan.saved {
        first.extend([count_into(&counters), load(memory, state), resume()]);
    } else {
        let path = config_path(plan);
        args.extend(["--config-file".into(), path.clone().into()]);
        files.push((path, format!("{:#}\n", config(plan, &vsock, &counters, &cmdline)).into_bytes()));
    }
    Launch {
        program: plan.program.clone(),
        args,
        files,
        sockets: vec![vsock, socket.clone()],
        counters: Some(counters),
        cmdline,
        agent: AgentSocket::Listen(agent),
        control: Control::Api { socket, first },
    }
}

fn config(plan: &MachinePlan, vsock: &Path, counters: &Path, cmdline: &str) -> Value {
    let mut machine = json!({ "vcpu_count": plan.vcpu, "mem_size_mib": plan.memory.0 });
    if plan.to_be_saved {
        machine["track_dirty_pages"] = true.into();
    }
    // Its size is never set: it takes pages only that the guest has freed.
    let mut balloon = json!({ "amount_mib": 0, "deflate_on_oom": true });
    if plan.gives_memory_back {
        // Versions that don't know the word refuse it.
        balloon["free_page_reporting"] = true.into();
    }
    json!({
        "balloon": balloon,
        "boot-source": {
            "kernel_image_path": text(&plan.kernel),
            "initrd_path": text(&plan.initrd),
            "boot_args": cmdline,
        },
        "machine-config": machine,
        "metrics": { "metrics_path": text(counters) },
        "drives": drives(plan),
        "network-interfaces": interfaces(plan),
        "vsock": { "guest_cid": GUEST_CID, "uds_path": text(vsock) },
        "entropy": {
            "rate_limiter": { "bandwidth": { "size": ENTROPY_BYTES, "refill_time": ENTROPY_PERIOD_MS } },
        },
    })
}

/// Says how to save a running machine into two files. It stands still from then on.
///
/// The memory's file is as long as the memory, with holes where nothing was written since the machine began: Firecracker
/// calls that a difference, here to nothing. It takes [`MachinePlan::to_be_saved`].
#[must_use]
pub fn save(memory: &Path, state: &Path) -> [Request; 2] {
    let body = json!({
        "snapshot_type": "Diff",
        "mem_file_path": text(memory),
        "snapshot_path": text(state),
    });
    [pause(), Request { method: "PUT", path: "/snapshot/create", body }]
}

/// Loads a saved machine, which stands still then. To be asked before there is a machine.
fn load(memory: &Path, state: &Path) -> Request {
    let body = json!({
        "mem_backend": { "backend_type": "File", "backend_path": text(memory) },
        "snapshot_path": text(state),
    });
    Request { method: "PUT", path: "/snapshot/load", body }
}

/// Has counters written into a pipe. A saved machine does not know of it.
fn count_into(pipe: &Path) -> Request {
    Request { method: "PUT", path: "/metrics", body: json!({ "metrics_path": text(pipe) }) }
}

/// Has counters written now; otherwise that is done once a minute.
#[must_use]
pub fn count() -> Request {
    Request { method: "PUT", path: "/actions", body: json!({ "action_type": "FlushMetrics" }) }
}

/// Returns what a line of counters says has been counted since the line before.
#[must_use]
pub fn counted(line: &[u8]) -> Option<Counters> {
    #[derive(Deserialize)]
    struct Metrics {
        block: Block,
    }
    #[derive(Deserialize)]
    struct Block {
        read_bytes: u64,
        write_bytes: u64,
    }
    let Metrics { block } = serde_json::from_slice(line).ok()?;
    Some(Counters { read: block.read_bytes, written: block.write_bytes })
}

/// Has the machine stand still.
#[must_use]
pub fn pause() -> Request {
    Request { method: "PATCH", path: "/vm", body: json!({ "state": "Paused" }) }
}

/// Has the machine go on.
#[must_use]
pub fn resume() -> Request {
    Request { method: "PATCH", path: "/vm", body: json!({ "state": "Resumed" }) }
}

/// The initramfs finds the root, so no drive is the root device.
fn drives(plan: &MachinePlan) -> Vec<Value> {
    let drive = |(number, drive): (usize, &Drive)| {
        let mut config = json!({
            "drive_id": format!("drive{number}"),
            "path_on_host": text(&drive.path),
            "is_root_device": false,
            "is_read_only": drive.read_only,
            // By default a guest's flush does nothing, and what it wrote is lost with the host's power.
            "cache_type": "Writeback",
        });
        if let Some(rate) = drive.rate {
            let size = rate.saturating_mul(RATE_PERIOD_MS) / 1000;
            config["rate_limiter"] = json!({ "bandwidth": { "size": size, "refill_time": RATE_PERIOD_MS } });
        }
        config
    };
    plan.drives.iter().enumerate().map(drive).collect()
}

/// It opens its tap itself, always.
fn interfaces(plan: &MachinePlan) -> Vec<Value> {
    let interface = |net: &NetDevice| match &net.link {
        NetLink::Named(tap) => Some(json!({ "iface_id": "net", "host_dev_name": tap, "guest_mac": net.mac })),
        NetLink::Open(_) | NetLink::Loose => None,
    };
    plan.net.iter().filter_map(interface).collect()
}

/// A plan has no path that isn't text: it is JSON as well.
fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// Tells whether a line of the console is the kernel's last one, of a machine that stands still and can't be switched off.
///
/// Whoever may write to the kernel's log or console can say the same, and could as well end the machine.
#[must_use]
pub fn says_halted(line: &str) -> bool {
    let Some((time, text)) = line.trim_end().strip_prefix('[').and_then(|rest| rest.split_once("] ")) else {
        return false;
    };
    let is_time = time.trim().bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    // Linux's `kernel/reboot.c`, in the order of the versions that say so.
    let texts = ["System halted", "Power down", "Power off not available: System halted instead"];
    is_time && text.strip_prefix("reboot: ").is_some_and(|said| texts.contains(&said))
}

/// What begins the line in which Firecracker says why it could not go on.
pub const COMPLAINT: &str = "RunWithApiError error: ";

/// Returns what an exit status means, when it is one that Firecracker has a meaning for.
///
/// Source: `FcExitCode` in its `src/vmm/src/lib.rs`.
#[must_use]
pub fn exit_reason(status: i32) -> Option<&'static str> {
    Some(match status {
        148 => "it made a system call that its filter forbids",
        149 => "SIGBUS: memory or a file it maps is gone",
        150 => "SIGSEGV",
        151 => "SIGXFSZ: it wrote beyond the length of its disk",
        152 => "its configuration is wrong",
        153 => "its arguments are wrong",
        154 => "SIGXCPU",
        155 => "SIGPIPE",
        156 => "SIGHUP",
        157 => "SIGILL",
        _ => return None,
    })
}

/// Tells why a version is not one this driver is made for; nothing when it is.
#[must_use]
pub fn unfit(version: (u32, u32)) -> Option<String> {
    let shown = |(major, minor): (u32, u32)| format!("{major}.{minor}");
    if version < VERSION_MIN {
        Some(format!("older than {}", shown(VERSION_MIN)))
    } else if version >= VERSION_END {
        Some(format!(
            "newer than this banger, which knows Firecracker {} to {}.x",
            shown(VERSION_MIN),
            VERSION_END.0 - 1
        ))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::{exit_reason, launch, save, says_halted, unfit};
    use crate::machine::{AgentSocket, Control, Drive, Driver, MachinePlan, NetDevice, NetLink, Saved};
    use banger_wire::size::Mebibytes;

    fn plan() -> MachinePlan {
        MachinePlan {
            driver: Driver::Firecracker,
            program: "/boot/firecracker".into(),
            kvm: true,
            pci: true,
            vcpu: 2,
            memory: Mebibytes(512),
            kernel: "/kernel/vmlinux".into(),
            initrd: "/initrd".into(),
            tsc_khz: Some(2_599_998),
            cmdline: vec!["extra=1".to_owned()],
            drives: vec![
                Drive { path: "/image/rootfs.ext4".into(), read_only: true, rate: None },
                Drive { path: "/vm/a\"b.raw".into(), read_only: false, rate: Some(5 << 20) },
            ],
            net: Some(NetDevice {
                mac: "52:54:00:00:00:01".to_owned(),
                link: NetLink::Named("tap0".to_owned()),
            }),
            run_dir: "/run".into(),
            gives_memory_back: true,
            to_be_saved: false,
            saved: None,
        }
    }

    #[test]
    fn launch_is_as_written_down() {
        let launch = launch(&plan());
        let args: Vec<_> = launch.args.iter().map(|arg| arg.to_str().unwrap()).collect();
        let [(path, config)] = &launch.files[..] else { panic!("{:?}", launch.files) };
        let text = format!("{}\n{}:\n{}", args.join("\n"), path.display(), str::from_utf8(config).unwrap());
        let expected = include_str!("../tests/golden/firecracker.txt");
        assert_eq!(text, expected, "change the golden file when the change is meant");
        assert_eq!(launch.agent, AgentSocket::Listen("/run/vsock_1024".into()));
        assert_eq!(launch.control, Control::Api { socket: "/run/api.sock".into(), first: Vec::new() });
        assert!(launch.cmdline.ends_with(" extra=1"));
    }

    #[test]
    fn without_a_bus_and_without_a_network() {
        let launch = launch(&MachinePlan { pci: false, net: None, ..plan() });
        assert!(!launch.args.contains(&"--enable-pci".into()));
        let config: serde_json::Value = serde_json::from_slice(&launch.files[0].1).unwrap();
        assert_eq!(config["network-interfaces"], serde_json::json!([]));
        let launch = super::launch(&MachinePlan { gives_memory_back: false, ..plan() });
        let config: serde_json::Value = serde_json::from_slice(&launch.files[0].1).unwrap();
        assert_eq!(config["balloon"], serde_json::json!({ "amount_mib": 0, "deflate_on_oom": true }));
    }

    #[test]
    fn a_machine_is_saved_and_goes_on() {
        let saved = launch(&MachinePlan { to_be_saved: true, ..plan() });
        let config: serde_json::Value = serde_json::from_slice(&saved.files[0].1).unwrap();
        assert_eq!(config["machine-config"]["track_dirty_pages"], true);
        let files = Saved::Files { memory: "/boot/memory".into(), state: "/boot/state".into() };
        let restored = launch(&MachinePlan { saved: Some(files), ..plan() });
        assert_eq!(restored.args, ["--level", "Error", "--api-sock", "/run/api.sock", "--enable-pci"]);
        assert_eq!(
            (restored.files, &restored.sockets, &restored.agent),
            (vec![], &saved.sockets, &saved.agent)
        );
        let Control::Api { first, .. } = restored.control else { panic!("{:?}", restored.control) };
        let shown: Vec<String> = save("/vm/memory".as_ref(), "/vm/state".as_ref())
            .iter()
            .chain(&first)
            .map(|request| format!("{} {} {}", request.method, request.path, request.body))
            .collect();
        let expected = [
            r#"PATCH /vm {"state":"Paused"}"#,
            r#"PUT /snapshot/create {"mem_file_path":"/vm/memory","snapshot_path":"/vm/state","snapshot_type":"Diff"}"#,
            r#"PUT /metrics {"metrics_path":"/run/counters"}"#,
            r#"PUT /snapshot/load {"mem_backend":{"backend_path":"/boot/memory","backend_type":"File"},"snapshot_path":"/boot/state"}"#,
            r#"PATCH /vm {"state":"Resumed"}"#,
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    fn a_halted_kernel_is_known_by_its_last_line() {
        for line in [
            "[    3.141592] reboot: System halted\r",
            "[   12.000001] reboot: Power off not available: System halted instead",
            "[12345.678901] reboot: Power down",
        ] {
            assert!(says_halted(line), "{line}");
        }
        for line in [
            "reboot: System halted",
            "[    3.141592] reboot: Restarting system",
            "[    3.141592] reboot: System halted or so",
            "[ make ] reboot: System halted",
            "echo [    3.141592] reboot: System halted",
            "",
        ] {
            assert!(!says_halted(line), "{line}");
        }
    }

    #[test]
    fn versions_outside_the_window_are_refused() {
        assert_eq!(unfit((1, 11)).as_deref(), Some("older than 1.12"));
        assert_eq!(unfit((0, 99)).as_deref(), Some("older than 1.12"));
        assert_eq!((unfit((1, 12)), unfit((1, 99))), (None, None));
        assert_eq!(
            unfit((2, 0)).as_deref(),
            Some("newer than this banger, which knows Firecracker 1.12 to 1.x")
        );
    }

    #[test]
    fn counters_are_of_all_drives() {
        let line = br#"{"utc_timestamp_ms":1,"block":{"read_bytes":7,"write_bytes":5,"flush_count":1},"block_drive0":{"read_bytes":7}}"#;
        assert_eq!(super::counted(line), Some(super::Counters { read: 7, written: 5 }));
        assert_eq!(super::counted(&line[..40]), None);
    }

    #[test]
    fn statuses_of_its_own_are_explained() {
        assert_eq!(exit_reason(148), Some("it made a system call that its filter forbids"));
        assert_eq!(exit_reason(1), None);
    }
}
