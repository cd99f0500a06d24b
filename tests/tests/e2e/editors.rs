//! Editors that work in a vm by ssh, from outside.

use crate::ssh::{missing, ok, program};
use crate::support::{IMAGE, Owner, has, skip};
use std::time::Instant;

#[test]
fn emacs_works_in_a_vm_by_tramp() {
    if missing(&["ssh", "ssh-keygen", "scp", "unshare"]) {
        return;
    }
    if !has("emacs") {
        skip("emacs_works_in_a_vm_by_tramp: `emacs` is not installed");
        return;
    }
    let owner = Owner::with_store();
    ok(&owner, &program(&owner, "banger", &["ssh-config", "--install"]));
    owner.ok(["vm", "run", "-d", "--net", "none", "--name", "web", "--image", IMAGE]);
    let prepare = "useradd -m dev && mkdir '/srv/two words' && cd '/srv/two words' && \
                   printf '#!/bin/sh\necho ä\n' > \"it's ä.sh\" && chmod 751 *";
    owner.ok(["vm", "exec", "web", "--", "sh", "-c", prepare]);
    std::fs::write(owner.home().join("tramp.el"), include_str!("tramp.el")).unwrap();
    let begun = Instant::now();
    let output = program(&owner, "emacs", &["--batch", "--no-init-file", "--load", "tramp.el"]);
    let said = ok(&owner, &output);
    println!("Emacs took {} ms", begun.elapsed().as_millis());
    insta::assert_snapshot!(said, @r##"
    mode 751, ("it's ä.sh")
    it has "#!/bin/sh\necho ä\n"
    mode 751, saved
    it ends with 3
    it says "ä\nünd more\n"
    shell: "web\n/srv/two words\nroot\n"
    beside: 5, "got a line\n"
    bytes: t
    left: ("new name.sh")
    as dev
    refused
    "##);
    let content = owner.ok([
        "vm",
        "exec",
        "web",
        "--",
        "sh",
        "-c",
        "cd '/srv/two words' && stat -c '%U %a' * && cat *",
    ]);
    assert_eq!(content, "root 751\n#!/bin/sh\necho ä\necho ünd more\nexit 3\n");
    owner.ok(["vm", "delete", "-f", "web"]);
    owner.assert_nothing_left();
}
