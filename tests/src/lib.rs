//! Rules about the tree, as tests (`tests/architecture.rs`).
