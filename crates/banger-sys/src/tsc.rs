//! The rate of the processor's time stamp counter.

use std::time::{Duration, Instant};

/// What a rate can be, in kHz: anything else is a mistake of the measurement.
const KHZ: std::ops::RangeInclusive<u64> = 100_000..=20_000_000;
/// Two readings closer together say too little: at this distance a microsecond of delay is 0.005 %.
pub const DISTANCE_MIN: Duration = Duration::from_millis(20);

/// The counter and the clock, read together. The rate is found by a later reading.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    counter: u64,
    at: Instant,
}

impl Reading {
    /// Reads both; none where the processor has no counter that runs at one rate.
    #[must_use]
    pub fn now() -> Option<Self> {
        let counter = counter()?;
        Some(Self { counter, at: Instant::now() })
    }

    /// Returns how long ago this was.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.at.elapsed()
    }

    /// Returns the rate in kHz since this reading; none when it is too recent, or the result can't be.
    #[must_use]
    pub fn khz(&self) -> Option<u64> {
        let now = Self::now()?;
        let elapsed = now.at.checked_duration_since(self.at).filter(|elapsed| *elapsed >= DISTANCE_MIN)?;
        let ticks = u128::from(now.counter.checked_sub(self.counter)?);
        let khz = u64::try_from(ticks * 1_000_000 / elapsed.as_nanos()).ok()?;
        KHZ.contains(&khz).then_some(khz)
    }
}

#[cfg(target_arch = "x86_64")]
fn counter() -> Option<u64> {
    /// Invariant counter: bit 8 of EDX (AMD64 manual volume 3, "Advanced Power Management Information").
    const LEAF: u32 = 0x8000_0007;
    use std::arch::x86_64::{__cpuid, _rdtsc};
    let invariant = __cpuid(LEAF & 0x8000_0000).eax >= LEAF && __cpuid(LEAF).edx & (1 << 8) != 0;
    // SAFETY: the instruction has no precondition; where it is forbidden to programs, so is it to the kernel's vDSO.
    invariant.then(|| unsafe { _rdtsc() })
}

#[cfg(not(target_arch = "x86_64"))]
fn counter() -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use super::{DISTANCE_MIN, KHZ, Reading};

    #[test]
    #[allow(clippy::disallowed_methods, reason = "time has to pass")]
    fn two_readings_make_a_rate() {
        let Some(first) = Reading::now() else {
            println!("skipped: this processor has no invariant time stamp counter");
            return;
        };
        assert_eq!(first.khz(), None, "too recent");
        std::thread::sleep(DISTANCE_MIN);
        let one = first.khz().unwrap();
        std::thread::sleep(DISTANCE_MIN);
        let two = first.khz().unwrap();
        assert!(KHZ.contains(&one));
        assert!(one.abs_diff(two) < one / 200, "{one} and {two} kHz are the same within 0.5 %");
    }
}
