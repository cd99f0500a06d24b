//! Developer tasks: `cargo xtask ci` is what CI runs, so no check exists only there.
#![allow(clippy::print_stdout, reason = "a developer tool talks on standard output")]
#![allow(clippy::disallowed_methods, reason = "a developer tool runs cargo")]

use anyhow::{Context as _, bail};
use std::process::{Command, Stdio};

fn main() -> anyhow::Result<()> {
    let task = std::env::args().nth(1).unwrap_or_default();
    match task.as_str() {
        "ci" => ci(),
        _ => bail!("usage: cargo xtask ci"),
    }
}

fn ci() -> anyhow::Result<()> {
    step("formatting", &["fmt", "--all", "--check"])?;
    step("lints", &["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings"])?;
    let mut skipped = Vec::new();
    let deny = Command::new("cargo").args(["deny", "--version"]).stderr(Stdio::null()).output();
    if deny.is_ok_and(|output| output.status.success()) {
        step("licences and sources", &["deny", "check", "bans", "licenses", "sources"])?;
    } else {
        skipped.push("cargo deny: not installed".to_owned());
    }
    println!("== tests");
    // Captured output would hide the tests' own `skipped:` lines, so it is collected here and shown again.
    let output = Command::new("cargo")
        .args(["test", "--workspace", "--all-features", "--no-fail-fast", "--", "--show-output"])
        .stderr(Stdio::inherit())
        .output()
        .context("start cargo test")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    skipped.extend(text.lines().filter_map(|line| line.trim().strip_prefix("skipped: ")).map(str::to_owned));
    let count = |word: &str| -> u64 {
        text.lines()
            .filter(|line| line.starts_with("test result:"))
            .flat_map(|line| line.split(';'))
            .filter_map(|part| {
                part.trim().strip_suffix(word)?.rsplit(' ').find(|w| !w.is_empty())?.parse::<u64>().ok()
            })
            .sum()
    };
    println!("== skipped: {}", skipped.len());
    skipped.iter().for_each(|reason| println!("  {reason}"));
    println!("{} passed, {} failed", count("passed"), count("failed"));
    if !output.status.success() {
        bail!("tests failed");
    }
    Ok(())
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
