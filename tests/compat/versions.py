"""The short parity set under other versions of the libraries, each pair in an environment of its own: `make test-versions`.

    python tests/compat/versions.py                          every pair; prints a table
    python tests/compat/versions.py 4.56/1.10 newest/newest  these pairs of transformers and accelerate
    python tests/compat/versions.py --trl                    also TRL's trainers, where TRL resolves

An environment sees the packages of the interpreter that runs this, and has of its own only what the pair has in another
version. It is made in a temporary folder and goes with it. Needs a package index.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

PAIRS = [
    f"{transformers}/{accelerate}" for transformers in ("4.56", "5.0", "newest") for accelerate in ("1.10", "newest")
]
SHOWN = ("transformers", "accelerate", "peft", "trl")
TESTS = str(Path(__file__).with_name("test_parity.py"))
SHORT, TRL = ["-m", "not full"], ["-m", "full", "-k", "trls"]


def requirement(name: str, version: str) -> str:
    return name if version == "newest" else f"{name}=={version}.*"


def make_environment(folder: Path, pair: str) -> tuple[Path, str | None]:
    """The interpreter of a new environment with this pair, and why it has not become one, or None."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    (own / "beneath.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    transformers, accelerate = pair.split("/")
    wanted = [requirement("transformers", transformers), requirement("accelerate", accelerate), "peft", "datasets"]
    wanted.append(f"torch=={importlib.metadata.version('torch').partition('+')[0]}")
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", *wanted]
    for more in (["trl"], []):
        done = subprocess.run([*install, *more], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return python, None
    return python, done.stderr.strip().splitlines()[-1]


def versions(python: Path) -> list[str]:
    code = "import importlib.metadata as m, importlib.util as u, sys\n"
    code += "print(*[m.version(n) if u.find_spec(n) else '-' for n in sys.argv[1:]])"
    return subprocess.check_output([python, "-c", code, *SHOWN], text=True).split()


def result(python: Path, selection: list[str]) -> str:
    """How pytest ended, in its own words; what failed goes to the terminal."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS, *selection]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        sys.stderr.write(f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}\n")
    return re.sub(r"(, \d+ deselected)? in .*", "", done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="The short parity set under other versions of the libraries.")
    parser.add_argument("pairs", nargs="*", default=PAIRS, metavar="TRANSFORMERS/ACCELERATE")
    parser.add_argument("--trl", action="store_true", help="also TRL's trainers, where TRL resolves")
    arguments = parser.parse_args()
    failed = False
    print("|", " | ".join([*SHOWN, "short set", *(["TRL's trainers"] if arguments.trl else [])]), "|")
    print("|" + "---|" * (len(SHOWN) + 1 + arguments.trl), flush=True)
    for pair in arguments.pairs:
        with tempfile.TemporaryDirectory(prefix="shardwise-versions-") as folder:
            python, unresolved = make_environment(Path(folder), pair)
            if unresolved is not None:
                print(f"| {pair.replace('/', ' | ')} | | | does not resolve: {unresolved} |", flush=True)
                continue
            found = versions(python)
            row = [*found, result(python, SHORT)]
            if arguments.trl:
                row.append(result(python, TRL) if found[-1] != "-" else "not there")
            failed = failed or any(re.search("failed|error", cell) for cell in row)
            print("|", " | ".join(row), "|", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
