//! The owner's ssh agent in a vm, for as long as a command runs that was to have it.

use crate::support::{IMAGE, Owner, has, run, show, skip, wait_for};
use std::process::{Child, Command, Stdio};

/// A real agent with a key, the owner's.
struct KeyAgent {
    process: Child,
    /// The key as the agent's protocol has it, in hexadecimal digits.
    key: String,
}

impl Drop for KeyAgent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn socket(owner: &Owner) -> std::path::PathBuf {
    owner.home().join("agent.sock")
}

fn start(owner: &Owner) -> KeyAgent {
    let mut agent = owner.program("ssh-agent");
    let process = agent.arg("-D").arg("-a").arg(socket(owner)).stdout(Stdio::null()).spawn().unwrap();
    let mut agent = KeyAgent { process, key: String::new() };
    wait_for("the ssh agent listens", || {
        if socket(owner).exists() { Ok(()) } else { Err("no socket".to_owned()) }
    });
    // It insists on a user who is in a list of users, which an owner is not.
    let key = owner.home().join("key");
    run(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key));
    if let Some(uid) = owner.uid() {
        std::os::unix::fs::chown(&key, Some(uid), Some(uid)).unwrap();
    }
    run(owner.program("ssh-add").args(["-q", "key"]).env("SSH_AUTH_SOCK", socket(owner)));
    let public = std::fs::read_to_string(owner.home().join("key.pub")).unwrap();
    let words = "printf %s \"$0\" | base64 -d | od -An -v -tx1 | tr -d ' \\n'";
    agent.key = run(Command::new("sh").args(["-c", words, public.split(' ').nth(1).unwrap()]));
    assert_eq!(agent.key.len(), 2 * 51);
    agent
}

/// A client of the agent's protocol, of what Debian's smallest image has: sends one message of this kind, prints the
/// answer.
fn client(kind: u8) -> String {
    format!(
        "perl -MIO::Socket::UNIX -e '$s = IO::Socket::UNIX->new(Peer => $ENV{{SSH_AUTH_SOCK}}) or die \"$!\\n\"; \
         syswrite $s, pack(\"NC\", 1, {kind}); sysread $s, $n, 4; $n = unpack(\"N\", $n); \
         while (length $b < $n) {{ sysread($s, $b, $n, length $b) or last }} print unpack(\"H*\", $b), \"\\n\"'"
    )
}

#[test]
fn the_ssh_agent_is_in_the_vm_when_asked_for_and_goes_with_the_command() {
    if let Some(program) = ["ssh-agent", "ssh-add", "ssh-keygen"].iter().find(|program| !has(program)) {
        return skip(&format!("forwarded agent: `{program}` is not installed"));
    }
    let owner = Owner::with_store();
    let agent = start(&owner);
    let with_agent = |args: &[&str]| {
        let mut command = owner.banger(args);
        let output = command.env("SSH_AUTH_SOCK", socket(&owner)).output().unwrap();
        assert!(output.status.success(), "{}{}", show(&output), owner.logs());
        String::from_utf8(output.stdout).unwrap()
    };
    // A vm without a network, and a command of another user's.
    let made = ["vm", "run", "-A", "--net", "none", "--name", "web", "--image", IMAGE, "--", "sh", "-c"];
    let listed = with_agent(&[&made[..], &[&*client(11)]].concat());
    assert!(listed.starts_with("0c00000001") && listed.contains(&agent.key), "{listed}");
    owner.ok(["vm", "exec", "web", "--", "useradd", "-m", "dev"]);
    let look = format!(
        "stat -c '%a %U' $SSH_AUTH_SOCK; stat -c '%a %U' $(dirname $SSH_AUTH_SOCK); {}; {}",
        client(11),
        client(19)
    );
    let exec = ["vm", "exec", "-A", "--user", "dev", "web", "--", "sh", "-c"];
    let said = with_agent(&[&exec[..], &[&*look]].concat());
    let lines: Vec<_> = said.lines().collect();
    assert_eq!((lines[0], lines[1]), ("600 dev", "711 root"));
    assert_eq!(lines[2], listed.trim_end());
    // What would change the agent is refused, and was not done.
    assert_eq!(lines[3], "05");
    let keys = run(owner.program("ssh-add").arg("-l").env("SSH_AUTH_SOCK", socket(&owner)));
    assert!(keys.contains("ED25519"), "{keys}");

    // Nothing of it is there afterwards, nor where it was not asked for.
    let look =
        "echo \"<$SSH_AUTH_SOCK>\"; find / -xdev -name 'banger-agent-*'; find /run -name 'banger-agent-*'";
    assert_eq!(with_agent(&["vm", "exec", "web", "--", "sh", "-c", look]), "<>\n");
    // What goes on after the command has no agent any more.
    let later = format!("( sleep 1; {} ) > /root/later 2>&1 &", client(11));
    with_agent(&["vm", "exec", "-A", "web", "--", "sh", "-c", &later]);
    wait_for("the background process has tried", || {
        let said = owner.ok(["vm", "exec", "web", "--", "cat", "/root/later"]);
        if said == "No such file or directory\n" { Ok(()) } else { Err(said) }
    });
    drop(agent);
    owner.ok(["vm", "delete", "-f", "web"]);
    owner.assert_nothing_left();
}
