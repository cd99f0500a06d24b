//! The owner's ssh agent for a command (`-A`).

use crate::support::{Bench, Peer, accept};
use banger_wire::frame::{Frame, Kind};
use insta::assert_snapshot;
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

/// An ssh agent that answers every message with its kind and one more byte; returns the kinds it has heard.
fn agent(bench: &Bench) -> Arc<Mutex<Vec<u8>>> {
    let listener = UnixListener::bind(bench.path().join("agent")).unwrap();
    let heard = Arc::<Mutex<Vec<u8>>>::default();
    let hears = Arc::clone(&heard);
    let read = |stream: &mut UnixStream| -> std::io::Result<Vec<u8>> {
        let mut len = [0; 4];
        stream.read_exact(&mut len)?;
        let mut message = vec![0; u32::from_be_bytes(len) as usize];
        stream.read_exact(&mut message)?;
        Ok(message)
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, hears) = (stream.unwrap(), Arc::clone(&hears));
            std::thread::spawn(move || {
                while let Ok(message) = read(&mut stream) {
                    hears.lock().unwrap().push(message[0]);
                    stream.write_all(&[0, 0, 0, 2, message[0], 99]).unwrap();
                }
            });
        }
    });
    heard
}

fn run(bench: &Bench, args: &[&str]) -> String {
    let mut command = bench.command(args);
    bench.show(&command.env("SSH_AUTH_SOCK", bench.path().join("agent")).output().unwrap())
}

/// Returns the next frame of a connection to the agent.
fn next(peer: &mut Peer) -> Frame {
    loop {
        let frame = peer.next().unwrap();
        if frame.channel >= 16 {
            return frame;
        }
    }
}

#[test]
fn an_agent_that_is_not_there_is_named_before_anything_is_made() {
    let bench = Bench::new();
    assert_snapshot!(bench.run(["vm", "run", "-A", "--", "true"]), @r#"
    status 125
    --- stderr
    error: there is no ssh agent to forward: `SSH_AUTH_SOCK` is not set
    hint: start one with `eval "$(ssh-agent)"`, give it a key with `ssh-add`, or leave `-A` out
    "#);
    let again = bench.run(["exec", "--forward-agent", "web", "true"]);
    assert_eq!(again, bench.run(["vm", "run", "-A", "--", "true"]));
    assert_snapshot!(run(&bench, &["run", "-A"]), @r#"
    status 125
    --- stderr
    error: there is no ssh agent to forward at `[DIR]/agent`, which `SSH_AUTH_SOCK` names
      caused by: No such file or directory (os error 2)
    hint: start one with `eval "$(ssh-agent)"`, give it a key with `ssh-add`, or leave `-A` out
    "#);
    assert_snapshot!(run(&bench, &["run", "-A", "-d"]), @r"
    status 2
    --- stderr
    error: `-d` makes a vm and returns, so nothing runs that could use `-A`
    hint: start it with `banger vm run -d`, then use `banger vm exec -A`
    ");
    assert!(bench.requests().is_empty());
    assert!(!bench.state().join("run/bangerd.sock").exists(), "no daemon was started");
}

#[test]
fn a_guest_may_ask_the_agent_and_change_nothing() {
    let bench = Bench::new();
    let heard = agent(&bench);
    bench.vm(|spec, _, peer| {
        assert!(spec.forward_agent);
        accept(peer);
        for (kind, answer) in
            [(11, [11, 99].to_vec()), (13, [13, 99].to_vec()), (17, [5].to_vec()), (20, [5].to_vec())]
        {
            // In two pieces, as it may come.
            peer.send(&Frame::data(0, 20, vec![0, 0]));
            peer.send(&Frame::data(0, 20, vec![0, 1, kind]));
            let expected = [&[0, 0, 0, answer.len() as u8][..], &answer].concat();
            assert_eq!(next(peer), Frame::data(0, 20, expected), "{kind}");
        }
        peer.send(&Frame::eof(0, 20));
        assert_eq!(next(peer), Frame::eof(0, 20));
        // Another one, which is too long.
        peer.send(&Frame::data(0, 20, vec![0, 4, 0, 1]));
        assert_eq!(next(peer), Frame::eof(0, 20));
        peer.send(&Frame::eof(0, 20));
        peer.exit(0);
    });
    assert_snapshot!(run(&bench, &["exec", "-A", "fuzzy-otter", "true"]), @"status 0");
    // Each connection begins with saying who asks.
    assert_eq!(*heard.lock().unwrap(), [27, 11, 13, 27]);
}

#[test]
fn without_being_asked_for_the_agent_is_out_of_reach() {
    let bench = Bench::new();
    let heard = agent(&bench);
    bench.vm(|spec, _, peer| {
        assert!(!spec.forward_agent);
        accept(peer);
        peer.send(&Frame::data(0, 16, vec![0, 0, 0, 1, 11]));
        while peer.next().is_some_and(|frame| frame.kind != Kind::Data) {}
    });
    assert_snapshot!(run(&bench, &["exec", "fuzzy-otter", "true"]), @r"
    status 125
    --- stderr
    error: lost the connection to vm `fuzzy-otter` before the command had ended
    hint: see `banger vm logs fuzzy-otter`
    ");
    assert!(heard.lock().unwrap().is_empty());
}

#[test]
fn a_guest_that_asks_without_end_is_cut_off() {
    let bench = Bench::new();
    let listener = UnixListener::bind(bench.path().join("agent")).unwrap();
    bench.vm(|_, _, peer| {
        accept(peer);
        (0..100).for_each(|_| peer.send(&Frame::data(0, 16, vec![0, 0, 0, 1, 11])));
        while peer.next().is_some() {}
    });
    // This agent answers nobody.
    assert_snapshot!(run(&bench, &["exec", "-A", "fuzzy-otter", "true"]), @r"
    status 125
    --- stderr
    error: the guest asks the ssh agent for more than it may
    ");
    drop(listener);
}
