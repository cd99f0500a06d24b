//! VMM drivers: data producers.
//!
//! A driver turns a [`MachinePlan`] into a [`Launch`]: program, arguments, and how the running VMM is controlled.
//! It never spawns, opens or connects anything; the supervisor does. So what a driver decides is visible in golden
//! tests, and drivers can't differ in how processes are confined.

pub mod api;
pub mod firecracker;
pub mod machine;
pub mod qemu;
pub mod qmp;

pub use machine::{
    AgentSocket, Control, Counters, Drive, Driver, Launch, MachinePlan, NetDevice, NetLink, Saved, launch,
};
