//! The guest's ends of `vm cp`.

use crate::users;
use banger_copy::Target;
use banger_wire::bytes::ByteString;
use banger_wire::channel::{ChannelReader, ChannelWriter};
use banger_wire::item::ItemWriter;
use std::io::Result;
use std::path::{Path, PathBuf};

/// What a path means that is not absolute: root's home, as `scp` has it.
fn from_home(path: &ByteString) -> PathBuf {
    let home = users::find(Path::new("/"), "root").map_or_else(|_| "/root".to_owned(), |root| root.home);
    let home = Path::new(&home);
    // Joining nothing would add a slash, which demands a directory.
    if path.0.is_empty() { home.to_owned() } else { home.join(path.as_os_str()) }
}

/// Creates what arrives.
pub(crate) fn copy_in(
    path: &ByteString,
    name: Option<&ByteString>,
    into: bool,
    input: ChannelReader,
) -> Result<()> {
    let target = Target::find(&from_home(path), name.map(ByteString::as_os_str), into)?;
    banger_copy::receive(target, input, &mut |_| {}, &mut |_| {})
}

/// Sends what there is.
pub(crate) fn copy_out(path: &ByteString, follow: bool, output: ChannelWriter) -> Result<()> {
    let mut writer = ItemWriter::new(output);
    banger_copy::send(&from_home(path), follow, &mut writer, &mut |_| {}, &mut |_| {})
}
