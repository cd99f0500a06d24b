//! pasta: turns packets of a network namespace into the host's own sockets, without any right on the host.
//!
//! Distributions ship versions of very different ages, so what a version understands is read from its own help. By
//! default pasta connects a namespace to the host more than a guest should be: it forwards ports both ways and maps
//! the gateway to the host's loopback. All of that is turned off; the policy does not rely on it.

use super::{OUT, OUTER, OUTER_GATEWAY, OUTER_GATEWAY6, OUTER6, PREFIX_LEN};
use crate::programs::said;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

/// Where the supervisor's private root has the vm's network namespace. pasta refuses `/proc/PID/ns/net`, and the
/// AppArmor profile that distributions ship for it knows this place.
pub(crate) const NETNS_FILE: &str = "/run/user/0/netns/vm";
/// Without these it would connect more than it should, or nothing.
const NEEDED: [&str; 9] = [
    "--config-net",
    "--netns-only",
    "--no-map-gw",
    "--no-dhcp",
    "--no-ndp",
    "--no-ra",
    "--no-dhcpv6",
    "--ns-ifname",
    "--tcp-ns",
];
/// What it is told besides when the vm has no IPv6. With IPv6 it has to answer who its gateway is.
pub(crate) const ONLY_IPV4: [&str; 2] = ["--ipv4-only", "--no-ndp"];
/// Used where they exist. The first keeps pasta from watching the namespace's file, the second and third are what
/// newer versions made of mapping the gateway.
const WANTED: [&[&str]; 3] =
    [&["--no-netns-quit"], &["--map-host-loopback", "none"], &["--map-guest-addr", "none"]];

/// How pasta is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PastaPlan {
    /// The program.
    pub(crate) program: PathBuf,
    /// Its arguments; none when this version lacks something that is needed.
    pub(crate) args: Option<Vec<String>>,
}

impl PastaPlan {
    /// Asks a pasta what it understands. The answer is remembered until the program changes.
    pub(crate) fn probe(program: PathBuf) -> Self {
        static KNOWN: Mutex<Option<(SystemTime, PastaPlan)>> = Mutex::new(None);
        let changed = std::fs::metadata(&program).and_then(|metadata| metadata.modified()).ok();
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((time, plan)) = &*known
            && Some(*time) == changed
            && plan.program == program
        {
            return plan.clone();
        }
        let help = said(&program, "--help");
        let plan = Self { args: args(&help), program };
        // One that had no time to answer is asked again.
        if !help.is_empty() {
            *known = changed.map(|time| (time, plan.clone()));
        }
        plan
    }

    /// What it calls its version; old packages don't know theirs.
    pub(crate) fn version(&self) -> String {
        let text = said(&self.program, "--version");
        text.lines()
            .find(|line| line.starts_with("pasta"))
            .unwrap_or("pasta")
            .escape_debug()
            .take(80)
            .collect()
    }
}

/// The arguments for a version with this help.
fn args(help: &str) -> Option<Vec<String>> {
    let knows = |option: &str| help.split(|c: char| c.is_whitespace() || c == ',').any(|word| word == option);
    if !NEEDED.iter().all(|option| knows(option)) {
        return None;
    }
    let addresses = format!("-a {OUTER} -n {PREFIX_LEN} -g {OUTER_GATEWAY} -a {OUTER6} -g {OUTER_GATEWAY6}");
    let fixed = format!(
        "--foreground --quiet --netns {NETNS_FILE} --netns-only --config-net --ns-ifname {OUT} {addresses} \
         -t none -u none -T none -U none --no-map-gw --no-dhcp --no-ra --no-dhcpv6"
    );
    let wanted = WANTED.iter().filter(|option| knows(option[0])).flat_map(|option| option.iter().copied());
    Some(fixed.split(' ').chain(wanted).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::{NEEDED, args};

    #[test]
    fn options_depend_on_the_version() {
        let old = format!("  -I, {}", NEEDED.join(" \tdoes something\n  "));
        let plain = args(&old).unwrap().join(" ");
        assert!(plain.ends_with("-U none --no-map-gw --no-dhcp --no-ra --no-dhcpv6"), "{plain}");
        let new = format!("{old}\n  --map-host-loopback ADDR\tTranslate\n  --map-guest-addr ADDR\n");
        let more = args(&new).unwrap().join(" ");
        assert_eq!(more, format!("{plain} --map-host-loopback none --map-guest-addr none"));
    }

    #[test]
    fn a_version_that_lacks_something_is_not_used() {
        assert_eq!(args(""), None);
        assert_eq!(args(&NEEDED[1..].join("\n")), None);
    }
}
