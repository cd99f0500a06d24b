//! What a long operation reports while it runs. Rendering is the caller's.

/// One report of a long operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// A new step began; the label is a short phrase such as `resolve packages`.
    Step {
        /// What is being done, lower case, no period.
        label: String,
    },
    /// The current step moved on.
    Bytes {
        /// Bytes done so far.
        done: u64,
        /// Bytes in all, where known.
        total: Option<u64>,
    },
}

/// Receives progress; called often, must be cheap.
pub type Sink<'a> = &'a (dyn Fn(Progress) + Send + Sync);
