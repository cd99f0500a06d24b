.PHONY: try test build

# Installs what is missing (asking before sudo), builds, and runs a command in a vm. Safe to repeat. The quicker of the
# two builds: what takes time in a vm's life is optimised in it too.
try:
	sh scripts/setup.sh run
	cargo build --quiet --package banger --package bangerd
	target/debug/banger run --rm -v -- uname -a

# Installs what the tests need, then runs every check. Safe to repeat.
test:
	sh scripts/setup.sh test
	cargo xtask ci

# The programs to install, as target/release/banger and target/release/bangerd.
build:
	sh scripts/setup.sh run
	cargo build --release --package banger --package bangerd
