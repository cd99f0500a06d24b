//! `vm net` and `--net`.

use crate::support::Bench;
use banger_wire::daemon::{NetMode, Outcome, Request};
use banger_wire::net::{NetRules, NetView};
use insta::assert_snapshot;

#[test]
fn what_is_allowed_is_asked_for_and_shown() {
    let bench = Bench::new();
    bench.daemon(|request, peer| {
        let target = |text: &str| text.parse().unwrap();
        let allow = vec![target("example.com:443"), target("10.1.0.0/16")];
        let asked = Request::VmNetChange { vm: "web".to_owned(), allow: allow.clone(), deny: Vec::new() };
        assert_eq!(request, asked);
        let rules = NetRules { allow, deny: vec![target("evil.test")] };
        peer.done(Outcome::Net(NetView {
            mode: NetMode::Allow,
            next_mode: None,
            rules,
            live: false,
            open: Vec::new(),
        }));
    });
    assert_snapshot!(bench.run(["vm", "net", "allow", "web", "Example.com:443", "10.1.0.0/16"]), @r"
    status 0
    --- stdout
    network:  allow
    allowed:  example.com:443, 10.1.0.0/16
    denied:   evil.test
    in force: from the next start on
    ");
}

#[test]
fn what_is_no_target_is_refused() {
    let bench = Bench::new();
    assert_snapshot!(bench.run(["vm", "net", "deny", "web", "10.0.0.1/8"]), @r"
    status 2
    --- stderr
    error: invalid value '10.0.0.1/8' for '<HOST[:PORT]>...': `10.0.0.1/8` is no name, address or network with an optional port: bits beyond the prefix are set

    For more information, try '--help'.
    ");
    assert_snapshot!(bench.run(["vm", "run", "--net", "lan"]), @r"
    status 125
    --- stderr
    error: invalid value 'lan' for '--net <MODE>': use `internet`, `none`, `full`, or `allow=HOST[:PORT],…`

    For more information, try '--help'.
    ");
}
