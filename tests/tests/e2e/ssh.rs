//! ssh into vms, with OpenSSH as it is installed here.

use crate::images::{Registry, install, prerequisites};
use crate::support::{IMAGE, Owner, has, run, show, skip};
use banger_tests::{code_that_prints, static_program};
use serde_json::json;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

/// Has OpenSSH know its user, as it insists: an owner is in no list of users. Only this command sees the one it is in.
fn known(owner: &Owner, inner: Command) -> Command {
    let (own_uid, own_gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let uid = owner.uid().unwrap_or(own_uid);
    let users = owner.home().join("passwd");
    let line = format!("owner:x:{uid}:{uid}::{}:/bin/sh\n", owner.home().display());
    // Before the others: whoever runs the tests is in the list already, with another home.
    std::fs::write(&users, line + &std::fs::read_to_string("/etc/passwd").unwrap()).unwrap();
    let mut command = Command::new("unshare");
    if owner.uid().is_none() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/passwd && exec \"$@\""]).arg(users);
    if owner.uid().is_none() {
        let own = [format!("--map-user={own_uid}"), format!("--map-group={own_gid}")];
        command.args(["unshare", "--user"]).args(own);
    }
    command.arg(inner.get_program()).args(inner.get_args()).env_clear().stdin(Stdio::null());
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.current_dir(owner.home());
    command
}

fn ssh(owner: &Owner, args: &[&str]) -> Output {
    known(owner, owner.banger([&["vm", "ssh"], args].concat())).output().unwrap()
}

pub(crate) fn program(owner: &Owner, name: &str, args: &[&str]) -> Output {
    let mut inner = owner.program(name);
    inner.args(args);
    known(owner, inner).output().unwrap()
}

/// Stdout, where the command succeeded.
pub(crate) fn ok(owner: &Owner, output: &Output) -> String {
    assert!(output.status.success(), "{}{}", show(output), owner.logs());
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(crate) fn missing(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|program| !has(program));
    missing.inspect(|program| skip(&format!("ssh: `{program}` is not installed"))).is_some()
}

#[test]
fn ssh_gets_into_a_vm_without_sshd_and_without_a_network() {
    if missing(&["ssh", "ssh-keygen", "scp", "sftp", "unshare"]) {
        return;
    }
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--net", "none", "--name", "web", "--image", IMAGE]);
    let begun = Instant::now();
    let output = ssh(&owner, &["web", "--", "echo out; echo err >&2; exit 42"]);
    assert_eq!(output.status.code(), Some(42), "{}{}", show(&output), owner.logs());
    assert_eq!((&*output.stdout, &*output.stderr), (&b"out\n"[..], &b"err\n"[..]));
    println!("the first command by ssh took {} ms", begun.elapsed().as_millis());
    let begun = Instant::now();
    ok(&owner, &ssh(&owner, &["web", "true"]));
    println!("the second took {} ms", begun.elapsed().as_millis());

    // A terminal, with its own words and ssh's flags.
    let output = ssh(&owner, &["web", "-tt", "--", "tty && stty -echo && id -un"]);
    let said = ok(&owner, &output);
    assert!(said.contains("/dev/pts/") && said.contains("root"), "{said}");

    // Another user of the image is that user, whatever it does.
    owner.ok(["vm", "exec", "web", "--", "useradd", "-m", "dev"]);
    let said =
        ok(&owner, &ssh(&owner, &["web", "-l", "dev", "id -un; pwd; cat /etc/shadow || echo refused"]));
    assert_eq!(said, "dev\n/home/dev\nrefused\n");
    let output = ssh(&owner, &["web", "-l", "nobody-here", "true"]);
    assert_eq!(output.status.code(), Some(255));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.starts_with("banger: no user `nobody-here` in the image's /etc/passwd"), "{said}");

    // What is kept is the owner's alone.
    let kept = owner.state().join("ssh");
    let mode = |name: &str| std::fs::metadata(kept.join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        ["", "id_ed25519", "host_secret", "known_hosts", "lock"].map(mode),
        [0o700, 0o600, 0o600, 0o600, 0o600]
    );
    assert!(!owner.home().join(".ssh").exists(), "nothing of the user's own is made");

    // A vm of the same name has another key.
    let hosts = || std::fs::read_to_string(kept.join("known_hosts")).unwrap();
    let before = hosts();
    owner.ok(["vm", "stop", "web"]);
    let output = ssh(&owner, &["web", "true"]);
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "error: vm `web` is not running, it is stopped\nhint: start it with `banger vm start web`\n"
    );
    assert_eq!(output.status.code(), Some(255));
    owner.ok(["vm", "delete", "web"]);
    owner.ok(["vm", "run", "-d", "--name", "web", "--image", IMAGE]);
    assert_eq!(ok(&owner, &ssh(&owner, &["web", "echo anew"])), "anew\n");
    assert_ne!(hosts(), before);
    assert_eq!(hosts().lines().count(), 1);

    let output = ssh(&owner, &["nothing"]);
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "error: no vm `nothing`\nhint: `banger vm list` shows those there are\n"
    );
    assert_eq!(output.status.code(), Some(255));
    let mut without = owner.banger(["vm", "ssh", "web"]);
    let path = crate::support::programs();
    let output = without.env("PATH", path).output();
    // The way to become the owner is on the path too.
    if let Ok(output) = output {
        let text = "error: could not start `ssh`\n  caused by: No such file or directory (os error 2)\n\
                    hint: install OpenSSH's client: the package is `openssh-client`, `openssh-clients` or `openssh`\n";
        assert_eq!(String::from_utf8_lossy(&output.stderr), text);
    }
    owner.ok(["vm", "delete", "-f", "web"]);
    owner.assert_nothing_left();
}

#[test]
fn names_of_vms_are_hosts_for_openssh_once_asked_for() {
    if missing(&["ssh", "ssh-keygen", "scp", "sftp", "unshare"]) {
        return;
    }
    let owner = Owner::with_store();
    let dir = owner.home().join(".ssh");
    run(owner.program("mkdir").args(["-m", "700"]).arg(&dir));
    let config = dir.join("config");
    let before = "# mine\nHost *\n    User somebody\n    Port 2222\n    ServerAliveInterval 60";
    std::fs::write(owner.home().join("text"), before).unwrap();
    run(owner.program("sh").args(["-c", "umask 077; cat text > .ssh/config"]));
    owner.ok(["vm", "run", "-d", "--net", "none", "--name", "web", "--image", IMAGE]);
    let settings = |args: &[&str]| {
        ok(&owner, &known(&owner, owner.banger([&["ssh-config"], args].concat())).output().unwrap())
    };
    let elsewhere = || ok(&owner, &program(&owner, "ssh", &["-G", "elsewhere.example"]));
    let alone = elsewhere();
    assert_eq!(settings(&["--install"]), format!("{} includes it; try `ssh NAME.vm`\n", config.display()));
    let text = std::fs::read_to_string(&config).unwrap();
    assert!(text.starts_with("# >>> banger >>>\nInclude \"") && text.ends_with(before), "{text}");

    assert_eq!(elsewhere(), alone, "other hosts are what they were");
    assert_eq!(ok(&owner, &program(&owner, "ssh", &["web.vm", "id -un"])), "root\n");
    // As an editor comes in that splits the line without a shell.
    let text = std::fs::read_to_string(owner.state().join("ssh/config")).unwrap();
    let line = text.lines().find_map(|line| line.trim().strip_prefix("ProxyCommand ")).unwrap();
    let mut words = line.split(' ').map(|word| word.replace("%h", "web.vm"));
    let mut proxy = owner.program(words.next().unwrap());
    proxy.args(words);
    let mut proxy = known(&owner, proxy).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut greeting = [0; 8];
    proxy.stdout.as_mut().unwrap().read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"SSH-2.0-");
    drop(proxy.stdin.take());
    assert!(proxy.wait().unwrap().success());
    // Files there and back, and the modes.
    let script = owner.home().join("run.sh");
    std::fs::write(&script, "#!/bin/sh\necho it runs\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    ok(&owner, &program(&owner, "scp", &["-qp", "run.sh", "web.vm:"]));
    assert_eq!(ok(&owner, &program(&owner, "ssh", &["web.vm", "./run.sh"])), "it runs\n");
    ok(&owner, &program(&owner, "scp", &["-q", "web.vm:/etc/hostname", "name"]));
    assert_eq!(std::fs::read_to_string(owner.home().join("name")).unwrap(), "web\n");
    // As another user, who is that in the file server too.
    owner.ok(["vm", "exec", "web", "--", "useradd", "-m", "dev"]);
    ok(&owner, &program(&owner, "scp", &["-q", "-o", "User=dev", "run.sh", "web.vm:"]));
    assert_eq!(ok(&owner, &program(&owner, "ssh", &["web.vm", "stat -c %U /home/dev/run.sh"])), "dev\n");
    let output = program(&owner, "scp", &["-q", "-o", "User=dev", "run.sh", "web.vm:/root/"]);
    assert!(!output.status.success(), "{}", show(&output));
    let commands = owner.home().join("commands");
    std::fs::write(&commands, "pwd\nmkdir new\nput run.sh new/run.sh\nls new\n").unwrap();
    let said = ok(&owner, &program(&owner, "sftp", &["-b", commands.to_str().unwrap(), "web.vm"]));
    assert!(said.contains("Remote working directory: /root") && said.contains("new/run.sh"), "{said}");
    // A pipe through it, binary and whole.
    let sum = "head -c 8388608 /dev/urandom > random && sha256sum < random && \
               ssh web.vm cat < random | sha256sum && ssh web.vm sha256sum < random";
    let sums = ok(&owner, &program(&owner, "sh", &["-c", sum]));
    let sums: Vec<_> = sums.lines().collect();
    assert!(sums.len() == 3 && sums[0] == sums[1] && sums[1] == sums[2], "{sums:?}");

    let output = program(&owner, "ssh", &["other.vm", "true"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.starts_with("error: no vm `other`\n") && output.status.code() == Some(255), "{said}");
    assert_eq!(settings(&["--uninstall"]), format!("{} is as it was\n", config.display()));
    assert_eq!(std::fs::read_to_string(&config).unwrap(), before);
    assert_eq!(settings(&["--uninstall"]), "there was nothing to take out\n");
    // Without being installed, it can be given to ssh by hand.
    std::fs::write(owner.home().join("printed"), settings(&[])).unwrap();
    assert_eq!(ok(&owner, &program(&owner, "ssh", &["-F", "printed", "web.vm", "id -un"])), "root\n");
    owner.ok(["vm", "delete", "-f", "web"]);
    owner.assert_nothing_left();
}

#[test]
fn ssh_uses_a_key_of_the_owners_own_and_vms_are_where_the_config_has_them() {
    if missing(&["ssh", "ssh-keygen", "unshare"]) {
        return;
    }
    let owner = Owner::with_store();
    let write = |text: &str| {
        run(owner.program("mkdir").args(["-p", ".config/banger"]));
        std::fs::write(owner.home().join("text"), text).unwrap();
        run(owner.program("cp").args(["text", ".config/banger/config.toml"]));
    };
    let key = owner.home().join("mine");
    run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
    if let Some(uid) = owner.uid() {
        std::os::unix::fs::chown(&key, Some(uid), Some(uid)).unwrap();
    }
    write("loopback_cidr = '127.99.3.128/28'\nssh_key_path = '~/mine'\n");
    let shown = owner.ok(["config", "show"]);
    let line = shown.lines().find(|line| line.starts_with("loopback_cidr")).unwrap();
    assert!(line.contains("\"127.99.3.128/28\"") && line.ends_with("config.toml:1"), "{line}");
    owner.ok(["vm", "run", "-d", "--net", "none", "--name", "web", "--image", IMAGE]);
    let address = || {
        let address = owner.json(&["vm", "show", "--json", "web"])["address"].as_str().unwrap().to_owned();
        address.parse::<std::net::Ipv4Addr>().unwrap().octets()
    };
    let first = address();
    assert!(first[..3] == [127, 99, 3] && (129..=142).contains(&first[3]), "{first:?}");
    assert_eq!(ok(&owner, &ssh(&owner, &["web", "echo by the key"])), "by the key\n");
    assert!(!owner.state().join("ssh/id_ed25519").exists(), "banger made no key of its own");

    // What runs stays where it is, and gets another place when it starts anew.
    write("loopback_cidr = '127.98.0.0/16'\nssh_key_path = '~/other'\n");
    assert_eq!(address(), first);
    let output = ssh(&owner, &["web", "true"]);
    let text = format!(
        "error: `ssh_key_path`, `{}`, can't be used\n  caused by: No such file or directory (os error 2)\n\
         hint: name another one in the config, or take `ssh_key_path` out: `banger config path`\n",
        owner.home().join("other").display()
    );
    assert_eq!((String::from_utf8_lossy(&output.stderr), output.status.code()), (text.into(), Some(255)));
    owner.ok(["vm", "restart", "web"]);
    assert_eq!(address()[..2], [127, 98]);
    write("");
    assert_eq!(ok(&owner, &ssh(&owner, &["web", "echo by bangers"])), "by bangers\n");
    owner.ok(["vm", "delete", "-f", "web"]);
    owner.assert_nothing_left();
}

#[test]
fn ssh_gets_into_an_image_of_one_program() {
    if missing(&["ssh", "ssh-keygen", "scp", "unshare"])
        || prerequisites(&["docker-registry", "skopeo", "gzip"]).is_none()
    {
        return;
    }
    let (owner, registry) = (Owner::with_store(), Registry::start());
    let single = registry.layer("single");
    install(&single.join("hello"), &static_program(&code_that_prints("hello by ssh\n", 9)));
    registry.push("one:1", &[(&single, "gzip")], json!({}));
    owner.ok(["vm", "run", "-d", "--name", "one", "--image", &registry.reference("one:1")]);
    let output = ssh(&owner, &["one", "/hello"]);
    assert_eq!(output.stdout, b"hello by ssh\n", "{}{}", show(&output), owner.logs());
    assert_eq!(output.status.code(), Some(9));
    for (command, message) in [
        (
            &["one", "/hello; true"][..],
            "banger: this image has no shell to understand the command\n\
          hint: without one, only plain words work, such as `/program --flag value`\n",
        ),
        (&["one"], "banger: this image has no shell\nhint: name a program of the image after `--`\n"),
        (&["one", "no-such"], "banger: `no-such` was not found in the guest\n"),
    ] {
        let output = ssh(&owner, &[&["one", "-T"], &command[1..]].concat());
        assert_eq!(output.status.code(), Some(127), "{}", show(&output));
        assert!(String::from_utf8_lossy(&output.stderr).ends_with(message), "{}", show(&output));
    }
    // Files need no program of the image's.
    owner.ok(["ssh-config", "--install"]);
    std::fs::write(owner.home().join("file"), "text").unwrap();
    ok(&owner, &program(&owner, "scp", &["-q", "file", "one.vm:/file"]));
    ok(&owner, &program(&owner, "scp", &["-q", "one.vm:/file", "back"]));
    assert_eq!(std::fs::read_to_string(owner.home().join("back")).unwrap(), "text");
    owner.ok(["vm", "delete", "-f", "one"]);
    owner.assert_nothing_left();
}
