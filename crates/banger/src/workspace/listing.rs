//! What a dry run tells of a checkout: exactly what would travel, and how.

use super::checkout::Survey;
use super::command::Asked;
use crate::context::Context;
use crate::stop::Ended;
use crate::text::escape;
use banger_wire::bytes::ByteString;
use banger_wire::daemon::WorkspaceMode;
use serde::Serialize;
use std::path::Path;

/// What would travel; the shape of `--dry-run --json`.
#[derive(Debug, Serialize)]
struct Listing {
    /// Top of the checkout.
    source: ByteString,
    /// Where it goes in the guest.
    path: ByteString,
    mode: WorkspaceMode,
    /// The commit whose files they are; none for the working tree's.
    from: Option<String>,
    files: Vec<Listed>,
    /// Bytes of all of them.
    bytes: u64,
    /// Untracked files that look like secrets, and stay.
    held_back: Vec<ByteString>,
    /// Untracked directories that are repositories of their own, and stay.
    nested: Vec<ByteString>,
}

/// One file, link or directory.
#[derive(Debug, Serialize)]
struct Listed {
    path: ByteString,
    /// Type and permission bits, octal, as git writes them.
    mode: String,
    bytes: u64,
}

fn listing(asked: &Asked, survey: &Survey) -> Listing {
    let name = |path: &Path| ByteString::from(path.as_os_str().to_owned());
    let names =
        |list: &[std::ffi::OsString]| list.iter().map(|path| ByteString::from(path.clone())).collect();
    let listed = |entry: &super::checkout::Entry| Listed {
        path: ByteString::from(entry.path.clone()),
        mode: format!("{:06o}", entry.mode),
        bytes: entry.len,
    };
    Listing {
        source: name(&survey.root),
        path: name(&asked.guest_path),
        mode: survey.mode,
        from: survey.from.clone(),
        files: survey.entries.iter().map(listed).collect(),
        bytes: survey.len(),
        held_back: names(&survey.held_back),
        nested: names(&survey.nested),
    }
}

/// Lists what would travel; without `json` for people, with escaped names.
///
/// # Errors
/// When it can't be printed.
pub(crate) fn tell(context: &Context, asked: &Asked, survey: &Survey, json: bool) -> Ended {
    if json {
        context.ui.json(&listing(asked, survey))?;
        return Ok(0);
    }
    let mut text = String::new();
    for entry in &survey.entries {
        let name = escape(&entry.path.to_string_lossy());
        text.push_str(&format!("{:06o} {:>10} {name}\n", entry.mode, entry.len));
    }
    let mode = match survey.mode {
        WorkspaceMode::ShallowOverlay => "shallow_overlay",
        WorkspaceMode::FullCopy => "full_copy",
    };
    let to = escape(&asked.guest_path.display().to_string());
    text.push_str(&format!("{} files, {} bytes, {mode}, to {to}\n", survey.entries.len(), survey.len()));
    context.ui.data(&text)?;
    Ok(0)
}
