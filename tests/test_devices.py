"""A run is the same on 1, 2 and 4 devices: whole runs of the scripts, against those of the other tests on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, flat_vector, override

import train_search_distill_binpack as script


def run_on(num_devices: int, name: str, words: list[str], save_dir: Path) -> Path:
    """The folder of a run in a process of its own."""
    command = [sys.executable, str(ROOT / name), *words, f"save_dir={save_dir}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(num_devices)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0 and f"{num_devices} x cpu" in run.stdout, run.stdout + run.stderr
    (run_dir,) = save_dir.glob("BinPack-v2/*/seed_0")
    return run_dir


def assert_same_run(run_dir: Path, one_device: Path) -> None:
    """The same episodes and gradients in the first iteration, the same parameters after three.

    What a softmax does not see is left out, such as the bias of a key: its gradient is rounding, and Adam steps on it.
    """
    mine, theirs = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (run_dir, one_device))
    for key in ("eval/greedy/avg_return", "eval/greedy/solved_rate", "eval/greedy/packed_items"):
        assert mine[0][key] == theirs[0][key], key
    for key in ("frames", "rollout/avg_return", "rollout/avg_steps", "rollout/solved_rate"):
        assert mine[1][key] == pytest.approx(theirs[1][key], rel=1e-6), key
    for row in (1, 2, 3):
        for key in (key for key in theirs[row] if key.startswith("train/")):
            assert mine[row][key] == pytest.approx(theirs[row][key], rel=2e-3, abs=1e-5), (row, key)
    first, third = (
        [script.read_checkpoint(run / f"iter_{i:06d}.pkl") for run in (run_dir, one_device)] for i in (1, 3)
    )
    a, b = (flat_vector(checkpoint["opt_state"]) for checkpoint in first)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    a, b = (flat_vector(checkpoint["model"][0]) for checkpoint in third)
    second_moment = flat_vector(third[1]["opt_state"])[-len(b) :]
    learned = np.sqrt(second_moment) > 1e-6
    assert learned.mean() > 0.9
    np.testing.assert_allclose(a[learned], b[learned], atol=1e-3)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_search_distillation_on_several_devices(num_devices, search_run, tmp_path):
    run_dir = run_on(num_devices, "train_search_distill_binpack.py", override("max_num_iters=3"), tmp_path)
    assert_same_run(run_dir, search_run)


def test_ppo_on_several_devices(ppo_run, ppo_words, tmp_path):
    run_dir = run_on(4, "train_ppo_binpack.py", ppo_words("max_num_iters=3"), tmp_path)
    assert_same_run(run_dir, ppo_run)
