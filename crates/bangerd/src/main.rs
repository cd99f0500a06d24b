//! The owner daemon, and with `bangerd supervise` the supervisor of one vm.

mod plan;

fn main() {}
