.PHONY: test

# Installs what the tests need, then runs every check. Safe to repeat.
test:
	sh scripts/setup.sh test
	cargo xtask ci
