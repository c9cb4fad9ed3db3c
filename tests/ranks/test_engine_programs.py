"""Short programs that once had other numbers than torch, as `test_random_programs.py` found them. Each name is the promise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rig.programs import problem_of
from rig.settings import Setting

# stage, where optimizer states rest, where weights rest, ranks
PLACES = {
    "0": Setting(0, ranks=2),
    "0 alone": Setting(0, ranks=1),
    "1": Setting(1, ranks=3),
    "2": Setting(2, ranks=2),
    "2-cpu": Setting(2, "cpu", ranks=2),
    "3": Setting(3, ranks=2),
    "3-cpu": Setting(3, "cpu", "cpu", ranks=2),
    "3-cpu alone": Setting(3, "cpu", "cpu", ranks=1),
    "3-nvme": Setting(3, "nvme", "nvme", ranks=2),
}

PROGRAMS = {
    "norms of gradients in fp64 are in fp64": (
        {"double": True, "clipping": 0.05},
        [
            ("backward", 1, "plain"),
            ("clip", "blocks.2", "1.0", 0.01),
            ("clip", "", "2.0", 0.01),
            ("clip", "", "inf", 0.01),
            ("read", "", "norm"),
            ("step", 0),
        ],
    ),
    "frozen weights are clipped as having no gradient": (
        {"frozen": ("blocks.2", "head")},
        [
            ("backward", 1, "plain"),
            ("clip", "blocks.2", "2.0", 0.01),
            ("clip", "head", "value", 0.01),
            ("clip", "blocks", "1.0", 0.01),
            ("step", 0),
        ],
    ),
    "gradients that no optimizer steps are in the norm": (
        {"frozen": ("blocks.1",), "knows": False},
        [
            ("thaw", "blocks.1"),
            ("backward", 1, "plain"),
            ("clip", "", "2.0", 0.01),
            ("clip", "blocks.1", "value", 0.001),
            ("step", 0),
            ("zero", 0),
            ("backward", 2, "plain"),
            ("clip", "", "inf", 0.01),
            ("read", "blocks.1", "norm"),
            ("step", 0),
        ],
    ),
    "a backward that failed leaves no gradient behind": (
        {"model": "reentrant", "accumulate": 2},
        [
            ("backward", 1, "plain"),
            ("backward", 2, "plain"),
            ("backward", 3, "input_gradients"),  # re-entrant checkpointing refuses autograd.grad
            ("step", 0),
            ("read", "", "norm"),
            ("backward", 4, "plain"),
            ("backward", 5, "plain"),
            ("step", 0),
        ],
    ),
    "a backward that begins in a recomputation leaves nothing half gathered": (
        {"model": "recomputed"},
        [
            ("backward", 1, "plain"),
            ("step", 0),
            ("zero", 0),
            ("backward", 2, "caught_alone"),
            ("look", ""),
            ("step", 0),
        ],
    ),
    "zero_grad behind an interrupted backward acts by what that was": (
        {},
        [
            ("backward", 1, "plain"),
            ("step", 0),
            ("zero", 0),
            ("backward", 2, "interrupted_backward", True),
            ("zero", 0, False),
            ("backward", 3, "plain"),
            ("clip", "blocks", "inf", 0.01),
            ("backward", 4, "interrupted_backward"),
            ("zero", 0),
            ("backward", 5, "interrupted"),
            ("step", 0),
        ],
    ),
    "what was thawed is trained behind a backward that records a graph": (
        {"frozen": ("blocks.1",)},
        [
            ("backward", 1, "plain"),
            ("step", 0),
            ("thaw", "blocks.1"),
            ("backward", 2, "penalised"),
            ("step", 0),
            ("zero", 0),
            ("backward", 3, "penalised"),
            ("clip", "", "2.0", 0.01),
            ("step", 0),
        ],
    ),
    "a gradient that is set on a thawed weight needs no backward": (
        {"frozen": ("blocks.1", "first"), "optimizers": ("sgd", "adamw")},
        [
            ("thaw", "bias"),
            ("give", "", -0.02),
            ("step", 0),
            ("step", 1),
            ("zero", 0),
            ("zero", 1),
            ("backward", 1, "plain"),
            ("thaw", "blocks.1.up"),
            ("give", "blocks.1.up", 0.01),
            ("clip", "", "2.0", 0.01),
            ("step", 0),
            ("step", 1),
        ],
    ),
    "and one that was dropped or made zero before a step is that": (
        {"frozen": ("blocks.1", "first", "head"), "accumulate": 1},
        [
            ("thaw", "blocks.1"),
            ("give", "blocks.1", 0.01),
            ("zero", 0),
            ("step", 0),
            ("thaw", "first"),
            ("give", "first", 0.01),
            ("zero", 0, False),
            ("step", 0),
            ("thaw", "head"),
            ("give", "head", 0.01),
            ("backward", 1, "plain", True),
            ("zero", 0),
            ("backward", 2, "plain"),
            ("step", 0),
        ],
    ),
    "a checkpoint with other parameter groups is refused": (
        {"frozen": ("blocks.1", "head"), "knows": False},
        [
            ("backward", 1, "plain"),
            ("step", 0),
            ("save", "a", True),
            ("add_group", 0, "head", 0.01),
            ("load", "a", False),
            ("backward", 2, "plain"),
            ("step", 0),
            ("save", "b", True),
            ("load", "b", False),
            ("backward", 3, "plain"),
            ("step", 0),
        ],
    ),
    "an evaluation in inference mode changes nothing": (
        {},
        [
            ("evaluate", 1, True),
            ("backward", 2, "plain"),
            ("step", 0),
            ("evaluate", 3, True),
            ("write", "head", "mul_", 0.5),
            ("backward", 4, "plain"),
            ("step", 0),
        ],
    ),
    "gradients are left as they were clipped by the configuration": (
        {"clipping": 0.05, "double": True, "optimizers": ("sgd", "adamw")},
        [
            ("backward", 1, "plain"),
            ("step", 1),
            ("read", "", "clone"),
            ("backward", 2, "plain"),
            ("step", 0),
            ("step", 0),
            ("step", 1),
            ("read", "", "clone"),
        ],
    ),
    "and so are those of an optimizer that has its buffers alone": (
        {"clipping": 0.05, "double": True},
        [
            ("backward", 1, "plain"),
            ("step", 0),
            ("step", 0),
            ("backward", 2, "plain"),
            ("step", 0),
            ("read", "", "sum"),
        ],
    ),
    "a micro-batch may be dropped, the last one before a step too": (
        {"accumulate": 3},
        [
            ("backward", 1, "plain"),
            ("backward", 2, "skipped"),
            ("backward", 3, "plain"),
            ("step", 0),
            ("zero", 0),
            ("backward", 4, "plain"),
            ("backward", 5, "plain"),
            ("backward", 6, "skipped"),
            ("clip", "", "2.0", 0.01),
            ("step", 0),
            ("zero", 0),
            ("backward", 7, "skipped"),
            ("backward", 8, "skipped"),
            ("backward", 9, "skipped"),
            ("step", 0),
            ("backward", 10, "plain"),
            ("step", 0),
            ("backward", 11, "plain"),
            ("backward", 12, "plain"),
            ("step", 0),
        ],
    ),
    "gradients of the script's own are stepped behind sums that it dropped": (
        {"accumulate": 3, "optimizers": ("adamw",)},
        [
            ("backward", 1, "plain"),
            ("backward", 2, "plain"),
            ("backward", 3, "skipped"),
            ("zero_model", True),
            ("give", "blocks.1", 0.01),
            ("step", 0),
            ("zero", 0),
            ("backward", 4, "plain"),
            ("give", "bias", 0.01),
            ("step", 0),
            ("backward", 5, "plain"),
            ("backward", 6, "plain"),
            ("step", 0),
        ],
    ),
    "gradients are made zero behind an interrupted backward": (
        {"accumulate": 2},
        [
            ("backward", 10, "interrupted_backward"),
            ("zero_model", False),
            ("backward", 11, "plain"),
            ("step", 0),
        ],
    ),
    "and where sums of the next step lie over those of a step that was not taken": (
        {"accumulate": 2, "looks": False},
        [
            ("backward", 1, "plain"),
            ("backward", 2, "plain"),
            ("backward", 3, "plain"),
            ("change", "", "mul_", 0.5),
            ("change", "blocks.1", "part", 0.5),
            ("zero_model", False),
            ("backward", 4, "plain"),
            ("step", 0),
        ],
    ),
    "parts are read of a gradient that the script has set": (
        {},
        [
            ("backward", 1, "plain"),
            ("give", "bias", -0.02),
            ("read", "bias", "part"),
            ("step", 0),
        ],
    ),
    "a backward that comes to thawed weights alone is averaged": (
        {"frozen": ("blocks.0", "first", "blocks.1"), "optimizers": ("adamw",)},
        [
            ("thaw", "first"),
            ("backward", 7, "caught_alone"),
            ("step", 0),
            ("zero", 0),
            ("backward", 8, "plain"),
            ("step", 0),
        ],
    ),
}


@pytest.mark.thinned(2)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("promise", PROGRAMS)
def test_found(world, promise, place):
    settings, program = PROGRAMS[promise]
    assert problem_of(world, replace(PLACES[place], **settings), program) is None
