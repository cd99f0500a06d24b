//! `image …`.

use crate::args::ImageCommand;
use crate::context::{Context, expect_outcome};
use crate::stop::Ended;
use crate::table::{Table, render_pairs};
use crate::text::{age, bytes, date, now};
use crate::upload::{Archive, Local, local};
use crate::vm::each;
use banger_wire::daemon::{ImageView, Request};
use banger_wire::names::{ImageName, VmName};
use std::path::Path;

/// Runs `banger image …`.
pub(crate) async fn dispatch(context: &mut Context, command: ImageCommand) -> Ended {
    match command {
        ImageCommand::Pull { reference, name, kernel_ref, json } => {
            let reference = match local(&reference)? {
                Some(Local::Archive(file, wanted)) => {
                    return load(context, &file, wanted, name, json).await;
                }
                Some(Local::Layout(reference)) => reference,
                None => reference,
            };
            let request = Request::ImagePull { reference, name, kernel: kernel_ref };
            let outcome = context.follow(request).await?;
            let image = expect_outcome!(outcome, Image)?;
            if json {
                context.ui.json(&image)?;
            } else {
                context.ui.data(&format!("pulled {}\n", image.name))?;
            }
        }
        ImageCommand::Load { input, name, json } => return load(context, &input, None, name, json).await,
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
        ("used by", join(&image.used_by)),
        ("created", Some(date(image.created, now))),
    ])
}

/// Returns the names in one text, or none when there are none.
pub(crate) fn join(names: &[VmName]) -> Option<String> {
    let names: Vec<&str> = names.iter().map(VmName::as_str).collect();
    (!names.is_empty()).then(|| names.join(", "))
}
