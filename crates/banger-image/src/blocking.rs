//! Work that blocks, beside a runtime's other tasks.
//!
//! As `tokio::task::spawn_blocking`, on a thread of its own each time: that one panics when the host has no thread left.
//! Making a thread takes some 20 µs, which is nothing to what is done here.

use std::future::Future;
use std::io;
use std::pin::Pin;
use tokio::sync::oneshot;

/// The result of some work, once it is there.
pub type Pending<T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send>>;

/// Begins some work. It goes on when what this returns is dropped.
///
/// The result is an error when there is no thread for it, or it has panicked.
pub fn start<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Pending<T> {
    let (tell, told) = oneshot::channel();
    let thread = std::thread::Builder::new().name("blocking".to_owned()).spawn(move || {
        // Whoever wanted to know may be gone.
        let _ = tell.send(work());
    });
    let started = thread.map_err(|error| io::Error::new(error.kind(), format!("start a thread: {error}")));
    Box::pin(async move {
        started?;
        told.await.map_err(|_| io::Error::other("the work has panicked"))
    })
}

#[cfg(test)]
mod tests {
    use super::start;

    #[tokio::test]
    async fn work_is_done_and_a_panic_is_an_error() {
        assert_eq!(start(|| 7).await.unwrap(), 7);
        let error = start(|| {
            if true {
                panic!("on purpose")
            }
        })
        .await
        .unwrap_err();
        assert_eq!(error.to_string(), "the work has panicked");
    }
}
