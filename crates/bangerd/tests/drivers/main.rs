//! What every driver promises, with real VMMs: from a plan by way of the supervisor, the private root and the confinement
//! to a guest that runs, and to nothing being left of it.
//!
//! There is one list of expectations, run with QEMU, and with Firecracker where it is in `PATH` and KVM can be used. The
//! guest is a small program (`guest.c`), since an ordinary kernel does not run everywhere these tests do; it needs a C
//! compiler. On Firecracker's PCI bus it finds no devices, so there those are left out that need one.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::print_stdout,
    reason = "a test"
)]

mod frames;
mod guest;
mod members;
mod vm;

use banger_wire::exec::{ExitStatus, STDIN, STDOUT, SessionEvent, WINDOW};
use banger_wire::frame::{Frame, Kind};
use banger_wire::guest::{GENERATION, GuestMessage, Hello, VSOCK_PORT};
use banger_wire::vm::{EndReason, Phase, VmEvent, VmRequest};
use guest::Script;
use members::frames_come_and_go_and_forged_ones_do_not;
use serde_json::json;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::PathBuf;
use vm::{Vm, Vmm};

/// A VMM and the guest's kernel.
struct Bench {
    vmm: Vmm,
    dir: tempfile::TempDir,
    nft: Option<PathBuf>,
}

impl Bench {
    /// Finds what it takes, or says why not.
    fn prepare(driver: &'static str, pci: bool) -> Result<Self, &'static str> {
        if !cfg!(target_arch = "x86_64") {
            return Err("the guest is for x86-64");
        }
        let in_path = |name: &str| {
            let path = std::env::var_os("PATH").unwrap_or_default();
            std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_file())
        };
        let program = match driver {
            "qemu" => in_path("qemu-system-x86_64").ok_or("`qemu-system-x86_64` is not in `PATH`")?,
            _ => in_path("firecracker").ok_or("`firecracker` is not in `PATH`")?,
        };
        let program = fs::canonicalize(program).unwrap();
        if driver == "firecracker" {
            // What is opened here as root, a vm's own user can open there.
            let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
            kvm.map_err(|_| "`/dev/kvm` can't be opened")?;
        }
        let dir = tempfile::tempdir().unwrap();
        let bench = Self { vmm: Vmm { driver, program, pci }, dir, nft: in_path("nft") };
        if driver == "firecracker" && pci && bench.is_version(&["v1.12."]) {
            return Err("this Firecracker has no PCI bus");
        }
        guest::build(&bench.kernel()).then_some(bench).ok_or("no C compiler for 32-bit x86")
    }

    fn kernel(&self) -> PathBuf {
        self.dir.path().join("vmlinux")
    }

    fn start(&self, script: &Script) -> Vm {
        Vm::start(&self.vmm, &self.kernel(), script, |_| {})
    }

    /// The way a kernel resets this machine.
    fn reset(&self, script: Script) -> Script {
        if self.is_qemu() { script.reset_by_fault() } else { script.reset_by_keyboard() }
    }

    /// The way a kernel switches this machine off, or says that it can't.
    fn off(&self, script: Script) -> Script {
        if self.is_qemu() {
            return script.acpi_off();
        }
        script.print("[    1.234567] reboot: Power off not available: System halted instead\r\n")
    }

    /// A guest up to where its agent is configured.
    fn ready(&self, script: Script) -> Script {
        Self::configured(self.connected(script))
    }

    /// A guest whose agent speaks, and goes on from there when that is asked of a machine that was saved then.
    fn goes_on(&self) -> Script {
        let script = self.connected(Script::default()).send(&hello());
        Self::configured(if self.is_qemu() { script.wait_for("ping") } else { script.dial_again(VSOCK_PORT) })
    }

    fn connected(&self, script: Script) -> Script {
        if self.is_qemu() { script.open_port() } else { script.dial(VSOCK_PORT) }
    }

    fn configured(script: Script) -> Script {
        script
            .send(&hello())
            .wait_for("configure")
            .send(&GuestMessage::Configured {
                boot_id: "a boot".to_owned(),
                timings: Vec::new(),
                warnings: Vec::new(),
            })
            .send(&GuestMessage::InitReady)
    }

    /// This version takes reports of free pages.
    fn reports(&self) -> bool {
        !self.is_version(&["v1.12.", "v1.13."])
    }

    fn is_version(&self, beginnings: &[&str]) -> bool {
        let output = std::process::Command::new(&self.vmm.program).arg("--version").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        beginnings.iter().any(|version| said.contains(version))
    }

    fn is_qemu(&self) -> bool {
        self.vmm.driver == "qemu"
    }

    /// A vm whose machine is saved when its agent speaks, once that is done.
    fn save(&self, script: &Script) -> Vm {
        let vm = Vm::start(&self.vmm, &self.kernel(), script, |plan| {
            plan["start"] = "save".into();
            plan["machine"]["to_be_saved"] = true.into();
        });
        let end = vm.end();
        assert_eq!((end.reason, end.detail.as_str()), (EndReason::Stopped, "saved"), "{}", vm.console());
        // Whoever goes on from it may be another user, as may be whoever publishes it.
        for name in ["memory", "state"] {
            fs::set_permissions(vm.path(name), fs::Permissions::from_mode(0o444)).unwrap();
        }
        vm
    }

    /// A vm that goes on from what another left, with the initramfs that boots it if it does not.
    fn restore(&self, from: &Vm, script: &Script) -> Vm {
        Vm::start(&self.vmm, &self.kernel(), script, |plan| {
            plan["start"] = "restore".into();
            let bind = |name: &str| json!({ "host": from.path(name), "inside": format!("/boot/{name}") });
            plan["binds"].as_array_mut().unwrap().extend([bind("memory"), bind("state")]);
        })
    }
}

fn hello() -> GuestMessage {
    GuestMessage::Hello(Hello {
        generation: GENERATION,
        kernel: "6.12".to_owned(),
        uptime_ms: 1,
        timings: Vec::new(),
    })
}

fn run(test: &str, driver: &'static str, pci: bool, expectation: fn(&Bench)) {
    match Bench::prepare(driver, pci) {
        Ok(bench) => expectation(&bench),
        // For CI's list; and past the test harness, which keeps the output of a test that passes to itself.
        Err(reason) => {
            let line = format!("skipped: {test}: {reason}");
            println!("{line}");
            let _ = std::io::stderr().write_all(format!("{line}\n").as_bytes());
        }
    }
}

macro_rules! tests {
    ($module:ident, $driver:literal, $pci:literal, $($name:ident)*) => {
        mod $module {
            $(#[test]
            fn $name() {
                super::run(concat!(stringify!($module), "::", stringify!($name)), $driver, $pci, super::$name);
            })*
        }
    };
}

/// The list. The second part needs a device that the guest finds, and the third is about what only Firecracker has.
macro_rules! with_each_driver {
    ({ $($name:ident)* } { $($more:ident)* } { $($own:ident)* }) => {
        tests!(qemu, "qemu", true, $($name)* $($more)*);
        tests!(firecracker_pci, "firecracker", true, $($name)*);
        tests!(firecracker, "firecracker", false, $($name)* $($more)* $($own)*);
    };
}

with_each_driver! {
    {
        the_guest_gets_command_line_and_initramfs_and_its_console_is_kept
        a_reset_during_boot_is_told_with_the_last_line
        a_panic_before_anything_was_written_is_tried_again
        a_killed_vm_leaves_nothing
        a_killed_supervisor_takes_everything_along
        a_vmm_that_fails_at_once_says_why
        a_flood_on_the_console_is_bounded
        the_console_is_typed_at_by_several
        whoever_does_not_read_the_console_misses_output_and_holds_up_nobody
        a_link_to_the_network_is_there_or_the_vm_boots_without
    }
    {
        a_stop_is_asked_of_the_agent_and_ends_in_order
        a_power_off_from_inside_is_told_from_a_crash
        a_guest_that_resets_boots_again
        a_stop_that_nobody_follows_is_forced
        a_machine_is_saved_and_goes_on_in_other_vms
        what_can_not_be_gone_on_from_is_booted
        what_a_machine_has_used_is_told
        frames_come_and_go_and_forged_ones_do_not
    }
    {
        drives_are_in_their_order_and_read_only_where_they_shall_be
        a_guest_reaches_no_other_port_of_the_host
        the_agents_place_is_taken_once
        a_fault_of_the_machine_is_an_error
        a_drive_is_as_fast_as_it_may_be
        there_is_a_balloon
    }
}

fn the_guest_gets_command_line_and_initramfs_and_its_console_is_kept(bench: &Bench) {
    let vm = bench.start(&Script::default().print("here: ").print_cmdline().print("\ndone\n"));
    vm.wait_for_console("done\n");
    let console = vm.console();
    assert!(console.contains("here: console=ttyS0 ") && console.contains(" word=of-the-plan"), "{console}");
    vm.request(VmRequest::Kill);
    vm.end();
}

fn a_reset_during_boot_is_told_with_the_last_line(bench: &Bench) {
    let vm = bench.start(&bench.reset(Script::default().print("first\nlast\n")));
    let end = vm.end();
    assert_eq!(end.reason, EndReason::Failed);
    assert_eq!(end.detail, "the vm ended while it booted; last on the console: last");
}

fn a_panic_before_anything_was_written_is_tried_again(bench: &Bench) {
    let vm = bench.start(&bench.reset(Script::default().print("[    1.0] Kernel panic - not syncing: it\n")));
    let mut answers = vm.request(VmRequest::Watch);
    let (mut restarts, mut detail) = (0, String::new());
    while let Some(event) = answers.next() {
        match event {
            VmEvent::State(status) => restarts = status.watchdog_restarts,
            VmEvent::Ended(end) => detail = end.detail,
            _ => {}
        }
    }
    assert_eq!((restarts, detail.as_str()), (3, "[    1.0] Kernel panic - not syncing: it"));
    assert_eq!(vm.end().reason, EndReason::Failed);
}

fn a_killed_vm_leaves_nothing(bench: &Bench) {
    let vm = bench.start(&Script::default().print("up\n"));
    vm.wait_for_console("up\n");
    assert!(!vm.processes().is_empty());
    let mut answers = vm.request(VmRequest::Kill);
    let ended = std::iter::from_fn(|| answers.next()).find(|event| matches!(event, VmEvent::Ended(_)));
    assert!(matches!(ended, Some(VmEvent::Ended(end)) if end.reason == EndReason::Killed));
    assert_eq!(vm.end().reason, EndReason::Killed);
}

fn a_killed_supervisor_takes_everything_along(bench: &Bench) {
    let vm = bench.start(&Script::default().print("up\n"));
    vm.wait_for_console("up\n");
    rustix::process::kill_process(vm.supervisor(), rustix::process::Signal::KILL).unwrap();
    vm.wait_gone();
    assert!(!vm.path("end.json").exists());
}

fn a_vmm_that_fails_at_once_says_why(bench: &Bench) {
    let kernel = bench.dir.path().join("no-kernel");
    fs::write(&kernel, "this is no kernel").unwrap();
    let vm = Vm::start(&bench.vmm, &kernel, &Script::default(), |_| {});
    let end = vm.end();
    assert_eq!(end.reason, EndReason::Failed);
    assert!(end.detail.starts_with("the VMM ended "), "{}", end.detail);
    let what = if bench.is_qemu() { "linux kernel too old" } else { "Cannot load kernel" };
    assert!(end.detail.contains(what), "{}", end.detail);
}

fn a_flood_on_the_console_is_bounded(bench: &Bench) {
    let vm = bench.start(&Script::default().flood());
    vm.wait_for_console(&"a guest that writes without end\n".repeat(1000));
    vm.request(VmRequest::Kill);
    assert_eq!(vm.end().reason, EndReason::Killed);
    assert!(fs::metadata(vm.path("console.log")).unwrap().len() <= 1 << 20);
}

/// A client of the console, past what it is told first.
fn attach(vm: &Vm) -> vm::Answers {
    let mut client = vm.request(VmRequest::Console);
    assert_eq!(client.next(), Some(VmEvent::Accepted));
    client
}

/// Takes a console's output until it has this, and gives room for as much again.
fn read_console(client: &mut vm::Answers, text: &str) -> String {
    let mut said = String::new();
    while !said.contains(text) {
        let frame = client.next_frame().unwrap_or_else(|| panic!("it ended: {said}"));
        if frame.kind == Kind::Data {
            said.push_str(&String::from_utf8_lossy(&frame.payload));
            client.send(&Frame::credit(0, STDOUT, u32::try_from(frame.payload.len()).unwrap()));
        }
    }
    said
}

fn the_console_is_typed_at_by_several(bench: &Bench) {
    let script = Script::default().print("before\n").echo().print("between\n").echo().print("after\n");
    let vm = bench.start(&script);
    vm.wait_for_console("before\n");
    let (mut one, mut other) = (attach(&vm), attach(&vm));
    read_console(&mut one, "before\n");
    one.send(&Frame::data(0, STDIN, b"typed by one\n".to_vec()));
    let said = read_console(&mut other, "between\n");
    assert_eq!(said, "before\ntyped by one\nbetween\n");
    // More than any buffer of a serial line, taken as fast as the guest does.
    let long = format!("{}\n", "x".repeat(100_000));
    other.send(&Frame::data(0, STDIN, long.as_bytes()[..60_000].to_vec()));
    other.send(&Frame::data(0, STDIN, long.as_bytes()[60_000..].to_vec()));
    let said = read_console(&mut one, "after\n");
    assert!(said.ends_with(&format!("between\n{long}after\n")), "{} bytes", said.len());
    let mut granted = 0;
    while granted < long.len() {
        let frame = other.next_frame().unwrap();
        if (frame.kind, frame.channel) == (Kind::Credit, STDIN) {
            granted += frame.parse_credit().unwrap() as usize;
        }
    }
    vm.request(VmRequest::Kill);
    let ends = std::iter::from_fn(|| other.next_frame()).filter(|frame| frame.kind == Kind::Message);
    let ends: Vec<SessionEvent> = ends.map(|frame| frame.parse().unwrap()).collect();
    assert_eq!(ends, [SessionEvent::Exited(ExitStatus::Code(0))]);
    vm.end();
}

fn whoever_does_not_read_the_console_misses_output_and_holds_up_nobody(bench: &Bench) {
    let vm = bench.start(&Script::default().flood());
    // One that does not even take it off, one that gives no room for more, and one that does as it should.
    let (_silent, mut idle, mut reader) = (attach(&vm), attach(&vm), attach(&vm));
    let mut seen = 0;
    while seen < 4 << 20 {
        let frame = reader.next_frame().unwrap();
        if frame.kind == Kind::Data {
            seen += frame.payload.len();
            reader.send(&Frame::credit(0, STDOUT, u32::try_from(frame.payload.len()).unwrap()));
        }
    }
    let (mut said, mut has_room) = (String::new(), false);
    while !said.contains("\r\n[output is missing here]\r\n") {
        // It is sent no more than it has room for, so what comes then is later.
        if !has_room && said.len() + 64 > WINDOW as usize {
            has_room = true;
            idle.send(&Frame::credit(0, STDOUT, WINDOW));
        }
        let frame = idle.next_frame().unwrap();
        said.push_str(&String::from_utf8_lossy(&frame.payload));
        assert!(said.len() <= 2 * WINDOW as usize, "{} bytes", said.len());
    }
    vm.request(VmRequest::Kill);
    assert_eq!(vm.end().reason, EndReason::Killed);
}

/// There is no `nft`, so the policy can't be in force and nothing is let out; the link to the guest is made all the same.
fn a_link_to_the_network_is_there_or_the_vm_boots_without(bench: &Bench) {
    let script = Script::default().print("up\n");
    let script = if bench.vmm.pci { script } else { script.find_device(1) };
    let vm = Vm::start(&bench.vmm, &bench.kernel(), &script.print("\ndone\n"), |plan| {
        plan["net"]["mode"] = "internet".into();
    });
    vm.wait_for_console("done\n");
    let has_tun = fs::File::options().read(true).write(true).open("/dev/net/tun").is_ok();
    assert!(bench.vmm.pci || vm.console().contains(if has_tun { "\nthere" } else { "\nno such device" }));
    vm.request(VmRequest::Kill);
    assert_eq!(vm.end().reason, EndReason::Killed);
}

/// Waits until sessions can be opened.
fn wait_ready(vm: &Vm) {
    let mut answers = vm.request(VmRequest::Watch);
    let ready = |event: &VmEvent| matches!(event, VmEvent::State(status) if status.phase == Phase::InitReady);
    assert!(std::iter::from_fn(|| answers.next()).any(|event| ready(&event)), "{}", vm.console());
}

fn a_stop_is_asked_of_the_agent_and_ends_in_order(bench: &Bench) {
    let script = bench.ready(Script::default()).wait_for("shutdown").print("going down\n");
    let vm = bench.start(&bench.off(script));
    wait_ready(&vm);
    vm.request(VmRequest::Stop { grace_ms: 30_000 });
    let end = vm.end();
    assert_eq!((end.reason, end.detail.as_str()), (EndReason::Stopped, "stopped"));
    assert!(vm.console().contains("going down\n"));
}

fn a_power_off_from_inside_is_told_from_a_crash(bench: &Bench) {
    let vm = bench.start(&bench.off(bench.ready(Script::default()).wait_for("heartbeat")));
    let end = vm.end();
    assert_eq!((end.reason, end.detail.as_str()), (EndReason::PoweredOff, "powered off from inside"));
}

fn a_guest_that_resets_boots_again(bench: &Bench) {
    let vm = bench.start(&bench.reset(bench.ready(Script::default()).wait_for("heartbeat")));
    let mut answers = vm.request(VmRequest::Watch);
    let (mut boots, mut booting) = (0, true);
    while boots < 3 {
        let Some(VmEvent::State(status)) = answers.next() else { panic!("{}", vm.console()) };
        match status.phase {
            Phase::Preparing | Phase::Booting => booting = true,
            Phase::InitReady if booting => (boots, booting) = (boots + 1, false),
            _ => {}
        }
    }
    vm.request(VmRequest::Kill);
    assert_eq!(vm.end().reason, EndReason::Killed);
}

fn a_stop_that_nobody_follows_is_forced(bench: &Bench) {
    let vm = bench.start(&bench.ready(Script::default()));
    wait_ready(&vm);
    vm.request(VmRequest::Stop { grace_ms: 100 });
    assert_eq!(vm.end().reason, EndReason::Killed);
}

fn drives_are_in_their_order_and_read_only_where_they_shall_be(bench: &Bench) {
    let script = Script::default().read_drive(0).read_drive(1).print("\n");
    let vm = bench.start(&script.write_drive(0).print("\n").write_drive(1).print("\ndone\n"));
    vm.wait_for_console("done\n");
    // The VMM has something to say about the first write.
    let console = vm.console();
    assert!(console.starts_with("ID\n") && console.ends_with("refused\nwritten\ndone\n"), "{console}");
    vm.request(VmRequest::Kill);
    vm.end();
    assert_eq!(fs::read(vm.path("disk.raw")).unwrap()[..1], *b"x");
}

fn a_guest_reaches_no_other_port_of_the_host(bench: &Bench) {
    let vm = bench.start(&Script::default().dial(VSOCK_PORT + 1).print("connected\n"));
    vm.wait_for_console("nobody listens\n");
    assert!(!vm.console().contains("connected"));
    vm.request(VmRequest::Kill);
    vm.end();
}

fn the_agents_place_is_taken_once(bench: &Bench) {
    let vm = bench.start(&bench.ready(Script::default()).dial(VSOCK_PORT).print("connected\n"));
    vm.wait_for_console("nobody listens\n");
    assert!(!vm.console().contains("connected"));
    vm.request(VmRequest::Kill);
    vm.end();
}

fn a_fault_of_the_machine_is_an_error(bench: &Bench) {
    let vm = bench.start(&Script::default().print("up\n").reset_by_fault());
    let end = vm.end();
    assert_eq!(end.reason, EndReason::Failed);
    // It may end with success as well, since its threads tell each other of the end before they tell the status.
    assert!(end.detail.contains("GenericError") || end.detail.contains("KVM"), "{}", end.detail);
}

/// Each starts where the agent has spoken, with drives of its own, and is told so.
fn a_machine_is_saved_and_goes_on_in_other_vms(bench: &Bench) {
    let script = bench.goes_on().print("went on\n");
    let script = if bench.is_qemu() { script } else { script.read_drive(0).read_drive(1).write_drive(1) };
    let saved = bench.save(&script.print("done\n"));
    assert!(!saved.console().contains("went on"));
    // A file has no more than the memory that was written, which the guest's is little of.
    let memory = fs::metadata(saved.path("memory")).unwrap();
    assert!(memory.blocks() * 512 < 32 << 20, "{} KiB", memory.blocks() / 2);
    for _ in 0..2 {
        // It would boot into this.
        let vm = bench.restore(&saved, &Script::default().print("booted\n"));
        vm.wait_for_console("done\n");
        wait_ready(&vm);
        let mut answers = vm.request(VmRequest::Kill);
        let Some(VmEvent::State(status)) = answers.next() else { panic!("no status") };
        assert_eq!(status.watchdog_restarts, 0);
        assert!(status.timings.iter().any(|timing| timing.stage == "restore to agent"), "{status:?}");
        vm.end();
        let console = vm.console();
        assert!(console.starts_with("went on\n") && !console.contains("booted"), "{console}");
        if !bench.is_qemu() {
            assert!(console.contains("IDwritten"), "{console}");
            assert_eq!(fs::read(vm.path("disk.raw")).unwrap()[..1], *b"x");
        }
    }
    assert_eq!(fs::read(saved.path("disk.raw")).unwrap()[..1], *b"D");
}

fn what_can_not_be_gone_on_from_is_booted(bench: &Bench) {
    let saved = bench.save(&bench.goes_on());
    let half = if bench.is_qemu() { "memory" } else { "state" };
    let bytes = fs::read(saved.path(half)).unwrap();
    fs::remove_file(saved.path(half)).unwrap();
    fs::write(saved.path(half), &bytes[..bytes.len() / 2]).unwrap();
    let vm = bench.restore(&saved, &bench.ready(Script::default()).print("booted\n"));
    vm.wait_for_console("booted\n");
    wait_ready(&vm);
    vm.request(VmRequest::Kill);
    vm.end();
}

fn a_drive_is_as_fast_as_it_may_be(bench: &Bench) {
    let script = Script::default().print("begin\n").read_much(2000).print("done\n");
    let took = |rate: Option<u64>| {
        let vm = Vm::start(&bench.vmm, &bench.kernel(), &script, |plan| {
            plan["machine"]["drives"][0]["rate"] = json!(rate);
        });
        vm.wait_for_console("begin\n");
        let begun = std::time::Instant::now();
        vm.wait_for_console("done\n");
        vm.request(VmRequest::Kill);
        vm.end();
        begun.elapsed().as_secs_f64()
    };
    // A million bytes, of which a tenth of a second's worth goes at once; the beginning may be noticed late.
    let (slow, fast) = (took(Some(200_000)), took(None));
    assert!(slow > 3.5 && fast < slow, "{slow} s, {fast} s without a limit");
}

fn there_is_a_balloon(bench: &Bench) {
    for gives_memory_back in [false, true].into_iter().filter(|reports| !reports || bench.reports()) {
        let vm = Vm::start(&bench.vmm, &bench.kernel(), &Script::default().find_device(5), |plan| {
            plan["machine"]["gives_memory_back"] = gives_memory_back.into();
        });
        vm.wait_for_console("there");
        vm.request(VmRequest::Kill);
        vm.end();
    }
}

/// Also by one that goes on from another's memory, which it has not read or written itself.
fn what_a_machine_has_used_is_told(bench: &Bench) {
    let begun = bench.goes_on();
    let script = if bench.is_qemu() { begun } else { begun.read_much(100).write_drive(1) };
    let saved = bench.save(&script.print("done\n"));
    let vm = bench.restore(&saved, &Script::default());
    vm.wait_for_console("done\n");
    for _ in 0..2 {
        let Some(VmEvent::Used(used)) = vm.request(VmRequest::Use).next() else { panic!("no answer") };
        assert_eq!((used.sent, used.received), (None, None), "there is no network: {used:?}");
        assert!(used.memory.is_some_and(|bytes| (1 << 20..1 << 30).contains(&bytes)), "{used:?}");
        let expected = if bench.is_qemu() { (Some(0), Some(0)) } else { (Some(51_200), Some(512)) };
        assert_eq!((used.read, used.written), expected);
    }
    vm.request(VmRequest::Kill);
    vm.end();
}
