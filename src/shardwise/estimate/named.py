"""The optimizer that `--optimizer` names: one that is known by its name, or any class or function of a module. No torch here.

AdamW                    every trained parameter
Muon                     Muon+AdamW
SOAP+AdamW               the first steps matrices but not embeddings and the head, the second all else
my_script:make_optimizer a function of the parameters, or a class
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..files.documents import printed

# By the module that has them. A class that two packages have is the first one's; the other is asked for as module:Class.
_MODULES = {
    "torch.optim": (
        "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop",
        "SGD",
    ),
    "bitsandbytes.optim": (
        "AdamW8bit", "Lion8bit", "AdEMAMix8bit", "LAMB8bit", "PagedAdamW", "PagedAdamW8bit", "PagedLion8bit",
    ),
    "torchao.optim": ("AdamW4bit", "AdamWFp8"),
    "schedulefree": ("AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"),
    "came_pytorch": ("CAME",),
    "pytorch_optimizer": ("Adan", "AdEMAMix", "Lamb", "LARS", "Lion", "SOAP"),
}  # fmt: skip
KNOWN = {name: module for module, names in _MODULES.items() for name in names}
# The package of a module, where its name is another.
_PACKAGES = {"came_pytorch": "came-pytorch", "pytorch_optimizer": "pytorch_optimizer"}
# What a class does not start without. No size depends on it.
_NEEDED: dict[str, dict[str, Any]] = {"CAME": {"lr": 1e-3}}
# What steps the rest, where a class takes matrices alone.
_BESIDE = {"Muon": "AdamW"}


@dataclass(frozen=True)
class Named:
    """One optimizer. module, attribute: where its class or function is; settings: keywords that it is called with."""

    name: str
    module: str
    attribute: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def made(self, parameters: Any) -> Any:
        """The optimizer of these. Raises ConfigError where it is not there, or cannot be made so."""
        make = self._found()
        try:
            made = make(parameters, **self.settings)
        except Exception as error:  # whatever a stranger's constructor raises
            said = printed(" ".join(f"{type(error).__name__}: {error}".split()))
            raise ConfigError(
                f"--optimizer: {self.name} cannot be made of parameters ({said}); give what it needs by --optimizer_args, or "
                "name a function of the parameters"
            ) from error
        if not hasattr(made, "param_groups"):
            raise ConfigError(f"--optimizer: {self.name} gives a {type(made).__name__}, which is no optimizer")
        return made

    def _found(self) -> Any:
        package = self.module.partition(".")[0]
        here = os.getcwd()
        if here not in sys.path:
            sys.path.append(here)  # as `python -m` finds a module of the directory
        try:
            found: Any = importlib.import_module(self.module)
            for part in self.attribute.split("."):
                found = getattr(found, part)
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != package:
                raise ConfigError(f"--optimizer: {self.module} cannot be imported: {error}") from error
            install = f"; pip install {_PACKAGES.get(package, package)}" if self.attribute in KNOWN else ""
            raise ConfigError(f"--optimizer: {self.name} is of {package}, which is not installed{install}") from None
        except AttributeError:
            raise ConfigError(f"--optimizer: {self.module} has no {self.attribute}") from None
        except Exception as error:  # a module of the user's may raise anything
            raise ConfigError(
                f"--optimizer: {self.module} cannot be imported: {type(error).__name__}: {error}"
            ) from error
        if not callable(found):
            raise ConfigError(f"--optimizer: {self.attribute} of {self.module} is neither a class nor a function")
        return found


def named(text: str, settings: str | None = None) -> tuple[Named, ...]:
    """One, or two: of matrices, and of the rest. settings: `name=value,...` for the first one.

    Raises ConfigError for a name that is not known, or settings that are none.
    """
    names = [part.strip() for part in text.split("+")]
    if len(names) > 2:
        raise ConfigError(f"--optimizer: {text!r} names {len(names)} optimizers; one for matrices and one for the rest")
    first = _one(names[0], _settings(settings))
    beside = names[1] if len(names) == 2 else _BESIDE.get(first.name) if first.module == "torch.optim" else None
    return (first,) if beside is None else (first, _one(beside, {}))


def _one(text: str, settings: Mapping[str, Any]) -> Named:
    module, colon, attribute = text.partition(":")
    if colon:
        if (
            not module
            or not attribute
            or not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")])
        ):
            raise ConfigError(f"--optimizer: {text!r} is not module:Class, as torch.optim:SGD is")
        return Named(attribute.rpartition(".")[2], module, attribute, settings)
    name = next((name for name in KNOWN if name.casefold() == text.casefold()), None)
    if name is None:
        close = difflib.get_close_matches(text.casefold(), [known.casefold() for known in KNOWN], n=1)
        near = [known for known in KNOWN if known.casefold() in close]
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"--optimizer: {text!r} is not one of {', '.join(KNOWN)}, nor module:Class, which any other class is named as{hint}"
        )
    return Named(name, KNOWN[name], name, {**_NEEDED.get(name, {}), **settings})


def _settings(text: str | None) -> dict[str, Any]:
    """`momentum=0.9,betas=(0.9,0.95)` as keywords."""
    if not text:
        return {}
    wrong = ConfigError(
        f"--optimizer_args: {text!r} is not name=value,... with numbers, texts in quotes, True or False"
    )
    try:
        call: Any = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise wrong
        return {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise wrong from None
