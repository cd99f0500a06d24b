//! The tools a checkout names for mise, installed in the guest by the guest's own mise.
//!
//! Nothing of it happens on the host: the files are trusted in the guest alone, and what they run, runs there.

use super::checkout::Survey;
use crate::context::Context;
use crate::session::{lost, lost_by, open_session};
use crate::stop::{Stop, failed};
use crate::text::ConsoleText;
use banger_wire::bytes::ByteString;
use banger_wire::daemon::VmView;
use banger_wire::error::{ErrorCode, WireError};
use banger_wire::exec::{ExecSpec, ExitStatus, STDERR, STDIN, STDOUT, SessionEvent};
use banger_wire::frame::{Frame, Kind};
use banger_wire::guest::SessionKind;
use std::path::Path;

/// Files that name tools, and whether mise wants to be told that it may read them.
const FILES: [(&str, bool); 3] = [("mise.toml", true), (".mise.toml", true), (".tool-versions", false)];

/// How tools are installed.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    /// Nothing goes on without them.
    pub(crate) must: bool,
    /// Whose they are; root's when none.
    pub(crate) user: Option<String>,
}

/// Returns the files at the top of a checkout that name tools.
pub(crate) fn files(survey: &Survey) -> Vec<&'static str> {
    let travels = |name: &str| survey.entries.iter().any(|entry| entry.path == name);
    FILES.iter().map(|(name, _)| *name).filter(|name| travels(name)).collect()
}

/// Installs what `files` in `dir` name, if the guest has mise.
///
/// # Errors
/// When it fails and has to succeed, and those of the connection.
pub(crate) async fn install(
    context: &mut Context,
    vm: &VmView,
    dir: &Path,
    files: &[&'static str],
    tools: &Tools,
) -> Result<(), Stop> {
    let mut commands = Vec::new();
    for (name, wants_trust) in FILES {
        if wants_trust && files.contains(&name) {
            commands.push(vec!["trust".into(), ByteString::from(dir.join(name).into_os_string())]);
        }
    }
    commands.push(vec!["install".into()]);
    let named = files.join("` and `");
    context.ui.note(&format!("install the tools of `{named}`"));
    for args in commands {
        let what = args.first().map(|word: &ByteString| word.as_os_str().display().to_string());
        match run(context, vm, dir, args, tools).await {
            Ok(0) => {}
            Ok(status) => {
                let what = format!("mise {}", what.unwrap_or_default());
                let message = format!(
                    "the tools of `{named}` are not installed: `{what}` in vm `{}` ended with status {status}",
                    vm.name
                );
                return not_installed(context, message, tools);
            }
            Err(Stop::Failed(error)) if error.code == ErrorCode::CommandNotFound => {
                context.ui.note(&format!("vm `{}` has no mise, so they are not", vm.name));
                return Ok(());
            }
            Err(stop) => return Err(stop),
        }
    }
    Ok(())
}

fn not_installed(context: &Context, message: String, tools: &Tools) -> Result<(), Stop> {
    let hint = "what it said is above; to go on without them, use `--no-bootstrap`";
    if tools.must {
        return Err(WireError::new(ErrorCode::Failed, message).hinted(hint).into());
    }
    context.ui.warning(&message);
    Ok(())
}

/// Runs mise with both of its outputs on stderr, since stdout is that of what comes after. Returns its status.
async fn run(
    context: &mut Context,
    vm: &VmView,
    dir: &Path,
    args: Vec<ByteString>,
    tools: &Tools,
) -> Result<u8, Stop> {
    let exec = ExecSpec {
        argv: std::iter::once("mise".into()).chain(args).collect(),
        // Nobody is asked: who placed the checkout here wants its tools.
        env: vec![("MISE_YES".into(), "1".into())],
        workdir: Some(ByteString::from(dir.as_os_str().to_owned())),
        user: tools.user.clone(),
        ..ExecSpec::default()
    };
    let name = vm.name.as_str();
    let Context { ui, signals, .. } = context;
    let running = async {
        let what = SessionKind::Exec(Box::new(exec));
        let (mut reader, mut writer) = open_session(name, Path::new(&vm.socket), what, false).await?;
        let broken = |error| Stop::from(lost_by(name, error));
        // What can't be written, the reading side learns; a command that has ended is told before.
        let _ = writer.write(&Frame::eof(0, STDIN)).await;
        let mut said = [ConsoleText::default(), ConsoleText::default()];
        loop {
            let frame = reader.next().await.map_err(broken)?.ok_or_else(|| lost(name))?;
            match (frame.kind, frame.channel) {
                (Kind::Data, channel @ (STDOUT | STDERR)) => {
                    ui.aside(&said[usize::from(channel - STDOUT)].push(&frame.payload));
                    let len = u32::try_from(frame.payload.len()).unwrap_or(u32::MAX);
                    let _ = writer.write(&Frame::credit(0, channel, len)).await;
                }
                (Kind::Message, _) => match frame.parse() {
                    Ok(SessionEvent::Started { .. }) => {}
                    Ok(SessionEvent::Exited(status)) => {
                        said.iter_mut().for_each(|said| ui.aside(&said.finish()));
                        return Ok(ExitStatus::shell_code(status));
                    }
                    Ok(SessionEvent::Failed(error)) => return Err(error.into()),
                    Err(error) => return Err(failed(format!("lost vm `{name}`"), &error).into()),
                },
                (Kind::Close, _) => return Err(lost(name).into()),
                _ => {}
            }
        }
    };
    signals.unless(running).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_named_at_the_top() {
        let survey = |names: &[&str]| {
            let entries = names.iter().map(|name| crate::workspace::checkout::Entry {
                path: (*name).into(),
                mode: 0o100_644,
                len: 0,
                modified: 0,
            });
            files(&Survey {
                root: "/r".into(),
                below: "".into(),
                mode: banger_wire::daemon::WorkspaceMode::FullCopy,
                from: None,
                repositories: Vec::new(),
                entries: entries.collect(),
                held_back: Vec::new(),
                nested: Vec::new(),
            })
        };
        assert_eq!(survey(&["a", ".tool-versions", "mise.toml"]), ["mise.toml", ".tool-versions"]);
        assert_eq!(survey(&["d/mise.toml", ".mise.toml.x", "mise"]), [""; 0]);
    }
}
