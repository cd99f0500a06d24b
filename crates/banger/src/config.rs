//! `banger config` and `banger cache`.

use crate::args::{CacheCommand, CachePruneArgs, ConfigCommand, JsonArgs};
use crate::context::{Context, expect_outcome};
use crate::stop::{Ended, invalid};
use crate::table::Table;
use crate::text::{age, bytes, now};
use banger_wire::daemon::{CacheView, ConfigSource, ConfigValue, ConfigView, Request};

/// Runs `banger config …`.
pub(crate) async fn dispatch(context: &mut Context, command: ConfigCommand) -> Ended {
    let outcome = context.ask(Request::ConfigShow).await?;
    let config = expect_outcome!(outcome, Config)?;
    match command {
        ConfigCommand::Show(JsonArgs { json: true }) => context.ui.json(&config)?,
        ConfigCommand::Show(JsonArgs { json: false }) => context.ui.data(&config_table(&config))?,
        ConfigCommand::Path => {
            let path = config.path.ok_or_else(|| {
                invalid("no place for a config: `HOME` is not set").hinted("set `HOME` or `XDG_CONFIG_HOME`")
            })?;
            context.ui.data(&format!("{}\n", crate::text::escape(&path)))?;
        }
    }
    Ok(0)
}

fn config_table(config: &ConfigView) -> String {
    let mut table = Table::new(&["KEY", "VALUE", "FROM"]);
    for value in &config.values {
        table.row([value.key.clone(), shown(&value.value), origin(value, config.path.as_deref())]);
    }
    table.render()
}

/// A value as the file would have it.
fn shown(value: &serde_json::Value) -> String {
    if value.is_null() { "-".to_owned() } else { value.to_string() }
}

fn origin(value: &ConfigValue, path: Option<&str>) -> String {
    match value.source {
        ConfigSource::Default => "default".to_owned(),
        ConfigSource::File => format!("{}:{}", path.unwrap_or("?"), value.line.unwrap_or(0)),
        ConfigSource::Environment => format!("environment, {}", value.variable.as_deref().unwrap_or("?")),
    }
}

/// Runs `banger cache …`.
pub(crate) async fn caches(context: &mut Context, command: CacheCommand) -> Ended {
    match command {
        CacheCommand::List(args) => {
            let outcome = context.ask(Request::CacheList).await?;
            let caches = expect_outcome!(outcome, Caches)?;
            if args.json {
                context.ui.json(&caches)?;
            } else {
                context.ui.data(&cache_table(&caches, now()))?;
            }
        }
        CacheCommand::Prune(CachePruneArgs { caches, dry_run, json }) => {
            let outcome = context.ask(Request::CachePrune { names: caches, dry_run }).await?;
            let gone = expect_outcome!(outcome, Caches)?;
            if json {
                context.ui.json(&gone)?;
                return Ok(0);
            }
            let (verb, free) = if dry_run { ("would delete", "would free") } else { ("deleted", "freed") };
            let mut text: String = gone.iter().map(|cache| format!("{verb} {}\n", cache.name)).collect();
            let freed: u64 = gone.iter().map(|cache| cache.disk_bytes).sum();
            text.push_str(&if gone.is_empty() {
                "nothing to prune\n".to_owned()
            } else {
                format!("{free} {}\n", bytes(freed))
            });
            context.ui.data(&text)?;
        }
    }
    Ok(0)
}

fn cache_table(caches: &[CacheView], now: i64) -> String {
    let mut table = Table::new(&["NAME", "SIZE", "USED", "VM"]);
    for cache in caches {
        table.row([
            cache.name.to_string(),
            format!("{}/{}", bytes(cache.disk_bytes), bytes(cache.size_bytes)),
            age(cache.used, now),
            cache.used_by.clone().unwrap_or_default(),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_shown_with_where_they_come_from() {
        let value = |key: &str, value, source, line, variable: Option<&str>| ConfigValue {
            key: key.to_owned(),
            value,
            source,
            line,
            variable: variable.map(str::to_owned),
        };
        let config = ConfigView {
            path: Some("/c.toml".to_owned()),
            exists: true,
            values: vec![
                value("log_level", json!("info"), ConfigSource::Environment, None, Some("BANGER_LOG")),
                value("qemu_bin", json!(null), ConfigSource::Default, None, None),
                value("registry.r.mirror", json!(["a", "b\u{1b}"]), ConfigSource::File, Some(3), None),
            ],
        };
        insta::assert_snapshot!(config_table(&config), @r#"
        KEY                VALUE            FROM
        log_level          "info"           environment, BANGER_LOG
        qemu_bin           -                default
        registry.r.mirror  ["a","b\u001b"]  /c.toml:3
        "#);
    }
}
