//! What a request for a vm means: what it says itself, else the checkout's own file, else the config.
//!
//! Nothing is made here. A checkout's file is written by somebody nobody knows: it chooses what the vm is made of, and takes
//! away what the vm may do, but gives nothing.

use crate::cache::settle_places;
use crate::config::{Config, keys};
use crate::daemon::DEFAULT_IMAGE;
use crate::load::LAYOUT_PREFIX;
use crate::plan::VmPlan;
use crate::ports;
use banger_wire::daemon::{NetMode, ProjectFile, VmSpec};
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::size::Mebibytes;
use banger_wire::time::{AutoStop, millis};
use serde::Deserialize;
use serde_json::Value;
use std::io::Read as _;
use std::path::Path;

/// How an archive with an image in it is written.
const ARCHIVE_PREFIX: &str = "docker-archive:";

/// A request with everything filled in that files say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) spec: VmSpec,
    /// Which of it the checkout's file chose.
    pub(crate) project: Vec<String>,
}

/// Fills in what was not asked for.
///
/// # Errors
/// When the checkout's file can't be used, or wants more than it may.
pub(crate) fn fill_in(spec: &VmSpec, config: &Config) -> Result<Asked, WireError> {
    let mut spec = spec.clone();
    let mut project = Vec::new();
    if let Some(file) = spec.project.take() {
        let asked = read_project(&file, config)?;
        let mut take = |name: &str, is_open: bool| {
            if is_open {
                project.push(name.to_owned());
            }
            is_open
        };
        if let Some(image) = asked.image
            && take("image", spec.image.is_none())
        {
            spec.image = Some(image);
        }
        if let Some(vcpu) = asked.vcpu
            && take("vcpu", spec.vcpu.is_none())
        {
            spec.vcpu = Some(vcpu);
        }
        if let Some(memory) = asked.memory
            && take("memory", spec.memory.is_none())
        {
            spec.memory = Some(memory);
        }
        if let Some(size) = asked.disk_size
            && take("disk_size", spec.disk_size.is_none())
        {
            spec.disk_size = Some(size);
        }
        if let Some(net) = asked.net
            && take("net", spec.net.is_none())
        {
            spec.net = Some(net);
        }
    }
    settle_places(&mut spec.caches);
    let defaults = &config.vm_defaults;
    let image = || config.default_image.clone().unwrap_or_else(|| DEFAULT_IMAGE.to_owned());
    spec.image = Some(spec.image.unwrap_or_else(image));
    spec.vcpu = spec.vcpu.or(defaults.vcpu);
    spec.memory = spec.memory.or(defaults.memory);
    spec.disk_size = spec.disk_size.or(defaults.disk_size);
    spec.net = spec.net.or(defaults.net);
    spec.vmm = spec.vmm.or(config.vmm);
    let proxy = std::mem::take(&mut spec.proxy);
    if config.pass_proxy {
        // What was said for this vm comes later and is stronger.
        spec.env.splice(0..0, proxy);
    }
    Ok(Asked { spec, project })
}

/// Puts into a plan what the config says at each start.
///
/// # Errors
/// When the file of certificates can't be used.
pub(crate) fn add_settings(plan: &mut VmPlan, spec: &VmSpec, config: &Config) -> Result<(), WireError> {
    if let Some(time) = config.boot_timeout {
        plan.boot_timeout_ms = millis(time);
    }
    let auto_stop = spec.auto_stop_after.or(config.auto_stop_after).and_then(AutoStop::after);
    // Whoever holds a lease uses the vm, and it goes with the lease.
    plan.auto_stop_ms = auto_stop.filter(|_| !plan.lease).map(millis);
    plan.ports = Some(ports::plan(&plan.id, config.loopback_cidr.unwrap_or_default(), spec.publish.clone()));
    plan.guest.ca = config.ca_file.as_deref().map(read_ca).transpose()?;
    Ok(())
}

/// Longest file of certificates. It reaches the guest in one message, which has at most 256 KiB.
const CA_LEN_MAX: usize = 64 * 1024;

fn read_ca(path: &Path) -> Result<String, WireError> {
    let refuse = |cause: String| {
        let mut error =
            WireError::new(ErrorCode::Invalid, format!("`ca_file`, `{}`, can't be used", path.display()));
        error.causes.push(cause);
        error.hinted("name a file of certificates in PEM form in the config, or take `ca_file` out")
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(|error| refuse(error.to_string()))?;
    file.take(CA_LEN_MAX as u64 + 1).read_to_string(&mut text).map_err(|error| refuse(error.to_string()))?;
    if text.len() > CA_LEN_MAX {
        return Err(refuse(format!("it has more than {} KiB", CA_LEN_MAX / 1024)));
    }
    if !text.contains("-----BEGIN CERTIFICATE-----") {
        return Err(refuse("there is no certificate in it".to_owned()));
    }
    Ok(text)
}

/// What a checkout may choose.
#[derive(Debug, Default)]
struct Project {
    image: Option<String>,
    vcpu: Option<u32>,
    memory: Option<Mebibytes>,
    disk_size: Option<Mebibytes>,
    net: Option<NetMode>,
}

fn read_project(file: &ProjectFile, config: &Config) -> Result<Project, WireError> {
    let path = file.path.escape_debug().to_string();
    let what = "the checkout's own";
    let hint = "`--no-project-config` leaves the file aside";
    let refuse = |line: usize, why: String| {
        let mut error = WireError::new(ErrorCode::Invalid, format!("{what} `{path}` can't be used"));
        error.causes.push(format!("line {line}: {why}"));
        error.hinted(hint)
    };
    let found =
        keys::look_through(&file.text, keys::PROJECT, what, &path).map_err(|error| error.hinted(hint))?;
    let mut project = Project::default();
    for found in found {
        let (text, size) = (found.value.as_str().map(str::to_owned), parse_size(&found.value));
        match found.name {
            "image" => {
                let image = text.unwrap_or_default();
                if [LAYOUT_PREFIX, ARCHIVE_PREFIX].iter().any(|prefix| image.starts_with(prefix)) {
                    let why = format!("`image` names a file of this machine, `{}`", image.escape_debug());
                    return Err(refuse(found.line, why));
                }
                project.image = Some(image);
            }
            "vcpu" => project.vcpu = found.value.as_u64().and_then(|number| u32::try_from(number).ok()),
            "memory" => project.memory = size,
            "disk_size" => project.disk_size = size,
            _ => {
                let wanted = NetMode::deserialize(&found.value).ok();
                let allowed = config.vm_defaults.net.unwrap_or(NetMode::Internet);
                if let Some(wanted) = wanted.filter(|wanted| openness(*wanted) > openness(allowed)) {
                    let why = format!(
                        "`net` can't be `{}`: a checkout may only take away from what vms reach, which is `{}`",
                        word(wanted),
                        word(allowed)
                    );
                    return Err(refuse(found.line, why));
                }
                project.net = wanted;
            }
        }
    }
    Ok(project)
}

fn parse_size(value: &Value) -> Option<Mebibytes> {
    value.as_u64().map(Mebibytes).or_else(|| value.as_str()?.parse().ok())
}

/// The more a vm reaches, the larger.
fn openness(net: NetMode) -> u8 {
    match net {
        NetMode::None => 0,
        NetMode::Allow => 1,
        NetMode::Internet => 2,
        NetMode::Full => 3,
    }
}

fn word(net: NetMode) -> &'static str {
    match net {
        NetMode::None => "none",
        NetMode::Internet => "internet",
        NetMode::Full => "full",
        NetMode::Allow => "allow",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::VmDefaults;

    fn spec(text: &str) -> VmSpec {
        let file = ProjectFile { path: ".banger.toml".to_owned(), text: text.to_owned() };
        VmSpec { project: Some(file), ..VmSpec::default() }
    }

    #[test]
    fn what_is_asked_for_is_stronger_than_the_checkout_and_that_than_the_config() {
        let vm_defaults = VmDefaults { vcpu: Some(3), memory: Some(Mebibytes(300)), ..VmDefaults::default() };
        let config = Config { vm_defaults, default_image: Some("c".to_owned()), ..Config::default() };
        let mut asked = spec("image = 'p'\nvcpu = 2\nmemory = '1G'\nnet = 'none'\n");
        asked.vcpu = Some(1);
        let Asked { spec, project } = fill_in(&asked, &config).unwrap();
        assert_eq!(
            (spec.image.as_deref(), spec.vcpu, spec.memory),
            (Some("p"), Some(1), Some(Mebibytes(1024)))
        );
        assert_eq!((spec.net, spec.project), (Some(NetMode::None), None));
        assert_eq!(project, ["image", "memory", "net"]);
        let Asked { spec, project } = fill_in(&VmSpec::default(), &config).unwrap();
        assert_eq!(
            (spec.image.as_deref(), spec.vcpu, spec.memory),
            (Some("c"), Some(3), Some(Mebibytes(300)))
        );
        assert!(project.is_empty());
    }

    #[test]
    fn a_checkout_may_only_tighten() {
        let with =
            |net| Config { vm_defaults: VmDefaults { net, ..VmDefaults::default() }, ..Config::default() };
        for (allowed, wanted, taken) in [
            (None, "none", true),
            (None, "internet", true),
            (None, "full", false),
            (Some(NetMode::None), "internet", false),
            (Some(NetMode::None), "none", true),
            (Some(NetMode::Full), "full", true),
            (None, "allow", true),
            (Some(NetMode::Allow), "internet", false),
        ] {
            let filled = fill_in(&spec(&format!("net = '{wanted}'")), &with(allowed));
            assert_eq!(filled.is_ok(), taken, "{allowed:?} {wanted}");
        }
        // Also where it would count for nothing.
        let asked = VmSpec { net: Some(NetMode::None), ..spec("net = 'full'") };
        let error = fill_in(&asked, &Config::default()).unwrap_err();
        insta::assert_snapshot!(format!(
            "{error}\n{}\n{}",
            error.causes[0],
            error.hint.clone().unwrap_or_default()
        ));
    }

    #[test]
    fn a_checkout_can_not_name_files_of_this_machine() {
        for image in ["oci:/home/me/layout", "docker-archive:/etc/x"] {
            let error = fill_in(&spec(&format!("\nimage = '{image}'")), &Config::default()).unwrap_err();
            assert!(error.causes[0].starts_with("line 2: `image` names a file"), "{}", error.causes[0]);
        }
        let error = fill_in(&spec("vmm = \"\\u001b[2J\""), &Config::default()).unwrap_err();
        assert!(!error.causes[0].contains('\u{1b}'), "{error:?}");
    }

    #[test]
    fn proxies_are_passed_on_when_the_config_says_so() {
        let pair = |name: &str, value: &str| (name.into(), value.into());
        let asked = VmSpec {
            proxy: vec![pair("http_proxy", "a")],
            env: vec![pair("http_proxy", "b")],
            ..VmSpec::default()
        };
        let Asked { spec, .. } = fill_in(&asked, &Config::default()).unwrap();
        assert_eq!((spec.env.len(), spec.proxy.len()), (1, 0));
        let config = Config { pass_proxy: true, ..Config::default() };
        let Asked { spec, .. } = fill_in(&asked, &config).unwrap();
        assert_eq!(spec.env, [pair("http_proxy", "a"), pair("http_proxy", "b")]);
    }
}
