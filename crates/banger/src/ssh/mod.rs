//! `vm ssh`, `ssh-config`: the system's own `ssh` as the client of a guest.
//!
//! ```text
//! ssh ── ProxyCommand: banger vm ssh-proxy ── supervisor ── agent ── an ssh server for this one connection
//! ```
//!
//! Nothing listens anywhere, and no network is needed. `ssh` gets a key and known hosts of banger's own; its other
//! settings are the user's.

pub(crate) mod agent;
pub(crate) mod check;
mod config;
mod keys;
mod options;

use crate::args::{SshArgs, SshConfigArgs, SshProxyArgs};
use crate::context::{Context, expect_outcome};
use crate::run::running;
use crate::session::lost;
use crate::stop::{Ended, Stop, failed};
use crate::transfer::{on_thread, transfer};
use banger_wire::channel::{ChannelReader, ChannelWriter};
use banger_wire::daemon::Request;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::frame::DATA_LEN_MAX;
use banger_wire::guest::SessionKind;
use keys::Keys;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tokio::sync::oneshot;

/// How ssh ends when it can't do what it is to do; our own failures are no different to who called it.
const STATUS_FAILED: u8 = 255;
/// What a name of a vm ends with where it stands among names of hosts.
pub(crate) const DOMAIN: &str = ".vm";
/// The key of the config by which the owner chooses another key than banger's own.
const KEY_PATH: &str = "ssh_key_path";
/// How long an agent that has this kind of session takes to greet, and much more.
const GREETING_TIME_MAX: Duration = Duration::from_secs(30);

/// Runs `banger vm ssh`.
pub(crate) async fn ssh(context: &mut Context, args: SshArgs) -> Ended {
    match connect(context, args).await {
        Err(Stop::Failed(error)) => {
            context.ui.error(&error);
            Ok(STATUS_FAILED)
        }
        ended => ended,
    }
}

async fn connect(context: &mut Context, args: SshArgs) -> Ended {
    let vm = running(context, args.vm).await?;
    let keys = keys(context).await?;
    know_hosts(context, &keys).await?;
    let (flags, words) = options::split(args.args);
    let mut command = command(Path::new("ssh"));
    for setting in options::NEWER {
        command.args(["-o", setting]);
    }
    for (name, value) in options::pinned(&keys, context.client.state(), vm.id.as_str())? {
        command.arg("-o").arg(format!("{name}={value}"));
    }
    command.arg("-o").arg(format!("HostKeyAlias={}{DOMAIN}", vm.id));
    // After the user's own flags, which may name another one; the first is the one that counts.
    command.args(flags).args(["-o", "User=root"]).arg(format!("{}{DOMAIN}", vm.name));
    if !words.is_empty() {
        command.arg("--").args(words);
    }
    let error = command.exec();
    Err(no_program("ssh", &error).into())
}

#[allow(
    clippy::disallowed_methods,
    reason = "`ssh` takes this process's place, and `ssh-keygen` makes its key"
)]
fn command(program: &Path) -> Command {
    Command::new(program)
}

/// Returns the failure to start a program of OpenSSH's.
fn no_program(program: &str, error: &std::io::Error) -> WireError {
    let error = failed(format!("could not start `{program}`"), error);
    error.hinted("install OpenSSH's client: the package is `openssh-client`, `openssh-clients` or `openssh`")
}

/// Returns the keys that the config has the client use.
async fn keys(context: &mut Context) -> Result<Keys, Stop> {
    let chosen = chosen_key(context).await?;
    Ok(Keys::ensure(context.client.state(), chosen)?)
}

/// Returns the private key that the config names, if it does.
async fn chosen_key(context: &mut Context) -> Result<Option<PathBuf>, Stop> {
    let outcome = context.ask(Request::ConfigShow).await?;
    let config = expect_outcome!(outcome, Config)?;
    let value =
        config.values.iter().find(|value| value.key == KEY_PATH).and_then(|value| value.value.as_str());
    let home = std::env::var_os("HOME").map(PathBuf::from);
    Ok(value.map(|text| match (Path::new(text).strip_prefix("~"), home) {
        (Ok(below), Some(home)) => home.join(below),
        _ => PathBuf::from(text),
    }))
}

/// Writes down the host keys of all vms; there is none to be asked about.
async fn know_hosts(context: &mut Context, keys: &Keys) -> Result<(), Stop> {
    // Held while asking: a list from before another vm was made must not replace one from after that.
    let dir = keys::dir_of(context.client.state());
    let _lock = context.signals.unless(on_thread(move || keys::lock(&dir))).await?;
    let outcome = context.ask(Request::VmList).await?;
    Ok(keys.write_known_hosts(&expect_outcome!(outcome, Vms)?)?)
}

/// Runs `banger vm ssh-proxy`: carries the bytes between `ssh` and the guest.
pub(crate) async fn proxy(context: &mut Context, args: SshProxyArgs) -> Ended {
    let host = options::unquoted(&args.host);
    let name = host.strip_suffix(DOMAIN).unwrap_or(host).to_owned();
    let vm = running(context, name).await?;
    let keys = keys(context).await?;
    know_hosts(context, &keys).await?;
    let what = SessionKind::Ssh(Box::new(keys.spec(vm.id.as_str())?));
    let (greeted, greeting) = oneshot::channel();
    let work = move |input, output| carry(input, output, greeted);
    let name = vm.name.to_string();
    let mut tick = || {};
    let carried = transfer((&name, Path::new(&vm.socket)), what, work, &mut tick);
    let silent = async {
        match tokio::time::timeout(GREETING_TIME_MAX, greeting).await {
            Err(_) => (),
            // The other side says how it ended.
            Ok(_) => std::future::pending().await,
        }
    };
    let Context { signals, .. } = context;
    signals
        .unless(async {
            tokio::select! {
                carried = carried => carried,
                () = silent => {
                    let hint = format!("if it was started by an older banger, use `banger vm restart {name}`");
                    Err(WireError { message: format!("the ssh server of vm `{name}` does not answer"), ..lost(&name) }
                        .hinted(hint)
                        .into())
                }
            }
        })
        .await?;
    Ok(0)
}

/// Copies to and from the standard streams, until the guest's side ends.
fn carry(
    mut input: ChannelReader,
    mut output: ChannelWriter,
    greeted: oneshot::Sender<()>,
) -> Result<(), WireError> {
    let send = move || {
        let mut stdin = std::io::stdin().lock();
        let mut bytes = vec![0; DATA_LEN_MAX];
        // A guest that takes no more is at its end, which the other direction tells.
        while let Ok(len @ 1..) = stdin.read(&mut bytes) {
            if output.write_all(&bytes[..len]).and_then(|()| output.flush()).is_err() {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new().name("to the guest".to_owned()).spawn(send);
    thread.map_err(|error| failed("could not start a thread", &error))?;
    let mut stdout = std::io::stdout().lock();
    let mut bytes = vec![0; DATA_LEN_MAX];
    let mut greeted = Some(greeted);
    loop {
        let len = input.read(&mut bytes).map_err(|error| failed("could not read from the guest", &error))?;
        greeted.take().map(|greeted| greeted.send(()));
        if len == 0 {
            return Ok(());
        }
        match stdout.write_all(&bytes[..len]).and_then(|()| stdout.flush()) {
            Ok(()) => {}
            // `ssh` has ended; so has everything else.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(failed("could not write to `ssh`", &error)),
        }
    }
}

/// Runs `banger ssh-config`.
pub(crate) async fn ssh_config(context: &mut Context, args: SshConfigArgs) -> Ended {
    let state = context.client.state().clone();
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
    let home = || {
        home.clone().ok_or_else(|| {
            WireError::new(ErrorCode::Failed, "no `~/.ssh/config`: `HOME` is not set").hinted("set `HOME`")
        })
    };
    if args.uninstall {
        let changed = config::uninstall(Path::new(&home()?), &state)?;
        context.ui.data(&match changed {
            Some(file) => format!("{} is as it was\n", file.display()),
            None => "there was nothing to take out\n".to_owned(),
        })?;
        return Ok(0);
    }
    let keys = keys(context).await?;
    let text = config::render(&options::pinned(&keys, &state, "%h")?);
    if !args.install {
        context.ui.data(&text)?;
        return Ok(0);
    }
    know_hosts(context, &keys).await?;
    let file = config::install(Path::new(&home()?), &state, &text)?;
    context.ui.data(&format!("{} includes it; try `ssh NAME{DOMAIN}`\n", file.display()))?;
    Ok(0)
}
