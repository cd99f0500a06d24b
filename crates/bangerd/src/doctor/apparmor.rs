//! The AppArmor profile that lets `bangerd` make user namespaces where a distribution restricts them.

use anyhow::{Context as _, bail};
use std::io::Write as _;
use std::path::Path;

/// What packages install.
const PROFILE: &str = include_str!("../../../../packaging/apparmor/bangerd");
/// The programs it is for.
const PACKAGED: &str = "/usr/{bin,local/bin}/bangerd";
/// Where it goes.
pub(crate) const PLACE: &str = "/etc/apparmor.d/bangerd";

/// Prints the profile for this program: `bangerd apparmor-profile`.
pub(crate) fn print() -> anyhow::Result<()> {
    let own = std::env::current_exe().context("find this program")?;
    Ok(std::io::stdout().write_all(profile(&own)?.as_bytes())?)
}

/// Returns the profile for a `bangerd` at this path.
fn profile(program: &Path) -> anyhow::Result<String> {
    if ["/usr/bin/bangerd", "/usr/local/bin/bangerd"].map(Path::new).contains(&program) {
        return Ok(PROFILE.to_owned());
    }
    let shown = program.to_str().filter(|text| {
        text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-' | '_' | '+'))
    });
    let Some(shown) = shown else {
        bail!("a profile can't name `{}`; move bangerd to `/usr/local/bin`", program.display());
    };
    Ok(PROFILE.replace(PACKAGED, shown))
}

#[cfg(test)]
mod tests {
    use super::{PROFILE, profile};
    use std::io::Write as _;
    use std::path::Path;
    use std::process::Stdio;

    #[test]
    fn the_profile_names_this_program() {
        assert_eq!(profile(Path::new("/usr/bin/bangerd")).unwrap(), PROFILE);
        let own = profile(Path::new("/home/a_user/.local/bin/bangerd")).unwrap();
        assert!(own.contains("\nprofile bangerd /home/a_user/.local/bin/bangerd flags=(unconfined) {\n"));
        assert!(own.contains("\n  userns,\n"));
        for path in ["/home/a user/bangerd", "/home/{a,b}/bangerd", "/home/*/bangerd", "/tmp/a\"b"] {
            assert!(profile(Path::new(path)).is_err(), "{path}");
        }
    }

    /// A parser of before 4.0 knows everything but the rule that the profile is there for.
    #[test]
    fn the_profile_is_one_to_apparmors_parser() {
        let test = "the_profile_is_one_to_apparmors_parser";
        let knows_userns = Path::new("/etc/apparmor.d/abi/4.0").exists();
        let parse = |text: &str| -> Option<(bool, String)> {
            // Neither loaded into the kernel nor kept.
            let mut parser = banger_sys::child::command("apparmor_parser".as_ref());
            parser.args(["--skip-kernel-load", "--skip-cache", "--stdout"]).stdin(Stdio::piped());
            let mut parser = parser.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().ok()?;
            parser.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
            let output = parser.wait_with_output().unwrap();
            Some((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
        };
        for path in ["/usr/bin/bangerd", "/home/a_user/.local/bin/bangerd"] {
            let mut text = profile(Path::new(path)).unwrap();
            if !knows_userns {
                text = text.replace("abi/4.0", "abi/3.0").replace("  userns,\n", "");
            }
            let Some((is_one, said)) = parse(&text) else {
                println!("skipped: {test}: `apparmor_parser` is not installed");
                return;
            };
            assert!(is_one, "{said}");
            assert!(!parse(&text.replace('}', "")).unwrap().0, "a profile without an end is none");
        }
        if !knows_userns {
            println!("skipped: {test}: the rule `userns`: this AppArmor is older than 4.0");
        }
    }
}
