"""Whole runs: log, checkpoints, resuming, stopping. What happens to them by faults: test_reliability.py."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import jax
import numpy as np
import pytest
import wandb
from conftest import flat_vector, override

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as script

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "results" / "golden.npz"
TIMES = ("hours", "perf/decisions_per_second", "perf/iteration_seconds")


def run(save_dir, *words) -> Path:
    assert script.main(override(f"save_dir={save_dir}", *words)) == 0
    return Path(save_dir) / "BinPack-v2" / "nsim_2" / "seed_0"


def contents_of(run_dir: Path) -> dict[str, bytes]:
    """The files of a run; the lock says which process came last."""
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file() and path.name != ".lock"}


def log_of(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def load(path: Path) -> dict:
    with open(path, "rb") as file:
        return pickle.load(file)


def assert_same_checkpoint(path: Path, other: Path) -> None:
    mine, theirs = load(path), load(other)
    for key in ("model", "opt_state", "iteration", "frames", "format_version", "method", "versions"):
        a, b = jax.tree.leaves(mine[key]), jax.tree.leaves(theirs[key])
        assert len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True)), key


class Method(NamedTuple):
    """A script, the words of its small run, and the folder of that run, undisturbed."""

    module: ModuleType
    words: Callable[..., list[str]]
    run_dir: Path

    def folder(self, save_dir: Path) -> Path:
        return save_dir.joinpath(*self.run_dir.parts[-3:])


@pytest.fixture(params=["search_distill", "ppo"])
def method(request, ppo_words) -> Method:
    if request.param == "ppo":
        return Method(ppo, ppo_words, request.getfixturevalue("ppo_run"))
    return Method(script, override, request.getfixturevalue("search_run"))


@pytest.fixture
def own_run(search_run, tmp_path) -> Path:
    """A copy of the undisturbed run, whose folder no other worker locks."""
    return Path(shutil.copytree(search_run, tmp_path / "own" / "BinPack-v2" / "nsim_2" / "seed_0"))


def test_two_iterations_and_two_more_equal_four(method, tmp_path):
    """Bit for bit, and more evaluations on the way change nothing."""
    words, run_dir = method.words("eval_interval=1", f"save_dir={tmp_path}"), method.folder(tmp_path)
    assert method.module.main([word for word in words if "max_num_iters" not in word] + ["max_num_iters=2"]) == 0
    assert [path.name for path in evaluate.find_checkpoints(run_dir)] == ["iter_000001.pkl", "iter_000002.pkl"]
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"iteration": 3, "frames": 1}\n{"iterat')  # What a killed run leaves after its last checkpoint.
    assert method.module.main([*words, "resume=auto"]) == 0
    assert_same_checkpoint(run_dir / "iter_000004.pkl", method.run_dir / "iter_000004.pkl")
    often, seldom = log_of(run_dir), log_of(method.run_dir)
    assert [{key: a[key] for key in b} for a, b in zip(often, seldom, strict=True)] == seldom
    assert all("eval/greedy/avg_return" in row for row in often)


def golden_record(search_run: Path, ppo_run: Path) -> dict[str, np.ndarray]:
    """What is kept of the first iterations of both runs."""
    record = {}
    for method, run_dir in (("search_distill", search_run), ("ppo", ppo_run)):
        record[f"{method} params"] = flat_vector(load(run_dir / "iter_000001.pkl")["model"][0])
        for key in ("frames", "rollout/avg_return"):
            record[f"{method} {key}"] = np.array([row[key] for row in log_of(run_dir)[1:3]])
    return record


def test_the_first_iterations_are_those_on_record(search_run, ppo_run):
    """To within the rounding of another machine: 1 % of a step of Adam, here, where the runs are equal bit for bit.

    The record was made at commit 1e421d9, when the network came to see where blocks end, by
    `np.savez_compressed(GOLDEN, **golden_record(search_run, ppo_run))` in a test of this file. Whoever changes on
    purpose what is played or learned has to make it again. golden.py compares longer runs, exactly.
    """
    expected = np.load(GOLDEN)
    found = golden_record(search_run, ppo_run)
    assert found.keys() == set(expected.files)
    for method, run_dir in (("search_distill", search_run), ("ppo", ppo_run)):
        for key in (f"{method} frames", f"{method} rollout/avg_return"):
            assert found[key][0] == pytest.approx(expected[key][0], rel=1e-6), key
            assert found[key][1] == pytest.approx(expected[key][1], rel=5e-2), key  # Rounding may change a game.
        checkpoint = load(run_dir / "iter_000001.pkl")
        a, b = found[f"{method} params"], expected[f"{method} params"]
        # Parameters without a gradient but rounding are left out, since Adam steps on that.
        learned = np.sqrt(flat_vector(checkpoint["opt_state"])[-len(a) :]) > 1e-6
        assert len(a) == len(b) and learned.mean() > 0.75
        difference = np.abs(a - b)[learned] / checkpoint["config"]["learning_rate"]
        assert np.mean(difference > 0.01) < 0.01, (method, np.quantile(difference, [0.5, 0.99, 1.0]))


def test_a_script_needs_evaluate_py_alone_to_train_and_to_be_played(method, tmp_path):
    """In a folder without anything else."""
    for module in (method.module, evaluate):
        shutil.copy(module.__file__, tmp_path)
    program, run_dir = Path(method.module.__file__).name, method.folder(tmp_path / "runs")
    for command in (
        [program, *method.words("max_num_iters=1", "save_dir=runs")],
        ["evaluate.py", run_dir, "policy=greedy", "num_episodes=8", "json=scores.json"],
    ):
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    assert_same_checkpoint(run_dir / "iter_000001.pkl", method.run_dir / "iter_000001.pkl")
    (row,) = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert row["avg_return"] == log_of(run_dir)[-1]["eval/greedy/avg_return"]


def test_resume_auto_starts_again_what_died_before_its_first_checkpoint(tmp_path):
    run_dir = tmp_path / "BinPack-v2" / "nsim_2" / "seed_0"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"iteration": 0, "frames": 0}\n{"iteration": 1, "frames": 9}\n')
    run(tmp_path, "resume=auto", "max_num_iters=1")
    assert [row["iteration"] for row in log_of(run_dir)] == [0, 1] and log_of(run_dir)[1]["frames"] > 9


def test_resume_from_a_path_continues_in_another_folder_only(own_run, tmp_path, capsys):
    words = override(f"resume={own_run / 'iter_000002.pkl'}")
    assert script.main([*words, f"save_dir={own_run.parents[2]}"]) == 2
    assert "iter_000004.pkl of an earlier run would be lost" in capsys.readouterr().err
    assert script.main([*words, f"save_dir={tmp_path}"]) == 0
    run_dir = tmp_path / "BinPack-v2" / "nsim_2" / "seed_0"
    assert_same_checkpoint(run_dir / "iter_000004.pkl", own_run / "iter_000004.pkl")
    branch, origin = load(run_dir / "iter_000004.pkl"), load(own_run / "iter_000004.pkl")
    assert branch["wandb_id"] != origin["wandb_id"]


def test_a_branch_that_is_stopped_at_once_goes_on_with_resume_auto(method, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "in_any_process", lambda flag: True)
        words = method.words(f"resume={method.run_dir / 'iter_000002.pkl'}", f"save_dir={tmp_path}")
        assert method.module.main(words) == 0 and "Stopped at iteration 2;" in capsys.readouterr().out
    assert method.module.main(method.words("resume=auto", f"save_dir={tmp_path}")) == 0
    assert_same_checkpoint(method.folder(tmp_path) / "iter_000004.pkl", method.run_dir / "iter_000004.pkl")


def test_resuming_a_complete_run_says_so_and_changes_nothing(method, tmp_path, capsys):
    own_run = Path(shutil.copytree(method.run_dir, method.folder(tmp_path)))
    before = contents_of(own_run)
    assert method.module.main(method.words("resume=auto", f"save_dir={tmp_path}")) == 0
    assert "Complete: 4 iterations are done" in capsys.readouterr().out
    assert contents_of(own_run) == before


def test_log_has_the_promised_names(search_run):
    rows = [json.loads(line) for line in (search_run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(rows[i]["frames"] < rows[i + 1]["frames"] and rows[i]["hours"] < rows[i + 1]["hours"] for i in range(4))
    promised = {
        "iteration", "frames", "hours", "rollout/avg_return", "rollout/avg_steps", "train/policy_loss",
        "train/value_loss", "train/grad_norm", "train/target_entropy", "train/target_kl", "train/taught_share",
        "perf/decisions_per_second",
        "eval/greedy/avg_return", "eval/greedy/avg_return_se", "eval/greedy/solved_rate", "eval/greedy/packed_items",
    }  # fmt: skip
    assert promised <= rows[4].keys() and 0 < rows[4]["train/taught_share"] < 1
    assert all(np.isfinite(value) for row in rows for value in row.values())
    assert rows[4]["frames"] - rows[3]["frames"] == round(rows[4]["rollout/avg_steps"] * 8)


def test_a_checkpoint_opens_with_numpy_alone(search_run):
    """In a process that cannot import jax, the README's line gives parameters, state and configuration."""
    code = """
import pickle, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in sys.stdlib_module_names | {"numpy"}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
checkpoint = pickle.load(open(sys.argv[1], "rb"))
params, state = checkpoint["model"]
import numpy
def plain(x):
    if isinstance(x, dict): return all(type(k) is str and plain(v) for k, v in x.items())
    if isinstance(x, (list, tuple)): return type(x) in (list, tuple) and all(map(plain, x))
    return type(x) in (int, float, str, bool, numpy.ndarray)
assert plain(checkpoint), "something that is not plain"
print(sum(x.size for m in params.values() for x in m.values()), checkpoint["config"]["num_simulations"])
"""
    path = str(search_run / "iter_000004.pkl")
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    size, simulations = run.stdout.split()
    assert int(size) > 1000 and simulations == "2"
    contents = load(Path(path))
    assert contents["iteration"] == 4 and contents["method"] == "search_distill" and contents["format_version"] == 1
    assert {"jax", "mctx", "jumanji"} <= contents["versions"].keys()


class Attack:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


FALSE = {  # Plain contents of the right types that no run has written.
    "array in config": {"config": {"env_id": np.zeros(2)}},
    "other array in config": {"config": {"env_id": "BinPack-v2", "seed": np.zeros(2)}},
    "iteration": {"iteration": 10**12},
    "optimizer": {"opt_state": [[[1], [1, 2]]]},
    "keys": {"model": ({1: np.zeros(1), "a": np.zeros(1)}, {})},
}


@pytest.mark.parametrize(
    "kind", ["shell", "numpy", "truncated", "text", "newer", "other method", "list", "bare", *FALSE]
)
def test_a_file_that_is_no_sound_checkpoint_is_refused_in_one_line(kind, search_run, tmp_path, capsys):
    good, path, marker = search_run / "iter_000004.pkl", tmp_path / "bad.pkl", tmp_path / "marker"
    contents = load(good)
    data = {
        "shell": lambda: pickle.dumps(Attack(os.system, f"touch {marker}")),
        "numpy": lambda: pickle.dumps({"model": Attack(np.save, str(marker), np.zeros(1))}),
        "truncated": lambda: good.read_bytes()[:-100],
        "text": lambda: b"hello",
        "newer": lambda: pickle.dumps(contents | {"format_version": 99}),
        "other method": lambda: pickle.dumps(contents | {"method": "ppo"}),
        "list": lambda: pickle.dumps([1, 2]),
        **{name: lambda: pickle.dumps(contents | FALSE[kind]) for name in FALSE},
        "bare": lambda: pickle.dumps({key: contents[key] for key in ("format_version", "method", "config")}),
    }[kind]()
    path.write_bytes(data)
    assert script.main(override(f"resume={path}", f"save_dir={tmp_path / 'save'}")) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and (str(path) in err or "do not fit this configuration" in err)
    assert not list(tmp_path.glob("marker*")) and not (tmp_path / "save").exists()


def test_resume_refuses_another_network(method, tmp_path, capsys):
    resume = f"resume={method.run_dir / 'iter_000002.pkl'}"
    assert method.module.main(method.words(resume, "pair_units=9", f"save_dir={tmp_path}")) == 2
    assert "do not fit this configuration; type pair_units=8\n" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_resume_refuses_a_bound_of_the_kl_that_the_run_does_not_have(search_run, tmp_path, capsys):
    """The bound's multiplier is part of the optimizer's state."""
    resume = f"resume={search_run / 'iter_000002.pkl'}"
    assert script.main(override(resume, "max_policy_kl=0.005", f"save_dir={tmp_path}")) == 2
    assert "do not fit this configuration; type max_policy_kl=0.0\n" in capsys.readouterr().err


def test_starting_over_an_earlier_run_needs_a_word(own_run, capsys):
    save_dir = own_run.parents[2]
    before = contents_of(own_run)
    assert script.main(override(f"save_dir={save_dir}")) == 2
    err = capsys.readouterr().err
    assert "resume=auto" in err and "overwrite=true" in err and err.count("\n") == 1
    assert contents_of(own_run) == before


def test_overwrite_starts_again(search_run, tmp_path):
    run_dir = tmp_path / "BinPack-v2" / "nsim_2" / "seed_0"
    shutil.copytree(search_run, run_dir)
    (run_dir / "iter_000099.pkl").write_bytes(b"old")
    (run_dir / ".iter_000098.pkl.tmp").write_bytes(b"half")
    run(tmp_path, "overwrite=true")
    assert not list(run_dir.glob(".*.tmp"))
    assert [path.name for path in evaluate.find_checkpoints(run_dir)] == [f"iter_{i:06d}.pkl" for i in (1, 2, 3, 4)]
    assert [row["iteration"] for row in log_of(run_dir)] == [0, 1, 2, 3, 4]


def test_resume_auto_takes_the_newest_sound_checkpoint_and_says_what_it_skips(search_run, tmp_path, capsys):
    run_dir = tmp_path / "BinPack-v2" / "nsim_2" / "seed_0"
    shutil.copytree(search_run, run_dir)
    words = override("resume=auto", f"save_dir={tmp_path}")
    config, _ = evaluate.parse_command_line(words, script.Config, script.PRESETS)
    paths = evaluate.find_checkpoints(run_dir)
    paths[3].write_bytes(paths[3].read_bytes()[:-5000])
    flipped = bytearray(paths[2].read_bytes())
    flipped[len(flipped) // 2] ^= 1
    paths[2].write_bytes(flipped)
    with contextlib.closing(evaluate.Run(config, script.METHOD)) as newest:
        assert newest.checkpoint_to_resume()["iteration"] == 2
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == [f"Skipped {path}" for path in (paths[3], paths[2])]
    for path in paths[:2]:
        path.write_bytes(b"")
    with contextlib.closing(evaluate.Run(config, script.METHOD)) as none:
        with pytest.raises(evaluate.UsageError, match="iter_000001.pkl: not a checkpoint"):
            none.checkpoint_to_resume()


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 9]), (1, [3, 9]), (2, [2, 3, 9]), (5, [1, 2, 3, 9])])
def test_only_older_checkpoints_are_removed(keep, left, tmp_path, config):
    """A later one, skipped as damaged, does not count: else the sound ones would go for it."""
    with contextlib.closing(
        evaluate.Run(config.model_copy(update=dict(save_dir=str(tmp_path), keep_checkpoints=keep)), script.METHOD)
    ) as run:
        run.take()
        run.start_log(evaluate.Progress())
        for i in (1, 2, 9):
            run.checkpoint(i).touch()
        run.save({"iteration": 3})
    assert [int(path.stem[5:]) for path in evaluate.find_checkpoints(run.path)] == left


@contextlib.contextmanager
def files_up_to(size: int):
    """The system refuses to let a file grow beyond a size, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_without_room_leaves_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "iter_000001.pkl"
    evaluate.write_checkpoint(path, {"a": 1})
    with files_up_to(10_000), pytest.raises(OSError):
        evaluate.write_checkpoint(path, {"a": np.zeros(10_000)})
    assert evaluate._PlainUnpickler(path.read_bytes()).load() == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_ctrl_c_and_sigterm_ask_once_and_then_end_the_process(capfd):
    for number in (signal.SIGINT, signal.SIGTERM):
        with evaluate.StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert stop.made and "once more to leave at once" in capfd.readouterr().err
            assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_training_goes_on_when_wandb_fails(search_run, tmp_path, monkeypatch, capsys):
    class Broken:
        def log(self, row):
            raise RuntimeError("service died")

        def finish(self):
            raise RuntimeError("service died")

    monkeypatch.setattr(evaluate, "start_wandb", lambda *_: Broken())
    run_dir = run(tmp_path, "save_interval=100", "save_minutes=0.00001", "keep_checkpoints=2")
    assert "W&B stopped" in capsys.readouterr().out and len(log_of(run_dir)) == 5
    # Saved every iteration for its minutes, and of four checkpoints the newest two are kept.
    assert [path.name for path in evaluate.find_checkpoints(run_dir)] == ["iter_000003.pkl", "iter_000004.pkl"]


def test_the_lock_is_given_back_after_wandb_has_finished(tmp_path, monkeypatch, config):
    class Locked:
        def finish(self):
            with pytest.raises(evaluate.UsageError, match=f"process {os.getpid()} of .* is at work there"):
                evaluate.lock_folder(run.path)
            finished.append(True)

    finished = []
    monkeypatch.setattr(evaluate, "start_wandb", lambda *_: Locked())
    run = evaluate.Run(config.model_copy(update=dict(save_dir=str(tmp_path))), script.METHOD)
    run.take()
    run.start_log(evaluate.Progress())
    run.close()
    assert finished == [True]
    evaluate.lock_folder(run.path).close()


def test_training_starts_when_wandb_does_not(tmp_path, monkeypatch, config, capsys):
    def refuse(*arguments, **more):
        raise RuntimeError("no service")

    monkeypatch.setattr(wandb, "init", refuse)
    with contextlib.closing(evaluate.Run(config.model_copy(update=dict(save_dir=str(tmp_path))), script.METHOD)) as run:
        run.take()
        run.start_log(evaluate.Progress())
        assert "W&B did not start" in capsys.readouterr().out
        run.record({"iteration": 0})
    assert json.loads(run.log.read_text()) == {"iteration": 0}
