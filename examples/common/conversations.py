"""Rows of conversations, prompts with completions, or plain text become token ids, and labels on what the model is to learn.

    messages               the answers of the assistant, in every turn, with what ends them
    prompt, completion     the completion and an end token; both may be texts, or lists of messages
    text                   every token but the first, and an end token

A label is the token's own id where it counts in the loss and -100 elsewhere; the model shifts them. The first token of a row
never counts: nothing comes before it, also where rows are packed behind one another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

IGNORED = -100
# The kinds of rows by the columns that they need, in the order in which they are looked for.
KINDS = {"messages": ("messages",), "completion": ("prompt", "completion"), "text": ("text",)}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Messages = list[dict[str, Any]]


class RowError(ValueError):
    """A row that cannot be read, in a sentence."""


@dataclass(frozen=True)
class Summary:
    """What became of the rows. Counts are of rows, but for `tokens` and `answer_tokens`, which are of those kept."""

    rows: int
    kept: int
    empty: int
    cut: int
    lost: int
    tokens: int
    answer_tokens: int
    unused: tuple[str, ...]

    def lines(self, name: str, max_length: int) -> list[str]:
        """The summary for people, one sentence a line; what did not happen is not said."""
        said = [f"{name}: {self.kept} of {self.rows} rows, {self.tokens} tokens, {self.answer_tokens} of them answers"]
        if self.empty:
            said.append(f"{name}: rows dropped, which have no answer or an empty one: {self.empty}")
        if self.cut:
            said.append(f"{name}: rows cut at --max-length {max_length} tokens, which lost their ends: {self.cut}")
        if self.lost:
            said.append(f"{name}: rows dropped, whose answers all lie beyond --max-length {max_length}: {self.lost}")
        if self.unused:
            said.append(f"{name}: columns that are not used: {', '.join(self.unused)}")
        return said


class Encoder:
    """Encodes rows with one tokenizer.

    template:   of the chat; None takes the tokenizer's own.
    max_length: tokens at which a row is cut.
    """

    def __init__(self, tokenizer: Any, template: str | None, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.template = template or tokenizer.chat_template
        self.max_length = max_length

    def encode(self, row: Mapping[str, Any], kind: str) -> dict[str, Any]:
        """{"input_ids", "labels", "fate", "problem"} of a row of this kind.

        fate: "kept", "cut", "lost" (cut so that no answer is left) or "empty" (nothing to learn in it).
        problem: why the row cannot be read, or "". The caller decides, so that every rank decides alike.
        """
        try:
            encoded = self._encode(row, kind)
        except RowError as error:
            return {"input_ids": [], "labels": [], "fate": "empty", "problem": str(error)}
        if encoded is None:
            return {"input_ids": [], "labels": [], "fate": "empty", "problem": ""}
        ids, answers = encoded
        learned = [token if counts else IGNORED for token, counts in zip(ids, answers, strict=True)]
        labels = [IGNORED, *learned[1:]]
        fate = "kept" if len(ids) <= self.max_length else "cut"
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        if all(label == IGNORED for label in labels):
            fate = "lost" if fate == "cut" else "empty"
        return {"input_ids": ids, "labels": labels, "fate": fate, "problem": ""}

    def _encode(self, row: Mapping[str, Any], kind: str) -> tuple[list[int], list[bool]] | None:
        if kind == "messages":
            return self._conversation(messages_of(row["messages"]), learned_from=0)
        if kind == "text":
            text = row["text"]
            if text is None or not str(text).strip():
                return None
            ids = self._with_end(self.tokenizer(str(text))["input_ids"])
            return ids, [True] * len(ids)
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, list) or isinstance(completion, list):
            before, after = messages_of(prompt, role="user"), messages_of(completion, role="assistant")
            return self._conversation(before + after, learned_from=len(before))
        if prompt is None:
            raise RowError("its prompt is missing")
        if completion is None or not str(completion).strip():
            return None
        # The prompt is tokenized by itself, as it will be when the model is asked.
        ids = self.tokenizer(str(prompt))["input_ids"]
        if ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text
            ids = ids[:-1]
        answer = self._with_end(self.tokenizer(str(completion), add_special_tokens=False)["input_ids"])
        return ids + answer, [False] * len(ids) + [True] * len(answer)

    def _with_end(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if end is None or ids[-1:] == [end] else [*ids, end]

    # Conversations.

    def _conversation(self, messages: Messages, learned_from: int) -> tuple[list[int], list[bool]] | None:
        """Ids, and which of them are the assistant's from message `learned_from` on; None without any, or with an empty one."""
        answers = [message for message in messages[learned_from:] if message["role"] == "assistant"]
        if not answers or any(_is_empty(message) for message in answers):
            return None
        text = self._render(messages)
        if any(message.get("tool_calls") for message in messages) and text == self._without_calls(messages):
            raise RowError(
                "the chat template writes no tool calls, so that an empty answer would be learned in their place"
            )
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        if _GENERATION.search(self.template):
            marked = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
            if list(marked["input_ids"]) != ids:
                raise RowError("the chat template's text and its tokens differ")
            counts = [bool(mark) for mark in marked["assistant_masks"]]
            start = len(self._prefix(messages[:learned_from], text)) if learned_from else 0
            return ids, [mark and end > start for mark, (_, end) in zip(counts, offsets, strict=True)]
        spans = []
        for number in range(learned_from, len(messages)):
            if messages[number]["role"] == "assistant":
                start = len(self._prefix(messages[:number], text, answers=True))
                spans.append((start, len(self._prefix(messages[: number + 1], text))))
        return ids, [any(end > first and start < last for first, last in spans) for start, end in offsets]

    def _prefix(self, messages: Messages, text: str, *, answers: bool = False) -> str:
        """The text of the first messages, which the whole text must begin with. answers: up to where an answer begins."""
        if not messages:
            return ""
        prefix = self._render(messages, add_generation_prompt=answers)
        if not text.startswith(prefix):
            raise RowError(
                "the chat template writes the first messages of a conversation otherwise than in the whole of it, so "
                "that its answers cannot be found. Mark them with {% generation %} in a template for --chat-template"
            )
        return prefix

    def _without_calls(self, messages: Messages) -> str | None:
        """The text without its tool calls; None where the template refuses that."""
        try:
            return self._render([{key: m[key] for key in m if key != "tool_calls"} for m in messages])
        except RowError:
            return None

    def _render(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                )
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise RowError(f"the chat template refuses it ({error})") from None


def messages_of(value: Any, role: str | None = None) -> Messages:
    """Messages of a row: a list of them, or the JSON of one (as CSV has it). A text is one message of `role`, if there is one.

    Keys without a value, which tables add to a row because another row has them, are left out. Raises RowError.
    """
    if isinstance(value, str):
        if role is not None:
            return [{"role": role, "content": value}]
        try:
            value = json.loads(value)
        except ValueError:
            raise RowError("its messages are a text that is no JSON") from None
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        raise RowError("its messages are no list of objects with role and content")
    found = [{key: item for key, item in message.items() if item is not None} for message in value]
    for number, message in enumerate(found):
        if not isinstance(message.get("role"), str):
            raise RowError(f'message {number} has no "role", only {sorted(message)}')
        if "content" not in message:
            if not message.get("tool_calls") and message["role"] != "assistant":
                raise RowError(f'message {number} has no "content", only {sorted(message)}')
            message["content"] = ""
        message["content"] = _text_of(message["content"], number)
    return found


def _text_of(content: Any, number: int) -> str:
    """A message's content as text, also where it is a list of parts: a template that reads texts would print the list."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        odd = next(part for part, text in zip(parts, texts, strict=True) if not isinstance(text, str))
        kind = odd.get("type") if isinstance(odd, Mapping) else type(odd).__name__
        raise RowError(f"message {number} has content of type {kind}, and only text is learned here")
    return "".join(texts)


def _is_empty(message: Mapping[str, Any]) -> bool:
    return not message["content"].strip() and not message.get("tool_calls")


def kind_of(columns: Sequence[str]) -> str | None:
    """The kind of rows with these columns; None if they are none of the three."""
    return next((kind for kind, needed in KINDS.items() if set(needed) <= set(columns)), None)


def encode_rows(rows: Dataset, encoder: Encoder, name: str) -> tuple[Dataset, Summary]:
    """The rows that are trained on, as input_ids and labels, and what became of the others.

    name: of the rows, in errors. Raises SystemExit for columns of no known kind, for rows that cannot be read, for a tokenizer
    that cannot do what the kind needs, and if no row is left.
    """
    kind = kind_of(rows.column_names)
    if kind is None:
        raise SystemExit(
            f"{name} has the columns {rows.column_names}; needed are messages, or prompt and completion, or text. Rename "
            "them with --columns, such as --columns prompt=instruction completion=output."
        )
    if kind == "messages" or any(not _is_text(rows, column) for column in KINDS[kind]):
        if encoder.template is None:
            raise SystemExit(
                f"{name} has conversations, and the tokenizer of this model has no chat template. Give one with "
                "--chat-template, for example examples/data/chat_template.jinja, or take the model's chat version."
            )
        if not encoder.tokenizer.is_fast:
            raise SystemExit(
                f"{name} has conversations, and the tokenizer of this model ({type(encoder.tokenizer).__name__}) does not "
                "say where in the text its tokens lie. Give prompt and completion as texts instead."
            )
    encoded = rows.map(
        encoder.encode,
        fn_kwargs={"kind": kind},
        remove_columns=rows.column_names,
        desc=name,
    )
    for number, problem in enumerate(encoded["problem"]):
        if problem:
            raise SystemExit(f"row {number} of {name} (counted from 0) cannot be used: {problem}.")
    fates = encoded["fate"][:]
    kept = encoded.select([number for number, fate in enumerate(fates) if fate in ("kept", "cut")])
    kept = kept.select_columns(["input_ids", "labels"])
    summary = Summary(
        rows=len(rows),
        kept=len(kept),
        empty=fates.count("empty"),
        cut=fates.count("cut"),
        lost=fates.count("lost"),
        tokens=sum(len(ids) for ids in kept["input_ids"]),
        answer_tokens=sum(label != IGNORED for labels in kept["labels"] for label in labels),
        unused=tuple(column for column in rows.column_names if column not in KINDS[kind]),
    )
    if not len(kept):
        raise SystemExit(
            f"no row of {name} is left: {summary.empty} have no answer, {summary.lost} have none within "
            f"--max-length {encoder.max_length}."
        )
    return kept, summary


def _is_text(rows: Dataset, column: str) -> bool:
    return getattr(rows.features[column], "dtype", None) in ("string", "large_string")


def read_template(path: Path | None) -> str | None:
    """The chat template in a file."""
    return None if path is None else path.read_text(encoding="utf-8")
