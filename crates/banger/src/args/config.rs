//! The config and caches.

use banger_wire::daemon::CacheMount;
use banger_wire::names::CacheName;
use clap::{Args, Subcommand};

use super::JsonArgs;

/// `banger config`.
#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Show every value and where it comes from.
    Show(JsonArgs),
    /// Print where the file is, or would be.
    Path,
}

/// `banger cache`.
#[derive(Debug, Subcommand)]
pub(crate) enum CacheCommand {
    /// List caches.
    #[command(alias = "ls")]
    List(JsonArgs),
    /// Delete caches that no running vm has.
    Prune(CachePruneArgs),
}

/// `banger cache prune`.
#[derive(Debug, Args)]
pub(crate) struct CachePruneArgs {
    /// Only these; all when none is named.
    #[arg(value_name = "NAME")]
    pub(crate) caches: Vec<CacheName>,
    /// Only say what would go.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Understands `NAME:PATH`.
pub(crate) fn parse_cache(text: &str) -> Result<CacheMount, String> {
    let (name, path) = text.split_once(':').ok_or("a cache is `NAME:PATH`, such as `cargo:/root/.cargo`")?;
    let name = name.parse().map_err(|error: banger_wire::names::NameError| error.to_string())?;
    Ok(CacheMount { name, path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::parse_cache;

    #[test]
    fn a_cache_has_a_name_and_a_place() {
        let cache = parse_cache("cargo:/root/.cargo:x").unwrap();
        assert_eq!((cache.name.as_str(), cache.path.as_str()), ("cargo", "/root/.cargo:x"));
        assert!(
            parse_cache("cargo").is_err() && parse_cache("../x:/a").is_err() && parse_cache(":/a").is_err()
        );
    }
}
