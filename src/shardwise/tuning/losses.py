"""Cross entropy without the logits of all tokens in fp32: torch's numbers, in chunks of tokens.

For T tokens and a vocabulary of V, transformers' loss holds at its peak 12 bytes for each of T x V logits in bf16. Two ways:

    from logits         logits stay; their fp32 form exists for one chunk          peak 2 e T V bytes (logits, gradient)
    from hidden states  each chunk's logits are made by the head, and made again   peak 12 C V bytes for chunks of C tokens
                        in the backward

The head is called as a module, chunk by chunk, so that whatever surrounds it acts: the engine's gathers, an adapter, a bias.
Both compute each chunk in fp32 and add the losses up in fp32; gradients of a trained head add up over chunks in its own dtype,
as autograd adds them. Neither has label smoothing, weights of classes, or labels that are probabilities. What torch's
cross_entropy refuses, these refuse before anything is computed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import LossError, PrepareError, ShardwiseError
from .blocks import Replacement

CHUNK_TOKENS = 1024


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items_in_batch: Tensor | int | None = None,
    chunk: int = CHUNK_TOKENS,
) -> Tensor:
    """The mean cross entropy of (T, V) logits and (T,) labels in fp32, or their sum over `num_items_in_batch`.

    Equal to F.cross_entropy(logits.float(), labels); the gradient comes in the logits' dtype, without an fp32 copy of them.
    With no label but `ignore_index` the mean is NaN, as torch's.
    Raises LossError for shapes, dtypes or labels that have no such loss. On CUDA a label that is no place in the vocabulary is
    an error of the device, as in torch.
    """
    _check("logits", logits, labels, num_items_in_batch, chunk)
    labels = labels.long()
    _check_labels(labels, ignore_index, logits.shape[-1])
    total = _FromLogits.apply(logits, labels, ignore_index, chunk)  # type: ignore[no-untyped-call]
    return _scaled(total, labels, ignore_index, num_items_in_batch)


def head_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items_in_batch: Tensor | int | None = None,
    chunk: int = CHUNK_TOKENS,
) -> Tensor:
    """As `cross_entropy(head(hidden), labels)`, with the logits of `chunk` tokens at a time, in both directions.

    hidden: (T, H). head: a module that makes (C, V) of (C, H); it runs twice for each chunk.
    Raises what `cross_entropy` raises.
    """
    _check("hidden states", hidden, labels, num_items_in_batch, chunk)
    labels = labels.long()

    def part(states: Tensor, wanted: Tensor) -> Tensor:
        logits = head(states)
        _check("logits of the head", logits, wanted)
        _check_labels(wanted, ignore_index, logits.shape[-1])
        return F.cross_entropy(logits.float(), wanted, ignore_index=ignore_index, reduction="sum")

    sums = []
    for states, wanted in zip(torch.split(hidden, chunk), torch.split(labels, chunk), strict=True):
        if torch.is_grad_enabled():
            sums.append(checkpoint(part, states, wanted, use_reentrant=False))
        else:
            sums.append(part(states, wanted))
    return _scaled(torch.stack(sums).sum(), labels, ignore_index, num_items_in_batch)


def _check(
    what: str, values: Tensor, labels: Tensor, items: Tensor | int | None = None, chunk: int = CHUNK_TOKENS
) -> None:
    """Raise LossError unless `values`, named `what`, are (T, n) in floating point, and `labels` are (T,) and can be labels."""
    shape, wanted = tuple(values.shape), tuple(labels.shape)
    if values.ndim != 2 or wanted != shape[:1]:
        raise LossError(
            f"{what} of shape {shape} and labels of shape {wanted}: a loss of T tokens takes (T, n) and (T,). Flatten both "
            "over the tokens, and shift the labels before."
        )
    if not values.is_floating_point():
        raise LossError(f"{what} are {values.dtype}: a cross entropy needs floating point.")
    if labels.dtype not in (torch.int64, torch.uint8):
        raise LossError(f"labels are {labels.dtype}: they are places in the vocabulary, in torch.int64 or torch.uint8.")
    if labels.device != values.device:
        raise LossError(f"labels are on {labels.device}, and {what} on {values.device}: move the labels there.")
    if not isinstance(chunk, int) or chunk < 1:
        raise LossError(f"chunk is {chunk!r}: it is the number of tokens at a time, 1 or more.")
    if isinstance(items, Tensor) and items.numel() != 1:
        raise LossError(f"num_items_in_batch has shape {tuple(items.shape)}: it is one number.")


def _check_labels(labels: Tensor, ignore_index: int, places: int) -> None:
    """Raise LossError for a label that is no place in the vocabulary. A GPU finds that itself; asking it holds the host."""
    if labels.device.type != "cpu":
        return
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= places))]
    if wrong.numel():
        raise LossError(
            f"label {int(wrong[0])} is no place in a vocabulary of {places}, and not ignore_index ({ignore_index}) either."
        )


def _scaled(total: Tensor, labels: Tensor, ignore_index: int, items: Tensor | int | None) -> Tensor:
    if items is None:
        return total / (labels != ignore_index).sum()
    return total / (items.to(total.device).view(()) if isinstance(items, Tensor) else items)


class _FromLogits(torch.autograd.Function):
    """The sum over tokens. Saves the logits as they are; of a chunk the fp32 form lives until it is summed or written."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, chunk: int) -> Tensor:
        ctx.ignore_index, ctx.chunk = ignore_index, chunk
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for part, wanted in zip(torch.split(logits, chunk), torch.split(labels, chunk), strict=True):
            counts = wanted != ignore_index
            places = wanted.where(counts, 0).unsqueeze(-1)
            chosen = torch.log_softmax(part, -1, dtype=torch.float32).gather(-1, places).squeeze(-1)
            total -= chosen.where(counts, 0).sum()
        ctx.save_for_backward(logits, labels)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        out = torch.empty_like(logits)
        for part, wanted, target in zip(*(torch.split(t, ctx.chunk) for t in (logits, labels, out)), strict=True):
            counts = wanted != ctx.ignore_index
            places = wanted.where(counts, 0).unsqueeze(-1)
            shares = torch.softmax(part, -1, dtype=torch.float32)
            shares.scatter_add_(-1, places, torch.full_like(places, -1, dtype=shares.dtype))
            torch.mul(shares, (gradients[0] * counts).unsqueeze(-1), out=target)  # rounds as it writes
        return out, None, None, None


class ReplacedLoss:
    """The `loss_function` of a transformers model, replaced on the instance until `undo`."""

    def __init__(self, model: Any, loss: Callable[..., Tensor]) -> None:
        self._model = model
        self._before = vars(model).get("_loss_function")
        model.loss_function = Replacement.of(model, "loss_function", loss, model.loss_function)

    def undo(self) -> None:
        """Give the model its own loss back."""
        if self._before is None:
            vars(self._model).pop("_loss_function", None)
        else:
            self._model.loss_function = self._before


class _LossInChunks:
    """Stands in for transformers' causal loss where `_takes` says so."""

    _plain: Callable[..., Tensor]

    def _takes(self, logits: Tensor) -> bool:
        raise NotImplementedError

    def _in_chunks(self, logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        """logits: (T, ...); labels: (T,), what each position is to predict."""
        raise NotImplementedError

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        settings: dict[str, Any] = {"num_items_in_batch": num_items_in_batch, "ignore_index": ignore_index}
        if not self._takes(logits):
            return self._plain(logits, labels, vocab_size, shift_labels=shift_labels, **settings, **kwargs)
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        return self._in_chunks(logits, shift_labels.reshape(-1).to(logits.device), **settings)


class LeanLoss(_LossInChunks):
    """A causal language model of transformers, also inside a PEFT model, whose training loss comes in chunks, until `undo`.

    chunk: tokens at a time.
    Where a forward with labels records gradients, the head hands the hidden states through, and the loss calls the head for
    each chunk. The output has no logits then: they never exist. Without labels or gradients nothing is different.
    Raises PrepareError for a model whose loss is not transformers' causal one, or which cannot be changed so.
    """

    def __init__(self, model: nn.Module, chunk: int = CHUNK_TOKENS) -> None:
        self.chunk = chunk
        self._model, self._head = _model_and_head(model)
        self._active = False  # between the start of such a forward and its loss
        self._handed: Tensor | None = None
        self._before = [(m, name, vars(m).get(name)) for m, name in self._changed()]
        self._original: Callable[..., Any] = self._model.forward
        self._head_forward: Callable[..., Tensor] = self._head.forward
        self._plain = self._model.loss_function
        own = {(id(module), name): value for module, name, value in self._before}
        for module, forward, original in (
            (self._model, self._forward, self._original),
            (self._head, self._pass_or_compute, self._head_forward),
        ):
            with_name = _in_place_of(original, forward)
            module.forward = Replacement.of(module, "forward", with_name, own[id(module), "forward"])
        self._model.loss_function = Replacement.of(self._model, "loss_function", self._loss, self._plain)

    def _changed(self) -> tuple[tuple[Any, str], ...]:
        return (self._model, "forward"), (self._head, "forward"), (self._model, "_loss_function")

    def undo(self) -> None:
        """Give the model its own loss back."""
        for module, name, value in self._before:
            if value is None:
                vars(module).pop(name, None)
            else:
                setattr(module, name, value)
        self._before.clear()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is None or not torch.is_grad_enabled():
            return self._original(*args, **kwargs)
        self._active = True
        try:
            output = self._original(*args, **kwargs)
            if self._active:
                raise ShardwiseError(
                    f"{type(self._model).__name__} does not take its loss from loss_function: it cannot be had in chunks. "
                    "Leave loss_chunk_tokens out."
                )
        finally:
            self._active, self._handed = False, None
        if isinstance(output, dict):
            return type(output)(**{name: value for name, value in output.items() if name != "logits"})
        return (output[0], None, *output[2:])

    def _pass_or_compute(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._active:
            return self._head_forward(hidden, *args, **kwargs)
        self._handed = hidden
        return hidden

    def _takes(self, logits: Tensor) -> bool:
        return self._active

    def _in_chunks(self, logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        self._active = False
        if logits is not self._handed:
            raise ShardwiseError(
                f"{type(self._model).__name__} changes its logits between the head and the loss (a cap or a scale): the loss "
                "cannot be had in chunks. Leave loss_chunk_tokens out."
            )
        return head_cross_entropy(
            logits.reshape(-1, logits.shape[-1]), self._head, labels, chunk=self.chunk, **settings
        )


class LogitsLoss(_LossInChunks):
    """A causal language model of transformers whose training loss takes its logits in chunks, until `undo`.

    chunk: tokens at a time. Logits are made once and stay, in their own dtype; what is fp32 of them exists for a chunk.
    Raises PrepareError for a model whose loss is not transformers' causal one.
    """

    def __init__(self, model: nn.Module, chunk: int = CHUNK_TOKENS) -> None:
        self._chunk = chunk
        inner, _ = _model_and_head(model)
        self._plain = inner.loss_function
        self._replaced = ReplacedLoss(inner, self._loss)

    def undo(self) -> None:
        """Give the model its own loss back."""
        self._replaced.undo()

    def _takes(self, logits: Tensor) -> bool:
        return torch.is_grad_enabled() and logits.requires_grad

    def _in_chunks(self, logits: Tensor, labels: Tensor, **settings: Any) -> Tensor:
        return cross_entropy(logits.reshape(-1, logits.shape[-1]), labels, chunk=self._chunk, **settings)


def _in_place_of(plain: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """`method` with the name and the signature of `plain`, which peft and transformers read."""

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return forward


def causal_models(model: nn.Module) -> Iterator[Any]:
    """The modules in `model` that have a loss of transformers' own, and none that is known to be other than the causal one."""
    for module in model.modules():
        # PEFT's wrappers answer for the model inside of them; the loss is the model's own.
        if "loss_function" in dir(type(module)) and getattr(module, "loss_type", None) in (None, "ForCausalLM"):
            yield module


def check_loss(model: nn.Module) -> None:
    """Raise what LeanLoss and LogitsLoss would raise for `model`, which stays as it is."""
    _model_and_head(model)


def _model_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The transformers model in `model`, whose loss can be replaced, and its head. Raises PrepareError."""
    for module in causal_models(model):
        find = getattr(module, "get_output_embeddings", None)
        head = find() if find is not None else None
        if head is None:
            continue
        kind = inspect.getattr_static(type(module), "loss_function")
        if isinstance(kind, property) and kind.fset is None:
            raise PrepareError(
                f"loss_chunk_tokens: the loss_function of {type(module).__name__} cannot be set, so its loss cannot be had in "
                "chunks. Leave it out, or call shardwise.losses.head_cross_entropy yourself."
            )
        return module, head
    raise PrepareError(
        f"loss_chunk_tokens: {type(model).__name__} is not a causal language model of transformers. Leave it out, or call "
        "shardwise.losses.head_cross_entropy yourself."
    )
