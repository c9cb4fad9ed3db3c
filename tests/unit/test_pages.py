"""What README and docs/ say can be followed: links and anchors lead somewhere, YAML is accepted, commands parse, errors exist.

Python blocks run in tests/ranks/test_page_snippets.py. One with `<!-- not run: why -->` above it is compiled here instead.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from shardwise.cli.flags import FLAGS
from shardwise.cli.main import app
from shardwise.config.resolve import resolve
from shardwise.config.schema import Config, every_setting

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools" / "site"))

import pages

ROOT = pages.ROOT
EVERY = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
FOR_USERS = [page for page in EVERY if not page.startswith(("docs/design/", "docs/log", "docs/trace", "CHANGELOG"))]
SHELL = ("", "bash", "sh", "shell", "console")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


# Links.


@pytest.mark.parametrize("page", EVERY)
def test_links_and_anchors_lead_somewhere(page: str) -> None:
    wrong = []
    for link in pages.links(text_of(page)):
        if not pages.is_internal(link.target):
            continue
        path, anchor = pages.resolved(page, link.target)
        if not (ROOT / path).exists():
            wrong.append(f"{page}:{link.line}: {link.target}: there is no {path}")
        elif anchor and path.endswith(".md") and anchor not in pages.anchors(text_of(path)):
            wrong.append(f"{page}:{link.line}: {link.target}: {path} has no such heading")
    assert not wrong, "\n".join(wrong)


def test_every_page_is_in_the_nav_once() -> None:
    class Loader(yaml.SafeLoader):
        pass

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]

    def leaves(item: Any) -> Iterator[str]:
        if isinstance(item, str):
            yield item
        else:
            for inner in item.values() if isinstance(item, dict) else item:
                yield from leaves(inner)

    assert sorted(leaves(nav)) == sorted(str(pages.site_path(page)) for page in EVERY)


# Settings and commands.


def yaml_blocks() -> list[Any]:
    return [
        pytest.param(fence.text, id=f"{page}:{fence.line}")
        for page in EVERY
        for fence in pages.fences(text_of(page))
        if fence.language in ("yaml", "yml")
    ]


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that pages name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 3}}')
    return tmp_path


@pytest.mark.parametrize("text", yaml_blocks())
def test_yaml_is_a_configuration_or_something_else(text: str, in_a_folder: Path) -> None:
    found = yaml.safe_load(text)
    if isinstance(found, dict) and found.keys() & Config.model_fields.keys():
        (in_a_folder / "run.yaml").write_text(text)
        resolve({}, "run.yaml")


def commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The commands of the page's blocks, without comments and with their continued lines, and the line of each."""
    for fence in pages.fences(text):
        if fence.language not in SHELL:
            continue
        joined = fence.text.replace("\\\n", " ")
        for number, line in enumerate(joined.splitlines()):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # what a command prints
                continue
            if words:
                yield fence.line + number, words


def own_commands() -> list[Any]:
    found = []
    for page in EVERY:
        for line, words in commands(text_of(page)):
            if "shardwise" in words[:6] and (words[0] in ("shardwise", "srun") or "srun" in words[:2]):
                found.append(pytest.param(words[words.index("shardwise") + 1 :], id=f"{page}:{line}"))
    return found


@pytest.mark.parametrize("arguments", own_commands())
def test_commands_are_what_the_parsers_take(arguments: list[str], in_a_folder: Path) -> None:
    top: Any = typer.main.get_command(app)
    name, *rest = arguments
    if name.startswith("-"):
        assert name in [option for one in top.params for option in one.opts]
        return
    top_context = top.make_context("shardwise", [name, *rest], resilient_parsing=False)
    command = top.commands[name]
    with command.make_context(name, rest, parent=top_context) as context:
        given = {flag.name: context.params[flag.name] for flag in FLAGS if context.params.get(flag.name) is not None}
    elsewhere = (
        context.params.get("config_file") or context.params.get("slurm_script") or context.params.get("hostfile")
    )
    if not elsewhere:  # what a file or a scheduler says beside the flags is not known
        resolve(given, use_zero=bool(context.params.get("use_deepspeed")))


def test_make_targets_files_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
    wrong = []
    for page in EVERY:
        for line, words in commands(text_of(page)):
            told = f"{page}:{line}: {' '.join(words)}"
            if words[0] == "make":
                names = {word for word in words[1:] if "=" not in word}
                said = {word.partition("=")[0] for word in words[1:] if "=" in word}
                if names - targets or said - variables:
                    wrong.append(told)
            if words[0] in ("python", "torchrun"):
                wrong += [
                    told
                    for word in words[1:]
                    if word.startswith(("benchmarks/", "examples/", "tests/", "tools/")) and not (ROOT / word).is_file()
                ]
            if words[:2] == ["pip", "install"]:
                asked = {one for word in words for part in re.findall(r"\[([\w,]+)\]", word) for one in part.split(",")}
                if asked - extras:
                    wrong.append(told)
    assert not wrong, "\n".join(wrong)


def test_blocks_that_are_not_run_compile() -> None:
    left_out = []
    for page in FOR_USERS:
        for fence in pages.fences(text_of(page)):
            if fence.language == "python":
                ast.parse(fence.text, f"{page}:{fence.line}")
                if fence.before.startswith("<!-- not run: "):
                    left_out.append(page)
    assert len(left_out) <= 3, "a page that nobody runs grows old"


# Errors.


def texts_of_the_source() -> list[str]:
    """Every text of src/ that may reach a user; what is put into it stands as `...`."""
    found: list[str] = []
    for file in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_errors_of_troubleshooting_are_in_the_source() -> None:
    told = re.findall(r"^### `(.+)`$", text_of("docs/troubleshooting.md"), re.MULTILINE)
    assert len(told) > 30
    own = texts_of_the_source()
    missing = []
    for error in told:
        pattern = re.compile(".{0,200}?".join(re.escape(part.strip()) for part in error.split("...")), re.DOTALL)
        if not any(pattern.search(text) for text in own):
            missing.append(error)
    assert missing == []


# The site.


def test_a_page_of_the_repository_becomes_one_of_the_site() -> None:
    text = "One\n- two [three](docs/log.md#a) `[x](y)`\n- [four](LICENSE) ![five](docs/pictures/step.svg)\n\n```\na\n- b\n```\n"
    assert pages.for_the_site("README.md", text) == (
        "One\n\n- two [three](log.md#a) `[x](y)`\n- four ![five](pictures/step.svg)\n\n```\na\n- b\n```\n"
    )
    assert (
        pages.for_the_site("docs/howto/rl.md", "[a](../../README.md#b)\n[c](../log.md)\n")
        == "[a](../index.md#b)\n[c](../log.md)\n"
    )


def test_anchors_are_those_of_github() -> None:
    text = "# A `b_c`: d, e\n## A [link](x.md) and *more*\n## Same\n## Same\n```\n# no\n```\n"
    assert pages.anchors(text) == {"a-b_c-d-e", "a-link-and-more", "same", "same-1"}


def test_reference_pages_have_all_that_the_code_has() -> None:
    import reference

    settings = reference.settings()
    assert not [
        key for key, _ in every_setting() if f"`{key[-1]}`" not in settings and f"`{'.'.join(key)}`" not in settings
    ]
    told = reference.commands()
    top: Any = typer.main.get_command(app)
    for name, command in top.commands.items():
        assert f"\n## {name}\n" in told
        assert not [
            option
            for one in command.params
            for option in one.opts
            if option.startswith("--") and f"`{option}`" not in told
        ]


def test_the_python_reference_shows_every_public_name() -> None:
    import reference

    import shardwise

    told = reference.api()
    assert not [name for name in shardwise._HOME_OF if f"`{name}`" not in told]
    assert "`Accelerator.prepare`" in told


def test_made_parts_are_those_that_pages_ask_for() -> None:
    import reference

    asked = {name for page in EVERY for name in pages.MADE.findall(text_of(page))}
    assert asked == reference.PARTS.keys()
