//! Runs the host's git.
//!
//! In the owner's repository only commands that read are run, and none that look at attributes: no filter, hook, diff or
//! merge program has a reason to run. fsmonitor, which would, is off; so is every transport. What a guest wrote is never
//! given to git as a repository, only as content under numbers, in repositories of banger's own. The one exception is
//! `commits`, which adds a pack and a branch, once both have been looked through.

use crate::stop::{failed, invalid};
use banger_wire::error::WireError;
use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Given to every command.
const ALWAYS: [&str; 9] = [
    "--no-pager",
    "-c",
    "core.fsmonitor=false",
    "-c",
    "core.hooksPath=/dev/null",
    "-c",
    "protocol.allow=never",
    // A directory in a tree that looks like a repository is a directory.
    "-c",
    "safe.bareRepository=explicit",
];

/// What a command reads.
enum Input<'a> {
    Bytes(&'a [u8]),
    File(File),
}

/// Git, somewhere.
#[derive(Debug, Clone)]
pub(crate) struct Git {
    dir: PathBuf,
    env: Vec<(&'static str, OsString)>,
    /// Config that overrides every file's.
    config: Vec<(OsString, String)>,
}

impl Git {
    /// Returns git in a directory of the owner's.
    pub(crate) fn at(dir: &Path) -> Self {
        Self { dir: dir.to_owned(), env: Vec::new(), config: Vec::new() }
    }

    /// Returns git in a repository of banger's own, where nothing of the owner's config counts, nor any attribute.
    pub(crate) fn own(dir: &Path) -> Self {
        Self::at(dir)
            .with_env("GIT_DIR", ".")
            .with_env("GIT_CONFIG_NOSYSTEM", "1")
            .with_env("GIT_CONFIG_GLOBAL", "/dev/null")
            .with_env("GIT_ATTR_NOSYSTEM", "1")
            .with_env("XDG_CONFIG_HOME", "/dev/null")
    }

    /// Returns the same git with a working tree of its own.
    pub(crate) fn in_tree(self, repository: &Path, tree: &Path) -> Self {
        let mut git = self.with_env("GIT_DIR", repository).with_env("GIT_WORK_TREE", tree);
        git.dir = tree.to_owned();
        git
    }

    /// Returns git in the owner's repository with every filter that its config names switched off.
    ///
    /// # Errors
    /// When the config can't be read.
    pub(crate) fn without_filters(&self) -> Result<Self, WireError> {
        let listed =
            self.ask(&["config", "-z", "--name-only", "--get-regexp", r"^filter\."])?.unwrap_or_default();
        let names: BTreeSet<Vec<u8>> = { listed.split(|&byte| byte == 0) }
            .filter_map(|key| Some(key[..key.iter().rposition(|&byte| byte == b'.')?].to_vec()))
            .collect();
        let mut git = self.clone();
        for name in names {
            for (key, value) in [(".clean", ""), (".smudge", ""), (".process", ""), (".required", "false")] {
                git.config.push((OsString::from_vec([&name[..], key.as_bytes()].concat()), value.to_owned()));
            }
        }
        Ok(git)
    }

    /// Returns the same git with one more value of the config.
    pub(crate) fn with_config(mut self, key: &str, value: impl Into<String>) -> Self {
        self.config.push((key.into(), value.into()));
        self
    }

    /// Returns the same git with one more variable.
    pub(crate) fn with_env(mut self, key: &'static str, value: impl Into<OsString>) -> Self {
        self.env.push((key, value.into()));
        self
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "git's own answers about the checkout; no other program is started here"
    )]
    fn command(&self, args: &[&OsStr]) -> Command {
        let mut command = Command::new("git");
        for (key, _) in std::env::vars_os().filter(|(key, _)| key.as_bytes().starts_with(b"GIT_")) {
            command.env_remove(key);
        }
        command.env("LC_ALL", "C").env("GIT_OPTIONAL_LOCKS", "0").env("GIT_TERMINAL_PROMPT", "0");
        command.env("GIT_NO_LAZY_FETCH", "1").env("GIT_NO_REPLACE_OBJECTS", "1");
        command.envs(self.env.iter().map(|(key, value)| (key, value)));
        // As variables: a name may have a `=`.
        command.env("GIT_CONFIG_COUNT", self.config.len().to_string());
        for (number, (key, value)) in self.config.iter().enumerate() {
            command
                .env(format!("GIT_CONFIG_KEY_{number}"), key)
                .env(format!("GIT_CONFIG_VALUE_{number}"), value);
        }
        command.args(ALWAYS).arg("-C").arg(&self.dir).args(args);
        command
    }

    fn finish(&self, args: &[&OsStr], input: Input<'_>) -> Result<Output, WireError> {
        let run = || {
            let mut command = self.command(args);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            let bytes = match input {
                Input::File(file) => {
                    command.stdin(file);
                    return command.output();
                }
                Input::Bytes(bytes) => bytes,
            };
            let mut child = command.stdin(Stdio::piped()).spawn()?;
            let stdin = child.stdin.take();
            std::thread::scope(|scope| {
                scope.spawn(|| stdin.map(|mut stdin| stdin.write_all(bytes)));
                child.wait_with_output()
            })
        };
        run().map_err(|error| failed("could not run `git`", &error))
    }

    /// Returns what a command prints.
    ///
    /// # Errors
    /// When git is missing, or the command fails.
    pub(crate) fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Vec<u8>, WireError> {
        self.feed(args, &[])
    }

    /// The same, of a command that reads `input`.
    ///
    /// # Errors
    /// When git is missing, or the command fails.
    pub(crate) fn feed<S: AsRef<OsStr>>(&self, args: &[S], input: &[u8]) -> Result<Vec<u8>, WireError> {
        self.feed_any(args, input, &[0])
    }

    /// The same, of a command that reads a file.
    ///
    /// # Errors
    /// When git is missing, or the command fails.
    pub(crate) fn feed_file<S: AsRef<OsStr>>(&self, args: &[S], input: File) -> Result<Vec<u8>, WireError> {
        let args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        let output = self.finish(&args, Input::File(input))?;
        if output.status.success() { Ok(output.stdout) } else { Err(self.failure(&args, &output)) }
    }

    /// Like [`Git::feed`], but none when the command prints more than `len_max` bytes, which then ends it.
    ///
    /// # Errors
    /// When git is missing, or the command fails.
    pub(crate) fn feed_up_to<S: AsRef<OsStr>>(
        &self,
        args: &[S],
        input: &[u8],
        len_max: usize,
    ) -> Result<Option<Vec<u8>>, WireError> {
        let args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        let run = || {
            let mut command = self.command(&args);
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn()?;
            let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
            std::thread::scope(|scope| {
                scope.spawn(|| stdin.map(|mut stdin| stdin.write_all(input)));
                let mut printed = Vec::new();
                if let Some(stdout) = stdout {
                    stdout.take(len_max as u64 + 1).read_to_end(&mut printed)?;
                }
                if printed.len() > len_max {
                    child.kill()?;
                }
                // What it says besides fits into the pipe.
                let rest = child.wait_with_output()?;
                Ok::<_, std::io::Error>(Output { stdout: printed, ..rest })
            })
        };
        let output = run().map_err(|error| failed("could not run `git`", &error))?;
        match output.status.success() {
            _ if output.stdout.len() > len_max => Ok(None),
            true => Ok(Some(output.stdout)),
            false => Err(self.failure(&args, &output)),
        }
    }

    /// Returns kind and content of objects, by their names; those that are not there are left out.
    ///
    /// # Errors
    /// When git is missing, or the command fails.
    pub(crate) fn objects<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<HashMap<String, (String, Vec<u8>)>, WireError> {
        let asked: String = names.into_iter().map(|name| format!("{name}\n")).collect();
        let answer = self.feed(&["cat-file", "--batch"], asked.as_bytes())?;
        let (mut found, mut rest) = (HashMap::new(), answer.as_slice());
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            let line = String::from_utf8_lossy(&rest[..end]).into_owned();
            rest = &rest[end + 1..];
            let mut fields = line.split(' ');
            let (Some(name), Some(kind), Some(len)) = (fields.next(), fields.next(), fields.next()) else {
                continue;
            };
            let content = len.parse().ok().and_then(|len: usize| rest.get(..len));
            let Some(content) = content else { break };
            found.insert(name.to_owned(), (kind.to_owned(), content.to_vec()));
            rest = rest.get(content.len() + 1..).unwrap_or_default();
        }
        Ok(found)
    }

    fn failure(&self, args: &[&OsStr], output: &Output) -> WireError {
        let what = args.first().map(|arg| arg.display().to_string()).unwrap_or_default();
        let mut error = invalid(format!("`git {what}` failed in `{}`", self.dir.display()));
        error.causes.push(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        error
    }

    /// The same, where some statuses besides 0 are no failure.
    ///
    /// # Errors
    /// When git is missing, or the command fails.
    pub(crate) fn feed_any<S: AsRef<OsStr>>(
        &self,
        args: &[S],
        input: &[u8],
        statuses: &[i32],
    ) -> Result<Vec<u8>, WireError> {
        let args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        let output = self.finish(&args, Input::Bytes(input))?;
        if output.status.code().is_some_and(|code| statuses.contains(&code)) {
            return Ok(output.stdout);
        }
        Err(self.failure(&args, &output))
    }

    /// Returns what a command prints, or none when it fails.
    ///
    /// # Errors
    /// When git is missing.
    pub(crate) fn ask<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Option<Vec<u8>>, WireError> {
        let args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
        let output = self.finish(&args, Input::Bytes(&[]))?;
        Ok(output.status.success().then_some(output.stdout))
    }

    /// Returns the one line a command prints, or none when it fails or prints nothing.
    ///
    /// # Errors
    /// When git is missing.
    pub(crate) fn line<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Option<OsString>, WireError> {
        let line = self.ask(args)?.map(|mut line| {
            line.pop();
            OsString::from_vec(line)
        });
        Ok(line.filter(|line| !line.is_empty()))
    }

    /// Returns where the repository has one of its files.
    ///
    /// # Errors
    /// When this is no repository.
    pub(crate) fn path(&self, name: &str) -> Result<PathBuf, WireError> {
        let mut path = self.run(&["rev-parse", "--git-path", name])?;
        path.pop();
        Ok(self.dir.join(OsStr::from_bytes(&path)))
    }

    /// Returns true when the repository names its objects by SHA-256.
    ///
    /// # Errors
    /// When git is missing.
    pub(crate) fn is_sha256(&self) -> Result<bool, WireError> {
        Ok(self.line(&["rev-parse", "--show-object-format"])?.is_some_and(|format| format == "sha256"))
    }
}
