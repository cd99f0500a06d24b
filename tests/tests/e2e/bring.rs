//! What comes out of a vm on request: files that somebody looked through, commits as a branch; and what is installed or
//! listed on the way in.

use crate::support::{Owner, show};
use crate::workspace::{checkout, guest, placed, sh, text};
use std::io::Write as _;
use std::process::{Output, Stdio};

/// Runs `banger` with these lines on stdin.
fn answered(owner: &Owner, args: &[&str], answers: &str) -> Output {
    let mut command = owner.banger(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(answers.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_review_takes_what_is_accepted() {
    let owner = Owner::with_store();
    let top = placed(
        &owner,
        "review",
        "for f in a b c; do echo $f > $f; done; mkdir d; echo x > d/x; git add .; git commit -qm one",
    );
    guest(
        &owner,
        "review",
        "echo A >> a; printf 'B\\033[2J\\n' >> b; rm c; rm -r d; echo file > d; printf 'n\\0' > new; chmod +x new",
    );
    let export = ["vm", "workspace", "export", "review", "--review"];
    let output = answered(&owner, &export, "y\nn\nwhat\ny\nn\nn\nn\n");
    assert!(output.status.success(), "{}", show(&output));
    let patch = text(&output.stdout);
    let files: Vec<&str> = patch.lines().filter(|line| line.starts_with("diff ")).collect();
    assert_eq!(files, ["diff --git a/a b/a", "diff --git a/c b/c"], "{patch}");
    let escapes = |output: &Output| output.stderr.contains(&0x1b);
    assert!(!escapes(&output), "an escape sequence of the guest's is alive");
    insta::assert_snapshot!(String::from_utf8_lossy(&output.stderr));
    let applying = [&export[..], &["--apply"]].concat();
    let nothing = |answers: &str| {
        let output = answered(&owner, &applying, answers);
        assert!(!output.status.success(), "{}", show(&output));
        assert_eq!(text(&sh(&owner, &top, "git status --porcelain").stdout), "");
        String::from_utf8_lossy(&output.stderr).lines().rev().take(2).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!(["", "y\ny", "y\nq\n", "n\nn\nn\ny\nn\nn\n"].map(nothing).join("\n---\n"));
    let output = answered(&owner, &applying, "n\nn\nn\na\n");
    assert!(output.status.success(), "{}", show(&output));
    let status = text(&sh(&owner, &top, "git status --porcelain -uall").stdout);
    assert_eq!(status, " D d/x\n?? d\n?? new\n", "{}", show(&output));
    owner.ok(["vm", "workspace", "undo", top.to_str().unwrap()]);
    assert_eq!(text(&sh(&owner, &top, "git status --porcelain").stdout), "");
    owner.ok(["vm", "delete", "-f", "review"]);
    owner.assert_nothing_left();
}

#[test]
fn commits_made_in_a_vm_become_a_branch() {
    let owner = Owner::with_store();
    let top = placed(
        &owner,
        "made",
        "for i in 1 2 3; do echo $i > a; git add .; git commit -qm $i; done; echo dirty >> a",
    );
    let export = |branch: &str| {
        let output =
            owner.banger(["vm", "workspace", "export", "made", "--branch", branch]).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let mut said = vec![export("topic")];
    let script = "git config user.name Guest; git config user.email guest@example.com; git checkout -q a; echo b > b
        git add b; GIT_AUTHOR_DATE='2001-02-03T04:05:06+0700' git commit -qm 'add b

        with a body' --author 'Somebody Else <else@example.com>'
        git checkout -qb side; echo s > s; git add s; git commit -qm side; git checkout -q main; git merge -q --no-ff --no-edit side
        echo uncommitted > u";
    guest(&owner, "made", script);
    let before =
        text(&sh(&owner, &top, "git status --porcelain; sha256sum .git/index; git symbolic-ref HEAD").stdout);
    said.push(export("topic"));
    let log = "git log --format='%H %T %P %an %ae %ad %cn %cd %B' -n 5 ";
    let theirs = guest(&owner, "made", log);
    assert_eq!(text(&sh(&owner, &top, &format!("{log} topic")).stdout), theirs);
    sh(&owner, &top, "git fsck --strict --no-dangling && git diff --exit-code topic^2:s topic:s");
    guest(&owner, "made", "git add u; git commit -qm u");
    said.push(export("topic"));
    assert_eq!(text(&sh(&owner, &top, "git show topic:u").stdout), "uncommitted\n");
    said.push(export("main"));
    said.push(export("a..b"));
    // What must not come out is in no commit that comes out.
    guest(&owner, "made", "ln -s /etc/passwd out; git add out; git commit -qm out");
    said.push(export("topic"));
    guest(&owner, "made", "git reset -q --hard HEAD~2; echo other > u; git add u; git commit -qm other");
    said.push(export("topic"));
    assert_eq!(
        text(&sh(&owner, &top, "git status --porcelain; sha256sum .git/index; git symbolic-ref HEAD").stdout),
        before
    );
    let said: Vec<String> = said.into_iter().map(|(success, said)| format!("{success}\n{said}")).collect();
    insta::assert_snapshot!(said.join("---\n"));
    owner.ok(["vm", "delete", "-f", "made"]);
    owner.assert_nothing_left();
}

#[test]
fn a_dry_run_lists_exactly_what_travels_and_makes_nothing() {
    let owner = Owner::new();
    let dir = checkout(
        &owner,
        "dry",
        "umask 022; git init -q r; cd r; echo 'out/' > .gitignore; mkdir d out; echo a > d/a; echo b > gone; ln -s d/a link
        git add .; git commit -qm one; rm gone; echo 12345 > new; chmod 755 new; echo x > out/x; echo k > .env
        printf n > \"$(printf 'n\\377')\"; git init -q nested; touch nested/x",
    );
    let top = dir.join("r");
    let top = top.to_str().unwrap();
    let listed = |args: &[&str]| -> String {
        let output = owner.banger(args).output().unwrap();
        assert!(output.status.success(), "{}", show(&output));
        String::from_utf8_lossy(&output.stdout).replace(owner.home().to_str().unwrap(), "HOME")
    };
    let json = listed(&["vm", "run", top, "--dry-run", "--json"]);
    insta::assert_snapshot!(json);
    assert_eq!(listed(&["vm", "workspace", "prepare", "--dry-run", "--json", "none", top]), json);
    assert_eq!(listed(&["vm", "create", "--dry-run", "--json", top]), json);
    insta::assert_snapshot!(listed(&[
        "vm",
        "run",
        top,
        "--dry-run",
        "--tracked-only",
        "--guest-path",
        "/srv/x"
    ]));
    assert!(!owner.home().join(".local").exists(), "something was made");
    assert_eq!(owner.processes(), [""; 0], "somebody was asked");
}

/// Says what it was asked for, and fails when it is told to.
const MISE: &str = r#"cat > /usr/local/bin/mise <<'END'
#!/bin/sh
echo "$PWD: mise $* ($MISE_YES)" >> /tmp/asked
echo "mise says $1"; echo "tool 1.2.3" >&2
test ! -e "/tmp/fail-$1"
END
chmod 755 /usr/local/bin/mise"#;

#[test]
fn tools_that_a_checkout_names_are_installed_before_the_command() {
    let owner = Owner::with_store();
    let top = placed(
        &owner,
        "tools",
        "echo '[tools]' > mise.toml; echo 'node 20' > .tool-versions; echo a > a; git add .; git commit -qm one",
    );
    let top_text = top.to_str().unwrap();
    // The vm had no mise, which is no failure.
    guest(&owner, "tools", MISE);
    sh(&owner, &top, "echo b > a");
    let again = |flags: &[&str], command: &[&str]| {
        let args = [&["vm", "run", "--reuse"], flags, &[top_text, "--"], command].concat();
        let output = owner.banger(args).output().unwrap();
        let (out, err) = (text(&output.stdout), String::from_utf8_lossy(&output.stderr).into_owned());
        (output.status.code(), out, err)
    };
    let asked = "/root/repo: mise trust /root/repo/mise.toml (1)\n/root/repo: mise install (1)\n";
    let (status, out, err) = again(&[], &["cat", "a", "/tmp/asked"]);
    assert_eq!((status, out.as_str()), (Some(0), &*format!("b\n{asked}")), "{err}");
    let mut lines: Vec<&str> = err.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["mise says install", "mise says trust", "tool 1.2.3", "tool 1.2.3"]);
    guest(&owner, "tools", "touch /tmp/fail-install; rm /tmp/asked");
    sh(&owner, &top, "echo c > a");
    let (status, out, err) = again(&[], &["echo", "ran"]);
    assert_eq!((status, out.as_str()), (Some(125), ""));
    insta::assert_snapshot!(err.split_once("error:").unwrap().1);
    let (status, out, _) = again(&["--no-bootstrap"], &["sh", "-c", "cat a; wc -l < /tmp/asked"]);
    assert_eq!((status, out.as_str()), (Some(0), "c\n2\n"));
    let prepared = owner.banger(["vm", "workspace", "prepare", "tools"]).output().unwrap();
    assert_eq!(prepared.status.code(), Some(1), "{}", show(&prepared));
    owner.ok(["vm", "workspace", "prepare", "--no-bootstrap", "tools"]);
    // Nothing is asked of mise where nothing names tools.
    sh(&owner, &top, "git rm -q mise.toml .tool-versions; git commit -qm two");
    owner.ok(["vm", "workspace", "prepare", "tools"]);
    owner.ok(["vm", "delete", "-f", "tools"]);
    owner.assert_nothing_left();
}
