//! Every check there is, in the order of their price.

use crate::programs::{Built, Profile};
use anyhow::{Context as _, bail};
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// Another architecture, for which everything is to compile; nothing is run there.
const OTHER: &str = "aarch64-unknown-linux-gnu";
/// Its C compiler and linker, as Debian calls it.
const OTHER_CC: &str = "aarch64-linux-gnu-gcc";
/// Crates without C in them, and those with.
const OTHER_PLAIN: [&str; 3] = ["banger-wire", "banger-sys", "banger-vmm"];
const OTHER_WITH_C: [&str; 4] = ["banger-image", "bangerd", "banger-agent", "banger"];

/// The image most end-to-end tests use.
const IMAGE: &str = "debian-bookworm-slim";

/// How long each decoder is given damaged input.
const FUZZ_SECONDS: &str = "10";

/// How much of a failed test's output is shown again at the end, in characters.
const FAILURE_LEN_MAX: usize = 4000;

/// Runs all checks and prints what was skipped.
pub(crate) fn run() -> anyhow::Result<()> {
    step("formatting", &["fmt", "--all", "--check"])?;
    step("lints", &["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"])?;
    let mut skipped = Vec::new();
    let deny = Command::new("cargo").args(["deny", "--version"]).stderr(Stdio::null()).output();
    if deny.is_ok_and(|output| output.status.success()) {
        step(
            "licences, sources, bans",
            &["deny", "--log-level", "error", "check", "bans", "licenses", "sources"],
        )?;
        // The advisories are in a repository that not every network reaches.
        check_advisories(&mut skipped)?;
    } else {
        skipped.push("cargo deny: not installed".to_owned());
    }
    check_other_architecture(&mut skipped)?;
    println!("== store for the end-to-end tests: a kernel and {IMAGE}, pulled");
    let built = Built::new(Profile::Dev)?;
    let store = built.store(&[IMAGE])?;
    println!("== tests");
    let scratch = tempfile::Builder::new().prefix("banger-ci-").tempdir()?;
    // Tests work there as other users too.
    std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o755))?;
    // Captured output would hide the tests' own `skipped:` lines, so it is collected here and shown again.
    let output = Command::new("cargo")
        .args(["test", "--workspace", "--all-features", "--no-fail-fast", "--", "--show-output"])
        // A vm keeps a processor busy while it boots; more at once only wait for each other.
        .args(["--test-threads", &std::thread::available_parallelism().map_or(2, |n| n.get()).to_string()])
        .env("BANGER_TEST_STORE", store.path())
        // Ordinary users' paths often lack the directories of system programs.
        .env("PATH", format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        // Some of what a run of tests has in common is there to its end, and nobody's to remove.
        .env("TMPDIR", scratch.path())
        .env("BANGER_FUZZ_SECONDS", FUZZ_SECONDS)
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    skipped.extend(text.lines().filter_map(|line| line.trim().strip_prefix("skipped: ")).map(str::to_owned));
    skipped.sort();
    skipped.dedup();
    println!("== skipped: {}", skipped.len());
    skipped.iter().for_each(|reason| println!("  {reason}"));
    // Once more at the end, where whoever reads a log looks first.
    for failure in failures(&text) {
        println!("== failed: {failure}");
    }
    println!("{} passed, {} failed", count(&text, "passed"), count(&text, "failed"));
    if !output.status.success() {
        bail!("tests failed");
    }
    Ok(())
}

/// Compiles for another architecture as much as this machine has the tools for.
fn check_other_architecture(skipped: &mut Vec<String>) -> anyhow::Result<()> {
    let libraries = Command::new("rustc").args(["--print", "target-libdir", "--target", OTHER]).output();
    let libraries = libraries.context("ask rustc for a directory")?.stdout;
    if !Path::new(String::from_utf8_lossy(&libraries).trim()).is_dir() {
        skipped.push(format!("{OTHER}: not installed, see `rustup target add {OTHER}`"));
        return Ok(());
    }
    let compiler = Command::new(OTHER_CC).arg("--version").stdout(Stdio::null()).status();
    let crates = if compiler.is_ok_and(|status| status.success()) {
        [&OTHER_PLAIN[..], &OTHER_WITH_C].concat()
    } else {
        skipped.push(format!("{OTHER}: {}: `{OTHER_CC}` is not installed", OTHER_WITH_C.join(", ")));
        OTHER_PLAIN.to_vec()
    };
    println!("== {OTHER}");
    let mut cargo = Command::new("cargo");
    cargo.args(["check", "--target", OTHER]).args(crates.iter().flat_map(|name| ["--package", name]));
    // The agent is linked, as `bangerd` contains it.
    cargo.env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", OTHER_CC);
    if !cargo.status().context("start cargo check")?.success() {
        bail!("{OTHER}: cargo check failed");
    }
    Ok(())
}

/// Fails when a dependency has an advisory; says so when they can't be looked at.
fn check_advisories(skipped: &mut Vec<String>) -> anyhow::Result<()> {
    println!("== advisories");
    let args = ["deny", "--log-level", "error", "check", "advisories"];
    let output = Command::new("cargo").args(args).output().context("start cargo deny")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(());
    }
    if text.contains("failed to fetch advisory database") {
        skipped.push("advisories: the advisory database can't be fetched".to_owned());
        return Ok(());
    }
    bail!("{text}")
}

/// Returns the name and the end of the output of each test that failed, of a test runner's whole output.
fn failures(text: &str) -> Vec<String> {
    let failed: BTreeSet<&str> =
        text.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED")).collect();
    let mut found = Vec::new();
    for block in text.split("\n---- ").skip(1) {
        let Some((name, output)) = block.split_once(" stdout ----\n") else { continue };
        if failed.contains(name) {
            // The next heading of the runner ends the last block of a section.
            let output = output.split("\n\n\nfailures:").next().unwrap_or_default();
            // A backtrace says little, and would push out what other threads said.
            let pieces = output.split("\nstack backtrace:").enumerate();
            let told = pieces.map(|(number, piece)| match number {
                0 => piece,
                _ => piece.split_once("\nnote: ").map_or("", |(_, rest)| rest),
            });
            let output = told.collect::<Vec<_>>().join("\n");
            let output = output.trim();
            let long = output.char_indices().rev().nth(FAILURE_LEN_MAX).map_or(0, |(at, _)| at);
            found.push(format!("{name}\n{}", &output[long..]));
        }
    }
    found
}

/// Adds up a column of the test runner's summary lines.
fn count(text: &str, word: &str) -> u64 {
    text.lines()
        .filter(|line| line.starts_with("test result:"))
        .flat_map(|line| line.split(';'))
        .filter_map(|part| {
            part.trim().strip_suffix(word)?.rsplit(' ').find(|w| !w.is_empty())?.parse::<u64>().ok()
        })
        .sum()
}

fn step(name: &str, args: &[&str]) -> anyhow::Result<()> {
    println!("== {name}");
    let status =
        Command::new("cargo").args(args).status().with_context(|| format!("start cargo {}", args[0]))?;
    if !status.success() {
        bail!("{name}: cargo {} failed", args.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_failed_tests_output_is_found() {
        let text = "test a ... ok\ntest b::c ... FAILED\n\nsuccesses:\n\n---- a stdout ----\nfine\n\n\nfailures:\n\n\
            ---- b::c stdout ----\nthread panicked\nwhy\nstack backtrace:\n 0: x\nnote: some\nthe test panicked\nstack backtrace:\n 0: y\n\n\n\
            failures:\n    b::c\n";
        assert_eq!(super::failures(text), ["b::c\nthread panicked\nwhy\nsome\nthe test panicked"]);
        assert_eq!(super::count("test result: FAILED. 3 passed; 1 failed; 0 ignored", "passed"), 3);
    }
}
