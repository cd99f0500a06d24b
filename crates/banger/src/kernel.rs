//! `kernel …`.

use crate::args::KernelCommand;
use crate::context::{Context, expect_outcome};
use crate::image::{absolute, available, join};
use crate::many::each;
use crate::stop::Ended;
use crate::table::{Table, render_pairs};
use crate::text::{age, bytes, date, now};
use banger_wire::daemon::{KernelFiles, KernelView, Outcome, Request};

/// Runs `banger kernel …`.
pub(crate) async fn dispatch(context: &mut Context, command: KernelCommand) -> Ended {
    match command {
        KernelCommand::Pull { name, upgrade, json } => {
            let outcome = context.follow(Request::KernelPull { name, upgrade }).await?;
            return told(context, outcome, "pulled", json);
        }
        KernelCommand::Import(args) => {
            let files = KernelFiles {
                name: args.name,
                from: args.from.as_deref().map(absolute).transpose()?,
                release: args.release,
                vmlinux: args.vmlinux.as_deref().map(absolute).transpose()?,
                modules: args.modules.as_deref().map(absolute).transpose()?,
            };
            let outcome = context.follow(Request::KernelImport(Box::new(files))).await?;
            return told(context, outcome, "imported", args.json);
        }
        KernelCommand::List(args) if args.available => {
            return available(context, Request::KernelAvailable, args.json).await;
        }
        KernelCommand::List(args) => {
            let outcome = context.ask(Request::KernelList).await?;
            let kernels = expect_outcome!(outcome, Kernels)?;
            if args.json {
                context.ui.json(&kernels)?;
            } else {
                context.ui.data(&table(&kernels, now()))?;
            }
        }
        KernelCommand::Show { name, json } => {
            let outcome = context.ask(Request::KernelShow { name }).await?;
            let kernel = expect_outcome!(outcome, Kernel)?;
            if json {
                context.ui.json(&kernel)?;
            } else {
                context.ui.data(&pairs(&kernel, now()))?;
            }
        }
        KernelCommand::Delete { names } => {
            return each(context, names, "deleted", |name| Request::KernelDelete { name }).await;
        }
    }
    Ok(0)
}

fn told(context: &Context, outcome: Outcome, verb: &str, json: bool) -> Ended {
    let kernel = expect_outcome!(outcome, Kernel)?;
    if json {
        context.ui.json(&kernel)?;
    } else {
        context.ui.data(&format!("{verb} {}\n", kernel.name))?;
    }
    Ok(0)
}

fn table(kernels: &[KernelView], now: i64) -> String {
    let mut table = Table::new(&["NAME", "RELEASE", "VERSION", "ARCH", "DISK", "USED BY", "CREATED"]);
    for kernel in kernels {
        table.row([
            kernel.name.to_string(),
            kernel.release.clone(),
            kernel.version.clone(),
            kernel.arch.clone(),
            bytes(kernel.disk_bytes),
            join(&kernel.used_by).unwrap_or_default(),
            age(kernel.created, now),
        ]);
    }
    table.render()
}

fn pairs(kernel: &KernelView, now: i64) -> String {
    render_pairs(&[
        ("name", Some(kernel.name.to_string())),
        ("release", Some(kernel.release.clone())),
        ("version", Some(kernel.version.clone())),
        ("arch", Some(kernel.arch.clone())),
        ("disk", Some(bytes(kernel.disk_bytes))),
        ("used by", join(&kernel.used_by)),
        ("images", join(&kernel.images)),
        ("created", Some(date(kernel.created, now))),
    ])
}
