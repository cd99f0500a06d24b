//! Developer tasks: `cargo xtask ci` is what CI runs, so no check exists only there; `cargo xtask bench` measures.
#![allow(clippy::print_stdout, reason = "a developer tool talks on standard output")]
#![allow(clippy::disallowed_methods, reason = "a developer tool runs programs")]

mod bare;
mod bench;
mod ci;
mod crowd;
mod forward;
mod programs;
mod pull;
mod workspace;

use anyhow::bail;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["ci"] => ci::run(),
        ["bench", "run"] => bench::run(),
        ["bench", "boots"] => bench::boots(200),
        ["bench", "boots", count] => bench::boots(count.parse()?),
        ["bench", "crowd"] => crowd::run(programs::Profile::Release, 50),
        ["bench", "crowd", "dev"] => crowd::run(programs::Profile::Dev, 50),
        ["bench", "forward"] => forward::run(programs::Profile::Release),
        ["bench", "forward", "dev"] => forward::run(programs::Profile::Dev),
        ["bench", "pull"] => pull::run(programs::Profile::Release),
        ["bench", "pull", "dev"] => pull::run(programs::Profile::Dev),
        ["bench", "workspace"] => workspace::run(programs::Profile::Release),
        ["bench", "workspace", "dev"] => workspace::run(programs::Profile::Dev),
        _ => bail!(
            "usage: cargo xtask ci | bench run | bench boots [COUNT] | bench crowd [dev] | bench forward [dev] | \
             bench pull [dev] | bench workspace [dev]"
        ),
    }
}
