"""Every keyword of accelerate's, in its place: a script that names arguments runs with the one import changed."""

import inspect

import pytest

import shardwise
import shardwise.tracking
from shardwise.names.table import ROWS
from shardwise.run import local_sgd, memory_fit
from shardwise.run.logging import get_logger

accelerate = pytest.importorskip("accelerate")

# What is not taken, by owner and keyword, with the reason.
NOT_TAKEN = {
    ("PartialState.destroy_process_group", "group"): "the groups of a run end together",
}
# Behind *objects a place is a keyword's alone, so that their order says nothing.
_APART = ("AcceleratorState", "DeepSpeedPlugin")  # their arguments are compared where they are made


def keywords(function):
    """Names of what can be given by name, in order."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    # One of accelerate's methods is static.
    return [p.name for p in parameters if p.kind not in kinds and p.name != "self"]


def pairs():
    """(name, accelerate's, ours) of every public function, constructor and method that both have."""
    from accelerate import local_sgd as their_local_sgd
    from accelerate import logging as their_logging
    from accelerate import tracking as their_tracking
    from accelerate import utils

    homes = [(name, shardwise, name) for name in shardwise.__all__]
    homes += [(name, shardwise.tracking, name) for name in shardwise.tracking.__all__]
    homes += [(name, memory_fit, name) for name in ("clear_device_cache", "should_reduce_batch_size")]
    homes += [("LocalSGD", local_sgd, "LocalSGD")]
    theirs = (accelerate, utils, utils.memory, their_tracking, their_local_sgd)
    for name, home, own in homes:
        found = next((getattr(module, name) for module in theirs if hasattr(module, name)), None)
        refused = name in ROWS and ROWS[name].verdict == "refused"
        if (
            callable(found)
            and not refused
            and not inspect.ismodule(found)
            and not name.isupper()
            and name not in _APART
        ):
            yield name, found, getattr(home, own)
    yield "get_logger", their_logging.get_logger, get_logger


def methods(name, found, own):
    yield name, found, own
    if inspect.isclass(found) and name not in ("DistributedType", "LoggerType"):
        for method in dir(found):
            theirs, ours = getattr(found, method), getattr(own, method, None)
            if not method.startswith("_") and inspect.isroutine(theirs) and callable(ours):
                yield f"{name}.{method}", theirs, ours


ALL = {name: (theirs, ours) for pair in pairs() for name, theirs, ours in methods(*pair)}


def test_the_table_covers_what_scripts_call():
    assert len(ALL) > 120
    for name in ("Accelerator", "Accelerator.reduce", "skip_first_batches", "send_to_device", "WandBTracker.log_table"):
        assert name in ALL


@pytest.mark.parametrize("name", ALL)
def test_keywords_are_accelerates_in_its_order(name):
    if name in ("DistributedType", "LoggerType"):
        return
    theirs, ours = (keywords(function) for function in ALL[name])
    missing = [keyword for keyword in theirs if keyword not in ours and (name, keyword) not in NOT_TAKEN]
    assert not missing, f"{name} takes {ours}"
    wanted = [keyword for keyword in theirs if keyword in ours]
    if not any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in inspect.signature(ALL[name][1]).parameters.values()):
        assert ours[: len(wanted)] == wanted


def test_what_is_not_taken_is_not_taken():
    for name, keyword in NOT_TAKEN:
        assert keyword in keywords(ALL[name][0])
        assert keyword not in keywords(ALL[name][1])
