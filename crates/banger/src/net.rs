//! `vm net`: what a vm may reach, and what it was refused.

use crate::args::{NetChangeArgs, NetCommand, ShowArgs};
use crate::context::{Context, expect_outcome};
use crate::stop::Ended;
use crate::table::{Table, render_pairs};
use crate::text::{age, duration, now};
use crate::vm::{NOTHING, net_word};
use banger_wire::daemon::Request;
use banger_wire::net::{Denial, NetTarget, NetView};
use std::time::Duration;

/// Runs `banger vm net …`.
pub(crate) async fn dispatch(context: &mut Context, command: NetCommand) -> Ended {
    match command {
        NetCommand::Show(args) => show(context, args).await,
        NetCommand::Allow(NetChangeArgs { vm, targets, json }) => {
            change(context, Request::VmNetChange { vm, allow: targets, deny: Vec::new() }, json.json).await
        }
        NetCommand::Deny(NetChangeArgs { vm, targets, json }) => {
            change(context, Request::VmNetChange { vm, allow: Vec::new(), deny: targets }, json.json).await
        }
        NetCommand::Denials(args) => denials(context, args).await,
    }
}

async fn show(context: &mut Context, args: ShowArgs) -> Ended {
    change(context, Request::VmNetShow { vm: args.vm }, args.json).await
}

async fn change(context: &mut Context, request: Request, json: bool) -> Ended {
    let net = expect_outcome!(context.ask(request).await?, Net)?;
    if json {
        context.ui.json(&net)?;
    } else {
        context.ui.data(&net_pairs(&net))?;
    }
    Ok(0)
}

async fn denials(context: &mut Context, args: ShowArgs) -> Ended {
    let denials = expect_outcome!(context.ask(Request::VmNetDenials { vm: args.vm }).await?, Denials)?;
    if args.json {
        context.ui.json(&denials)?;
    } else {
        context.ui.data(&denial_table(&denials, now()))?;
    }
    Ok(0)
}

fn net_pairs(net: &NetView) -> String {
    let list = |targets: &[NetTarget]| {
        let words: Vec<String> = targets.iter().map(ToString::to_string).collect();
        Some(words.join(", ")).filter(|words| !words.is_empty())
    };
    let open: Vec<String> = net
        .open
        .iter()
        .map(|open| {
            format!("{} ({}, {})", open.address, open.name, duration(Duration::from_secs(open.left_s)))
        })
        .collect();
    render_pairs(&[
        ("network", Some(net_word(net.mode).to_owned())),
        ("from the next start", net.next_mode.map(|mode| net_word(mode).to_owned())),
        ("allowed", list(&net.rules.allow)),
        ("denied", list(&net.rules.deny)),
        ("open by name", Some(open.join(", ")).filter(|open| !open.is_empty())),
        ("in force", Some(if net.live { "now" } else { "from the next start on" }.to_owned())),
    ])
}

fn denial_table(denials: &[Denial], now: i64) -> String {
    let mut table = Table::new(&["LAST", "COUNT", "PROTOCOL", "NAME", "ADDRESS", "PORT"]);
    let text = |value: Option<String>| value.unwrap_or_else(|| NOTHING.to_owned());
    for denial in denials {
        table.row([
            age(denial.last, now),
            denial.count.to_string(),
            denial.protocol.clone(),
            text(denial.name.clone()),
            text(denial.address.map(|address| address.to_string())),
            text(denial.port.map(|port| port.to_string())),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::{denial_table, net_pairs};
    use banger_wire::daemon::NetMode;
    use banger_wire::net::{Denial, NetRules, NetView, OpenName};

    #[test]
    fn what_is_reached_is_told() {
        let target = |text: &str| text.parse().unwrap();
        let rules = NetRules { allow: vec![target("a.example:443"), target("10.0.0.0/8")], deny: Vec::new() };
        let open = OpenName { name: "a.example".to_owned(), address: "9.9.9.9".parse().unwrap(), left_s: 90 };
        let net = NetView { mode: NetMode::Allow, next_mode: None, rules, live: true, open: vec![open] };
        assert_eq!(
            net_pairs(&net),
            "network:      allow\n\
             allowed:      a.example:443, 10.0.0.0/8\n\
             open by name: 9.9.9.9 (a.example, 1 min 30 s)\n\
             in force:     now\n"
        );
    }

    #[test]
    fn what_was_refused_is_a_table() {
        let packet = Denial {
            last: 1000,
            count: 3,
            protocol: "tcp".to_owned(),
            name: None,
            address: Some("10.0.0.1".parse().unwrap()),
            port: Some(443),
        };
        let question = Denial {
            count: 1,
            protocol: "dns".to_owned(),
            name: Some("evil\u{1b}.test".to_owned()),
            address: None,
            port: None,
            ..packet.clone()
        };
        let table = denial_table(&[packet, question], 1005);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[0].split_whitespace().collect::<Vec<_>>(),
            ["LAST", "COUNT", "PROTOCOL", "NAME", "ADDRESS", "PORT"]
        );
        assert!(lines[1].ends_with("3      tcp       -              10.0.0.1  443"), "{table}");
        assert!(!table.contains('\u{1b}'), "{table}");
    }
}
