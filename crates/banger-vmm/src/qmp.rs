//! QMP, QEMU's control protocol.
