//! What the agent's tests have in common.

use banger_wire::bytes::ByteString;
use banger_wire::guest::{GuestConfig, GuestDrives, InitMode};

/// What an agent outside a vm is told: nothing of a machine's.
pub(crate) fn config(env: Vec<(ByteString, ByteString)>) -> GuestConfig {
    let drives = GuestDrives {
        image: String::new(),
        image_fs: String::new(),
        disk: String::new(),
        modules: None,
        caches: Vec::new(),
    };
    GuestConfig {
        hostname: "test".to_owned(),
        machine_id: "0".repeat(32),
        unix_ns: 0,
        entropy: ByteString::default(),
        network: None,
        init: InitMode::Auto,
        env,
        workdir: None,
        user: None,
        drives,
        ca: None,
    }
}
