//! Whether this machine's KVM runs an ordinary kernel, found out with a small one.
//!
//! That the device can be opened and makes vms says little: there are hosts whose KVM only runs kernels made for it. A
//! guest that can't go on may also stay silent for ever, so whoever calls [`try_out`] does so in a process that can be
//! killed.

#[cfg(target_arch = "x86_64")]
pub mod guest;
#[cfg(target_arch = "x86_64")]
mod machine;

/// Why the guest did not get through.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A step before its first instruction.
    #[error("{step}: {source}")]
    Machine {
        /// What was to be done.
        step: &'static str,
        /// What the kernel says.
        source: std::io::Error,
    },
    /// KVM ended it.
    #[error("{0}")]
    Ended(String),
    /// There is no such guest for this architecture.
    #[error("there is no test guest for this architecture yet")]
    NoGuest,
}

/// Makes a vm with one processor, runs the guest in it, and tells of each stage it reaches, by its name.
///
/// # Errors
/// When the guest does not get through: KVM refuses something or ends it. It may also never return.
#[cfg(target_arch = "x86_64")]
pub fn try_out(tell: &mut dyn FnMut(&str)) -> Result<(), Failure> {
    machine::run(&mut |stage| tell(stage.name()))
}

/// Fails: there is a guest for one architecture only.
///
/// # Errors
/// Always.
#[cfg(not(target_arch = "x86_64"))]
pub fn try_out(_tell: &mut dyn FnMut(&str)) -> Result<(), Failure> {
    Err(Failure::NoGuest)
}
