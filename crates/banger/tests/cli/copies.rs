//! `vm cp` out of a vm whose agent is not ours any more.

use crate::support::{Bench, Peer, view};
use banger_wire::daemon::{Outcome, Request};
use banger_wire::exec::STDOUT;
use banger_wire::frame::{DATA_LEN_MAX, Frame};
use banger_wire::guest::SessionKind;
use banger_wire::item::{Item, ItemWriter};
use banger_wire::vm::{VmEvent, VmRequest};
use insta::assert_snapshot;

/// A vm that answers a copy with `script`.
fn agent(bench: &Bench, script: impl Fn(&mut Peer) + Send + Sync + 'static) {
    let socket = bench.supervisor(move |request, peer| {
        let VmRequest::Open { what: SessionKind::CopyOut { .. }, lease: false } = request else {
            panic!("{request:?}")
        };
        peer.say(&VmEvent::Accepted);
        script(peer);
    });
    bench.daemon(move |request, peer| {
        assert!(matches!(request, Request::VmShow { .. }));
        let mut vm = view("web", "running");
        socket.clone_into(&mut vm.socket);
        peer.done(Outcome::Vm(vm));
    });
}

fn stream(items: &[Item]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = ItemWriter::new(&mut bytes);
    for item in items {
        match item {
            Item::Part { offset, .. } => writer.part(*offset, b"pwned").unwrap(),
            item => writer.item(item).unwrap(),
        }
    }
    bytes
}

#[test]
fn a_hostile_agent_is_refused_and_reaches_nothing_else() {
    let directory = |path: &str| Item::Directory { path: path.into(), mode: 0o777 };
    let link =
        |path: &str, target: &str| Item::Link { path: path.into(), target: target.into(), modified: 0 };
    let file = |path: &str| {
        let whole = Item::Whole { path: path.into(), mode: 0o777, modified: 0, len: 5 };
        vec![Item::Parts { path: path.into() }, Item::Part { offset: 0, len: 5 }, whole]
    };
    let mut said = String::new();
    for items in [
        file("top/../../victim"),
        [
            vec![directory("top"), link("top/\u{1b}[2J", "../.."), directory("top/\u{1b}[2J")],
            file("top/\u{1b}[2J/victim"),
        ]
        .concat(),
        file("victim"),
        // All is well, and then it says that it is done in the middle.
        vec![directory("top"), Item::Parts { path: "top/half".into() }, Item::Part { offset: 0, len: 5 }],
    ] {
        let bench = Bench::new();
        let bytes = stream(&items);
        agent(&bench, move |peer| {
            peer.send(&Frame::data(0, STDOUT, bytes.clone()));
            peer.exit(0);
        });
        let mut command = bench.command(["vm", "cp", "web:/srv", "here"]);
        command.current_dir(bench.path());
        said.push_str(&bench.show(&command.output().unwrap()));
        assert!(!bench.path().join("victim").exists() && !bench.path().join("here/half").exists());
    }
    assert_snapshot!(said, @r"
    status 1
    --- stderr
    error: could not copy to `here`
      caused by: a name that leads elsewhere: `top/../../victim`
    status 1
    --- stderr
    error: could not copy to `here`
      caused by: `here/\u{1b}[2J`: there is a file or link, which a directory does not replace
    status 1
    --- stderr
    error: could not copy to `here`
      caused by: what arrived is no copy of a file or directory
    status 1
    --- stderr
    error: could not copy to `here`
      caused by: the copy broke off before its end
    ");
}

#[test]
fn more_than_was_granted_ends_a_copy() {
    let bench = Bench::new();
    agent(&bench, |peer| {
        // The beginning of a header that never ends, and more and more after it.
        let chunk = Frame::data(0, STDOUT, vec![0; DATA_LEN_MAX]);
        (0..64).for_each(|_| peer.send(&chunk));
        while peer.next().is_some() {}
    });
    let mut command = bench.command(["vm", "cp", "web:/srv", "here"]);
    command.current_dir(bench.path());
    let shown = bench.show(&command.output().unwrap());
    assert!(shown.starts_with("status 1\n"), "{shown}");
    assert!(!bench.path().join("here").exists());
}
