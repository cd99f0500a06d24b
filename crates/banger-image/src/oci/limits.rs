//! How much an image may be.

/// Bounds on what is read from a registry and on what it unpacks to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes all layers may unpack to.
    pub unpacked_bytes: u64,
    /// Entries of all layers.
    pub entries: u64,
    /// How many times its compressed size a layer may unpack to.
    pub ratio: u64,
    /// Bytes of each layer for which the ratio doesn't count: a file of zeroes compresses a thousandfold.
    pub ratio_free_bytes: u64,
    /// Layers of one image.
    pub layers: usize,
    /// Bytes of a manifest, an index or a configuration.
    pub document_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // The largest images in use, of models and compilers, have about a tenth.
            unpacked_bytes: 256 << 30,
            // A full desktop installation has half a million.
            entries: 4_000_000,
            ratio: 200,
            ratio_free_bytes: 1 << 30,
            // Docker's own limit is 127.
            layers: 512,
            // The distribution specification asks registries for this much.
            document_bytes: 4 << 20,
        }
    }
}
