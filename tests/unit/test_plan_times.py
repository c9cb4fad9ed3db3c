"""The model of a step's time: schedule, collectives, link and operations as arithmetic, and the terms of machines."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.estimate.activations import Batch
from shardwise.estimate.bytes import Choice, Estimate, Machine, Run, estimate
from shardwise.estimate.collectives import all_reduce_s, collective_s
from shardwise.estimate.kept_terms import store, stored
from shardwise.estimate.measuring import measured
from shardwise.estimate.meta_model import Adapters, build_meta_model
from shardwise.estimate.passes import counted, placed_units, with_shapes
from shardwise.estimate.peaks import at_peak
from shardwise.estimate.plans import Planned, Planner, nearly_fastest
from shardwise.estimate.schedule import Work, step_of, walk
from shardwise.estimate.terms import SHEETS, Terms, as_values, sheet_named, sheet_of_memory, terms_of, with_values
from shardwise.estimate.times import NOTHING, Way
from shardwise.estimate.tracing import Operations, Traced
from shardwise.plan.plan import Tier
from shardwise.plan.precision import Precision

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE), encoding="utf-8")
    return build_meta_model(str(path))


def run_of(ranks: int = 2, **values) -> Run:
    given = {"precision": Precision.named("bf16"), "batch": Batch(2, 16), **values}
    return Run(world_size=ranks, local_processes=min(ranks, 8), **given)


def total(found: dict[str, Operations]) -> Operations:
    every = Operations()
    for operations in found.values():
        every.add(operations)
    return every


def test_the_model_of_scaling_hides_what_the_computation_is_longer_than() -> None:
    terms = Terms(nvlink=1e9, slowing=0.0, launch=0.0, latency=0.0)
    half = [Work(1.0, 10**9)] * 4  # over two ranks a gather takes 0.5 s
    step = step_of([*half, *half], 4, 2, 0, terms)
    assert (step.compute, step.exposed_gathers) == (8.0, 0.5)  # the first, which nothing comes before
    # 2 s: three more of the forward wait a second each; of the backward the two that stayed do not, the two others do.
    slow = [Work(1.0, 4 * 10**9)] * 4
    step = step_of([*slow, *slow], 4, 2, 0, terms)
    assert step.exposed_gathers == pytest.approx(2 + 3 + 2)
    assert step_of([*slow, *slow], 4, 1, 0, terms).total == 8.0


def test_between_machines_a_collective_takes_what_its_slower_way_takes() -> None:
    terms = Terms(nvlink=100e9, network=1e9, launch=0.0, latency=0.0, network_latency=0.0)
    assert collective_s(16 * 10**9, 8, terms) == pytest.approx(14 / 100)
    assert collective_s(16 * 10**9, 16, terms) == pytest.approx(8 / 8)
    assert collective_s(16 * 10**9, 1, terms) == 0


def test_copies_average_over_machines_what_their_groups_have_reduced() -> None:
    terms = Terms(nvlink=100e9, network=1e9, launch=0.0, latency=0.0, network_latency=1.0, slowing=0.0)
    assert all_reduce_s(16 * 10**9, 8, 8, terms) == 0
    # Two machines send and get half of 16 GB twice over 8 cards; one step of a tree there and back.
    assert all_reduce_s(16 * 10**9, 8, 16, terms) == pytest.approx(2 + 2)
    units = [Work(1.0, 10**9)] * 4
    passes = [*units, *(Work(1.0, 10**9, 8 * 10**9) for _ in units)]
    alone, grouped = (step_of(passes, 4, ranks, 0, terms, group=8) for ranks in (8, 32))
    assert (alone.exposed_gathers, alone.slowed) == (grouped.exposed_gathers, grouped.slowed)
    assert grouped.exposed_reductions > alone.exposed_reductions


def test_a_lane_of_its_own_lets_the_next_reduction_begin() -> None:
    terms = Terms(nvlink=100e9, network=1e9, launch=0.0, latency=0.0, network_latency=1.0, slowing=0.0)
    passes = [Work(1.0, 0, 80 * 10**9)] * 4
    one, two = (step_of(passes, 0, 32, 0, terms, group=8, apart=apart) for apart in (False, True))
    assert one.exposed_reductions - two.exposed_reductions == pytest.approx(3 * collective_s(80 * 10**9, 8, terms))


def test_what_comes_from_the_host_is_there_before_its_gather() -> None:
    terms = Terms(nvlink=1e9, slowing=0.0, launch=0.0, latency=0.0)
    units = [Work(1.0, 0, fetch_s=0.9)] * 4
    # The first shard is waited for; each of the others comes beside the computation of the two before it.
    assert walk([*units, *units], 4, 2, terms).exposed_gathers == pytest.approx(0.9)
    slow = [Work(1.0, 0, fetch_s=2.0)] * 4
    assert walk([*slow, *slow], 4, 2, terms).exposed_gathers > 3 * 1.0


def test_gradients_that_leave_show_where_the_backward_is_shorter() -> None:
    terms = Terms(slowing=0.0)
    hidden, shown = ([Work(1.0, 0), Work(1.0, 0, land_s=seconds), Work(1.0, 0)] for seconds in (0.5, 3.0))
    assert walk(hidden, 1, 1, terms).exposed_reductions == 0
    assert walk(shown, 1, 1, terms).exposed_reductions == pytest.approx(2.0)


def test_a_link_is_slower_each_way_while_both_are_busy() -> None:
    terms = Terms(up=2.0, both=1.0)
    assert terms.over_link(2, 0) == terms.over_link(0, 2) == 1
    assert terms.over_link(2, 2) == 2
    assert terms.over_link(4, 2) == 2 + 1


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("GPU 0: NVIDIA H200 (UUID: GPU-1)", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_says(name: str, known: str) -> None:
    assert sheet_named(name) == (known, SHEETS[known])


def test_terms_of_an_h200_are_those_that_were_measured() -> None:
    found, own = as_values(terms_of(SHEETS["H200"])), as_values(Terms())
    for name in ("matrix", "memory", "nvlink", "alone", "up", "both"):
        assert found[name] == pytest.approx(own[name], rel=0.01), name
    assert sheet_named("Quadro 4000") is None
    assert sheet_of_memory(80 * 10**9)[0] == "H100"


def test_measured_terms_are_those_of_the_same_gpus_and_stay_until_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "terms.json"
    assert stored(path, ["a"]) == {}
    store(path, ["a"], {"up": 1e9, "read": 2.0})
    store(path, ["a"], {"up": 2e9})
    assert stored(path, ["a"]) == {"up": 2e9, "read": 2.0}
    assert stored(path, ["b"]) == {}
    assert with_values(Terms(), stored(path, ["a"])).up == 2e9
    assert with_values(Terms(), {"engines": 0.0}).engines is None


@pytest.mark.parametrize(
    "text", ["", "{}", '{"terms": {"speed": 1}}', '{"terms": {"up": -1}}', '{"terms": {"up": "fast"}}']
)
def test_a_spoiled_file_of_terms_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "terms.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as told:
        stored(path, [])
    assert len(str(told.value).splitlines()) == 1
    store(path, [], {"up": 1.0})  # and measuring again mends it
    assert stored(path, []) == {"up": 1.0}


def test_a_drive_is_measured_where_it_is_named(tmp_path: Path) -> None:
    found = measured(0, str(tmp_path))
    assert set(found) == {"read", "write"}
    assert all(rate > 1e6 for rate in found.values())
    with pytest.raises(ConfigError, match="cannot be measured"):
        measured(0, str(tmp_path / "missing"))


def test_products_are_counted_exactly_and_given_to_their_units(model) -> None:
    placed, batch = placed_units(model), Batch(2, 16)
    traced, why = counted(model, placed, batch, torch.bfloat16)
    assert why is None
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    ahead, behind = (
        sum(flops * n for (flops, _), n in total(found).products.items()) for found in (traced.forward, traced.backward)
    )
    rotary = 2 * batch.rows * 8 * batch.length  # positions times frequencies, a product of its own
    assert 0 <= ahead - 2 * batch.tokens * matrices <= rotary
    assert behind == 2 * 2 * batch.tokens * matrices
    # Two products of half a square of 16 x 16 for each of 4 heads of 16, in each of 3 blocks.
    scores = 3 * 2 * 2 * (batch.rows * 4 * 16 * 16 * 16) // 2
    assert sum(flops * n for (flops, _), n in total(traced.forward).attention.items()) == scores
    assert sum(flops * n for (flops, _), n in total(traced.backward).attention.items()) == 5 * scores // 2
    assert all(one.key in traced.forward and one.key in traced.backward for one in placed if one.entries)
    assert all(parameter.is_meta and parameter.grad is None for parameter in model.parameters())


def test_a_model_that_wants_other_input_is_counted_by_arithmetic(model) -> None:
    class Other(type(model)):
        def forward(self, pixels):
            return pixels

    model.__class__ = Other
    placed = placed_units(model)
    traced, why = counted(model, placed, Batch(2, 16), torch.bfloat16)
    assert why is not None
    assert "TypeError" in why
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    found = sum(flops for flops, _ in total(traced.forward).products)
    assert found >= 2 * 32 * matrices / 3  # equal blocks are one key here
    assert isinstance(traced, Traced)


def test_a_peak_is_no_more_than_all_rows_and_no_less_than_what_rests(model) -> None:
    for accumulates in (False, True):
        run = run_of(accumulates=accumulates)
        for choice in (Choice(0), Choice(2, "cpu"), Choice(3), Choice(3, "nvme", "nvme")):
            every = estimate(model, choice, run)
            highest = at_peak(every, run)
            assert highest.taken("GPU") <= every.taken("GPU")
            assert highest.taken("GPU") >= sum(
                every.nbytes.get((row, Tier.GPU), 0) for row in ("frozen", "parameter", "optimizer")
            )
            assert highest.taken("host") == every.taken("host")


def test_recomputing_costs_time_and_saves_memory_and_offloading_too(model) -> None:
    planner = Planner(model, run_of(batch=Batch(64, 64)), Terms())
    plain, again = planner.plan(Choice(3), Way()), planner.plan(Choice(3), Way(recompute=True))
    assert again.time.total > plain.time.total
    assert again.estimate.taken("GPU") < plain.estimate.taken("GPU")
    away = planner.plan(Choice(3, "cpu", "cpu"), Way())
    assert away.time.link > 0
    assert away.time.drive == plain.time.link == 0
    on_disk = planner.plan(Choice(3, "nvme", "nvme"), Way())
    assert on_disk.time.drive > 0
    half = planner.plan(Choice(3, "cpu", "cpu"), Way(kept=0.5))
    assert plain.time.link < half.time.link < away.time.link
    assert away.estimate.taken("GPU") < half.estimate.taken("GPU")
    assert half.estimate.taken("host") < away.estimate.taken("host")


def test_micro_batches_are_a_step_of_one_optimizer(model) -> None:
    one = Planner(model, run_of(accumulates=True), Terms()).plan(Choice(2), Way())
    four = Planner(model, run_of(accumulates=True), Terms(), micro_batches=4).plan(Choice(2), Way())
    assert four.time.products == pytest.approx(4 * one.time.products)
    assert four.time.optimizer == one.time.optimizer
    assert four.time.total < 4 * one.time.total


def test_micro_batches_add_up_gradients_where_they_rest(model) -> None:
    """On the device they cost its memory's time, in host memory a thread's; stages 0 and 1 send them down once."""
    run, slow = run_of(1, accumulates=True), replace(Terms(), adding=1e6, host_step=0.0)
    trained = sum(p.numel() for p in model.parameters())
    one, four = (Planner(model, run, slow, count).plan(Choice(2), Way()).time for count in (1, 4))
    assert four.kernels - 4 * one.kernels == pytest.approx(3 * 12 * trained / slow.memory)
    links = {
        (stage, count): Planner(model, run, slow, count).plan(Choice(stage, "cpu"), Way()).time.link
        for stage in (1, 2)
        for count in (1, 4)
    }
    assert links[1, 4] == links[1, 1] == links[2, 1]
    assert links[2, 4] - links[2, 1] == pytest.approx(3 * 4 * trained / slow.adding, rel=0.05)


@pytest.mark.parametrize("stage", [0, 1])
def test_whole_sums_and_averaged_gradients_are_not_there_at_one_time(model, stage: int) -> None:
    run = run_of(accumulates=True)
    every = estimate(model, Choice(stage), run)
    peak = at_peak(every, run)
    rows = {row for row, tier in peak.nbytes if tier is Tier.GPU}
    assert not {"whole gradients", "gradient"} <= rows
    alone = run_of(1, accumulates=True)
    found = [at_peak(estimate(model, Choice(of), alone), alone).taken("GPU") for of in (stage, 2)]
    assert found[0] == pytest.approx(found[1], rel=0.02)  # on one rank there is nothing to divide


def test_codes_are_counted_by_the_units_that_they_make(tmp_path: Path) -> None:
    """Blocks of codes are smaller, so that more of them share a unit than of the weights that they are of."""
    path = tmp_path / "config.json"
    large = {**SHAPE, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4}
    path.write_text(json.dumps(large), encoding="utf-8")
    shapes = build_meta_model(str(path), adapters=Adapters(4))
    coded = build_meta_model(str(path), adapters=Adapters(4), quantize="4bit")
    placed = placed_units(coded)
    assert [one.key for one in placed] != [one.key for one in placed_units(shapes)]
    run = run_of(1)
    plain, codes = Planner(shapes, run, Terms()), Planner(coded, run, Terms(), shapes=shapes)
    one, other = (planner.plan(Choice(3), Way()).time for planner in (plain, codes))
    assert other.products == pytest.approx(one.products)
    blocks = [p for name, p in shapes.named_parameters() if "base_layer.weight" in name]
    decoded = sum(p.nbytes for name, p in coded.named_parameters() if not p.is_floating_point())
    decoded += sum(2 * p.numel() for p in blocks)
    with_codes, whole = with_shapes(placed, shapes)
    assert sum(one.decoded for one in with_codes) == decoded
    assert sum(p.numel() for one in whole for p in one.unit.parameters.values()) == sum(
        p.numel() for p in shapes.parameters()
    )
    calls = 40e-6  # kernels' starts of joined units are fewer, and nothing else differs
    assert other.kernels - one.kernels == pytest.approx(2 * decoded / (0.86 * Terms().memory), abs=calls)


def planned(choice: Choice, ms: float, gb: float = 10.0, way: Way = Way()) -> Planned:  # noqa: B008
    found = Estimate(choice, {("frozen", Tier.GPU): int(gb * 1e9)})
    return Planned(choice, way, found, replace(NOTHING, products=ms / 1000))


def test_of_plans_that_take_as_long_the_one_that_asks_for_least_is_taken() -> None:
    plain, recomputed = planned(Choice(2), 101), planned(Choice(2), 100, way=Way(recompute=True))
    compiled, budgeted = (
        planned(Choice(2), 100, way=Way(compiled=True)),
        planned(Choice(2, "cpu"), 100, 5, Way(kept=0.5)),
    )
    away, far = planned(Choice(2, "cpu"), 99.9, 5), planned(Choice(3, "nvme", "nvme"), 99.5, 1)
    for others in ([recomputed], [compiled], [budgeted], [away], [far], [far, away, compiled]):
        assert nearly_fastest([*others, plain]) is plain
    assert nearly_fastest([far, away, budgeted]) is away
    slow = planned(Choice(2), 110)
    assert nearly_fastest([slow, away]) is away  # what is worth its while is taken
    # Of stages less memory counts; where there is nothing to divide, the lowest.
    assert nearly_fastest([planned(Choice(0), 100, 20), planned(Choice(1), 101, 12)]).choice == Choice(1)
    assert nearly_fastest([planned(Choice(stage), 100, 10 - stage / 10) for stage in (3, 1, 0)]).choice == Choice(0)


def test_on_one_gpu_where_all_fits_nothing_is_divided_or_offloaded(model) -> None:
    found = Planner(model, run_of(1), Terms()).plans(Machine(1, 10**12, 10**12))
    best = nearly_fastest([one for one in found if one.fits])
    assert (best.choice, best.way.kept, best.way.recompute) == (Choice(0), 0.0, False)


def test_of_each_choice_the_fastest_that_fits_is_taken(model) -> None:
    planner = Planner(model, run_of(), Terms())
    choices = (Choice(0), Choice(3, "cpu"))
    large = planner.plans(Machine(2, 10**12, 10**12), choices)
    assert all(one.fits for one in large)
    assert [one.choice for one in large] == list(choices)
    least = min(one.estimate.taken("GPU") for one in large)
    assert not any(one.fits for one in planner.plans(Machine(2, least // 2, 10**12), choices))


def test_adapters_need_no_gradient_of_the_base(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SHAPE), encoding="utf-8")
    whole, adapted = (build_meta_model(str(path), adapters=adapters) for adapters in (None, Adapters(4)))
    times = [
        Planner(one, run_of(1), Terms(call=1e-12, backward_call=1e-12)).plan(Choice(3), Way()).time
        for one in (whole, adapted)
    ]
    assert times[0].optimizer > 5 * times[1].optimizer


def test_predictions_are_near_what_two_gpus_were_measured_to_do(monkeypatch, capsys) -> None:
    """Times within 15%, bytes within 5%, of docs/log.md; the other cases are printed by the same script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "plan", raising=False)
    import plan

    assert plan.main(["--only", "full1b"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(rows) >= 7
    for row in rows:
        assert abs(row["off"]) < 0.15, row
        if row["measured_gb"] is not None:
            assert row["peak_gb"] == pytest.approx(row["measured_gb"], rel=0.05), row
