//! `image …`.

use crate::args::{ImageCacheCommand, ImageCommand};
use crate::context::{Context, expect_outcome};
use crate::export;
use crate::many::each;
use crate::stop::{Ended, failed, invalid};
use crate::table::{Table, render_pairs};
use crate::text::{age, bytes, date, escape, now};
use crate::upload::{Archive, Local, local};
use banger_wire::daemon::{CachePruned, ImageFiles, ImageView, Outcome, Request};
use banger_wire::doctor::{Check, Verdict};
use banger_wire::error::WireError;
use banger_wire::names::ImageName;
use std::path::Path;

/// Runs `banger image …`.
pub(crate) async fn dispatch(context: &mut Context, command: ImageCommand) -> Ended {
    match command {
        ImageCommand::Pull { reference, name, kernel_ref, platform, json } => {
            let reference = match local(&reference)? {
                Some(Local::Archive(..)) if kernel_ref.is_some() || platform.is_some() => {
                    return Err(invalid("an archive takes neither `--kernel-ref` nor `--platform`")
                        .hinted("name the kernel when a vm is made: `banger vm run --kernel-ref`")
                        .into());
                }
                Some(Local::Archive(file, wanted)) => {
                    return load(context, &file, wanted, name, json).await;
                }
                Some(Local::Layout(reference)) => reference,
                None => reference,
            };
            let request = Request::ImagePull { reference, name, kernel: kernel_ref, platform };
            let outcome = context.follow(request).await?;
            return told(context, outcome, "pulled", json);
        }
        ImageCommand::Register(args) => {
            let files = ImageFiles {
                name: args.name,
                rootfs: absolute(&args.rootfs)?,
                kernel_ref: args.kernel_ref,
                kernel: args.kernel.as_deref().map(absolute).transpose()?,
                initrd: args.initrd.as_deref().map(absolute).transpose()?,
                modules: args.modules.as_deref().map(absolute).transpose()?,
            };
            let outcome = context.follow(Request::ImageRegister(Box::new(files))).await?;
            return told(context, outcome, "registered", args.json);
        }
        ImageCommand::Export { image, output } => return export::export(context, image, &output).await,
        ImageCommand::Commit { vm, name, json } => {
            let outcome = context.follow(Request::ImageCommit { vm, name }).await?;
            return told(context, outcome, "made", json);
        }
        ImageCommand::Verify { image, json } => {
            let outcome = context.follow(Request::ImageVerify { image }).await?;
            return verified(context, &expect_outcome!(outcome, Verified)?, json);
        }
        ImageCommand::Cache(ImageCacheCommand::Prune { dry_run, all, json }) => {
            let outcome = context.follow(Request::ImageCachePrune { dry_run, all }).await?;
            let pruned = expect_outcome!(outcome, CachePruned)?;
            if json {
                context.ui.json(&pruned)?;
            } else {
                context.ui.data(&pruned_line(&pruned, dry_run))?;
            }
        }
        ImageCommand::Load { input, name, json } => return load(context, &input, None, name, json).await,
        ImageCommand::List(args) if args.available => {
            return available(context, Request::ImageAvailable, args.json).await;
        }
        ImageCommand::List(args) => {
            let outcome = context.ask(Request::ImageList).await?;
            let images = expect_outcome!(outcome, Images)?;
            if args.json {
                context.ui.json(&images)?;
            } else {
                context.ui.data(&table(&images, now()))?;
            }
        }
        ImageCommand::Show { image, json } => {
            let outcome = context.ask(Request::ImageShow { image }).await?;
            let image = expect_outcome!(outcome, Image)?;
            if json {
                context.ui.json(&image)?;
            } else {
                context.ui.data(&pairs(&image, now()))?;
            }
        }
        ImageCommand::Delete { images } => {
            return each(context, images, "deleted", |image| Request::ImageDelete { image }).await;
        }
    }
    Ok(0)
}

/// Says that an image is there now.
fn told(context: &Context, outcome: Outcome, verb: &str, json: bool) -> Ended {
    let image = expect_outcome!(outcome, Image)?;
    if json {
        context.ui.json(&image)?;
    } else {
        context.ui.data(&format!("{verb} {}\n", image.name))?;
    }
    Ok(0)
}

/// Lists what can be pulled by name.
pub(crate) async fn available(context: &mut Context, request: Request, json: bool) -> Ended {
    let outcome = context.ask(request).await?;
    let available = expect_outcome!(outcome, Available)?;
    if json {
        context.ui.json(&available)?;
        return Ok(0);
    }
    let mut table = Table::new(&["NAME", "WHAT", "HERE"]);
    for one in available {
        table.row([one.name, one.what, if one.present { "yes" } else { "no" }.to_owned()]);
    }
    context.ui.data(&table.render())?;
    Ok(0)
}

/// One line for each thing; fails when one of them is not as it should be.
fn verified(context: &Context, checks: &[Check], json: bool) -> Ended {
    if json {
        context.ui.json(&checks)?;
    }
    let mut failed = 0;
    for check in checks {
        let is_good = check.verdict != Verdict::Fail;
        failed += u32::from(!is_good);
        if !json {
            let word = if is_good { "ok  " } else { "FAIL" };
            context.ui.data(&format!("{word} {}: {}\n", escape(&check.name), escape(&check.detail)))?;
            if let Some(hint) = &check.hint {
                context.ui.data(&format!("     {}\n", escape(hint)))?;
            }
        }
    }
    Ok(u8::from(failed > 0))
}

fn pruned_line(pruned: &CachePruned, dry_run: bool) -> String {
    let verb = if dry_run { "would remove" } else { "removed" };
    let files = if pruned.files == 1 { "1 file".to_owned() } else { format!("{} files", pruned.files) };
    let (freed, kept) = (bytes(pruned.freed_bytes), bytes(pruned.kept_bytes));
    let link = if dry_run { " and free" } else { ", freed" };
    format!("{verb} {files}{link} {freed}; {kept} stay\n")
}

/// A path as the daemon, which is somewhere else, can use it.
pub(crate) fn absolute(path: &Path) -> Result<String, WireError> {
    let shown = escape(&path.display().to_string());
    let whole =
        std::path::absolute(path).map_err(|error| failed(format!("could not find `{shown}`"), &error))?;
    let text = whole.into_os_string().into_string();
    text.map_err(|_| invalid(format!("`{shown}` is not text, and only such paths can be passed on")))
}

async fn load(
    context: &mut Context,
    input: &Path,
    reference: Option<String>,
    name: Option<ImageName>,
    json: bool,
) -> Ended {
    let archive = Archive::open(input)?;
    let (label, size) = (archive.label.clone(), archive.size);
    let outcome = context.send(Request::ImageLoad { label, size, reference, name }, archive).await?;
    let images = expect_outcome!(outcome, Images)?;
    if json {
        context.ui.json(&images)?;
    } else {
        let told: String = images.iter().map(|image| format!("loaded {}\n", image.name)).collect();
        context.ui.data(&told)?;
    }
    Ok(0)
}

fn table(images: &[ImageView], now: i64) -> String {
    let mut table = Table::new(&["NAME", "SOURCE", "ARCH", "SIZE", "DISK", "USED BY", "CREATED"]);
    for image in images {
        table.row([
            image.name.to_string(),
            image.source.clone(),
            image.arch.clone(),
            bytes(image.size_bytes),
            bytes(image.disk_bytes),
            join(&image.used_by).unwrap_or_default(),
            age(image.created, now),
        ]);
    }
    table.render()
}

fn pairs(image: &ImageView, now: i64) -> String {
    render_pairs(&[
        ("name", Some(image.name.to_string())),
        ("source", Some(image.source.clone())),
        ("digest", Some(image.digest.clone())),
        ("arch", Some(image.arch.clone())),
        ("size", Some(bytes(image.size_bytes))),
        ("disk", Some(bytes(image.disk_bytes))),
        ("init", Some(image.init.clone().unwrap_or_else(|| "none".to_owned()))),
        ("filesystem", Some(image.filesystem.clone())),
        ("sha256", image.sha256.clone()),
        ("kernel", image.kernel.clone()),
        ("initrd", image.initrd.then(|| "its own".to_owned())),
        ("env", list(&image.env)),
        ("workdir", image.workdir.clone()),
        ("user", image.user.clone()),
        ("entrypoint", list(&image.entrypoint)),
        ("cmd", list(&image.cmd)),
        ("used by", join(&image.used_by)),
        ("created", Some(date(image.created, now))),
    ])
}

fn list(words: &[String]) -> Option<String> {
    (!words.is_empty()).then(|| words.join(" "))
}

/// Returns the names in one text, or none when there are none.
pub(crate) fn join(names: &[impl ToString]) -> Option<String> {
    let names: Vec<String> = names.iter().map(ToString::to_string).collect();
    (!names.is_empty()).then(|| names.join(", "))
}
