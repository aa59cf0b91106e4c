"""A run is the same on 1 and 4 devices and in two processes: whole runs, against those of the other tests."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, flat_vector, override

import evaluate
import train_ppo_binpack as ppo

GLOO = r"(\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d|\s)*"


def assert_same_run(run_dir: Path, one_device: Path, first: int = 1) -> None:
    """The same episodes and gradients in the first iteration that was made here, the same parameters after three.

    Parameters without a gradient but rounding are left out, since Adam steps on that.
    """
    mine, theirs = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (run_dir, one_device))
    for key in ("eval/greedy/avg_return", "eval/greedy/solved_rate", "eval/greedy/packed_items"):
        assert mine[0][key] == theirs[0][key], key
    for key in ("frames", "rollout/avg_return", "rollout/avg_steps", "rollout/solved_rate"):
        assert mine[first][key] == pytest.approx(theirs[first][key], rel=1e-6), key
    for row in (1, 2, 3):
        for key in (key for key in theirs[row] if key.startswith("train/")):
            assert mine[row][key] == pytest.approx(theirs[row][key], rel=2e-2, abs=1e-4), (row, key)
    early, third = (
        [evaluate.read_checkpoint(run / f"iter_{i:06d}.pkl") for run in (run_dir, one_device)] for i in (first, 3)
    )
    a, b = (flat_vector(checkpoint["opt_state"]) for checkpoint in early)
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    a, b = (flat_vector(checkpoint["model"][0]) for checkpoint in third)
    second_moment = flat_vector(third[1]["opt_state"])[-len(b) :]
    learned = np.sqrt(second_moment) > 1e-6
    assert learned.mean() > 0.75  # Some relations are rare.
    difference = np.abs(a - b)[learned]
    assert np.mean(difference > 1e-3) < 0.01, np.quantile(difference, [0.5, 0.99, 1.0])


def test_search_distillation_on_four_devices(search_run, tmp_path):
    """The same as on one. PPO on four stands below, in two processes."""
    words = [*override("max_num_iters=3"), f"save_dir={tmp_path}"]
    command = [sys.executable, "train_search_distill_binpack.py", *words]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0 and "4 x cpu" in run.stdout, run.stdout + run.stderr
    assert_same_run(tmp_path / "BinPack-v2" / "nsim_2" / "seed_0", search_run)


def test_cpu_cores_are_devices_as_far_as_the_batches_divide():
    code = "import evaluate, jax; evaluate.start_jax(%s); print(jax.device_count())"
    environment = {key: value for key, value in os.environ.items() if key != "JAX_NUM_CPU_DEVICES"}
    cores = len(os.sched_getaffinity(0))
    for batches, most in (("64, 256", 4), ("64, 34", 2), ("1024, 17", 1)):  # 16 rows or more for each.
        run = [sys.executable, "-c", code % batches]
        found = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert int(found) == max(n for n in (1, 2, 4) if n <= min(most, cores))


def start_two(save_dir: Path, words: list[str], *of_the_second: str) -> list[subprocess.Popen]:
    """Two processes of two devices each that make one run of PPO, which compiles faster."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    words = [*words, "distributed=true", f"coordinator_address={address}", "num_processes=2"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2"}
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train_ppo_binpack.py"), *words, *more, f"save_dir={save_dir}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for more in (["process_id=0"], ["process_id=1", *of_the_second])
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_make_one_run_and_none_outlives_the_other(ppo_run, ppo_words, tmp_path):
    """They continue a run's first iteration, four devices against one; a process is killed, and resume=auto goes on."""
    run_dir = tmp_path / "BinPack-v2" / "ppo" / "seed_0"
    run_dir.mkdir(parents=True)
    for name in ("iter_000001.pkl", "metrics.jsonl"):
        shutil.copy(ppo_run / name, run_dir)
    first, second = start_two(tmp_path, ppo_words("max_num_iters=250", "resume=auto"))
    deadline = time.time() + 300
    while time.time() < deadline and first.poll() is None and not (run_dir / "iter_000003.pkl").exists():
        time.sleep(0.1)
    second.kill()
    killed = time.time()
    out, err = first.communicate(timeout=100)
    assert time.time() - killed < 60 and first.returncode not in (0, 2), err
    assert "a process of this run ended" in err or "JAX distributed service" in err, err
    assert "4 x cpu, from iteration 1" in out
    # The second says one line; Gloo's threads then tear one another's lines into pieces.
    assert re.fullmatch(rf"process 1 of 2 waits for localhost:\d+, up to \d+ s\n{GLOO}", second.communicate()[0])
    assert_same_run(run_dir, ppo_run, first=2)

    newest = evaluate.read_checkpoint(evaluate.find_checkpoints(run_dir)[-1])["iteration"]
    assert ppo.main([*ppo_words(f"max_num_iters={newest + 1}", "resume=auto"), f"save_dir={tmp_path}"]) == 0
    names = {path.name for path in run_dir.iterdir()} - {".lock"}
    assert names == {"metrics.jsonl", *(f"iter_{i:06d}.pkl" for i in range(1, newest + 2))}
    rows = [json.loads(line)["iteration"] for line in (run_dir / "metrics.jsonl").open()]
    assert rows == list(range(newest + 2))


def test_processes_with_different_configurations_stop_with_a_clear_line(ppo_words, tmp_path):
    processes = start_two(tmp_path, ppo_words(), "permute_axes=false")
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    expected = "error: distributed=true: expected the keys of process 0 in every process, got "
    assert (
        f"{expected}others in another one\n" in errors[0] and f"{expected}permute_axes=false, not true\n" in errors[1]
    )
    assert not any("Traceback" in error for error in errors) and list(tmp_path.iterdir()) == []
