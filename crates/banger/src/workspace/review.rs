//! A person looks through a guest's changes and says which to take.
//!
//! What is shown is what is taken: both come from contents that are on the host already. Answers are read from stdin,
//! a terminal or not, and as long as one is missing nothing is taken.

use super::collect::{Change, Changes};
use crate::context::Context;
use crate::stop::{Stop, failed, invalid};
use crate::streams::start_reader;
use crate::terminal::stdin_is_terminal;
use crate::text::escape;
use crate::transfer::on_thread;
use banger_wire::bytes::ByteString;
use banger_wire::error::WireError;
use std::collections::BTreeSet;
use tokio::sync::mpsc::Receiver;

/// Longest answer that is read; what is longer is none.
const ANSWER_LEN_MAX: usize = 4096;
const HELP: &str = "\
y - take this file
n - skip this file
a - take this file and all that follow
d - skip this file and all that follow
q - quit; nothing is taken at all
? - print this
";

/// What was answered about a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Take,
    Skip,
    TakeRest,
    SkipRest,
    Quit,
}

fn understand(line: &str) -> Option<Answer> {
    match line.trim().to_ascii_lowercase().as_str() {
        "y" | "yes" => Some(Answer::Take),
        "n" | "no" => Some(Answer::Skip),
        "a" | "all" => Some(Answer::TakeRest),
        "d" => Some(Answer::SkipRest),
        "q" | "quit" => Some(Answer::Quit),
        _ => None,
    }
}

/// Shows each change and drops those that are skipped.
///
/// # Errors
/// When an answer is missing or says to quit, when what is taken does not fit together, and those of git.
pub(crate) async fn review(context: &mut Context, mut changes: Changes) -> Result<Changes, Stop> {
    if changes.list.is_empty() {
        return Ok(changes);
    }
    let mut answers = Answers {
        chunks: start_reader().map_err(|error| failed("could not read the answers", &error))?,
        rest: Vec::new(),
    };
    let trees = on_thread(move || Ok((changes.trees()?, changes)));
    let trees = context.signals.unless(trees).await?;
    let trees = {
        changes = trees.1;
        trees.0
    };
    let total = changes.list.len();
    let mut taken = BTreeSet::new();
    for number in 0..total {
        let path = changes.list[number].path.clone();
        let (of, asked) = (trees.clone(), path.clone());
        let shown = on_thread(move || Ok((changes.diff_of(&of, &asked)?, changes)));
        let shown = context.signals.unless(shown).await?;
        changes = shown.1;
        context.ui.aside(&visible(&shown.0));
        let question = format!("({}/{total}) take `{}`? [y,n,a,d,q,?]", number + 1, lossy(&path));
        match ask(context, &mut answers, &question).await? {
            Answer::Take => _ = taken.insert(path),
            Answer::Skip => {}
            Answer::TakeRest => {
                taken.extend(changes.list[number..].iter().map(|change| change.path.clone()));
                break;
            }
            Answer::SkipRest => break,
            Answer::Quit => {
                context.ui.note("nothing was taken");
                return Err(Stop::Told);
            }
        }
    }
    changes.list.retain(|change| taken.contains(&change.path));
    fits(&changes)?;
    Ok(changes)
}

async fn ask(context: &mut Context, answers: &mut Answers, question: &str) -> Result<Answer, Stop> {
    loop {
        context.ui.question(question);
        let Some(line) = context.signals.unless(async { Ok(answers.next().await) }).await? else {
            context.ui.end_foreign_line();
            return Err(invalid("`--review` needs an answer for each file, and stdin has no more")
                .hinted(
                    "use it in a terminal, or write one of y, n, a, d and q in a line of stdin for each file",
                )
                .into());
        };
        if !stdin_is_terminal() {
            // Nobody's key has ended the line.
            context.ui.end_foreign_line();
        }
        match understand(&line) {
            Some(answer) => return Ok(answer),
            None => context.ui.aside(HELP),
        }
    }
}

/// The lines of stdin.
struct Answers {
    chunks: Receiver<Vec<u8>>,
    rest: Vec<u8>,
}

impl Answers {
    /// Returns the next line; none when there is none, or it is longer than any answer.
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.rest.iter().position(|&byte| byte == b'\n') {
                let line = self.rest.drain(..=end).collect::<Vec<u8>>();
                return Some(String::from_utf8_lossy(&line).into_owned());
            }
            if self.rest.len() > ANSWER_LEN_MAX {
                return None;
            }
            match self.chunks.recv().await {
                Some(chunk) => self.rest.extend(chunk),
                // A last line without its end was not meant to be sent yet.
                None => return None,
            }
        }
    }
}

fn lossy(path: &ByteString) -> String {
    path.as_os_str().to_string_lossy().into_owned()
}

/// A diff with nothing in it that steers a terminal. Tabs stay, as there is hardly a source file without.
fn visible(diff: &[u8]) -> String {
    let text = String::from_utf8_lossy(diff);
    let line = |line: &str| line.split('\t').map(escape).collect::<Vec<_>>().join("\t");
    let mut shown: String = text.split('\n').map(line).collect::<Vec<_>>().join("\n");
    if !shown.ends_with('\n') {
        shown.push('\n');
    }
    shown
}

/// Refuses a file under a name that has to be a directory for another.
fn fits(changes: &Changes) -> Result<(), WireError> {
    let mut there: BTreeSet<&ByteString> = changes.base.files.keys().collect();
    for Change { path, after, .. } in &changes.list {
        if after.is_some() {
            there.insert(path)
        } else {
            there.remove(path)
        };
    }
    for path in &there {
        let ends = path.0.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        for parent in ends.map(|end| ByteString(path.0[..end].to_vec())) {
            if there.contains(&parent) {
                let message = format!(
                    "`{}` and `{}` can't both be there",
                    escape(&lossy(&parent)),
                    escape(&lossy(path))
                );
                return Err(invalid(message).hinted("take both changes, or skip both"));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_few_and_clear() {
        for (line, answer) in [
            ("y\n", Some(Answer::Take)),
            (" YES \n", Some(Answer::Take)),
            ("n\n", Some(Answer::Skip)),
            ("a", Some(Answer::TakeRest)),
            ("d", Some(Answer::SkipRest)),
            ("q", Some(Answer::Quit)),
            ("", None),
            ("\n", None),
            ("yy", None),
            ("yes please", None),
        ] {
            assert_eq!(understand(line), answer, "{line:?}");
        }
    }

    #[tokio::test]
    async fn a_line_without_an_end_is_no_answer() {
        let (send, chunks) = tokio::sync::mpsc::channel(4);
        let mut answers = Answers { chunks, rest: Vec::new() };
        for chunk in [&b"y\nn"[..], b"\n\na"] {
            send.send(chunk.to_vec()).await.unwrap();
        }
        drop(send);
        for expected in ["y\n", "n\n", "\n"] {
            assert_eq!(answers.next().await.as_deref(), Some(expected));
        }
        assert_eq!(answers.next().await, None);
    }

    #[test]
    fn a_diff_steers_no_terminal() {
        assert_eq!(visible(b"+a\tb\r\n+\x1b[2J\xe2\x80\xae\n"), "+a\tb\\r\n+\\x1b[2J\\u{202e}\n");
        assert_eq!(visible(b"+x"), "+x\n");
    }
}
