//! The operations, what is there before, and what one that says it succeeded has promised.

use crate::world::World;

/// One operation.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// The owner has a kernel and an image.
    pub(crate) stocked: bool,
    /// Its steps are those of other operations.
    pub(crate) is_made_of_others: bool,
    /// Shell commands of the owner that make what is there before; run once.
    pub(crate) before: &'static str,
    /// Shell commands of the owner right before the operation.
    pub(crate) running: &'static str,
    /// The operation.
    pub(crate) does: &'static str,
    /// What holds when the operation has said that it succeeded.
    pub(crate) promise: fn(&World) -> Result<(), String>,
}

const CREATE: &str = "banger vm create --no-start --name one --image debian-bookworm-slim";
const LOAD: &str = "banger image pull --name tiny oci:layout:it";
const PRUNED: &str =
    "banger image pull --name tiny oci:layout:it; banger image delete tiny; banger image cache prune";
const RUN: &str = "banger vm run -d --name one --image debian-bookworm-slim";

pub(crate) const SCENARIOS: [Scenario; 13] = [
    Scenario {
        name: "create",
        stocked: true,
        is_made_of_others: false,
        before: "",
        running: "",
        does: CREATE,
        promise: |world| world.expect("created"),
    },
    Scenario {
        name: "start",
        stocked: true,
        is_made_of_others: false,
        before: CREATE,
        running: "",
        does: "banger vm start one",
        promise: |world| world.expect("running"),
    },
    Scenario {
        name: "first-run",
        stocked: true,
        is_made_of_others: true,
        before: "",
        // What is made once for a kernel is made in the operation.
        running: "rm -f .local/state/banger/kernels/*/initramfs-*",
        does: "banger vm run -d --name one --image debian-bookworm-slim",
        promise: |world| world.expect("running"),
    },
    Scenario {
        name: "run",
        stocked: true,
        is_made_of_others: true,
        before: "",
        running: "",
        does: "banger vm run --rm --name one --image debian-bookworm-slim -- true",
        promise: World::expect_none,
    },
    Scenario {
        name: "join",
        stocked: true,
        is_made_of_others: true,
        before: "",
        running: "",
        does: "banger vm run -d --name one --network shop --image debian-bookworm-slim",
        promise: |world| world.expect("running"),
    },
    Scenario {
        name: "stop",
        stocked: true,
        is_made_of_others: false,
        before: CREATE,
        running: "banger vm start one",
        does: "banger vm stop one",
        promise: |world| world.expect("stopped"),
    },
    Scenario {
        name: "restart",
        stocked: true,
        is_made_of_others: true,
        before: CREATE,
        running: "banger vm start one",
        does: "banger vm restart one",
        promise: |world| world.expect("running"),
    },
    Scenario {
        name: "delete",
        stocked: true,
        is_made_of_others: false,
        before: "",
        running: RUN,
        does: "banger vm delete --force one",
        promise: World::expect_none,
    },
    Scenario {
        name: "set",
        stocked: true,
        is_made_of_others: true,
        before: CREATE,
        running: "",
        does: "banger vm set --memory 300M one",
        promise: |world| world.expect("created"),
    },
    Scenario {
        name: "move",
        stocked: true,
        is_made_of_others: true,
        before: "banger vm create --no-start --name one --network shop --image debian-bookworm-slim",
        running: "",
        does: "banger vm set --network lab one",
        promise: |world| world.expect("created"),
    },
    Scenario {
        name: "recover",
        stocked: true,
        is_made_of_others: true,
        before: CREATE,
        // What an owner comes back to: a vm that runs, and one that was cut off.
        running:
            "banger vm run -d --name two --image debian-bookworm-slim; banger vm start one;
                  pkill -9 -u $(id -u) -f '[b]angerd serve';
                  pkill -9 -u $(id -u) -o -f '[b]angerd supervise'; mkdir ~/.local/state/banger/vms/.new-left",
        does: "banger vm list",
        promise: |_| Ok(()),
    },
    Scenario {
        name: "load",
        stocked: false,
        is_made_of_others: false,
        // The kernel is there, and nothing else.
        before: PRUNED,
        running: "",
        does: LOAD,
        promise: |world| world.expect_image("tiny"),
    },
    Scenario {
        name: "image-delete",
        stocked: false,
        is_made_of_others: false,
        before: LOAD,
        running: "",
        does: "banger image delete tiny",
        promise: World::expect_no_image,
    },
];
