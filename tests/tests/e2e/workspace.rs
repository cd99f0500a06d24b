//! Checkouts in vms: every kind of repository looks in the guest as it looks on the host.

use crate::support::{IMAGE, Owner, run, show, wait_for};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

/// Prints what git and the filesystem say about a checkout, in a way that is the same for equal ones.
const LOOK: &str = r#"
export GIT_OPTIONAL_LOCKS=0 LC_ALL=C
git status --porcelain=v2 --branch -z | tr '\0' '\n'
git log -n 20 --format='%H %T %an %ae %s' || true
git ls-files --stage -z | tr '\0' '\n'
git ls-files -t -z | tr '\0' '\n'
git diff --no-ext-diff --no-textconv | sha256sum
git diff --cached --no-ext-diff | sha256sum
git config user.name; git config user.email; git config remote.origin.url || true
cd "$(git rev-parse --show-toplevel)"
find . -name .git -prune -o -type f -print0 | sort -z | xargs -0 -r sha256sum
find . -name .git -prune -o -printf '%y %m %l %p\n' | grep -av '^d' | sort
"#;

/// One kind of checkout.
struct Kind {
    name: &'static str,
    /// Makes it in a directory of its own.
    script: &'static str,
    /// The checkout below that directory.
    path: &'static str,
    /// How it can be placed.
    modes: &'static [&'static str],
}

const fn kind(name: &'static str, path: &'static str, script: &'static str) -> Kind {
    Kind { name, script, path, modes: &["shallow_overlay", "full_copy"] }
}

const KINDS: [Kind; 19] = [
    kind(
        "everything that can be changed",
        "r",
        "git init -q r; cd r; printf 'out/\n*.log\n' > .gitignore
        for f in same changed gone staged both mode typed old; do echo $f > $f; done
        : > empty; head -c 3000000 /dev/urandom > huge; ln -s same link; mkdir -p a/b/c; echo x > a/b/c/deep
        git add .; git commit -qm one
        echo more >> changed; rm gone; echo s > staged; git add staged; echo b1 > both; git add both; echo b2 > both
        chmod +x mode; rm typed; ln -s same typed; git mv old new; ln -snf changed link; rm -r a; echo flat > a
        echo added > added; git add added; echo untracked > untracked; mkdir out; echo o > out/o; echo l > x.log
        chmod 600 untracked; git rm -q --cached empty",
    ),
    kind(
        "a linked worktree",
        "tree",
        "git init -q r; cd r; echo a > a; git add .; git commit -qm one
        git worktree add -q -b side ../tree; cd ../tree; echo b > b; git add b; echo c >> a",
    ),
    kind(
        "alternates",
        "r",
        "git init -q base; cd base; echo a > a; git add .; git commit -qm one; cd ..
        git clone -q --shared base r; cd r; echo b > b; git add .; git commit -qm two; echo c >> a",
    ),
    kind(
        "a sparse checkout",
        "r",
        "git init -q r; cd r; mkdir in out; echo a > in/a; echo b > out/b; echo c > c; git add .; git commit -qm one
        git sparse-checkout set --cone in; echo more >> in/a",
    ),
    kind(
        "a sparse index",
        "r",
        "git init -q r; cd r; mkdir in out; echo a > in/a; echo b > out/b; git add .; git commit -qm one
        git sparse-checkout set --cone --sparse-index in; echo more >> in/a",
    ),
    kind(
        "a shallow clone",
        "r",
        "git init -q base; cd base; for i in 1 2 3; do echo $i > a; git add .; git commit -qm $i; done; cd ..
        git clone -q --depth 2 \"file://$PWD/base\" r; cd r; echo more >> a",
    ),
    kind(
        "a partial clone",
        "r",
        "git init -q base; cd base; git config uploadpack.allowFilter true
        for i in 1 2 3; do echo $i > a; git add .; git commit -qm $i; done; cd ..
        git clone -q --filter=blob:none \"file://$PWD/base\" r; cd r; echo more >> a",
    ),
    kind(
        "a sparse partial clone",
        "r",
        "git init -q base; cd base; git config uploadpack.allowFilter true; mkdir in out; echo a > in/a; echo b > out/b
        git add .; git commit -qm one; cd ..; git clone -q --filter=blob:none --sparse \"file://$PWD/base\" r; cd r
        git sparse-checkout set --cone in; echo more >> in/a",
    ),
    kind(
        "files behind a filter",
        "r",
        "git init -q r; cd r; echo '*.big filter=big' > .gitattributes
        git config filter.big.clean 'sed s/content/pointer/'; git config filter.big.smudge 'sed s/pointer/content/'
        echo content > x.big; git add .; git commit -qm one; sleep 1.1; git update-index -q --refresh; echo a > a; git add a",
    ),
    kind(
        "a detached head",
        "r",
        "git init -q r; cd r; for i in 1 2; do echo $i > a; git add .; git commit -qm $i; done
        git checkout -q HEAD~; echo more >> a",
    ),
    kind("an unborn branch", "r", "git init -q -b first r; cd r; echo a > a; git add a; echo b > b"),
    kind(
        "SHA-256 objects",
        "r",
        "git init -q --object-format=sha256 r; cd r; echo a > a; git add .; git commit -qm one; echo b >> a; echo n > n",
    ),
    kind(
        "odd names",
        "a repo \u{e9}",
        "git init -q 'a repo \u{e9}'; cd 'a repo \u{e9}'
        for f in \"$(printf 'bad\\377')\" \"$(printf 'new\\nline')\" 'quo\"te' 'back\\slash' ' space ' README readme -dash; do
        echo \"$f\" > \"./$f\"; done
        git add .; git commit -qm one; for f in *; do echo more >> \"./$f\"; done; printf u > \"$(printf 'u\\376')\"",
    ),
    kind(
        "a directory below the top",
        "r/a/b",
        "git init -q r; cd r; mkdir -p a/b; echo x > a/b/x; echo y > y; git add .; git commit -qm one; echo more >> y",
    ),
    kind(
        "a branch and its upstream apart",
        "r",
        "git init -q base; cd base; for i in 1 2 3; do echo $i > a$i; git add .; git commit -qm $i; done; cd ..
        git clone -q base r; cd r; echo m > m; git add .; git commit -qm mine; cd ../base; echo t > t; git add .
        git commit -qm theirs; cd ../r; git fetch -q; git remote set-url origin https://host/r.git",
    ),
    kind(
        "a merge with conflicts",
        "r",
        "git init -q r; cd r; echo a > a; git add .; git commit -qm one; git checkout -qb side; echo b > a
        git commit -qam two; git checkout -q -; echo c > a; git commit -qam three; git merge -q side > /dev/null || true",
    ),
    kind(
        "a split index with every flag",
        "r",
        "git init -q r; cd r; for f in a b c d; do echo $f > $f; done; git add .; git commit -qm one
        git update-index --split-index; git update-index --assume-unchanged a; git update-index --skip-worktree b
        echo x > a; echo i > intent; git add -N intent; echo more >> c",
    ),
    kind(
        "line ends and a long history",
        "r",
        "git init -q r; cd r; echo '*.txt text eol=crlf' > .gitattributes; echo a > a.txt; git add .
        for i in $(seq 120); do echo $i > n; git add .; git commit -qm $i; done
        rm a.txt; git checkout -q a.txt; echo more > n; printf 'b\\r\\n' > b.txt; git add b.txt 2> /dev/null",
    ),
    Kind {
        name: "submodules",
        path: "r",
        modes: &["full_copy"],
        script: "git init -q sub; cd sub; echo s > s; git add .; git commit -qm sub; cd ..; git init -q r; cd r
        git -c protocol.file.allow=always submodule --quiet add ../sub mod; echo a > a; git add .; git commit -qm one
        git submodule --quiet deinit -f mod; git -c protocol.file.allow=always submodule --quiet update --init
        git remote add origin ../base; git config submodule.mod.url ../sub; echo more >> mod/s; echo u > mod/u",
    },
];

/// Runs a shell script as the owner; the directory is the owner's.
pub(crate) fn sh(owner: &Owner, dir: &Path, script: &str) -> Output {
    let mut command = owner.program("sh");
    let output = command.args(["-c", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{script}: {}", show(&output));
    output
}

/// Makes an owner who commits, and a checkout by a script.
pub(crate) fn checkout(owner: &Owner, name: &str, script: &str) -> PathBuf {
    let dir = owner.home().join("src").join(name.replace(' ', "-"));
    run(owner.program("mkdir").arg("-p").arg(&dir));
    let config = "[user]\nname = A U Thor\nemail = author@example.com\n[init]\ndefaultBranch = main\n[advice]\n\
        detachedHead = false\n";
    sh(owner, &dir, &format!("printf '{config}' > ~/.gitconfig; set -e; {script}"));
    dir
}

pub(crate) fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string().replace("\\n", "\n")
}

#[test]
fn a_checkout_looks_in_the_guest_as_on_the_host() {
    look_alike("kinds", "shallow_overlay");
}

#[test]
fn a_checkout_and_all_its_history_look_in_the_guest_as_on_the_host() {
    look_alike("histories", "full_copy");
}

/// Places each kind of checkout in one vm, and compares what git and the filesystem say on both sides.
fn look_alike(name: &str, mode: &str) {
    let owner = Owner::with_store();
    owner.ok(["vm", "run", "-d", "--image", IMAGE, "--name", name]);
    for kind in KINDS.iter().filter(|kind| kind.modes.contains(&mode)) {
        let dir = checkout(&owner, kind.name, kind.script);
        let path = dir.join(kind.path);
        let ignoring = "find . -name .git -prune -o \\( -path ./out -o -name '*.log' \\) -prune -o";
        let on_host = LOOK.replace("find . -name .git -prune -o", ignoring);
        let host = sh(&owner, &path, &on_host);
        let mut command = owner.banger(["vm", "workspace", "prepare"]);
        let placed = command.args(["--mode", mode]).arg(name).arg(&path).output().unwrap();
        assert!(placed.status.success(), "{}: {}{}", kind.name, show(&placed), owner.logs());
        let below = if kind.path.contains('/') { "/a/b" } else { "" };
        // A command begins in the directory that was named, without being told to.
        let begins = owner.ok(["vm", "exec", name, "--", "pwd"]);
        assert_eq!(begins, format!("/root/repo{below}\n"), "{}", kind.name);
        let mut command = owner.banger(["vm", "exec", name, "--", "sh", "-c"]);
        let guest = command.arg(LOOK).output().unwrap();
        assert_eq!(text(&guest.stdout), text(&host.stdout), "{}: {}", kind.name, text(&guest.stderr));
        let fsck = owner
            .banger(["vm", "exec", name, "--", "git", "-C", "/root/repo", "fsck", "--no-dangling"])
            .output();
        let fsck = fsck.unwrap();
        let lazy = kind.name.ends_with("partial clone");
        assert!(fsck.status.success() || lazy, "{}: {}", kind.name, show(&fsck));
    }
    owner.ok(["vm", "delete", "-f", name]);
    owner.assert_nothing_left();
    let left = std::fs::read_dir(owner.state().join("workspaces")).unwrap().count();
    assert_eq!(left, 0, "something of the workspaces is left");
}

#[test]
fn a_command_runs_in_a_copy_of_the_checkout() {
    let owner = Owner::with_store();
    let dir = checkout(
        &owner,
        "run",
        "git init -q r; cd r; mkdir sub; echo a > sub/a; echo b > .env; git add sub; git commit -qm one",
    );
    let output = owner.vm_run(
        [
            dir.join("r/sub").as_os_str().as_bytes(),
            b"--",
            b"sh",
            b"-c",
            b"pwd; ls -A ..; echo x > a; git status -s; exit 7",
        ]
        .map(<std::ffi::OsStr as std::os::unix::ffi::OsStrExt>::from_bytes),
    );
    assert_eq!(output.status.code(), Some(7), "{}", show(&output));
    assert_eq!(text(&output.stdout), "/root/repo/sub\n.git\nsub\n M a\n");
    let warning = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(warning.contains("`.env` looks like a secret and stays behind"), "{warning}");
    assert_eq!(std::fs::read_to_string(dir.join("r/sub/a")).unwrap(), "a\n");
    owner.assert_nothing_left();
}

/// Everything below a directory: type, permission bits, content.
const TREE: &str = "find . -path ./.git -prune -o -printf '%y %m %l %p\n' | grep -av '^d' | LC_ALL=C sort
    find . -path ./.git -prune -o -type f -print0 | LC_ALL=C sort -z | xargs -0 -r sha256sum";

/// Runs a script in a vm's workspace.
pub(crate) fn guest(owner: &Owner, name: &str, script: &str) -> String {
    let output = owner.banger(["vm", "exec", name, "--", "sh", "-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}{}", show(&output), owner.logs());
    text(&output.stdout)
}

/// A vm with a checkout made by a script.
pub(crate) fn placed(owner: &Owner, name: &str, script: &str) -> PathBuf {
    let top = checkout(owner, name, &format!("git init -q r; cd r; {script}")).join("r");
    let top_text = top.to_str().unwrap();
    owner.ok(["vm", "run", "-d", "--image", IMAGE, "--name", name, top_text]);
    top
}

#[test]
fn what_changed_comes_back_and_can_be_taken_back() {
    let owner = Owner::with_store();
    let top = placed(
        &owner,
        "back",
        "printf 'out/\n' > .gitignore; for f in same changed gone mode typed old; do echo $f > $f; done
        mkdir -p a/b sub; echo x > a/b/c; ln -s same link; printf 'a\\0b' > bin; printf 'x\r\ny\r\n' > crlf; echo s > sub/s
        echo host > 'od d'; chmod 600 mode; git add .; git commit -qm one; echo untracked > u; printf 'n\\377' > \"$(printf 'n\\377')\"",
    );
    let before = sh(&owner, &top, TREE);
    let script = "echo more >> changed; rm gone; chmod u+x mode; rm typed; ln -s same typed; git mv old new; git commit -qam one
        rm -r a; echo flat > a; ln -snf changed link; printf 'a\\0c' > bin; printf 'x\r\nz\r\n' > crlf; rm -r sub; mkdir -p out deep/er
        echo ignored > out/x; echo d > deep/er/d; echo mine >> u; echo more >> 'od d'; printf m >> \"$(printf 'n\\377')\"
        head -c 5000000 /dev/urandom > big; : > empty; echo local > '.gitattributes'; echo '*.log' >> .gitignore; echo l > x.log
        echo colon > ':(top)x'; git add changed; git stash -q; git stash pop -q --index; echo staged > st; git add st";
    guest(&owner, "back", script);
    let state = "find .git -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum; find .git -printf '%p %m %T@ %i\n' | sort";
    let git_before = guest(&owner, "back", state);
    let patch = top.parent().unwrap().join("p.diff");
    owner.ok(["vm", "workspace", "export", "back", "-o", patch.to_str().unwrap()]);
    let status = owner.json(&["vm", "workspace", "status", "back", "--json"]);
    assert_eq!(status["host_changed"].as_array().unwrap().len(), 0, "{status}");
    let applied = owner.banger(["vm", "workspace", "export", "back", "--apply"]).output().unwrap();
    assert!(applied.status.success(), "{}", show(&applied));
    assert_eq!(guest(&owner, "back", state), git_before, "the guest's git has changed");
    // As in the guest, but for what is ignored, and for who may read what had to be made anew.
    let leave = |text: String| -> Vec<String> {
        let wanted = |line: &&str| !line.contains("./out/") && !line.contains("x.log");
        text.lines().filter(wanted).map(str::to_owned).collect()
    };
    let there = leave(guest(&owner, "back", TREE));
    assert_eq!(leave(text(&sh(&owner, &top, TREE).stdout)), there);
    owner.ok(["vm", "workspace", "undo", top.to_str().unwrap()]);
    assert_eq!(text(&sh(&owner, &top, TREE).stdout), text(&before.stdout));
    // The patch says the same to git.
    let by_git = "git apply ../p.diff 2> /dev/null || git apply --exclude=':(top)x' ../p.diff";
    sh(&owner, &top, by_git);
    // Git gives what it makes anew to everybody.
    let by_git = text(&sh(&owner, &top, TREE).stdout).replace("755  ./mode", "700  ./mode");
    assert_eq!(leave(by_git), there);
    let again = owner.banger(["vm", "workspace", "undo", top.to_str().unwrap()]).output().unwrap();
    assert_eq!(again.status.code(), Some(1), "{}", show(&again));
    owner.ok(["vm", "delete", "-f", "back"]);
    owner.assert_nothing_left();
}

#[test]
fn both_sides_are_joined_or_nothing_is_written() {
    let owner = Owner::with_store();
    let lines = "for i in 1 2 3 4 5 6 7 8 9; do echo $i; done";
    let top =
        placed(&owner, "join", &format!("({lines}) > text; echo a > other; git add .; git commit -qm one"));
    guest(&owner, "join", "sed -i 's/^1$/one/' text; echo new > new");
    sh(&owner, &top, "sed -i 's/^9$/nine/' text; git commit -qam two");
    owner.ok(["vm", "workspace", "export", "join", "--apply"]);
    let joined = std::fs::read_to_string(top.join("text")).unwrap();
    assert!(joined.starts_with("one\n") && joined.ends_with("nine\n"), "{joined}");
    let dirty = owner.banger(["vm", "workspace", "export", "join", "--apply"]).output().unwrap();
    assert!(text(&dirty.stderr).contains("not committed: `text`"), "{}", show(&dirty));
    sh(&owner, &top, "git add .; git commit -qm three; echo b > other; git commit -qam four; rm new");
    guest(&owner, "join", "echo c > other; echo newer > new");
    sh(&owner, &top, "git add -A; git commit -qm five; echo x > untracked");
    let before = text(&sh(&owner, &top, TREE).stdout);
    let refused = owner.banger(["vm", "workspace", "export", "join", "--apply"]).output().unwrap();
    let said = text(&refused.stderr);
    assert!(!refused.status.success() && said.contains("both sides changed `other`"), "{said}");
    assert_eq!(text(&sh(&owner, &top, TREE).stdout), before);
    owner.ok(["vm", "delete", "-f", "join"]);
}

#[test]
fn a_workspace_is_brought_up_to_date_and_changes_in_it_are_not_lost() {
    let owner = Owner::with_store();
    let top = placed(
        &owner,
        "fresh",
        "echo 'out/' > .gitignore; mkdir d; echo a > d/a; git add .; git commit -qm one",
    );
    assert_eq!(
        guest(&owner, "fresh", "pwd; mkdir -p out d/out; echo built > out/x; echo built > d/out/y"),
        "/root/repo\n"
    );
    sh(&owner, &top, "echo b > d/a; git commit -qam two");
    let stale = owner.banger(["vm", "exec", "fresh", "--", "cat", "d/a"]).output().unwrap();
    assert!(
        text(&stale.stderr).contains("has another commit checked out than vm `fresh` has"),
        "{}",
        show(&stale)
    );
    assert_eq!(text(&stale.stdout), "a\n");
    let fresh = owner
        .banger(["vm", "exec", "--auto-prepare", "fresh", "--", "cat", "d/a", "out/x", "d/out/y"])
        .output();
    let fresh = fresh.unwrap();
    assert_eq!(text(&fresh.stdout), "b\nbuilt\nbuilt\n", "{}", show(&fresh));
    guest(&owner, "fresh", "echo mine > d/a");
    let refused = owner.banger(["vm", "workspace", "prepare", "fresh"]).output().unwrap();
    assert!(text(&refused.stderr).contains("1 change in vm `fresh` would be lost"), "{}", show(&refused));
    assert_eq!(guest(&owner, "fresh", "cat d/a"), "mine\n");
    owner.ok(["vm", "workspace", "prepare", "--force", "fresh"]);
    assert_eq!(guest(&owner, "fresh", "cat d/a out/x"), "b\nbuilt\n");
    // It is there after a restart, and still compared with what was placed.
    guest(&owner, "fresh", "echo later > d/new");
    owner.ok(["vm", "stop", "fresh"]);
    owner.ok(["vm", "start", "fresh"]);
    let status = owner.json(&["vm", "workspace", "status", "fresh", "--json"]);
    assert_eq!(status["guest_changed"], serde_json::json!(["d/new"]), "{status}");
    let elsewhere = ["vm", "workspace", "prepare", "--guest-path", "/etc", "fresh"];
    let refused = owner.banger(elsewhere).output().unwrap();
    assert!(text(&refused.stderr).contains("there is something already"), "{}", show(&refused));
    sh(&owner, &top, "echo not > d/committed; echo c > d/a; chmod +x d/a");
    owner.ok([
        "workspace",
        "prepare",
        "--guest-path",
        "/srv/old",
        "--branch",
        "old",
        "--from",
        "HEAD~",
        "fresh",
    ]);
    let said = guest(
        &owner,
        "fresh",
        "pwd; git symbolic-ref HEAD; git status --short; ls d; cat d/a; git log --format=%s",
    );
    assert_eq!(said, "/srv/old\nrefs/heads/old\na\na\none\n");
    // Placed again without a word, it is placed as it was.
    owner.ok(["workspace", "prepare", "fresh"]);
    assert_eq!(guest(&owner, "fresh", "git symbolic-ref HEAD; cat d/a"), "refs/heads/old\na\n");
    sh(&owner, &top, "rm d/committed; git checkout -q .");
    let readonly = [
        "vm",
        "workspace",
        "prepare",
        "--guest-path",
        "/srv/x/repo",
        "--readonly",
        "--branch",
        "topic",
        "fresh",
    ];
    owner.ok(readonly);
    let said = guest(&owner, "fresh", "pwd; git symbolic-ref HEAD; touch new 2> /dev/null || echo refused");
    assert_eq!(said, "/srv/x/repo\nrefs/heads/topic\nrefused\n");
    owner.ok(["vm", "delete", "-f", "fresh"]);
    owner.assert_nothing_left();
}

#[test]
fn a_transfer_that_breaks_off_leaves_what_was_there() {
    let owner = Owner::with_store();
    let top = placed(&owner, "broken", "echo a > a; git add .; git commit -qm one");
    let before = guest(&owner, "broken", "ls -A; cat a; git status --porcelain");
    sh(&owner, &top, "echo b > a; head -c 150000000 /dev/zero > z; git commit -qam two");
    let mut client = owner.banger(["workspace", "prepare", "broken"]).spawn().unwrap();
    let staging = "ls -A /root | grep -c banger-new || true";
    wait_for("the transfer is under way", || match guest(&owner, "broken", staging).as_str() {
        "1\n" => Ok(()),
        other => Err(other.to_owned()),
    });
    client.kill().unwrap();
    client.wait().unwrap();
    wait_for("the guest has noticed", || match guest(&owner, "broken", staging).as_str() {
        "0\n" => Ok(()),
        other => Err(other.to_owned()),
    });
    assert_eq!(guest(&owner, "broken", "ls -A; cat a; git status --porcelain"), before);
    let workspaces = || std::fs::read_dir(owner.state().join("workspaces")).unwrap().count();
    assert_eq!(workspaces(), 2, "a client was killed, and left nothing?");
    owner.ok(["daemon", "stop"]);
    owner.ok(["vm", "list"]);
    assert_eq!(workspaces(), 1, "what a killed client left is still there");
    owner.ok(["workspace", "prepare", "broken"]);
    assert_eq!(guest(&owner, "broken", "cat a; stat -c %s z"), "b\n150000000\n");
    owner.ok(["vm", "delete", "-f", "broken"]);
    owner.assert_nothing_left();
}

#[test]
fn one_command_brings_its_change_back() {
    let owner = Owner::with_store();
    let dir = checkout(&owner, "one", "git init -q r; cd r; echo a > a; git add .; git commit -qm one");
    let (top, patch) = (dir.join("r"), dir.join("p.diff"));
    let args = ["--export", patch.to_str().unwrap(), "--apply", top.to_str().unwrap()];
    let output = owner.vm_run(args.iter().chain(&["--", "sh", "-c", "echo b > a; exit 3"]));
    assert_eq!(output.status.code(), Some(3), "{}", show(&output));
    assert_eq!(std::fs::read_to_string(top.join("a")).unwrap(), "b\n");
    assert!(std::fs::read_to_string(&patch).unwrap().contains("\n-a\n+b\n"));
    owner.assert_nothing_left();
    let output = owner.vm_run(args.iter().chain(&["--", "true"]));
    assert!(text(&output.stderr).contains("not committed: `a`"), "{}", show(&output));
    sh(
        &owner,
        &dir,
        "git init -q sub; cd sub; echo s > s; git add .; git commit -qm sub; cd ..; git init -q super; cd super
        git -c protocol.file.allow=always submodule --quiet add ../sub mod; git commit -qm one",
    );
    let top = dir.join("super");
    let args = [
        "--mode",
        "full_copy",
        "--apply",
        top.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        "echo t > mod/s; touch mod/n",
    ];
    let output = owner.vm_run(args);
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(text(&sh(&owner, &top.join("mod"), "git status -s").stdout), " M s\n?? n\n");
    let plain = dir.join("plain");
    sh(&owner, &dir, "mkdir plain; echo x > plain/x");
    let output = owner.vm_run([
        "--mode",
        "full_copy",
        "--apply",
        plain.to_str().unwrap(),
        "--",
        "sh",
        "-c",
        "echo y > x; touch n",
    ]);
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(std::fs::read_to_string(plain.join("x")).unwrap(), "y\n");
    owner.assert_nothing_left();
}

/// What an owner may have in the config, and what a guest would like git to run with it. Each leaves a mark.
const TRAPS: &str = r#"
mkdir -p ~/marks ~/hooks
mark() { printf '#!/bin/sh\ntouch ~/marks/%s\ncat 2> /dev/null\nexit 0\n' "$1" > ~/hooks/"$1"; chmod +x ~/hooks/"$1"; }
for hook in pre-commit post-checkout post-index-change pre-applypatch applypatch-msg post-merge reference-transaction; do mark $hook; done
for trap in fsmonitor clean smudge process textconv external command merge ssh pager editor credential askpass; do mark $trap; done
git config --global core.hooksPath ~/hooks; git config --global core.fsmonitor ~/hooks/fsmonitor
git config --global filter.evil.clean ~/hooks/clean; git config --global filter.evil.smudge ~/hooks/smudge
git config --global filter.evil.required true; git config --global filter.long.process ~/hooks/process
git config --global diff.evil.textconv ~/hooks/textconv; git config --global diff.other.command ~/hooks/command
git config --global diff.external ~/hooks/external; git config --global merge.evil.driver "$HOME/hooks/merge %O %A %B"
git config --global merge.default evil; git config --global core.sshCommand ~/hooks/ssh
git config --global core.pager ~/hooks/pager; git config --global core.editor ~/hooks/editor
git config --global credential.helper ~/hooks/credential; git config --global core.askPass ~/hooks/askpass
git config --global submodule.recurse true; git config --global protocol.allow always; git config --global diff.submodule log
"#;

/// What a hostile guest writes; `mark` is a command that leaves a mark on the host.
const PAYLOAD: &str = r#"
mark="touch $HOST_HOME/marks/guest"
printf '* filter=evil diff=evil merge=evil\n*.long filter=long\n*.other diff=other\n' > .gitattributes
cp .gitattributes .git/info/attributes
for hook in pre-commit post-checkout post-index-change pre-applypatch fsmonitor-watchman reference-transaction; do
    mkdir -p .git/hooks; printf '#!/bin/sh\n%s\n' "$mark" > .git/hooks/$hook; chmod 755 .git/hooks/$hook; done
cat >> .git/config <<END
[core]
    fsmonitor = $mark
    sshCommand = $mark
    pager = $mark
    worktree = /
[filter "evil"]
    clean = $mark
    smudge = $mark
[diff]
    external = $mark
[diff "evil"]
    textconv = $mark
[alias]
    status = !$mark
[include]
    path = $HOST_HOME/hooks/config
END
echo "$HOST_HOME/src" > .git/objects/info/alternates
printf '[submodule "m"]\n\tpath = m\n\turl = ext::sh -c "%s"\n\tupdate = !%s\n' "$mark" "$mark" > .gitmodules
mkdir -p m inner/objects inner/refs inner/hooks nested/.git .Git 'git~1' '.git.'
echo "gitdir: $HOST_HOME/src" > m/.git
printf 'ref: refs/heads/main\n' > inner/HEAD
printf '[core]\n\tbare = true\n\tfsmonitor = %s\n\tworktree = ..\n' "$mark" > inner/config
cp inner/config inner/HEAD nested/.git/; cp inner/config .Git/config; cp inner/config 'git~1/config'; cp inner/config '.git./config'
printf '#!/bin/sh\n%s\n' "$mark" > inner/hooks/post-checkout; chmod 755 inner/hooks/post-checkout
# Of the same length, so that git has to compare the contents.
echo 5 > as-long; echo changed >> text; echo changed >> x.long; echo changed >> x.other; echo new > nested/file
ln -s "$HOST_HOME" out; ln -s ../../.. up; ln -s .git/config gitlink; ln -s /etc/passwd passwd
rm -rf dir; ln -s "$HOST_HOME" dir
printf '#!/bin/sh\n' > suid; chmod 6755 suid; mknod device c 1 3; mkfifo pipe
echo "$mark" > "$(printf '\033]0;title\007')"
"#;

#[test]
fn nothing_a_guest_writes_makes_the_host_run_anything() {
    let owner = Owner::with_store();
    let top = placed(
        &owner,
        "hostile",
        "mkdir dir; echo d > dir/file; echo 1 > text; echo 2 > x.long; echo 3 > x.other; echo 4 > as-long; git add .; git commit -qm one",
    );
    sh(&owner, owner.home(), TRAPS);
    let mut command = owner.banger(["vm", "exec", "--env"]);
    command.arg(format!("HOST_HOME={}", owner.home().display()));
    let ran = command.args(["hostile", "--", "sh", "-ec", PAYLOAD]).output().unwrap();
    assert!(ran.status.success(), "{}", show(&ran));
    let marks = || -> Vec<String> {
        let found = std::fs::read_dir(owner.home().join("marks")).unwrap();
        found.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    };
    let calm = |args: &[&str], succeeds: bool| {
        let output = owner.banger(args).output().unwrap();
        assert_eq!(output.status.success(), succeeds, "{args:?}: {}", show(&output));
        assert_eq!(marks(), [""; 0], "{args:?} had something run");
        text(&output.stderr)
    };
    let patch = owner.home().join("p.diff");
    calm(&["vm", "workspace", "status", "hostile"], true);
    let said = calm(&["vm", "workspace", "export", "hostile", "-o", patch.to_str().unwrap()], true);
    for name in [
        "`out`",
        "`up`",
        "`gitlink`",
        "`passwd`",
        "`dir`",
        "`.Git/config`",
        "`git~1/config`",
        "`.git./config`",
        "`device`",
        "`pipe`",
    ] {
        assert!(said.contains(&format!("{name} ")), "{name} was not refused by name: {said}");
    }
    calm(&["vm", "workspace", "export", "hostile", "--apply"], true);
    // The guest's attributes are in the checkout now, beside the owner's filters.
    calm(&["vm", "workspace", "export", "hostile", "--apply"], false);
    calm(&["vm", "run", "--dry-run", top.to_str().unwrap()], true);
    calm(&["vm", "workspace", "prepare", "--force", "hostile"], true);
    calm(&["vm", "exec", "hostile", "--", "true"], true);
    let has = |name: &str| top.join(name).symlink_metadata().is_ok();
    assert!(has("suid") && has("nested/file") && has("inner/config") && has(".gitattributes"));
    for name in [
        "out",
        "up",
        "gitlink",
        "passwd",
        ".Git",
        "git~1",
        ".git.",
        "device",
        "pipe",
        "nested/.git",
        "m/.git",
    ] {
        assert!(!has(name), "{name} came out");
    }
    let mode = std::os::unix::fs::MetadataExt::mode(&top.join("suid").metadata().unwrap());
    assert_eq!(mode & 0o7000, 0, "a setuid bit came out");
    assert!(!top.join("dir").is_symlink());
    calm(&["vm", "workspace", "undo", top.to_str().unwrap()], true);
    assert_eq!(std::fs::read_to_string(top.join("text")).unwrap(), "1\n");
    owner.ok(["vm", "delete", "-f", "hostile"]);
}
