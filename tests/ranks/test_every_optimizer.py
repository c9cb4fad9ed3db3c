"""docs/optimizers.md says what happens to an optimizer; here each is trained, and what happens is what the page has.

    python -m pytest -m full tests/ranks/test_every_optimizer.py --write-data

writes tests/data/optimizers.json and the page anew. `make test` trains some at stage 3, in place and on a drive.
"""

from __future__ import annotations

import pytest

from rig import optimizer_page
from rig.every_optimizer import KINDS, PLANS, outcome
from rig.optimizer_page import shortened

# torch's own, what it does not know by name, and one of each way in which others are stepped or refused.
SHORT = {
    *(key for key in KINDS if key.startswith("torch ")),
    "transformers Adafactor",
    "bitsandbytes AdamW8bit",
    "bitsandbytes PagedAdamW",
    "pytorch_optimizer AdaBelief",
    "pytorch_optimizer Lamb",
    "pytorch_optimizer Prodigy",
    "pytorch_optimizer SOAP",
    "pytorch_optimizer Conda",
}


def _in_short(key: str, plan: str) -> bool:
    """On a drive what torch does not know, and of torch's own some."""
    return key in SHORT and plan in (("3-nvme",) if list(KINDS).index(key) % 2 else ("3",))


CASES = [
    pytest.param(key, plan, marks=() if _in_short(key, plan) else pytest.mark.full) for key in KINDS for plan in PLANS
]


@pytest.mark.parametrize(("key", "plan"), CASES)
def test_what_the_page_says_is_so(world, tmp_path, request, key, plan):
    kind = KINDS[key]
    if not kind.is_there:
        pytest.skip(f"{kind.package} is not installed")
    first, *others = world(2).run(outcome, key, plan, str(tmp_path), not _in_short(key, plan))
    assert all(other == first for other in others)
    found = shortened(first, kind.name)
    if request.config.getoption("--write-data"):
        optimizer_page.write(key, plan, found)
    assert optimizer_page.read()[key][plan] == found


def test_the_page_is_what_was_found(request):
    if request.config.getoption("--write-data"):
        optimizer_page.PAGE.write_text(optimizer_page.page(optimizer_page.read()))
    assert optimizer_page.PAGE.read_text() == optimizer_page.page(optimizer_page.read())
    assert list(optimizer_page.read()) == list(KINDS)
