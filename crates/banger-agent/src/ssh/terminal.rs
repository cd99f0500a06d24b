//! A client's terminal: what it is called, how large it is, and which keys it has (RFC 4254, section 8).

use super::fields::Fields;
use banger_wire::exec::TerminalSize;
use rustix::termios::{InputModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};
use std::os::fd::OwnedFd;

/// The modes that have an argument; any other ends the list.
const WITH_ARGUMENT: std::ops::Range<u8> = 1..160;
const IUTF8: u8 = 42;
/// A key that is not there.
const NO_KEY: u32 = 255;
/// What the kernel takes for one.
const DISABLED: u8 = 0;
/// The keys, each with the number it has in a list of modes. Everything else about a new terminal is as it should be.
const KEYS: [(u8, SpecialCodeIndex); 8] = [
    (1, SpecialCodeIndex::VINTR),
    (2, SpecialCodeIndex::VQUIT),
    (3, SpecialCodeIndex::VERASE),
    (4, SpecialCodeIndex::VKILL),
    (5, SpecialCodeIndex::VEOF),
    (8, SpecialCodeIndex::VSTART),
    (9, SpecialCodeIndex::VSTOP),
    (10, SpecialCodeIndex::VSUSP),
];

/// A terminal that was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Terminal {
    pub(crate) name: String,
    pub(crate) size: TerminalSize,
    modes: Vec<(u8, u32)>,
}

impl Terminal {
    /// Reads the fields of a `pty-req`.
    pub(crate) fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        let name = fields.text()?.to_owned();
        let size = parse_size(fields)?;
        let mut rest = Fields::of(fields.bytes()?);
        let mut modes = Vec::new();
        while let Some(mode) = rest.byte().filter(|mode| WITH_ARGUMENT.contains(mode)) {
            modes.push((mode, rest.number()?));
        }
        Some(Self { name, size, modes })
    }

    /// Gives a new terminal the client's keys. One that can't be given them works as well as it can.
    pub(crate) fn apply(&self, terminal: &OwnedFd) {
        let Ok(mut now) = tcgetattr(terminal) else { return };
        for &(mode, value) in &self.modes {
            if let Some(&(_, key)) = KEYS.iter().find(|(number, _)| *number == mode) {
                now.special_codes[key] = if value == NO_KEY { DISABLED } else { value as u8 };
            } else if mode == IUTF8 {
                now.input_modes.set(InputModes::IUTF8, value != 0);
            }
        }
        let _ = tcsetattr(terminal, OptionalActions::Now, &now);
    }
}

/// Reads a size: columns and rows, and the same in pixels.
pub(crate) fn parse_size(fields: &mut Fields<'_>) -> Option<TerminalSize> {
    let (cols, rows) = (fields.number()?, fields.number()?);
    fields.number().zip(fields.number())?;
    let fitting = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
    Some(TerminalSize { rows: fitting(rows), cols: fitting(cols) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ssh::fields::Packet;

    #[test]
    fn terminals_are_read_and_nonsense_is_none() {
        let modes = Packet::part().byte(3).number(8).byte(IUTF8).number(1).byte(0).byte(9);
        let packet =
            Packet::part().bytes("xterm").number(80).number(70_000).number(0).number(0).bytes(modes.0);
        let terminal = Terminal::parse(&mut Fields::of(&packet.0)).unwrap();
        assert_eq!((terminal.size.cols, terminal.size.rows), (80, u16::MAX));
        assert_eq!(terminal.modes, [(3, 8), (IUTF8, 1)]);
        for len in 0..packet.0.len() - 7 {
            assert_eq!(Terminal::parse(&mut Fields::of(&packet.0[..len])), None, "{len}");
        }
    }
}
