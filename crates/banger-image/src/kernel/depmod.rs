//! What `depmod` does: the dependency order of a module tree and the index files `modprobe` reads.
//!
//! Everything is computed from what the modules say about themselves. `modules.devname` is left out on purpose: with it
//! systemd's kmod-static-nodes.service starts, and fails in images without kmod.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;

use thiserror::Error;

use super::kmod_index::KmodIndex;
use super::module::{Module, name_of, normalise_alias};

/// The deepest chain of dependencies followed; real ones end below 12.
const DEPTH_MAX: usize = 64;

/// The tree's dependencies make no sense.
#[derive(Debug, Error)]
pub enum DepmodError {
    /// A module needs one that is neither in the tree nor built in.
    #[error("module `{}` needs `{}`, which is not in the tree", .module.escape_debug(), .needs.escape_debug())]
    Missing {
        /// The module.
        module: String,
        /// What it needs.
        needs: String,
    },
    /// A chain of dependencies is endless, or as good as.
    #[error("the dependencies of module `{}` are nested too deeply", .0.escape_debug())]
    TooDeep(String),
}

/// A module tree whose dependencies are known.
#[derive(Debug)]
pub struct ModuleTree {
    /// In the order of `modules.order`, which is the order in which equally good matches are tried.
    modules: Vec<Module>,
    by_name: HashMap<String, usize>,
    builtin: BTreeMap<String, Vec<String>>,
}

impl ModuleTree {
    /// Makes a tree of modules and the texts that come with them: `modules.order`, `modules.builtin` and
    /// `modules.builtin.modinfo`.
    pub fn new(mut modules: Vec<Module>, order: &str, builtin: &str, modinfo: &[u8]) -> Self {
        let rank: HashMap<String, usize> =
            order.lines().enumerate().filter_map(|(n, line)| Some((name_of(line)?, n))).collect();
        modules.sort_by(|a, b| {
            let key = |m: &Module| rank.get(&m.name).copied().unwrap_or(usize::MAX);
            key(a).cmp(&key(b)).then_with(|| a.path.cmp(&b.path))
        });
        let by_name = modules.iter().enumerate().rev().map(|(n, module)| (module.name.clone(), n)).collect();
        let mut built: BTreeMap<String, Vec<String>> =
            builtin.lines().filter_map(|line| Some((name_of(line)?, Vec::new()))).collect();
        for line in modinfo.split(|b| *b == 0) {
            let text = std::str::from_utf8(line).unwrap_or("");
            let Some((name, alias)) = text.split_once(".alias=") else { continue };
            if let Some(aliases) = built.get_mut(&name.replace('-', "_")) {
                aliases.push(normalise_alias(alias));
            }
        }
        Self { modules, by_name, builtin: built }
    }

    /// Returns a module of the tree by name.
    pub fn get(&self, name: &str) -> Option<&Module> {
        self.by_name.get(name).map(|n| &self.modules[*n])
    }

    /// Whether the kernel has it built in.
    pub fn is_builtin(&self, name: &str) -> bool {
        self.builtin.contains_key(name)
    }

    /// Lists what must be loaded for `names`, in load order; names that are built in or don't exist are left out.
    pub fn load_order(&self, names: &[&str]) -> Result<Vec<&Module>, DepmodError> {
        let (mut seen, mut order) = (HashSet::new(), Vec::new());
        for name in names {
            if self.get(name).is_some() {
                self.visit(name, true, 0, &mut seen, &mut order)?;
            }
        }
        Ok(order.into_iter().map(|n| &self.modules[n]).collect())
    }

    /// Appends a module after everything it needs.
    fn visit(
        &self,
        name: &str,
        soft: bool,
        depth: usize,
        seen: &mut HashSet<usize>,
        order: &mut Vec<usize>,
    ) -> Result<(), DepmodError> {
        if depth > DEPTH_MAX {
            return Err(DepmodError::TooDeep(name.to_owned()));
        }
        let Some(&at) = self.by_name.get(name) else { return Ok(()) };
        if !seen.insert(at) {
            return Ok(());
        }
        let module = &self.modules[at];
        for needs in &module.depends {
            if !self.by_name.contains_key(needs) && !self.is_builtin(needs) {
                return Err(DepmodError::Missing { module: name.to_owned(), needs: needs.clone() });
            }
            self.visit(needs, soft, depth + 1, seen, order)?;
        }
        if soft {
            for first in module.softdeps.iter().flat_map(|line| soft_pre(line)) {
                self.visit(&first.replace('-', "_"), soft, depth + 1, seen, order)?;
            }
        }
        order.push(at);
        Ok(())
    }

    /// Renders all index files, by name.
    pub fn render(&self) -> Result<BTreeMap<&'static str, Vec<u8>>, DepmodError> {
        let (mut dep, mut alias, mut symbols, mut soft) =
            (String::new(), String::new(), String::new(), String::new());
        let mut dep_index = KmodIndex::default();
        let (mut alias_index, mut symbol_index) = (KmodIndex::default(), KmodIndex::default());
        alias.push_str("# Aliases extracted from modules themselves.\n");
        symbols.push_str("# Aliases for symbols, used by symbol_request().\n");
        soft.push_str("# Soft dependencies extracted from modules themselves.\n");
        // Writing to a String can't fail.
        for (priority, module) in (0u32..).zip(&self.modules) {
            let line = self.dep_line(module)?;
            let _ = writeln!(dep, "{line}");
            dep_index.add(&module.name, &line, priority);
            for pattern in &module.aliases {
                let _ = writeln!(alias, "alias {pattern} {}", module.name);
                alias_index.add(pattern, &module.name, priority);
            }
            for symbol in &module.symbols {
                let _ = writeln!(symbols, "alias symbol:{symbol} {}", module.name);
                symbol_index.add(&format!("symbol:{symbol}"), &module.name, priority);
            }
            for line in &module.softdeps {
                let _ = writeln!(soft, "softdep {} {line}", module.name);
            }
        }
        let (mut builtin_index, mut builtin_alias) = (KmodIndex::default(), KmodIndex::default());
        for (priority, (name, aliases)) in (0u32..).zip(&self.builtin) {
            builtin_index.add(name, "", priority);
            for pattern in aliases {
                builtin_alias.add(pattern, name, priority);
            }
        }
        Ok(BTreeMap::from([
            ("modules.dep", dep.into_bytes()),
            ("modules.dep.bin", dep_index.render()),
            ("modules.alias", alias.into_bytes()),
            ("modules.alias.bin", alias_index.render()),
            ("modules.symbols", symbols.into_bytes()),
            ("modules.symbols.bin", symbol_index.render()),
            ("modules.softdep", soft.into_bytes()),
            ("modules.builtin.bin", builtin_index.render()),
            ("modules.builtin.alias.bin", builtin_alias.render()),
        ]))
    }

    /// `path: path path…`, what it needs in the reverse of the load order, as modprobe expects it.
    fn dep_line(&self, module: &Module) -> Result<String, DepmodError> {
        let (mut seen, mut order) = (HashSet::new(), Vec::new());
        self.visit(&module.name, false, 0, &mut seen, &mut order)?;
        let mut line = format!("{}:", module.path);
        for needed in order.iter().rev().map(|n| &self.modules[*n]).filter(|m| m.name != module.name) {
            line.push(' ');
            line.push_str(&needed.path);
        }
        Ok(line)
    }
}

/// The names after `pre:` in a soft dependency.
fn soft_pre(line: &str) -> impl Iterator<Item = &str> {
    let mut pre = false;
    line.split_whitespace().filter(move |word| {
        match *word {
            "pre:" => pre = true,
            "post:" => pre = false,
            _ => return pre,
        }
        false
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str, depends: &[&str], softdep: &str) -> Module {
        Module {
            name: name_of(path).unwrap(),
            path: path.into(),
            depends: depends.iter().map(|d| (*d).into()).collect(),
            aliases: vec![format!("alias-{path}")],
            softdeps: if softdep.is_empty() { vec![] } else { vec![softdep.into()] },
            symbols: vec![],
        }
    }

    fn tree() -> ModuleTree {
        let modules = vec![
            module("kernel/a/virtio_net.ko.xz", &["net_failover", "virtio"], ""),
            module("kernel/a/net_failover.ko.xz", &["failover"], ""),
            module("kernel/b/failover.ko.xz", &[], ""),
            module("kernel/c/erofs.ko.xz", &[], "pre: crc-x y post: z"),
            module("kernel/c/crc-x.ko.xz", &[], ""),
            module("kernel/c/z.ko.xz", &[], ""),
        ];
        let order = "kernel/c/z.ko\nkernel/a/virtio_net.ko\n";
        ModuleTree::new(
            modules,
            order,
            "kernel/v/virtio.ko\n",
            b"virtio.alias=virtio-a\0virtio.license=GPL\0",
        )
    }

    #[test]
    fn load_order_has_needs_first() {
        let tree = tree();
        let names = |wanted: &[&str]| {
            tree.load_order(wanted).unwrap().iter().map(|m| m.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(&["virtio_net"]), ["failover", "net_failover", "virtio_net"]);
        assert_eq!(names(&["failover", "absent", "virtio", "net_failover"]), ["failover", "net_failover"]);
        assert_eq!(names(&["erofs"]), ["crc_x", "erofs"]);
    }

    #[test]
    fn index_files() {
        let files = tree().render().unwrap();
        let dep = String::from_utf8(files["modules.dep"].clone()).unwrap();
        assert!(dep.starts_with("kernel/c/z.ko.xz:\nkernel/a/virtio_net.ko.xz: kernel/a/net_failover.ko.xz kernel/b/failover.ko.xz\n"), "{dep}");
        let soft = String::from_utf8(files["modules.softdep"].clone()).unwrap();
        assert!(soft.contains("softdep erofs pre: crc-x y post: z\n"));
        assert!(!files.contains_key("modules.devname"));
    }

    #[test]
    fn missing_and_circular_needs() {
        let tree = ModuleTree::new(vec![module("a.ko", &["nowhere"], "")], "", "", b"");
        assert!(matches!(tree.render(), Err(DepmodError::Missing { .. })));
        let modules = vec![module("a.ko", &["b"], ""), module("b.ko", &["a"], "")];
        let tree = ModuleTree::new(modules, "", "", b"");
        assert_eq!(tree.load_order(&["a"]).unwrap().len(), 2);
        let modules =
            (0..500).map(|n| module(&format!("m{n}.ko"), &[&format!("m{}", (n + 1) % 500)], "")).collect();
        assert!(matches!(ModuleTree::new(modules, "", "", b"").render(), Err(DepmodError::TooDeep(_))));
    }
}
