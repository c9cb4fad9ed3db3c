"""What tools/check_dist.py finds in packages, and that those of today pass it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import check_dist


@pytest.mark.full
def test_wheel_and_sdist_are_what_users_are_to_get(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run(build, cwd=check_dist.ROOT, check=True, capture_output=True)
    assert check_dist.check(tmp_path) == []


def test_a_wheel_with_other_files_or_another_version_is_told(tmp_path: Path) -> None:
    wheel = tmp_path / "shardwise-0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("shardwise/__init__.py", "")
        archive.writestr("tests/test_it.py", "")
        archive.writestr("shardwise-0.dist-info/METADATA", "Name: shardwise\nVersion: 0\nRequires-Dist: torch\n\n")
        archive.writestr("shardwise-0.dist-info/entry_points.txt", "")
    project = {
        "name": "shardwise",
        "requires-python": ">=3.11",
        "license": "Apache-2.0",
        "dependencies": ["torch>=2.9"],
        "optional-dependencies": {},
    }
    found = "\n".join(check_dist.problems_of_the_wheel(wheel, project, "1"))
    for words in ("lacks shardwise/py.typed", "has tests/test_it.py", "Version is 0, not 1", "no command", "['torch']"):
        assert words in found


def test_one_wheel_and_one_sdist_are_wanted(tmp_path: Path) -> None:
    assert check_dist.check(tmp_path) == [f"{tmp_path} has 0 wheel(s) and 0 sdist(s); one of each is wanted"]


def test_workflows_run_what_is_there() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (check_dist.ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in ("ci", "release"):
        jobs = yaml.safe_load((check_dist.ROOT / ".github" / "workflows" / f"{name}.yml").read_text())["jobs"]
        runs = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
        assert ".ci/run" in runs
        assert "make dist" in runs
        assert {run.split()[1] for run in runs if run.startswith("make ")} <= targets
        assert all(needed in jobs for job in jobs.values() for needed in job.get("needs", []))
    assert (check_dist.ROOT / ".ci" / "run").stat().st_mode & 0o100
