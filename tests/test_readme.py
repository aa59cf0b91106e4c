"""The commands of the README and of the script's docstring run as written, with small overrides added."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import collect_results
import pytest
from conftest import SMALL_WORDS

import train_search_distill_binpack as script

FULL = "rollout_batch_size=16 training_batch_size=64 max_num_iters=1 eval_batch_size=16 eval_num_simulations=0".split()
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """Every call of a training script in a bash block of the README, and in the docstring, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()] + script.__doc__.splitlines()
    calls = [re.search(r"(?:^|\s)(?:\S*/)?python (train_\w+\.py[^#&|]*)", line) for line in lines]
    return list(dict.fromkeys(call.group(1).strip() for call in calls if call))


def small(words: list[str]) -> list[str]:
    """The overrides whose keys a command does not give itself."""
    given = {word.lstrip("-").partition("=")[0].replace("-", "_") for word in words}
    return [word for word in SMALL_WORDS if word.partition("=")[0] not in given]


def test_the_readme_has_the_commands_that_users_need():
    assert "train_search_distill_binpack.py preset=cpu" in commands()
    assert any("--help" in command for command in commands())
    assert len(commands()) >= 4


@pytest.mark.parametrize("command", commands())
def test_command_runs_as_written(command, tmp_path):
    name, *words = shlex.split(command)
    shutil.copy(ROOT / name, tmp_path)
    full = not words  # The bare command keeps the full network and search, on small batches.
    if "--help" not in words:
        words += FULL if full else small(words)
    run = subprocess.run(
        [sys.executable, name, *words],
        cwd=tmp_path,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Traceback" not in run.stderr and "Warning" not in run.stderr
    if "--help" not in words:
        assert list(tmp_path.glob(f"*/BinPack-v2/nsim_*/seed_*/iter_{1 if full else 4:06d}.pkl"))
    if full:
        assert "preset=cpu is a complete run" in run.stdout


def test_the_results_table_is_made_from_the_committed_files():
    results, floors = (json.loads(path.read_text()) for path in (collect_results.RESULTS, collect_results.FLOORS))
    assert collect_results.with_table(README, results, floors) == README
    assert len(results["runs"]) >= 3 and results["commit"] and floors["differing_fields"] == []


def test_requirements_and_versions_in_use_agree():
    """The packages that the tests run with lie within the bounds that the requirements state."""
    from importlib import metadata

    from packaging.requirements import Requirement

    files = (ROOT / "requirements.txt", ROOT / "tests/requirements.txt")
    lines = [line for file in files for line in file.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    assert len(requirements) >= 10
    for requirement in requirements:
        assert metadata.version(requirement.name) in requirement.specifier, requirement
