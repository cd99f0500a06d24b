//! The QEMU driver (7.2 and later): q35 with PCI devices.
//!
//! Software emulation is what it is for. The microvm machine boots 0.4 s faster but, emulated under load, now and
//! then hangs before the kernel's first line, because it has a single reference to calibrate the clock by; q35 has
//! others. The kernel is given the host's clock rate for the same reason.

use crate::machine::{AgentSocket, Control, Launch, MachinePlan, NetLink, Saved};
use std::ffi::OsString;

/// Name of the agent's virtio-serial port.
const AGENT_PORT: &str = banger_wire::guest::PORT_NAME;
/// Size of the emulator's translation cache in MiB: the default costs 60 MB more and gains nothing measurable.
const TRANSLATION_CACHE_MIB: u32 = 128;
/// Timer interrupts a second of Debian's kernels (`CONFIG_HZ`). With another rate, busy waits are that much longer.
const KERNEL_HZ: u64 = 250;
/// What makes a Debian cloud kernel start quickly and end the VMM with the guest.
///
/// `panic=-1 reboot=t` turn a panic into a reset, which `-no-reboot` turns into an exit. Without AppArmor's parser in
/// the image, Docker refuses to run on a kernel that has AppArmor on.
const CMDLINE: [&str; 11] = [
    "console=ttyS0",
    "quiet",
    "nokaslr",
    "cryptomgr.notests=1",
    "no_timer_check",
    "panic=-1",
    "reboot=t",
    "net.ifnames=0",
    "apparmor=0",
    "fstab=no",
    "systemd.firstboot=no",
];

/// Modules that udev would load in an emulated machine for what its processor says it can do, for several seconds of its
/// time: virtualisation, clock rates, and ciphers and checksums of which the kernel has portable ones. Whoever wants one
/// loads it by its name.
const NOT_FOR_EMULATION: &str = "kvm_amd,kvm_intel,powernow_k8,acpi_cpufreq,aesni_intel,ghash_clmulni_intel,\
    polyval_clmulni,sha1_ssse3,sha256_ssse3,sha512_ssse3,crc32_pclmul,crc32c_intel,crct10dif_pclmul";

/// What an emulated processor must not say it has: string instructions that are fast for any length. Emulated, those go
/// byte by byte, and the kernel would copy nearly everything with them; its loops of eight bytes are 3 to 7 times as fast.
const SLOW_IN_EMULATION: &str = "erms=off,fsrm=off";

/// Says how to start the machine with QEMU. The console goes to the VMM's standard output.
#[must_use]
pub fn launch(plan: &MachinePlan) -> Launch {
    let agent_socket = plan.run_dir.join("agent.sock");
    let control_socket = plan.run_dir.join("qmp.sock");
    let mut cmdline: Vec<String> = CMDLINE.map(str::to_owned).to_vec();
    // Emulated timers are too late under load to calibrate by; a kernel that tries may never get to its first line.
    if let Some(khz) = plan.tsc_khz.filter(|_| !plan.kvm) {
        cmdline.push(format!("tsc_early_khz={khz} lpj={}", khz * 1000 / KERNEL_HZ));
    }
    if !plan.kvm {
        cmdline.push(format!("modprobe.blacklist={NOT_FOR_EMULATION}"));
    }
    cmdline.extend(plan.cmdline.iter().cloned());
    let cmdline = cmdline.join(" ");
    let mut args = Args::default();
    // Without the keyboard, disk and bus controllers of a PC, which a guest would look for things on.
    args.words("-nodefaults -no-user-config -display none -no-reboot");
    args.words("-machine q35,i8042=off,sata=off,smbus=off");
    if plan.kvm {
        args.words("-accel kvm -cpu host");
    } else {
        args.pair("-cpu", format!("max,{SLOW_IN_EMULATION}"))
            .pair("-accel", format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"));
    }
    args.pair("-smp", plan.vcpu.to_string()).pair("-m", plan.memory.0.to_string());
    args.pair("-kernel", &plan.kernel).pair("-initrd", &plan.initrd).pair("-append", &cmdline);
    args.words("-serial stdio");
    args.pair("-chardev", option("socket,id=agent,server=on,wait=off,path=", agent_socket.as_os_str()));
    args.words("-device virtio-serial-pci,max_ports=2");
    args.pair("-device", format!("virtserialport,nr=1,chardev=agent,name={AGENT_PORT}"));
    for (number, drive) in plan.drives.iter().enumerate() {
        let access = if drive.read_only { "readonly=on," } else { "discard=unmap," };
        // Two vms share an image; the supervisor's own lock is what keeps a disk to one vm.
        let head = format!("id=drive{number},if=none,format=raw,file.locking=off,{access}file=");
        let mut drive_option = option(&head, drive.path.as_os_str());
        if let Some(rate) = drive.rate {
            drive_option.push(format!(",throttling.bps-total={rate}"));
        }
        args.pair("-drive", drive_option);
        args.pair("-device", format!("virtio-blk-pci,drive=drive{number}"));
    }
    if let Some(net) = &plan.net {
        let link = match &net.link {
            NetLink::Open(tap) => format!("tap,id=net,fd={tap}"),
            NetLink::Named(tap) => format!("tap,id=net,ifname={tap},script=no,downscript=no"),
            NetLink::Loose => "hubport,id=net,hubid=0".to_owned(),
        };
        args.pair("-netdev", link);
        // A machine that goes on elsewhere would be asked to announce its address. There is nobody to hear that, and Linux
        // 6.12 deadlocks over it when the interface is taken down meanwhile.
        args.pair(
            "-device",
            format!("virtio-net-pci,netdev=net,mac={},guest_announce=off,romfile=", net.mac),
        );
    }
    // After everything that has a number in the guest. Its size is never set: it takes pages only that the guest has freed.
    let reporting = if plan.gives_memory_back { "on" } else { "off" };
    args.pair("-device", format!("virtio-balloon-pci,deflate-on-oom=on,free-page-reporting={reporting}"));
    let mut control = option("unix:", control_socket.as_os_str());
    control.push(",server=on,wait=off");
    args.pair("-qmp", control);
    if let Some(Saved::Open(saved)) = &plan.saved {
        args.pair("-incoming", format!("fd:{saved}"));
    }
    args.words("-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
    Launch {
        program: plan.program.clone(),
        args: args.0,
        files: Vec::new(),
        sockets: Vec::new(),
        counters: None,
        cmdline,
        agent: AgentSocket::Dial(agent_socket),
        control: Control::Qmp(control_socket),
    }
}

/// In QEMU's option lists a comma ends a value; a doubled one is a comma of the value.
fn option(head: &str, path: &std::ffi::OsStr) -> OsString {
    use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
    let mut bytes = head.as_bytes().to_vec();
    for &byte in path.as_bytes() {
        bytes.push(byte);
        if byte == b',' {
            bytes.push(byte);
        }
    }
    OsString::from_vec(bytes)
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn words(&mut self, words: &str) -> &mut Self {
        self.0.extend(words.split(' ').map(OsString::from));
        self
    }

    fn pair(&mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> &mut Self {
        self.0.push(name.into());
        self.0.push(value.as_ref().to_owned());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::launch;
    use crate::machine::{AgentSocket, Drive, Driver, MachinePlan, NetDevice, NetLink, Saved};
    use banger_wire::size::Mebibytes;

    fn plan() -> MachinePlan {
        MachinePlan {
            driver: Driver::Qemu,
            program: "/usr/bin/qemu-system-x86_64".into(),
            kvm: false,
            pci: true,
            vcpu: 2,
            memory: Mebibytes(512),
            kernel: "/kernel/vmlinux".into(),
            initrd: "/initrd".into(),
            tsc_khz: Some(2_599_998),
            cmdline: vec!["extra=1".to_owned()],
            drives: vec![
                Drive { path: "/image/rootfs.ext4".into(), read_only: true, rate: None },
                Drive { path: "/vm/a,b.raw".into(), read_only: false, rate: Some(5 << 20) },
            ],
            net: Some(NetDevice { mac: "52:54:00:00:00:01".to_owned(), link: NetLink::Open(3) }),
            run_dir: "/run".into(),
            gives_memory_back: true,
            to_be_saved: false,
            saved: None,
        }
    }

    #[test]
    fn emulated_launch_is_as_written_down() {
        let launch = launch(&plan());
        let args: Vec<_> = launch.args.iter().map(|arg| arg.to_str().unwrap()).collect();
        assert_eq!(
            args.join("\n"),
            include_str!("../tests/golden/qemu-emulated.txt").trim_end(),
            "change the golden file when the change is meant"
        );
        assert_eq!(launch.agent, AgentSocket::Dial("/run/agent.sock".into()));
        assert!(launch.cmdline.contains(" tsc_early_khz=2599998 lpj=10399992 modprobe.blacklist=kvm_amd,"));
    }

    #[test]
    fn a_saved_machine_goes_on_as_it_was() {
        let booted = launch(&plan()).args;
        let restored = launch(&MachinePlan { saved: Some(Saved::Open(9)), ..plan() }).args;
        let more: Vec<_> = restored.iter().filter(|arg| !booted.contains(arg)).collect();
        assert_eq!(more, ["-incoming", "fd:9"]);
        let net = Some(NetDevice { mac: "52:54:00:00:00:01".to_owned(), link: NetLink::Loose });
        let saved = launch(&MachinePlan { net, ..plan() }).args;
        let other: Vec<_> = booted.iter().zip(&saved).filter(|(one, other)| one != other).collect();
        assert_eq!(other, [(&"tap,id=net,fd=3".into(), &"hubport,id=net,hubid=0".into())]);
    }

    #[test]
    fn kvm_uses_the_hosts_processor() {
        let launch = launch(&MachinePlan { kvm: true, net: None, ..plan() });
        let args = launch.args.join(" ".as_ref()).into_string().unwrap();
        assert!(args.contains("-accel kvm -cpu host") && !args.contains("tcg") && !args.contains("-netdev"));
    }
}
