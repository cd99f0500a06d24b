//! Work that blocks, on a thread of its own. A guest may have no thread left; the agent goes on then.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::oneshot;

/// Begins some work. What this returns is closed when the work has panicked.
///
/// # Errors
/// When there is no thread for it.
pub(crate) fn start<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (tell, told) = oneshot::channel();
    std::thread::Builder::new().spawn(move || drop(tell.send(work())))?;
    Ok(told)
}

/// Does some work that has to be done: without a thread for it, right here.
pub(crate) async fn finish(work: impl FnOnce() + Send + 'static) {
    let work = Arc::new(Mutex::new(Some(work)));
    let theirs = Arc::clone(&work);
    match start(move || take(&theirs)) {
        Ok(done) => drop(done.await),
        Err(_) => take(&work),
    }
}

fn take(work: &Mutex<Option<impl FnOnce()>>) {
    let work = work.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(work) = work {
        work();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn work_is_done_once() {
        let count = Arc::new(AtomicU32::new(0));
        let theirs = Arc::clone(&count);
        let work = move || {
            theirs.fetch_add(1, Ordering::Relaxed);
        };
        super::finish(work).await;
        assert_eq!(count.load(Ordering::Relaxed), 1);
        assert_eq!(super::start(|| 7).unwrap().await.unwrap(), 7);
    }
}
