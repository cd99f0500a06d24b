//! `vm run` and `vm exec`: one command and its streams.

use crate::support::{IMAGE, Owner, run, show, wait_for};
use sha2::{Digest as _, Sha256};
use std::ffi::OsStr;
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

#[test]
fn a_command_in_a_vm_of_its_own() {
    let owner = Owner::with_store();
    let output = owner.vm_run(["--", "uname", "-sr"]);
    assert!(output.status.success(), "{}{}", show(&output), owner.logs());
    let kernel = String::from_utf8(output.stdout).unwrap();
    assert!(kernel.starts_with("Linux 6.") && kernel.ends_with("-cloud-amd64\n"), "{kernel}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "quiet when nobody watches");
    let output = owner.vm_run(["-v", "--", "true"]);
    let said = String::from_utf8_lossy(&output.stderr);
    for part in [" to agent ", "configure guest", "ready in "] {
        assert!(said.contains(part), "{said}");
    }
    let how = ["qemu (software emulation)", "qemu (KVM)", "firecracker (KVM)"];
    assert!(how.iter().any(|how| said.lines().next().unwrap().contains(how)), "{said}");
    owner.assert_nothing_left();
}

#[test]
fn statuses_arguments_and_streams_are_the_commands() {
    let owner = Owner::with_store();
    let output = owner.vm_run(["--", "sh", "-c", "exit 42"]);
    assert_eq!(output.status.code(), Some(42), "{}{}", show(&output), owner.logs());
    let output = owner.vm_run(["--", "printf", "%s|", "a b", "c'd", ""]);
    assert_eq!(output.stdout, b"a b|c'd||", "{}{}", show(&output), owner.logs());
    owner.ok(["vm", "run", "-d", "--name", "web", "--image", IMAGE]);
    for (command, code) in [
        (&["sh", "-c", "exit 42"][..], 42),
        (&["sh", "-c", "kill -9 $$"], 137),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["no-such-program"], 127),
        (&["/etc/passwd"], 126),
        (&["true"], 0),
    ] {
        let output = owner.banger(["vm", "exec", "web", "--"]).args(command).output().unwrap();
        assert_eq!(output.status.code(), Some(code), "{command:?}: {}", show(&output));
    }
    let output = owner.banger(["vm", "exec", "nobody", "--", "true"]).output().unwrap();
    assert_eq!(output.status.code(), Some(125), "banger's own failure: {}", show(&output));
    let exact = [&b"%s|"[..], b"a b", b"c'd", b"", b"\xff\xfe", b"$HOME", b"-x"];
    let mut command = owner.banger(["vm", "exec", "web", "--", "printf"]);
    let output = command.args(exact.map(OsStr::from_bytes)).output().unwrap();
    assert_eq!(output.stdout, b"a b|c'd||\xff\xfe|$HOME|-x|", "{}", show(&output));
    let output =
        owner.banger(["vm", "exec", "web", "--", "sh", "-c", "echo out; echo err >&2"]).output().unwrap();
    assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
    let mut command = owner.banger(["vm", "exec", "--env", "A=b c", "--workdir", "/var", "web", "--"]);
    let output = command.args(["sh", "-c", "echo $A; pwd; id -u; cat"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "b c\n/var\n0\n", "{}", show(&output));
}

#[test]
fn a_pipe_of_256_mib_arrives_whole() {
    const LEN: usize = 256 << 20;
    let owner = Owner::with_store();
    let mut child = owner
        .banger(["vm", "run", "--rm", "--image", IMAGE, "--", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let started = Instant::now();
    let writer = std::thread::spawn(move || {
        let (mut sent, mut state) = (Sha256::new(), 88_172_645_463_325_252_u64);
        let mut chunk = vec![0; 1 << 20];
        for _ in 0..LEN / chunk.len() {
            for bytes in chunk.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                bytes.copy_from_slice(&state.to_le_bytes());
            }
            sent.update(&chunk);
            stdin.write_all(&chunk).unwrap();
        }
        sent.finalize()
    });
    let (mut received, mut len) = (Sha256::new(), 0);
    let mut stdout = child.stdout.take().unwrap();
    let mut chunk = vec![0; 1 << 20];
    loop {
        let read = stdout.read(&mut chunk).unwrap();
        if read == 0 {
            break;
        }
        received.update(&chunk[..read]);
        len += read;
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(len, LEN);
    assert_eq!(received.finalize(), writer.join().unwrap());
    println!("256 MiB there and back in {:.1} s", started.elapsed().as_secs_f64());
    owner.assert_nothing_left();
}

#[test]
fn an_interrupt_reaches_the_command() {
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--name", "sig", "--image", IMAGE]);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let mut child = owner
            .banger(["vm", "exec", "sig", "--", "sh", "-c", "echo ready; exec sleep 60"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
        run(std::process::Command::new("kill").args([format!("-{signal}"), child.id().to_string()]));
        assert_eq!(child.wait().unwrap().code(), Some(code), "{signal}");
    }
    wait_for("the commands have ended in the guest too", || {
        let count = owner.ok(["vm", "exec", "sig", "--", "sh", "-c", "ps -e | grep -c sleep || true"]);
        if count.trim() == "0" { Ok(()) } else { Err(count) }
    });
    let output =
        owner.banger(["vm", "exec", "--timeout", "1s", "sig", "--", "sleep", "60"]).output().unwrap();
    assert_eq!(output.status.code(), Some(124), "{}", show(&output));
}

#[test]
fn a_terminal_is_a_terminal() {
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--name", "tty", "--image", IMAGE]);
    let in_terminal = |outside: &str, inside: &str| {
        let mut command = owner.program("script");
        command.env("TERM", "vt220").args(["-qec"]);
        command
            .arg(format!("stty rows 33 cols 101; {outside} exec banger vm exec -t tty -- sh -c '{inside}'"));
        let output = command.arg("/dev/null").output().unwrap();
        String::from_utf8_lossy(&output.stdout).replace("\r\n", "\n")
    };
    let text = in_terminal("", "stty size; test -t 0 && test -t 1 && echo terminal; echo $TERM");
    assert!(text.contains("33 101\nterminal\nvt220\n"), "{text}");
    // Another size while the command runs, which is told of it.
    let resize = "t=$(tty); (sleep 2; stty -F $t rows 40 cols 120) &";
    let wait = "trap \"stty size; exit\" WINCH; i=0; while [ $i -lt 200 ]; do sleep 0.1; i=$((i+1)); done";
    let text = in_terminal(resize, wait);
    assert!(text.contains("40 120\n"), "{text}");
}

#[test]
fn a_killed_client_takes_its_vm_along() {
    let owner = Owner::with_store();
    let mut child = owner
        .banger(["vm", "run", "--rm", "--image", IMAGE, "--", "sh", "-c", "echo up; exec sleep 600"])
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap();
    let mut line = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    owner.assert_nothing_left();
    assert_eq!(owner.json(&["vm", "list", "--json"]).as_array().unwrap().len(), 0);
}

#[test]
fn eight_at_once() {
    let owner = Owner::with_store();
    let children: Vec<_> = (0..8)
        .map(|number| {
            let number = number.to_string();
            let mut command = owner.banger(["vm", "run", "--rm", "--memory", "256M", "--image", IMAGE]);
            command
                .args(["--", "echo", &number])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for (number, child) in children.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.stdout, format!("{number}\n").as_bytes(), "{}{}", show(&output), owner.logs());
    }
    owner.assert_nothing_left();
}

#[test]
fn no_network_at_all_is_no_problem() {
    let owner = Owner::with_store();
    let mut command = owner.program("unshare");
    let output = command
        .args([
            "-Urn",
            "--map-current-user",
            "banger",
            "vm",
            "run",
            "--rm",
            "--image",
            IMAGE,
            "--",
            "id",
            "-u",
        ])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"0\n", "{}{}", show(&output), owner.logs());
    std::thread::sleep(Duration::from_millis(1));
    owner.assert_nothing_left();
}
