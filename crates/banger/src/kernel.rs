//! `kernel …`.

use crate::args::KernelCommand;
use crate::context::{Context, expect_outcome};
use crate::image::join;
use crate::stop::Ended;
use crate::table::{Table, render_pairs};
use crate::text::{age, bytes, date, now};
use crate::vm::each;
use banger_wire::daemon::{KernelView, Request};

/// Runs `banger kernel …`.
pub(crate) async fn dispatch(context: &mut Context, command: KernelCommand) -> Ended {
    match command {
        KernelCommand::Pull { name, json } => {
            let outcome = context.follow(Request::KernelPull { name }).await?;
            let kernel = expect_outcome!(outcome, Kernel)?;
            if json {
                context.ui.json(&kernel)?;
            } else {
                context.ui.data(&format!("pulled {}\n", kernel.name))?;
            }
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
        ("created", Some(date(kernel.created, now))),
    ])
}
