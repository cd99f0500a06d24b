//! Checkouts in vms: every kind of repository looks in the guest as it looks on the host.

use crate::support::{IMAGE, Owner, run, show};
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
find . -name .git -prune -o -printf '%y %m %l %p\n' | grep -v '^d' | sort
"#;

/// One kind of checkout.
struct Kind {
    name: &'static str,
    /// Makes it in a directory of its own.
    script: &'static str,
    /// The checkout below that directory.
    path: &'static str,
    /// Further flags.
    flags: &'static [&'static str],
}

const fn kind(name: &'static str, path: &'static str, script: &'static str) -> Kind {
    Kind { name, script, path, flags: &[] }
}

const KINDS: [Kind; 18] = [
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
        flags: &["--mode", "full_copy"],
        script: "git init -q sub; cd sub; echo s > s; git add .; git commit -qm sub; cd ..; git init -q r; cd r
        git -c protocol.file.allow=always submodule --quiet add ../sub mod; echo a > a; git add .; git commit -qm one
        git submodule --quiet deinit -f mod; git -c protocol.file.allow=always submodule --quiet update --init
        git remote add origin ../base; git config submodule.mod.url ../sub; echo more >> mod/s; echo u > mod/u",
    },
];

/// Runs a shell script as the owner; the directory is the owner's.
fn sh(owner: &Owner, dir: &Path, script: &str) -> Output {
    let mut command = owner.program("sh");
    let output = command.args(["-c", script]).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{script}: {}", show(&output));
    output
}

/// Makes an owner who commits, and a checkout by a script.
fn checkout(owner: &Owner, name: &str, script: &str) -> PathBuf {
    let dir = owner.home().join("src").join(name.replace(' ', "-"));
    run(owner.program("mkdir").arg("-p").arg(&dir));
    let config = "[user]\nname = A U Thor\nemail = author@example.com\n[init]\ndefaultBranch = main\n[advice]\n\
        detachedHead = false\n";
    sh(owner, &dir, &format!("printf '{config}' > ~/.gitconfig; set -e; {script}"));
    dir
}

fn text(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string().replace("\\n", "\n")
}

#[test]
fn a_checkout_looks_in_the_guest_as_on_the_host() {
    let owner = Owner::with_store();
    let name = "kinds";
    owner.ok(["vm", "run", "-d", "--image", IMAGE, "--name", name]);
    for kind in &KINDS {
        let dir = checkout(&owner, kind.name, kind.script);
        let path = dir.join(kind.path);
        let ignoring = "find . -name .git -prune -o \\( -path ./out -o -name '*.log' \\) -prune -o";
        let on_host = LOOK.replace("find . -name .git -prune -o", ignoring);
        let host = sh(&owner, &path, &on_host);
        let mut command = owner.banger(["vm", "workspace", "prepare"]);
        let placed = command.args(kind.flags).arg(name).arg(&path).output().unwrap();
        assert!(placed.status.success(), "{}: {}{}", kind.name, show(&placed), owner.logs());
        let below = if kind.path.contains('/') { "/a/b" } else { "" };
        let workdir = format!("/root/repo{below}");
        let mut command = owner.banger(["vm", "exec", "--workdir", &workdir, name, "--", "sh", "-c"]);
        let guest = command.arg(LOOK).output().unwrap();
        assert_eq!(text(&guest.stdout), text(&host.stdout), "{}: {}", kind.name, text(&guest.stderr));
        let fsck = owner
            .banger(["vm", "exec", name, "--", "git", "-C", "/root/repo", "fsck", "--no-dangling"])
            .output();
        let fsck = fsck.unwrap();
        let lazy = kind.name == "a partial clone";
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
