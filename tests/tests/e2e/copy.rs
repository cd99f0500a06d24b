//! `vm cp` in both directions.

use crate::support::{IMAGE, Owner, run, show, wait_for};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};

fn sh(owner: &Owner, vm: &str, script: &str) -> String {
    owner.ok(["vm", "exec", vm, "--", "sh", "-c", script])
}

/// What a tree is, name by name: kinds, rights, times, lengths, targets and digests.
const LIST: &str = r#"cd "$1" && find . -printf '%p %y %m %l %T@ ' \( -type f -printf '%s ' -exec sha256sum -b {} \; \
    -o -printf '\n' \) | sort"#;

fn give_away(owner: &Owner, path: &Path) {
    if let Some(uid) = owner.uid() {
        run(Command::new("chown").args(["-R", &format!("{uid}:{uid}")]).arg(path));
    }
}

#[test]
fn trees_files_and_streams_are_copied_both_ways() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "cp", "--image", IMAGE, "--net", "none"]);
    let tree = owner.home().join("tree");
    std::fs::create_dir_all(tree.join("sub/empty")).unwrap();
    std::fs::write(tree.join(OsStr::from_bytes(b"odd \xff 'name'\n")), "odd").unwrap();
    std::fs::write(tree.join("sub/script"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(tree.join("sub/script"), PermissionsExt::from_mode(0o750)).unwrap();
    let large: Vec<u8> =
        (0..(16 << 20) + 7_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(tree.join("large"), &large).unwrap();
    symlink("/etc/../nowhere", tree.join("link")).unwrap();
    let sparse = std::fs::File::create(tree.join("sparse")).unwrap();
    sparse.set_len(5 << 30).unwrap();
    sparse.write_all_at(b"at the end", (5 << 30) - 10).unwrap();
    give_away(&owner, &tree);
    let copied = owner.banger(["vm", "cp", "tree", "cp:"]).output().unwrap();
    assert!(
        copied.status.success() && copied.stdout.is_empty() && copied.stderr.is_empty(),
        "{}",
        show(&copied)
    );
    // Without the hashes of five gigabytes of nothing, which an emulated processor would take minutes for.
    let list = LIST.replace("-type f -printf", "-type f ! -name sparse -printf");
    let here = run(Command::new("sh").args(["-c", &list, "sh"]).arg(&tree));
    let there =
        owner.banger(["vm", "exec", "cp", "--", "sh", "-c", &list, "sh", "/root/tree"]).output().unwrap();
    let there = String::from_utf8_lossy(&there.stdout).into_owned();
    assert_eq!(here, there);
    let rights = sh(
        &owner,
        "cp",
        "stat -c '%U:%G' /root/tree/large; du -k --apparent-size /root/tree/sparse | cut -f1; \
        test $(du -k /root/tree/sparse | cut -f1) -lt 100 && tail -c 10 /root/tree/sparse",
    );
    assert_eq!(rights, "root:root\n5242880\nat the end");
    // Back, under another name, and of a relative path below root's home.
    owner.ok(["vm", "cp", "cp:tree", "back"]);
    let back = run(Command::new("sh").args(["-c", &list, "sh"]).arg(owner.home().join("back")));
    assert_eq!(here, back);
    let found = owner.home().join("back/sparse").metadata().unwrap();
    assert!(found.len() == 5 << 30 && found.blocks() < 1024, "{found:?}");
    assert_eq!(found.uid(), owner.uid().unwrap_or_else(|| rustix::process::getuid().as_raw()));
    // Streams.
    let mut child = owner.banger(["vm", "cp", "-", "cp:/srv/stream"]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), &large).unwrap();
    assert!(child.wait().unwrap().success());
    let out = owner.banger(["vm", "cp", "cp:/srv/stream", "-"]).output().unwrap();
    assert!(out.status.success() && out.stdout == large, "{} of {}", out.stdout.len(), large.len());
    // Links that are named, rights that do not travel, content that replaces content.
    sh(
        &owner,
        "cp",
        "cd /srv && ln -s stream l && mkfifo p && touch s && chmod 4755 s && mkdir d && echo one > d/f && chmod 700 d",
    );
    owner.ok(["vm", "cp", "cp:/srv/s", "cp:/srv/l", "."]);
    assert_eq!(owner.home().join("s").metadata().unwrap().mode() & 0o7777, 0o755);
    assert!(owner.home().join("l").symlink_metadata().unwrap().is_symlink());
    owner.ok(["vm", "cp", "-L", "cp:/srv/l", "followed"]);
    assert_eq!(std::fs::read(owner.home().join("followed")).unwrap(), large);
    std::fs::create_dir(owner.home().join("d")).unwrap();
    std::fs::write(owner.home().join("d/f"), "two\n").unwrap();
    give_away(&owner, &owner.home().join("d"));
    owner.ok(["vm", "cp", "d/.", "cp:/srv/d/"]);
    assert_eq!(sh(&owner, "cp", "stat -c %a /srv/d; cat /srv/d/f"), "700\ntwo\n");
    // What is left out is said, and what can't be done.
    let output = owner.banger(["vm", "cp", "cp:/srv", "srv"]).output().unwrap();
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "warning: `p` was left out: it is a device, pipe or socket\n"
    );
    let mut said = String::new();
    for arguments in [
        &["cp:/nowhere", "."][..],
        &["tree/large", "cp:/nowhere/file"],
        &["cp:/srv/d", "-"],
        &["cp:/dev/vda", "."],
        &["nowhere", "cp:"],
        &["tree", "nobody:"],
    ] {
        let output = owner.banger(["vm", "cp"].iter().chain(arguments)).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", show(&output));
        said.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    insta::assert_snapshot!(said);
    owner.ok(["vm", "delete", "-f", "cp"]);
    owner.assert_nothing_left();
}

#[test]
fn a_copy_that_is_interrupted_leaves_no_half_file() {
    let owner = Owner::with_store();
    owner.ok(["vm", "create", "--name", "cp", "--image", IMAGE, "--net", "none"]);
    // Never ends by itself.
    for (way, arguments) in [("in", ["/dev/stdin", "cp:/srv/file"]), ("out", ["cp:/srv/endless", "file"])] {
        sh(&owner, "cp", "rm -f /srv/endless; truncate -s 1T /srv/sparse; ln -sf /dev/zero /srv/endless");
        let (source, mut feeder) = if way == "in" {
            (
                vec!["vm", "cp", "-", arguments[1]],
                Some(Command::new("yes").stdout(Stdio::piped()).spawn().unwrap()),
            )
        } else {
            sh(&owner, "cp", "dd if=/dev/zero of=/srv/big bs=1M count=300 2>&1");
            (vec!["vm", "cp", "cp:/srv/big", arguments[1]], None)
        };
        let mut command = owner.banger(source);
        if let Some(feeder) = &mut feeder {
            command.stdin(feeder.stdout.take().unwrap());
        }
        let mut child = command.spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(1500));
        assert!(child.try_wait().unwrap().is_none(), "{way}: it was over too soon");
        let pid = rustix::process::Pid::from_child(&child);
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(130), "{way}");
        if let Some(mut feeder) = feeder {
            let _ = feeder.kill();
            let _ = feeder.wait();
        }
        if way == "in" {
            wait_for("the guest has given up", || {
                let left = sh(&owner, "cp", "ls -A /srv | grep -v -e endless -e sparse || true");
                if left.is_empty() { Ok(()) } else { Err(left) }
            });
        }
        let left: Vec<_> = std::fs::read_dir(owner.home())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains("banger-cp") || name == "file")
            .collect();
        assert!(left.is_empty(), "{way}: {left:?}");
    }
    owner.ok(["vm", "delete", "-f", "cp"]);
    owner.assert_nothing_left();
}
