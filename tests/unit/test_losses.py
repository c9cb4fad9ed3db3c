"""The loss in chunks against torch's and transformers' own, in both directions."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rig.tiny import batches, tiny
from shardwise.errors import LossError, PrepareError, ShardwiseError
from shardwise.tuning.losses import LeanLoss, LogitsLoss, check_loss, cross_entropy, head_cross_entropy

TOKENS, WIDTH, WORDS = 37, 12, 53


def problem(dtype):
    torch.manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_()
    head = nn.Linear(WIDTH, WORDS, bias=False).to(dtype)
    labels = torch.randint(0, WORDS, (TOKENS,))
    labels[::5] = -100
    return hidden, head, labels


def grads(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("items", [None, 11, torch.tensor(11)])
@pytest.mark.parametrize("chunk", [5, 8, 37, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_both_ways_give_torchs_loss_and_gradients(dtype, tolerance, chunk, items):
    hidden, head, labels = problem(dtype)
    wanted = F.cross_entropy(head(hidden).float(), labels, reduction="mean" if items is None else "sum")
    wanted = wanted if items is None else wanted / items
    expected = grads(wanted, hidden, head.weight)
    settings = {"chunk": chunk, "num_items_in_batch": items}
    for loss in (
        cross_entropy(head(hidden), labels, **settings),
        head_cross_entropy(hidden, head, labels, **settings),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
        for found, right in zip(grads(loss, hidden, head.weight), expected, strict=True):
            assert found.dtype == dtype
            torch.testing.assert_close(found, right, rtol=tolerance, atol=tolerance * right.abs().max().item())


def test_without_any_label_the_mean_is_nan_as_torchs():
    hidden, head, labels = problem(torch.float32)
    nothing = torch.full_like(labels, -100)
    assert cross_entropy(head(hidden), nothing).isnan()
    assert head_cross_entropy(hidden, head, nothing).isnan()


def test_another_ignored_label_is_ignored():
    hidden, head, labels = problem(torch.float32)
    labels = labels.where(labels >= 0, 7)
    wanted = F.cross_entropy(head(hidden), labels, ignore_index=7)
    torch.testing.assert_close(cross_entropy(head(hidden), labels, ignore_index=7), wanted)
    torch.testing.assert_close(head_cross_entropy(hidden, head, labels, ignore_index=7), wanted)


def table():
    """name -> (logits, labels, ignore_index): what torch refuses, and what it takes although it looks odd."""
    torch.manual_seed(4)
    logits, labels = torch.randn(6, 10), torch.randint(0, 9, (6,))
    ignored = labels.index_fill(0, torch.tensor([1, 4]), 3)
    return {
        "fewer labels": (logits, labels[:3], -100),
        "one label": (logits, labels[:1], -100),
        "a label without dimensions": (logits[:1], labels[0], -100),
        "more labels": (logits[:3], labels, -100),
        "labels of one column": (logits, labels[:, None], -100),
        "logits and labels in batches": (logits.view(2, 3, 10), labels.view(2, 3), -100),
        "as many tokens as places": (logits[:, :6].reshape(1, 6, 6), labels.clamp(max=5).view(1, 6)[:, :3], -100),
        "labels in batches": (logits, labels.view(2, 3), -100),
        "int32": (logits, labels.int(), -100),
        "int16": (logits, labels.short(), -100),
        "float labels": (logits, labels.float(), -100),
        "bool labels": (logits, labels > 3, -100),
        "uint8": (logits, labels.byte(), -100),
        "uint8, its largest ignored": (logits, labels.byte().index_fill(0, torch.tensor([2]), 255), 255),
        "uint8, as -100 would be cut": (
            torch.randn(6, 200),
            labels.byte().index_fill(0, torch.tensor([2]), 156),
            -100,
        ),
        "integer logits": (logits.long(), labels, -100),
        "complex logits": (logits.to(torch.complex64), labels, -100),
        "a label beyond": (logits, labels.index_fill(0, torch.tensor([5]), 10), -100),
        "a label below": (logits, labels.index_fill(0, torch.tensor([0]), -1), -100),
        "-100 that is not ignored": (logits, labels.index_fill(0, torch.tensor([0]), -100), 3),
        "a label beyond that is ignored": (logits, labels.index_fill(0, torch.tensor([0]), 99), 99),
        "an ignored place": (logits, ignored, 3),
        "no tokens": (logits[:0], labels[:0], -100),
        "no places": (logits[:, :0], labels, -100),
        "labels elsewhere": (logits, labels.to("meta"), -100),
        "double": (logits.double(), labels, -100),
        "half": (logits.half(), labels, -100),
        "infinite": (logits.index_fill(1, torch.tensor([9]), -float("inf")), labels, -100),
        "not a number": (logits.index_fill(0, torch.tensor([1]), float("nan")), labels, -100),
    }


class Same(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("way", ["logits", "head"])
@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.parametrize("name", table())
def test_what_torch_refuses_is_refused_and_all_else_has_torchs_number(name, chunk, way):
    logits, labels, ignored = table()[name]
    wanted = refusal = None
    try:
        wanted = F.cross_entropy(logits.float() if logits.is_floating_point() else logits, labels, ignore_index=ignored)
    except Exception as error:  # torch has many kinds
        refusal = error
    settings = {"ignore_index": ignored, "chunk": chunk}

    def found():
        if way == "head":
            return head_cross_entropy(logits, Same(), labels, **settings)
        return cross_entropy(logits, labels, **settings)

    if refusal is not None:
        with pytest.raises(LossError):
            found()
    else:
        torch.testing.assert_close(found(), wanted, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "settings",
    [{"chunk": 0}, {"chunk": -1}, {"chunk": 2.5}, {"num_items_in_batch": torch.tensor([1, 2])}],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(settings):
    hidden, head, labels = problem(torch.float32)
    with pytest.raises(LossError):
        cross_entropy(head(hidden), labels, **settings)
    with pytest.raises(LossError):
        head_cross_entropy(hidden, head, labels, **settings)


def test_a_reduction_or_weights_are_no_settings_of_these_losses():
    hidden, head, labels = problem(torch.float32)
    for settings in ({"reduction": "sum"}, {"weight": torch.ones(WORDS)}, {"label_smoothing": 0.1}):
        with pytest.raises(TypeError):
            cross_entropy(head(hidden), labels, **settings)
        with pytest.raises(TypeError):
            head_cross_entropy(hidden, head, labels, **settings)


def test_a_head_whose_logits_have_no_tokens_of_their_own_is_refused():
    hidden, _, labels = problem(torch.float32)
    with pytest.raises(LossError, match="logits of the head"):
        head_cross_entropy(hidden, lambda x: x.mean(0), labels)


@pytest.mark.parametrize("kind", [LeanLoss, LogitsLoss])
def test_a_model_of_transformers_that_is_given_other_labels_is_refused(kind):
    model = tiny("llama", "full")
    kind(model, chunk=5)
    batch = batches("llama", 1, 3)[0]
    with pytest.raises(LossError, match="shape"):
        model(**{**batch, "labels": batch["labels"][:, :-1]})
    with pytest.raises(LossError, match="place"):
        model(**{**batch, "labels": batch["labels"] + 10**6})


def saved(function):
    """Bytes that autograd keeps."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(nbytes for nbytes, _ in kept.values())


def test_no_logits_are_kept_between_the_directions():
    hidden, head, labels = problem(torch.bfloat16)
    logits = TOKENS * WORDS * 2
    plain = saved(lambda: F.cross_entropy(head(hidden).float(), labels))
    assert plain - saved(lambda: cross_entropy(head(hidden), labels)) >= 0.8 * logits
    assert plain - saved(lambda: head_cross_entropy(hidden, head, labels, chunk=8)) >= 2 * logits


@pytest.mark.parametrize("items", [None, 9])
@pytest.mark.parametrize("tuning", ["full", "lora", "lora+save"])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_model_of_transformers_trains_the_same_with_it(name, tuning, items):
    model = tiny(name, tuning)
    plain = copy.deepcopy(model)
    lean = LeanLoss(model, chunk=5)
    batch = batches("llama", 1, 3)[0]
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, :4] = -100
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    wanted, found = plain(**batch, **extra), model(**batch, **extra)
    wanted.loss.backward()
    found.loss.backward()
    torch.testing.assert_close(found.loss, wanted.loss)
    assert found.logits is None
    for mine, right in zip(model.parameters(), plain.parameters(), strict=True):
        if right.grad is not None:
            torch.testing.assert_close(mine.grad, right.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # an evaluation has its logits
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
        torch.testing.assert_close(model(**batch).loss, plain(**batch).loss)
    lean.undo()
    torch.testing.assert_close(model(**batch).logits, plain(**batch).logits)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_changes_its_logits_is_refused_in_words():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=61, hidden_size=32, intermediate_size=44, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).train()
    LeanLoss(model)
    with pytest.raises(ShardwiseError, match="changes its logits"):
        model(**batches("llama", 1, 2)[0])


TAKING = [LeanLoss, LogitsLoss, check_loss]


@pytest.mark.parametrize("take", TAKING)
def test_an_encoder_decoder_is_refused(take):
    with pytest.raises(PrepareError, match="not a causal language model"):
        take(tiny("bart"))


@pytest.mark.parametrize("take", TAKING)
def test_a_model_of_ones_own_is_refused(take):
    with pytest.raises(PrepareError, match="head_cross_entropy"):
        take(nn.Linear(2, 2))


class _Fixed(nn.Module):
    """A causal model whose loss is its own matter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(2, 2)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    @property
    def loss_function(self) -> None:
        return None


@pytest.mark.parametrize("take", TAKING)
def test_a_loss_that_cannot_be_set_is_refused_in_words(take):
    with pytest.raises(PrepareError, match="the loss_function of _Fixed cannot be set"):
        take(_Fixed())


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_checking_a_loss_changes_nothing(name):
    model = tiny(name)
    before = [(module, dict(vars(module))) for module in model.modules()]
    check_loss(model)
    assert all(vars(module) == kept for module, kept in before)
