"""Whether what was built is what users are to get: `python tools/check_dist.py dist`, behind `make dist`.

The wheel has every file of the package and nothing else, and says of itself what pyproject.toml says. Installed into an empty
environment, which borrows the packages that it depends on from this one, it is what Python imports and the commands run.
"""

from __future__ import annotations

import email
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from email.message import Message
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"
# What somebody needs who builds the package from its sources.
OF_THE_SDIST = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "src/shardwise/py.typed")
NOT_OF_THE_SDIST = (".venv", "build", "dist", "runs", ".git/")

IMPORTS = """
import importlib, pkgutil, sys
import shardwise
assert shardwise.__file__.startswith(sys.prefix), shardwise.__file__
for found in pkgutil.walk_packages(shardwise.__path__, "shardwise."):
    if not found.name.endswith(("__main__", "worker", "triton_kernels")):  # programs, and what needs a GPU's compiler
        importlib.import_module(found.name)
from shardwise import Accelerator
from shardwise.utils import set_seed
print(shardwise.__version__)
"""


def problems_of_the_wheel(wheel: Path, project: dict[str, object], version: str) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        commands = archive.read(f"{info}/entry_points.txt").decode()
    inside = {name for name in names if not name.startswith(f"{info}/")}
    wanted = {
        str(file.relative_to(SOURCE))
        for file in (SOURCE / "shardwise").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    found = [f"{wheel.name}: lacks {name}" for name in sorted(wanted - inside)]
    found += [f"{wheel.name}: has {name}, which is no part of the package" for name in sorted(inside - wanted)]
    if "shardwise/py.typed" not in inside:
        found.append(f"{wheel.name}: lacks py.typed, so type checkers would not look into it")
    if "shardwise = shardwise.cli.main:main" not in commands:
        found.append(f"{wheel.name}: has no command shardwise")
    return found + [f"{wheel.name}: {text}" for text in problems_of_metadata(metadata, project, version)]


def problems_of_metadata(metadata: Message, project: dict[str, object], version: str) -> list[str]:
    wanted = {
        "Name": project["name"],
        "Version": version,
        "Requires-Python": project["requires-python"],
        "License-Expression": project["license"],
        "Description-Content-Type": "text/markdown",
    }
    found = [f"{key} is {metadata[key]}, not {value}" for key, value in wanted.items() if metadata[key] != value]
    needed = [str(one) for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in str(one)]
    dependencies = project["dependencies"]
    assert isinstance(dependencies, list)
    if sorted(needed) != sorted(dependencies):
        found.append(f"Requires-Dist is {sorted(needed)}, not {sorted(dependencies)}")
    extras = project["optional-dependencies"]
    assert isinstance(extras, dict)
    if set(metadata.get_all("Provides-Extra", [])) != set(extras):
        found.append(f"Provides-Extra is {metadata.get_all('Provides-Extra')}, not {sorted(extras)}")
    return found


def problems_of_the_sdist(sdist: Path) -> list[str]:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    found = [f"{sdist.name}: lacks {name}" for name in OF_THE_SDIST if name not in names]
    return found + [f"{sdist.name}: has {name}" for name in sorted(names) if name.startswith(NOT_OF_THE_SDIST)]


def problems_of_the_installed(wheel: Path, version: str) -> list[str]:
    """Of the wheel in an environment of its own: what is imported, and what the commands answer."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "environment"
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel.resolve()]
        subprocess.run(install, check=True, cwd=folder)
        # A path in a .pth file comes last in sys.path, and .pth files in it (an editable install's) are not read.
        lent = next((place / "lib").glob("python*")) / "site-packages" / "lent.pth"
        lent.write_text(sysconfig.get_path("purelib") + "\n")
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        found = []
        for command, wanted in (
            ([python, "-c", IMPORTS], version),
            ([place / "bin" / "shardwise", "--version"], f"shardwise {version}"),
            ([python, "-m", "shardwise", "--version"], f"shardwise {version}"),
        ):
            ran = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False)
            if ran.returncode or ran.stdout.strip() != wanted:
                found.append(f"{command[1]}: {ran.returncode}: {ran.stdout}{ran.stderr}")
        return found


def check(folder: Path) -> list[str]:
    """Everything that is wrong with the one wheel and the one sdist in `folder`."""
    wheels, sdists = sorted(folder.glob("*.whl")), sorted(folder.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        return [f"{folder} has {len(wheels)} wheel(s) and {len(sdists)} sdist(s); one of each is wanted"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known: dict[str, str] = {}
    exec((SOURCE / "shardwise" / "version.py").read_text(), known)
    version = known["__version__"]
    found = problems_of_the_wheel(wheels[0], project, version) + problems_of_the_sdist(sdists[0])
    return found or problems_of_the_installed(wheels[0], version)


def main() -> None:
    folder = Path(sys.argv[1])
    found = check(folder)
    print("\n".join(found) or f"{', '.join(sorted(file.name for file in folder.iterdir()))}: as it should be")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
