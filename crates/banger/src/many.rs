//! One request for each of several things, all at once, each reported as it ends.

use crate::context::{Context, expect_outcome};
use crate::stop::{Ended, Stop, failed};
use crate::text::escape;
use banger_wire::daemon::{Event, Request};
use banger_wire::error::{ErrorCode, WireError};
use std::collections::BTreeSet;

/// What is done, as a verb, and when it is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Doing {
    pub(crate) verb: &'static str,
    pub(crate) done: &'static str,
}

/// A thing and what is asked about it, one request after another while they succeed.
struct Job {
    name: String,
    requests: Vec<Request>,
}

/// Sends one request for each name and says `done` of each.
pub(crate) async fn each<N: Ord + Clone + ToString>(
    context: &mut Context,
    names: Vec<N>,
    done: &str,
    request: impl Fn(N) -> Request,
) -> Ended {
    let job = |name: N| Job { name: name.to_string(), requests: vec![request(name)] };
    let jobs = BTreeSet::from_iter(names).into_iter().map(job).collect();
    if perform(context, jobs, done, |_, error| error).await? { Err(Stop::Told) } else { Ok(0) }
}

/// Sends requests for each vm, whatever its references are; two of the same vm count once. A failure names its vm.
pub(crate) async fn each_vm(
    context: &mut Context,
    references: Vec<String>,
    doing: Doing,
    requests: impl Fn(String) -> Vec<Request>,
) -> Ended {
    let mut told = false;
    let mut jobs = Vec::new();
    let references = BTreeSet::from_iter(references);
    // A single one is looked up by the request itself.
    if references.len() == 1 {
        let job = |name: String| Job { name: name.clone(), requests: requests(name) };
        jobs.extend(references.into_iter().map(job));
    } else {
        let mut vms = Vec::new();
        for vm in references {
            let found = context.ask(Request::VmShow { vm }).await;
            match found.and_then(|outcome| expect_outcome!(outcome, Vm)) {
                Ok(vm) => vms.push((vm.name, vm.id)),
                Err(Stop::Failed(error)) => {
                    context.ui.error(&error);
                    told = true;
                }
                Err(stop) => return Err(stop),
            }
        }
        vms.sort();
        vms.dedup();
        let job = |(name, id): (_, _)| Job {
            name: ToString::to_string(&name),
            requests: requests(ToString::to_string(&id)),
        };
        jobs.extend(vms.into_iter().map(job));
    }
    let name_it = |name: &str, error: WireError| named(doing.verb, name, error);
    told |= perform(context, jobs, doing.done, name_it).await?;
    if told { Err(Stop::Told) } else { Ok(0) }
}

/// An error that says which vm it is about.
fn named(verb: &str, vm: &str, error: WireError) -> WireError {
    // What can't be found is named anyway, and may not be a name at all.
    let is_named = error.message.contains(&format!("`{vm}`")) || error.code == ErrorCode::NotFound;
    if is_named || error.code == ErrorCode::Invalid {
        return error;
    }
    let causes = std::iter::once(error.message).chain(error.causes).collect();
    WireError { message: format!("could not {verb} vm `{vm}`"), causes, ..error }
}

/// Does all jobs at once; true when one of them failed, which was told.
async fn perform(
    context: &mut Context,
    jobs: Vec<Job>,
    done: &str,
    explain: impl Fn(&str, WireError) -> WireError,
) -> Result<bool, Stop> {
    let several = jobs.len() > 1;
    let mut tasks = tokio::task::JoinSet::new();
    for job in jobs {
        let client = context.client.clone();
        tasks.spawn(async move {
            let (mut result, mut warnings) = (Ok(()), Vec::new());
            for request in job.requests {
                let mut observe = |event: &Event| {
                    if let Event::Warning { text } = event {
                        warnings.push(text.clone());
                    }
                };
                result = client.ask(request, &mut observe).await.map(drop);
                if result.is_err() {
                    break;
                }
            }
            (job.name, warnings, result)
        });
    }
    let mut told = false;
    while let Some(joined) = context.signals.unless(async { Ok(tasks.join_next().await) }).await? {
        let (name, warnings, result) =
            joined.map_err(|error| Stop::from(failed("a request did not end as it should", &error)))?;
        for text in warnings {
            context.ui.warning(&if several { format!("{name}: {text}") } else { text });
        }
        match result {
            Ok(()) => context.ui.data(&format!("{done} {}\n", escape(&name)))?,
            Err(error) => {
                context.ui.error(&explain(&name, error));
                told = true;
            }
        }
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::named;
    use banger_wire::error::{ErrorCode, WireError};

    #[test]
    fn a_failure_names_its_vm_once() {
        let of = |message: &str| named("stop", "web", WireError::new(ErrorCode::Failed, message));
        assert_eq!(of("vm `web` has not ended").message, "vm `web` has not ended");
        let error = of("connection failed");
        assert_eq!(
            (error.message.as_str(), &error.causes[..]),
            ("could not stop vm `web`", &["connection failed".to_owned()][..])
        );
    }
}
