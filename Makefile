.PHONY: try test build

# Installs what is missing (asking before sudo), builds, and runs a command in a vm. Safe to repeat.
try: build
	target/release/banger run --rm -v -- uname -a

# Installs what the tests need, then runs every check. Safe to repeat.
test:
	sh scripts/setup.sh test
	cargo xtask ci

build:
	sh scripts/setup.sh run
	cargo build --release --quiet --package banger --package bangerd
