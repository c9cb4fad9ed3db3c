"""What does generating with sharded weights cost, beside a model that is whole, and beside what the memory's speed allows?

    torchrun --nproc_per_node 2 benchmarks/generation.py --case bart     8 tokens a batch: DDP against stage 3, greedy and beams
    torchrun --nproc_per_node 2 benchmarks/generation.py --case lora8b   64 tokens: whole, gathered, and streamed
    torchrun --nproc_per_node 2 benchmarks/generation.py --case bart --tiny --use-cpu

    ddp, whole    generate() of the module in DDP; of a model that is whole on each rank (the 8B base, without adapters)
    gathered      stage 3 inside `accelerator.generation`: all units are gathered once for the evaluation
    each call     stage 3 without that block: each generate() gathers and lets go
    streamed gpu  stage 3, nothing kept: each token gathers every unit from the ranks' shards
    streamed cpu  the same with the shards in host memory

Forms of one model take turns batch by batch. Prints a JSON line for each form: seconds of a batch, tokens a second of all
ranks, the bound (bytes that one forward must read, over the measured speed of what it reads them from), and whether the
tokens are those of the whole model. Exits with 1 if, on GPUs, an evaluation of `bart` at stage 3 takes more than 1.05 of
DDP's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cases import Case, pick_case
from measure import free
from place import Place
from shardwise.config.sections import EngineConfig
from shardwise.plan.plan import Plan, Tier
from shardwise.plan.precision import Precision
from shardwise.weights.integrations import connect, generation
from shardwise.zero.sharded import ShardedModel

RATIO_BOUND = 1.05
BEAMS = 4


@dataclass
class Form:
    """One way to have the weights, and what was seen.

    once_s:  seconds to enter the generation block, which holds for all batches.
    bound_s: what one forward takes at least, reading each weight once.
    peak:    bytes allocated on the device; forms that take turns are both there.
    """

    name: str
    beams: int = 1
    once_s: float = 0.0
    batch_s: list[float] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    peak: int | None = None
    bound_s: float | None = None

    @property
    def evaluation_s(self) -> float:
        """Of all batches, each taken for the median: one that the machine held up says nothing about a form."""
        return self.once_s + len(self.batch_s) * statistics.median(self.batch_s)


@dataclass(frozen=True)
class Work:
    """What every form generates: `new_tokens` after each prompt of so many batches."""

    case: Case
    place: Place
    batches: int
    new_tokens: int

    def generate(self, model: Any, beams: int, number: int) -> tuple[float, Tensor]:
        """Seconds of the slowest rank for one batch, from an idle device to an idle device, and this rank's tokens."""
        ids = self.case.batch(number, self.place.rank, self.place.device)["input_ids"]
        settings = {
            "max_new_tokens": self.new_tokens,
            "min_new_tokens": self.new_tokens,  # random weights may say the end at once
            "num_beams": beams,
            "do_sample": False,
            "use_cache": True,
            "pad_token_id": 1,
        }
        with torch.no_grad():
            seconds, tokens = self.timed(
                lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            )
        return seconds, tokens.cpu()

    def timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Seconds of the slowest rank for a call that all ranks begin together, and what it gave."""
        self.place.synchronize()
        dist.barrier()
        started = time.perf_counter()
        result = call()
        self.place.synchronize()
        return largest(time.perf_counter() - started, self.place), result

    def measure(
        self, forms: Sequence[tuple[Form, nn.Module]], block: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """Warm the forms up with one batch and time the others, the forms in turn. block: entered once, the last form's."""
        cuda = self.place.cuda
        opened = block()
        last = forms[-1][0]
        last.once_s, _ = self.timed(opened.__enter__)
        try:
            for number in range(self.batches + 1):
                for form, model in forms:
                    if cuda:
                        torch.cuda.reset_peak_memory_stats(self.place.device)
                    seconds, tokens = self.generate(model, form.beams, number)
                    if cuda:
                        form.peak = max(form.peak or 0, torch.cuda.max_memory_allocated(self.place.device))
                    if number:
                        form.batch_s.append(seconds)
                        form.tokens.append(tokens)
        finally:
            opened.__exit__(None, None, None)
        self.place.say(f"# {last.name}, beams {last.beams}: {statistics.median(last.batch_s):.3f} s a batch")


def main(argv: list[str]) -> int:
    """Measure; gives the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--case", choices=["bart", "lora8b"], default="bart")
    parser.add_argument("--tiny", action="store_true", help="small enough for a CPU")
    parser.add_argument("--use-cpu", action="store_true")
    parser.add_argument("--layers", type=int, help="another number of blocks")
    parser.add_argument("--batches", type=int, help="timed batches of each form")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--rows", type=int, help="sequences of a rank; default: 8")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers and PEFT, about each other
    place = Place.join(use_cpu=options.use_cpu)
    try:
        bart = options.case == "bart"
        case = pick_case(options.case, tiny=options.tiny, layers=options.layers)
        rows = options.rows or (case.rows if options.tiny else 8)
        case = replace(case, rows=rows, length=min(case.length, 64), checkpointing=False)
        few = 2 if options.tiny else 12 if bart else 3
        new_tokens = options.new_tokens or (8 if bart or options.tiny else 64)
        work = Work(case, place, options.batches or few, new_tokens)
        return report(of_bart(work) if bart else of_llama(work), work)
    finally:
        place.leave()


def of_bart(work: Work) -> list[Form]:
    """DDP beside stage 3, for greedy and beam search."""
    from torch.nn.parallel import DistributedDataParallel

    place, case = work.place, work.case
    whole = case.build(place.device, torch.bfloat16).eval()
    ddp = DistributedDataParallel(whole, device_ids=[place.device] if place.cuda else None).module
    model = case.build(place.device, torch.bfloat16).eval()
    sharded = shard(model, place)
    forms = []
    for beams in (1, BEAMS):
        mine = [Form(name, beams) for name in ("ddp", "gathered", "ddp, again", "each call")]
        work.measure([(mine[0], ddp), (mine[1], model)], lambda: generation(sharded))
        work.measure([(mine[2], ddp), (mine[3], model)])
        forms += mine
    return forms


def of_llama(work: Work) -> list[Form]:
    """The base of the case, without adapters: whole, gathered, streamed."""
    hbm, link = device_speed(work), link_speed(work)
    text = (
        f"# device memory {hbm / 1e9:.0f} GB/s; from pinned host memory {link / 1e9:.1f} GB/s a rank, all ranks at once"
    )
    work.place.say(text)
    forms = on_the_device(work, hbm)
    free(work.place)
    return [*forms, from_the_host(work, link)]


def on_the_device(work: Work, hbm: float) -> list[Form]:
    place = work.place
    forms = [Form("whole"), Form("gathered"), Form("streamed gpu")]
    whole, model = (work.case.build(place.device, torch.bfloat16).unload().eval() for _ in range(2))
    for form in forms[:2]:
        form.bound_s = read_by_a_forward(whole) / hbm
    sharded = shard(model, place)
    work.measure([(forms[0], whole), (forms[1], model)], lambda: generation(sharded))
    sharded.options = EngineConfig(generation_memory_budget=None)
    work.measure([(forms[2], model)], lambda: generation(sharded))
    return forms


def from_the_host(work: Work, link: float) -> Form:
    model = work.case.build(work.place.device, torch.bfloat16).unload().eval()
    sharded = shard(model, work.place, offloaded=True)
    free(work.place)
    form = Form("streamed cpu")
    form.bound_s = sum(nbytes for (_, tier), nbytes in sharded.ledger().items() if tier is Tier.CPU) / link
    work.measure([(form, model)], lambda: generation(sharded))
    return form


def shard(model: nn.Module, place: Place, *, offloaded: bool = False) -> ShardedModel:
    """`model` at stage 3; offloaded: its shards rest in host memory, and as few units as possible stay gathered."""
    tier = "cpu" if offloaded else "none"
    sharded = ShardedModel(
        model,
        plan=Plan.from_stage(3, offload_optimizer=tier, offload_param=tier),
        ranks=place.ranks,
        precision=Precision.named("bf16"),
        options=EngineConfig(generation_memory_budget=None if offloaded else "auto"),
    )
    connect(model)
    return sharded


def read_by_a_forward(model: Any) -> int:
    """Bytes of weights that one forward reads: all, but of an embedding table of its own only some rows."""
    table = model.get_input_embeddings().weight
    read = sum(parameter.nbytes for parameter in model.parameters())
    return read if table is model.get_output_embeddings().weight else read - table.nbytes


def device_speed(work: Work) -> float:
    """Bytes a second of the device's memory, reads and writes of a copy together."""
    source = torch.ones(2**31 if work.place.cuda else 2**22, dtype=torch.uint8, device=work.place.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(work, lambda: target.copy_(source))


def link_speed(work: Work) -> float:
    """Bytes a second from pinned host memory to the device, the slowest rank's while all copy."""
    source = torch.ones(2**30 if work.place.cuda else 2**22, dtype=torch.uint8, pin_memory=work.place.cuda)
    target = torch.empty_like(source, device=work.place.device)
    return source.nbytes / fastest(work, lambda: target.copy_(source, non_blocking=True))


def fastest(work: Work, copy: Callable[[], Any]) -> float:
    """Seconds of one copy, the best of three times eight."""

    def eight() -> None:
        for _ in range(8):
            copy()

    return min(work.timed(eight)[0] for _ in range(4)) / 8


def largest(value: float, place: Place) -> float:
    stacked = torch.tensor(value, dtype=torch.float64, device=place.device)
    dist.all_reduce(stacked, op=dist.ReduceOp.MAX)
    return float(stacked)


def report(forms: list[Form], work: Work) -> int:
    """Print the records and the table; 1 if an evaluation at stage 3 was too slow."""
    place, case = work.place, work.case
    tokens = place.world_size * case.rows * work.new_tokens
    facts = place.facts()
    head = f"{'form':<14}{'beams':>6}{'s/batch':>10}{'min':>9}{'max':>9}{'once s':>8}{'ratio':>7}{'tokens/s':>10}"
    lines = [f"{head}{'bound':>10}{'of it':>7}{'same':>6}{'peak GB':>9}"]
    slow = False
    for place_of, form in enumerate(forms):
        # Its own peer: the whole model that took turns with it, else the first.
        peers = [other for other in forms[:place_of] if other.name.startswith("ddp") and other.beams == form.beams]
        peer = form if form.name.startswith(("ddp", "whole")) else (peers or forms)[-1 if peers else 0]
        ratio = form.evaluation_s / peer.evaluation_s
        median = statistics.median(form.batch_s)
        bound = None if form.bound_s is None else tokens / (form.bound_s * work.new_tokens)
        same = all(torch.equal(a, b) for a, b in zip(form.tokens, peer.tokens, strict=True))
        slow |= form.name == "gathered" and case.family == "bart" and place.cuda and ratio > RATIO_BOUND
        record = {
            "case": case.name,
            "engine": form.name,
            "beams": form.beams,
            "batch_s": {"median": median, "min": min(form.batch_s), "max": max(form.batch_s)},
            "once_s": form.once_s,
            "evaluation_s": form.evaluation_s,
            "ratio": ratio,
            "tokens_per_s": tokens / median,
            "bound_tokens_per_s": bound,
            "same_tokens": same,
            "peak_bytes": form.peak,
            "rows": case.rows,
            "prompt": case.length,
            "new_tokens": work.new_tokens,
            "batches": work.batches,
        }
        place.say(json.dumps({**record, **facts}))
        limit = f"{'-':>10}{'-':>7}" if bound is None else f"{bound:>10.0f}{100 * tokens / median / bound:>6.1f}%"
        peak = "-" if form.peak is None else f"{form.peak / 1e9:.2f}"
        lines.append(
            f"{form.name:<14}{form.beams:>6}{median:>10.4f}{min(form.batch_s):>9.4f}{max(form.batch_s):>9.4f}{form.once_s:>8.3f}"
            f"{ratio:>7.3f}{tokens / median:>10.1f}{limit}{'yes' if same else 'no':>6}{peak:>9}"
        )
    place.say("\n".join(lines))
    return int(slow)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
