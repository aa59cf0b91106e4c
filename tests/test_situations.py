"""Where and how people run the programs: a test for each situation of the table in results/situations.md.

A test is told its situation in words, which are data where they can be. `measure_situations.py` finds those that fail
in an earlier checkout, and `collect_results.py` makes the table.
"""

import contextlib
import errno
import io
import json
import os
import pickle
import pwd
import re
import runpy
import shlex
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jumanji
import numpy as np
import pytest
import wandb
import yaml
from conftest import ROOT, override
from jumanji.environments import BinPack
from jumanji.environments.packing.bin_pack.generator import RandomGenerator
from wandb.proto import wandb_internal_pb2
from wandb.sdk.launch.sweeps import utils

import evaluate
import train_search_distill_binpack as script

SETTINGS, PROGRAM, ENDS, FILES, SWEEPS, SIZES, SYSTEMS = KINDS = (
    "settings of JAX", "inside another program", "ends and output", "file systems", "sweeps and resuming",
    "instances of other sizes", "other operating systems",
)  # fmt: skip
TABLE = []  # Of dicts with kind, situation, outcome and the name of the test.
FEW = ("max_num_iters=2", "eval_interval=2")


def situations(kind: str, outcome: str, *names: str):
    """Marks a test that gets each of the situations by its name."""

    def mark(test: Callable) -> Callable:
        TABLE.extend(dict(kind=kind, situation=name, outcome=outcome, test=test.__name__) for name in names)
        return pytest.mark.parametrize("situation", names)(test)

    return mark


def few(save_dir: Path, *words: str) -> list[str]:
    """The words of a run of two iterations, with others in it."""
    keys = {word.split("=")[0] for word in words}
    return override(f"save_dir={save_dir}", *(word for word in FEW if word.split("=")[0] not in keys), *words)


def train(save_dir: Path, *words: str) -> int:
    return script.main(few(save_dir, *words))


def folder(save_dir: Path) -> Path:
    return save_dir / "BinPack-v2" / "nsim_2" / "seed_0"


def rows(run_dir: Path) -> list[dict]:
    return evaluate.read_log(run_dir / "metrics.jsonl")


def is_whole(save_dir: Path, last: int = 2) -> bool:
    """Whether a run of `last` iterations has all of its rows, and a checkpoint of the last one."""
    saved = [evaluate.read_checkpoint(path)["iteration"] for path in evaluate.find_checkpoints(folder(save_dir))]
    return [row["iteration"] for row in rows(folder(save_dir))] == [*range(last + 1)] and saved[-1:] == [last]


def one_line(capsys, *parts: str) -> bool:
    out, err = capsys.readouterr()
    return err.startswith("error: ") and err.count("\n") == 1 and all(part in err for part in parts)


def program(*words: str, preexec: Callable | None = None, **environment: str | None) -> subprocess.Popen:
    """One of the programs in a process of its own. None unsets a variable."""
    environment = {key: value for key, value in (os.environ | environment).items() if value is not None}
    return subprocess.Popen(
        [sys.executable, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=preexec,
    )  # fmt: skip


@contextlib.contextmanager
def jax_set(word: str):
    """`JAX_NAME=value` as if it had stood in the environment."""
    name, _, text = word.partition("=")
    before = getattr(jax.config, name.lower())
    value = int(text) if text.isdigit() else text
    jax.config.update(name.lower(), value if type(before) is int or isinstance(value, str) else bool(value))
    try:
        yield
    finally:
        jax.config.update(name.lower(), before)


@pytest.fixture(scope="module")
def agent(search_run):
    return evaluate.load_checkpoint(search_run)


@pytest.fixture(scope="module")
def observation(agent):
    return agent.env.reset(evaluate.evaluation_keys(0, 1)[0])[1].observation


def scores(path: Path, policy: str) -> list[float]:
    assert evaluate.main([f"policy={policy}", "num_episodes=4", f"json={path}"]) == 0
    return json.loads(path.read_text())["rows"][0]["returns"]


# ================================================== Settings of JAX ===================================================
CHANGING = (
    "JAX_ENABLE_X64=1", "JAX_THREEFRY_PARTITIONABLE=0", "JAX_DEFAULT_PRNG_IMPL=rbg",
    "JAX_DEFAULT_PRNG_IMPL=unsafe_rbg", "JAX_RANDOM_SEED_OFFSET=7", "JAX_ENABLE_CUSTOM_PRNG=1",
    "JAX_LEGACY_PRNG_KEY=error", "JAX_NUMPY_DTYPE_PROMOTION=strict", "JAX_NUMPY_RANK_PROMOTION=raise",
    "JAX_TRANSFER_GUARD=disallow",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(agent, tmp_path_factory, search_run):
    """What is played and learned without any setting."""
    path = tmp_path_factory.mktemp("undisturbed") / "scores.json"
    (_, timestep), states = agent.env.reset(evaluate.evaluation_keys(5, 1)[0]), agent.play(seed=0)
    return SimpleNamespace(
        scores={policy: scores(path, policy) for policy in ("random", "largest_first")},
        items=np.stack(timestep.observation.items), steps=len(states), apply=agent.apply(timestep.observation),
        rows=rows(search_run),
    )  # fmt: skip


@situations(SETTINGS, "the same instances and scores", *CHANGING, "JAX_HIGH_DYNAMIC_RANGE_GUMBEL=1")
def test_fixed_instances_are_the_same(situation, undisturbed, tmp_path):
    with jax_set(situation):
        for policy, expected in undisturbed.scores.items():
            assert scores(tmp_path / "scores.json", policy) == expected


@situations(SETTINGS, "the same instances and play in a notebook", *(f"{word}, in a notebook" for word in CHANGING))
def test_functions_called_from_a_notebook_are_the_same(situation, agent, undisturbed, search_run):
    key = np.array(evaluate.evaluation_keys(5, 1)[0])
    with jax_set(situation.removesuffix(", in a notebook")):
        assert np.array_equal(evaluate.evaluation_keys(5, 1)[0], key)
        loaded = evaluate.load_checkpoint(search_run)
        state, timestep = loaded.env.reset(key)
        assert np.array_equal(np.stack(timestep.observation.items), undisturbed.items)
        for x, expected in zip(loaded.apply(timestep.observation), undisturbed.apply, strict=True):
            assert x.dtype == expected.dtype and np.array_equal(x, expected)
        reset = jax.jit(jax.vmap(loaded.env.reset))
        transformed = reset(jax.device_put(key[None]))[1].observation.items
        assert np.array_equal(np.stack(transformed)[:, 0], undisturbed.items)
        state, timestep = loaded.env.step(state, loaded.act(timestep.observation))
        assert timestep.reward.dtype == np.float32 and np.asarray(timestep.reward) > 0
        assert len(loaded.play(seed=0)) == undisturbed.steps


@situations(SETTINGS, "the same training run", *(f"{word}, training" for word in CHANGING))
def test_training_is_the_same(situation, undisturbed, tmp_path):
    with jax_set(situation.removesuffix(", training")):
        assert train(tmp_path, "max_num_iters=1") == 0
    for row, expected in zip(rows(folder(tmp_path)), undisturbed.rows):
        assert [(key, row[key]) for key in expected if "train/" in key or key == "frames"] == [
            (key, expected[key]) for key in expected if "train/" in key or key == "frames"
        ]


@pytest.mark.slow
@situations(SETTINGS, "preset=cpu is traced, compiled and played", "JAX_ENABLE_X64=1, the preset's search")
def test_the_search_of_the_preset_runs_with_64_bits(situation, tmp_path):
    words = ["leaf_value=completion", "value_scale=0.5", "token_sizes=[[8,12],[40,20]]"]
    with jax_set("JAX_ENABLE_X64=1"):
        assert train(tmp_path, "max_num_iters=1", *words) == 0 and is_whole(tmp_path, last=1)


@situations(
    SETTINGS, "refused in one line",
    "JAX_DISABLE_JIT=1", "JAX_NO_EXECUTION=1", "JAX_ERROR_CHECKING_BEHAVIOR_NAN=raise",
    "JAX_ERROR_CHECKING_BEHAVIOR_DIVIDE=raise", "JAX_ERROR_CHECKING_BEHAVIOR_OOB=raise",
)  # fmt: skip
def test_settings_under_which_nothing_runs_are_refused(situation, tmp_path, capsys):
    with jax_set(situation):
        assert train(tmp_path) == 2
        assert one_line(capsys, situation.split("=")[0], "type unset") and not list(tmp_path.iterdir())
        assert evaluate.main(["policy=random"]) == 2 and one_line(capsys, situation.split("=")[0])


@situations(SETTINGS, "refused in one line", "JAX_PLATFORMS=cuda without a GPU", "JAX_PLATFORMS=npu, which JAX lacks")
def test_devices_that_are_not_there_are_refused(situation, tmp_path):
    platform = situation.split("=")[1].split()[0].strip(",")
    process = program(str(ROOT / "evaluate.py"), "policy=random", JAX_PLATFORMS=platform)
    out, err = process.communicate(timeout=100)
    lines = [line for line in err.splitlines() if not re.match(r"[WE]\d{4} ", line)]  # JAX's own, of its search.
    assert process.returncode == 2 and len(lines) == 1 and f"got JAX_PLATFORMS={platform} (" in lines[0]


# =============================================== Inside another program ===============================================
def in_a_thread(function: Callable) -> object:
    """What a function returns in a thread that is not the main one."""
    returned = []
    thread = threading.Thread(target=lambda: returned.append(function()))
    thread.start()
    thread.join()
    return returned[0]


@situations(PROGRAM, "trains", "main([...]) in a thread that is not the main one")
def test_training_in_a_thread(situation, tmp_path):
    assert in_a_thread(lambda: train(tmp_path)) == 0 and is_whole(tmp_path)


@situations(PROGRAM, "draws", "render= in a thread, MPLBACKEND=TkAgg and no display")
def test_pictures_need_no_display_and_no_main_thread(situation, search_run, tmp_path):
    code = f"""
import threading, evaluate
words = ["{search_run}", "num_episodes=2", "render={tmp_path}/a.png"]
status = []
thread = threading.Thread(target=lambda: status.append(evaluate.main(words)))
thread.start(), thread.join()
assert status == [0]
"""
    environment = dict(MPLBACKEND="TkAgg", DISPLAY=None, PYTHONPATH=str(ROOT))
    process = program("-c", code, **environment)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and (tmp_path / "a.png").stat().st_size > 1000, err


@situations(PROGRAM, "given back", *(f"the handler of {name} after main" for name in ("SIGINT", "SIGTERM", "SIGUSR1")))
def test_handlers_are_given_back(situation, tmp_path):
    number, mine = getattr(signal, situation.split()[3]), lambda *_: None
    before = signal.signal(number, mine)
    try:
        for status, words in ((0, []), (2, ["resume=nowhere.pkl"])):
            assert train(tmp_path / str(status), *words) == status and signal.getsignal(number) is mine
    finally:
        signal.signal(number, before)


@situations(
    PROGRAM, "the same action",
    "jax.jit(agent.act)", "jax.vmap(agent.act)", "jax.lax.scan over agent.act", "jax.jit(agent.act), JAX_ENABLE_X64=1",
)  # fmt: skip
def test_agents_can_be_transformed(situation, agent, observation):
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), observation)
    expected, act = agent.act(observation), agent.act
    calls = {
        "jax.jit(agent.act)": lambda: jax.jit(act)(observation),
        "jax.vmap(agent.act)": lambda: jax.vmap(act)(batch)[1],
        "jax.lax.scan over agent.act": lambda: jax.lax.scan(lambda c, x: (c, act(x)), 0, batch)[1][1],
    }
    with jax_set(situation.split(", ")[1]) if ", " in situation else contextlib.nullcontext():
        action = calls[situation.split(", ")[0]]()
    assert np.array_equal(action, expected) and action.dtype == np.int32 and np.shape(expected) == (2,)


@situations(PROGRAM, "the same agent there", "an agent is sent to another process")
def test_agents_can_be_pickled(situation, agent, observation):
    copy = pickle.loads(pickle.dumps(agent))
    assert np.array_equal(copy.act(observation), agent.act(observation)) and copy.path == agent.path


@pytest.mark.slow
@situations(
    PROGRAM, "plays and trains",
    "MPLBACKEND=module://matplotlib_inline.backend_inline, not installed", "MPLBACKEND=nosuch",
)  # fmt: skip
def test_a_backend_that_is_not_installed(situation, tmp_path):
    """The package is here, since the tests need it, so it is hidden, as is what it has told matplotlib of itself."""
    backend = situation.removeprefix("MPLBACKEND=").split(",")[0]
    code = f"""
import sys, importlib.metadata as metadata
sys.modules["matplotlib_inline"] = None
find = metadata.entry_points
metadata.entry_points = lambda **group: [] if "matplotlib" in str(group) else find(**group)
version = metadata.version
def hidden(name):
    if "inline" in name: raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = hidden
import evaluate, train_search_distill_binpack as script
assert evaluate.main(["policy=largest_first", "num_episodes=4"]) == 0
assert script.main({override("max_num_iters=1", f"save_dir={tmp_path}")!r}) == 0
import os, matplotlib.figure
assert os.environ["MPLBACKEND"] == {backend!r}
"""
    process = program("-c", code, MPLBACKEND=backend, PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and is_whole(tmp_path, last=1), err


@situations(PROGRAM, "used, and left open", "a W&B run that the program has open")
def test_an_open_wandb_run_is_used(situation, tmp_path, monkeypatch):
    logged, finished = [], []
    config = SimpleNamespace(update=lambda values, allow_val_change: None)
    mine = SimpleNamespace(name="mine", id="abc", config=config, log=logged.append, finish=lambda: finished.append(1))
    monkeypatch.setattr(wandb, "run", mine)
    monkeypatch.setattr(wandb, "init", lambda **_: mine)
    mine.define_metric = lambda *_, **__: None
    assert train(tmp_path) == 0
    assert [row["iteration"] for row in logged] == [0, 1, 2] and not finished


@situations(PROGRAM, "kept", "the program's own jax_compilation_cache_dir")
def test_the_programs_own_cache_is_kept(situation, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    mine = jax.config.jax_compilation_cache_dir
    assert train(tmp_path) == 0 and jax.config.jax_compilation_cache_dir == mine


# ================================================== Ends and output ===================================================
def interrupt(monkeypatch, *numbers: int) -> None:
    """Has the process get signals after the first iteration of each run."""
    record = evaluate.Run.record

    def record_and_interrupt(run, row):
        record(run, row)
        for number in numbers if row["iteration"] == 1 else ():
            os.kill(os.getpid(), number)

    monkeypatch.setattr(evaluate.Run, "record", record_and_interrupt)


@situations(
    ENDS, "saves, and ends with status 0",
    "SIGHUP: the terminal was closed", "SIGHUP twice", "SIGUSR1: Slurm's --signal", "SIGUSR2", "SIGXCPU",
    "SIGUSR1, then SIGTERM",
)  # fmt: skip
def test_signals_that_announce_the_end(situation, tmp_path, monkeypatch, capsys):
    numbers = [getattr(signal, name) for name in re.findall(r"SIG[A-Z0-9]+", situation)]
    interrupt(monkeypatch, *numbers * (2 if "twice" in situation else 1))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # These tests may run under nohup.
    try:
        assert train(tmp_path, "save_interval=100") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "Stopped at iteration 1" in capsys.readouterr().out and is_whole(tmp_path, last=1)


@situations(ENDS, "trains on", "SIGHUP under nohup")
def test_nohup_is_kept(situation, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt(monkeypatch, signal.SIGHUP)
        assert train(tmp_path) == 0 and is_whole(tmp_path)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Refusing(io.StringIO):
    """A stream that cannot be written to."""

    encoding = "utf-8"

    def __init__(self, error: Exception):
        super().__init__()
        self.refusal = error

    def write(self, text: str) -> int:
        raise self.refusal


CLOSED = io.StringIO()
CLOSED.close()
STREAMS = {
    "standard output is a closed pipe": ("stdout", BrokenPipeError(errno.EPIPE, "Broken pipe")),
    "standard error is a closed pipe": ("stderr", BrokenPipeError(errno.EPIPE, "Broken pipe")),
    "standard output is a terminal that is gone": ("stdout", OSError(errno.EIO, "Input/output error")),
    "standard output is on a full disk": ("stdout", OSError(errno.ENOSPC, "No space left on device")),
    "standard output is a full pipe that does not block": ("stdout", BlockingIOError(errno.EAGAIN, "would block")),
    "standard output was closed by the program": ("stdout", ValueError("I/O operation on closed file.")),
    "standard output is None (pythonw)": ("stdout", None),
    "standard error is None (pythonw)": ("stderr", None),
    "standard error was closed by the program": ("stderr", CLOSED),
}


@situations(ENDS, "trains to the end: log and checkpoint are whole", *STREAMS)
def test_output_that_cannot_be_written(situation, tmp_path, monkeypatch):
    name, error = STREAMS[situation]
    monkeypatch.setattr(sys, name, Refusing(error) if isinstance(error, Exception) else error)
    status = train(tmp_path)
    assert status == 0 and is_whole(tmp_path)


@pytest.mark.slow
@situations(ENDS, "trains to the end: log and checkpoint are whole", "2>&1 | head -n 3", ">&- 2>&-")
def test_readers_that_go_away(situation, tmp_path):
    """With a shell, as users do."""
    words = shlex.join([str(ROOT / "train_search_distill_binpack.py"), *override(*FEW, f"save_dir={tmp_path}")])
    command = f"set -o pipefail; {sys.executable} {words} {situation}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and is_whole(tmp_path), done.stderr
    assert situation.startswith(">") or done.stdout.count("\n") == 3
    assert not any("\n" in line for line in map(json.dumps, rows(folder(tmp_path))))


@pytest.mark.slow
@situations(ENDS, "status 0, and no traceback at Python's end", "a full pipe that nobody reads and that does not block")
def test_a_pipe_that_stays_full(situation, tmp_path):
    read, write = os.pipe()
    os.set_blocking(write, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, bytes(4096))
    command = [sys.executable, str(ROOT / "train_search_distill_binpack.py"), *few(tmp_path)]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=200)
    assert done.returncode == 0 and is_whole(tmp_path) and "BlockingIOError" not in done.stderr


@situations(ENDS, "status 0 and no traceback", "evaluate.py | true", "--help | true")
def test_tables_and_help_without_a_reader(situation, tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    path = tmp_path / "scores.json"
    words = ["policy=largest_first", "num_episodes=4", f"json={path}"] if "evaluate" in situation else ["--help"]
    monkeypatch.setattr(sys, "stdout", open(write, "w"))
    assert (evaluate if "evaluate" in situation else script).main(words) == 0
    sys.stdout.flush()  # As Python does at its end.
    assert path.exists() == ("evaluate" in situation)


@situations(ENDS, "status 2 and one line, since the table is lost", "evaluate.py > /dev/full")
def test_a_table_that_is_lost(situation, tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        path = tmp_path / "scores.json"
        assert evaluate.main(["policy=largest_first", "num_episodes=4", f"json={path}"]) == 2 and path.exists()
        monkeypatch.undo()
    assert "No space left on device" in capsys.readouterr().err


NAMES = {"a folder named größe": "größe", "a folder whose name is not UTF-8": os.fsdecode(b"gr\xf6\xdfe")}


@situations(ENDS, "an ASCII terminal shows it escaped", *(f"{name}, evaluate.py" for name in NAMES))
def test_names_in_tables(situation, search_run, tmp_path, monkeypatch):
    name = NAMES[situation.removesuffix(", evaluate.py")]
    path = tmp_path / name / "iter_000004.pkl"
    path.parent.mkdir()
    path.write_bytes((search_run / path.name).read_bytes())
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert evaluate.main([str(path), "num_episodes=2", f"json={tmp_path}/scores.json"]) == 0
    shown.flush()
    assert rb"gr\xf6\xdfe" in shown.buffer.getvalue() or rb"gr\udcf6\udcdfe" in shown.buffer.getvalue()


@situations(ENDS, "an ASCII terminal shows it escaped", "a folder named größe, training")
def test_names_of_runs(situation, tmp_path, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", shown)
    assert train(tmp_path / "größe") == 0 and is_whole(tmp_path / "größe")
    shown.flush()
    assert shown.buffer.getvalue().count(rb"gr\xf6\xdfe") >= 2


@situations(ENDS, "drawn as it is", *(f"{name} in a picture" for name in ("a folder named $\\x$", *NAMES)))
def test_names_in_pictures(situation, search_run, tmp_path):
    name = {"a folder named $\\x$": "$\\x$", **NAMES}[situation.removesuffix(" in a picture")]
    run_dir = tmp_path / name
    run_dir.mkdir()
    for file in ("iter_000004.pkl", "metrics.jsonl"):
        (run_dir / file).write_bytes((search_run / file).read_bytes())
    pictures = [f"render={tmp_path}/a.png", f"curves={tmp_path}/b.png"]
    assert evaluate.main([str(run_dir), "num_episodes=2", *pictures]) == 0
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.png").exists()


# ==================================================== File systems ====================================================
ADDRESSES = {
    "save_dir=gs://bucket/x": train, "save_dir=s3://bucket/x": train, "save_dir=file:///tmp/x": train,
    "save_dir=me@host:/runs": train, "resume=gs://bucket/iter_000001.pkl": train,
    "compilation_cache_dir=gs://bucket/cache": train,
}  # fmt: skip


@situations(
    FILES, "refused in one line, and nothing is written",
    *(f"{word}, training" for word in ADDRESSES), "gs://bucket/run, evaluate.py",
    "json=s3://bucket/a.json, evaluate.py", "render=gs://bucket/a.png, evaluate.py",
)  # fmt: skip
def test_remote_addresses(situation, tmp_path, monkeypatch, capsys):
    word, _, name = situation.partition(", ")
    monkeypatch.chdir(tmp_path)
    words = override(*FEW, word) if name == "training" else [word, "policy=largest_first", "num_episodes=4"]
    assert (script if name == "training" else evaluate).main(words) == 2
    assert one_line(capsys, "expected a path of this machine, not an address; mount it") and not list(
        tmp_path.iterdir()
    )


@situations(FILES, "refused in one line", 'load_checkpoint("gs://bucket/run")')
def test_remote_addresses_in_a_notebook(situation):
    with pytest.raises(evaluate.UsageError, match="not an address"):
        eval(situation, vars(evaluate))


def refuse(monkeypatch, module, name: str, error: OSError, when: Callable = lambda *arguments: True) -> list:
    """Has a call of the system refuse, and counts how often it did."""
    call, refused = getattr(module, name), []

    def refusing(*arguments, **more):
        if when(*arguments):
            refused.append(arguments)
            raise error
        return call(*arguments, **more)

    monkeypatch.setattr(module, name, refusing)
    return refused


def is_folder(path, *_) -> bool:
    return os.path.isdir(f"/proc/self/fd/{path}" if isinstance(path, int) else path)


MOUNTS = {
    "fsync of a folder is refused: EINVAL (CIFS, FUSE)": ("fsync", errno.EINVAL, is_folder),
    "fsync of a folder is refused: ENOTSUP": ("fsync", errno.ENOTSUP, is_folder),
    "fsync is not there at all: ENOSYS (FUSE)": ("fsync", errno.ENOSYS, lambda *_: True),
    "a folder cannot be opened: EACCES": ("open", errno.EACCES, is_folder),
}


@situations(FILES, "trains, and saves", *MOUNTS)
def test_calls_that_network_mounts_refuse(situation, tmp_path, monkeypatch):
    name, number, when = MOUNTS[situation]
    refused = refuse(monkeypatch, os, name, OSError(number, os.strerror(number)), when)
    assert train(tmp_path) == 0 and is_whole(tmp_path) and refused


@situations(FILES, "trains, and says that it cannot lock", "flock is refused: ENOLCK (NFS)", "flock is refused: ENOSYS")
def test_locks_that_network_mounts_refuse(situation, tmp_path, monkeypatch, capsys):
    number = getattr(errno, re.search(r"E[A-Z]+", situation)[0])
    refused = refuse(monkeypatch, evaluate.fcntl, "flock", OSError(number, os.strerror(number)))
    assert train(tmp_path) == 0 and is_whole(tmp_path) and refused
    assert "cannot be locked here" in capsys.readouterr().out


@situations(FILES, "status 2 and one line that names the file", "fsync fails: EIO", "fsync fails: EDQUOT (NFS quota)")
def test_errors_of_the_disk_are_not_taken_for_refusals(situation, tmp_path, monkeypatch, capsys):
    number = getattr(errno, situation.split()[2])
    refuse(monkeypatch, os, "fsync", OSError(number, os.strerror(number)))
    assert train(tmp_path) == 2 and one_line(capsys, "cannot be written", os.strerror(number))
    assert not evaluate.find_checkpoints(folder(tmp_path))


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without HOME and without an entry, in an empty folder."""

    def unknown(name):
        raise KeyError(name)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.chdir(tmp_path)
    yield
    jax.config.update("jax_compilation_cache_dir", cache)


@situations(FILES, "works, and makes no folder ~", "no home, training", "no home, evaluate.py")
def test_without_a_home(situation, nobody, tmp_path):
    if "training" in situation:
        assert train(Path("runs")) == 0
    else:
        assert evaluate.main(["policy=largest_first", "num_episodes=4"]) == 0
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}
    assert not str(jax.config.jax_compilation_cache_dir).startswith("~")


@situations(FILES, "works", "HOME cannot be written to", "the working folder cannot be written to")
def test_folders_that_cannot_be_written_to(situation, tmp_path, monkeypatch):
    if "HOME" in situation:
        monkeypatch.setenv("HOME", "/proc/self/nowhere")  # Not even root can.
    else:
        monkeypatch.chdir("/proc/self")
    assert train(tmp_path) == 0 and is_whole(tmp_path)


@situations(FILES, "refused in one line", "no home, save_dir=~/runs", "no home, save_dir=~other/runs")
def test_a_home_that_nobody_knows(situation, nobody, tmp_path, capsys):
    assert script.main(override(*FEW, situation.split(", ")[1])) == 2
    assert one_line(capsys, "no home folder is known") and not list(tmp_path.iterdir())


@situations(FILES, "trains; W&B, offline, has its files beside the run", "no home, W&B")
def test_wandb_without_a_home(situation, nobody, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    assert train(Path("runs")) == 0 and is_whole(Path("runs"))
    assert "W&B did not start" not in capsys.readouterr().out and len(histories(Path("runs"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


# ================================================ Sweeps and resuming =================================================
def histories(save_dir: Path) -> dict[str, list[int]]:
    """Of each offline run in a folder the iterations that it has, by the run's id."""
    found = {}
    for path in save_dir.rglob("offline-run-*/*.wandb"):
        data, place, part = path.read_bytes(), 7, b""  # LevelDB's log: blocks of 32 KiB, headers of 7 bytes.
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            part = (part if kind in (3, 4) else b"") + data[place + 7 : place + 7 + length]  # 1 is a whole record.
            place += 7 + length
            if kind in (1, 4):
                record = wandb_internal_pb2.Record.FromString(part)
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                found.setdefault(path.stem, []).extend([int(items["iteration"])] if items else [])
    return found


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.slow
@situations(SWEEPS, "a folder for each trial", "two trials of the README's W&B sweep, as its agent starts them")
def test_two_trials_of_a_sweep(situation, tmp_path, monkeypatch):
    """The agent's own code makes the commands from the sweep file; a server would choose the values. All are read, and
    the last one runs: with another learning rate, another program would be compiled."""
    sweep = yaml.safe_load(re.search(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1])
    command = utils.create_sweep_command(sweep.get("command"))
    rest = [word for word in few(tmp_path) if word.split("=")[0] not in sweep["parameters"]]
    fixed = {key: entry for key, entry in sweep["parameters"].items() if "value" in entry}
    values, folders = sweep["parameters"]["learning_rate"]["values"], set()
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    for trial, value in zip(("aaa", "bbb"), values, strict=True):
        given = utils.create_sweep_command_args({"args": fixed | {"learning_rate": {"value": value}}})
        given |= dict(env=[], interpreter=[], program=[str(ROOT / sweep["program"])])
        words = [x for word in command for x in (given[word[2:-1]] if word.startswith("${") else [word])]
        config, _ = evaluate.parse_command_line(words[1:], script.Config, script.PRESETS)
        monkeypatch.setenv("WANDB_RUN_ID", trial)
        folders.add(config.run_dir())
        assert config.learning_rate == value and config.resume == "auto"
    assert len(folders) == 2
    process = program(*words, *rest)
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    (path,) = (path for path in tmp_path.rglob("iter_000002.pkl") if "bbb" in str(path))
    assert evaluate.read_checkpoint(path)["config"]["learning_rate"] == values[-1]


@pytest.fixture
def trial(monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "aaa")


@situations(SWEEPS, "a folder for each trial", "two trials of a sweep in one process")
def test_two_trials_in_one_process(situation, tmp_path, monkeypatch, trial):
    for name in ("aaa", "bbb"):
        monkeypatch.setenv("WANDB_RUN_ID", name)
        assert in_a_thread(lambda name=name: train(tmp_path, f"wandb_project={name}")) == 0
    paths = {path.parts[-3]: path for path in tmp_path.rglob("iter_000002.pkl")}
    projects = [evaluate.read_checkpoint(paths[f"trial_{name}"])["config"]["wandb_project"] for name in ("aaa", "bbb")]
    assert projects == ["aaa", "bbb"]


@situations(SWEEPS, "goes on in its folder, as the same W&B run", "a trial that was stopped and is started again")
def test_a_trial_that_is_started_again(situation, tmp_path, monkeypatch, trial):
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGTERM)
        assert train(tmp_path, "resume=auto") == 0
    assert train(tmp_path, "resume=auto") == 0
    (path,) = tmp_path.rglob("iter_000002.pkl")
    assert [row["iteration"] for row in rows(path.parent)] == [0, 1, 2] and "aaa" in str(path)
    assert evaluate.read_checkpoint(path)["wandb_id"] == "aaa"


@situations(SWEEPS, "said in one line, with the folder", "resume=auto finds nothing")
def test_resume_auto_says_that_it_found_nothing(situation, tmp_path, capsys):
    assert train(tmp_path, "resume=auto") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"resume=auto: no checkpoint in {folder(tmp_path)}; the run starts afresh"
    assert train(tmp_path, "resume=auto") == 0 and "no checkpoint" not in capsys.readouterr().out


@pytest.mark.slow
@situations(
    SWEEPS, "every iteration once, in the one run that wandb sync finds",
    "an offline run, killed after its checkpoint and resumed", "an offline run, killed and resumed twice",
)  # fmt: skip
def test_offline_runs_show_every_iteration_once(situation, tmp_path, offline):
    """Killed an iteration after the last checkpoint."""
    code = """
import os, sys, evaluate, train_search_distill_binpack as script
record = evaluate.Run.record
def record_and_die(run, row):
    record(run, row)
    if row["iteration"] == int(sys.argv[1]):
        os.kill(os.getpid(), 9)
evaluate.Run.record = record_and_die
script.main(sys.argv[2:])
"""
    words = ["save_interval=2", "resume=auto", "max_num_iters=6"]
    for last in (3, 5) if "twice" in situation else (3,):
        killed = program("-c", code, str(last), *few(tmp_path, *words), PYTHONPATH=str(ROOT))
        assert killed.communicate(timeout=200) and killed.returncode == -9
    assert train(tmp_path, *words) == 0 and is_whole(tmp_path, last=6)
    assert list(histories(tmp_path).values()) == [[0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.slow
@situations(SWEEPS, "found", "wandb sync, as the README tells it")
def test_wandb_sync_finds_offline_runs(situation, tmp_path, monkeypatch, offline):
    assert train(tmp_path) == 0
    line = re.search(r"wandb sync \S+/wandb\b", (ROOT / "README.md").read_text())[0]
    path = folder(tmp_path) / Path(line.split()[-1]).name
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--dry-run", str(path)], capture_output=True, text=True,
        env=os.environ | {"WANDB_SILENT": "false"},
    )  # fmt: skip
    assert "Would sync 1 run(s)" in done.stdout + done.stderr


@situations(SWEEPS, "every iteration once", "an online run, killed and resumed")
def test_online_runs_show_every_iteration_once(situation, tmp_path, monkeypatch):
    """W&B says where its copy of the run ends."""
    server = {}

    def init(**arguments):
        def log(row, step=None, commit=None):
            server[max(server, default=-1) + 1 if step is None else step] = row["iteration"]

        first = max(server, default=-1) + 1
        return SimpleNamespace(
            id="abc", dir=str(tmp_path / "wandb" / "run-1" / "files"), step=first, log=log,
            define_metric=lambda *_, **__: None, finish=lambda: None,
        )  # fmt: skip

    monkeypatch.setattr(wandb, "init", init)
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGTERM)
        assert train(tmp_path, "max_num_iters=3") == 0
    server[2] = 2  # An iteration that was logged and not saved.
    assert train(tmp_path, "max_num_iters=3", "resume=auto") == 0
    assert list(server.values()) == [0, 1, 2, 3]


# ============================================== Instances of other sizes ==============================================
def other(num_items: int = 20, obs_num_ems: int = 40, **more):
    generator = RandomGenerator(max_num_items=num_items, max_num_ems=max(40, obs_num_ems))
    env = BinPack(generator=generator, obs_num_ems=obs_num_ems, **more)
    return env.reset(jax.random.PRNGKey(0))[1]


OTHERS = {
    "lengths in millimetres": lambda: other(normalize_dimensions=False).observation,
    "a TimeStep": lambda: other(),
    "an observation of another environment": lambda: (
        jumanji.make("Snake-v1").reset(jax.random.PRNGKey(0))[1].observation
    ),
    "a mask of another batch": lambda: (lambda o: o._replace(items_mask=jnp.stack([o.items_mask] * 2)))(
        other().observation
    ),
}


LARGER = {"30 items": dict(num_items=30), "10 items": dict(num_items=10), "60 spaces": dict(obs_num_ems=60)}


@situations(SIZES, "logits in the right places", *LARGER)
def test_observations_of_other_sizes(situation, agent):
    """Legal actions alone have logits, which go with their items, and slots that nothing uses change nothing."""
    observation = other(**LARGER[situation]).observation
    logits, value = agent.apply(observation)
    legal = np.asarray(observation.action_mask)
    assert logits.shape == (legal.size,) and np.array_equal(np.asarray(logits) > -1e8, legal.ravel())
    space, item = agent.act(observation)
    assert legal[space, item] and 0 < value <= 1
    turned = observation._replace(
        items=jax.tree.map(lambda x: x[::-1], observation.items),
        items_mask=observation.items_mask[::-1],
        items_placed=observation.items_placed[::-1],
        action_mask=observation.action_mask[:, ::-1],
    )
    by_pair = np.asarray(logits).reshape(legal.shape)
    np.testing.assert_allclose(np.asarray(agent.apply(turned)[0]).reshape(legal.shape)[:, ::-1], by_pair, atol=1e-4)
    pad = lambda x, name: jnp.pad(
        x, [(0, 3), (0, 2)] if "action" in name else [(0, 3 if name.startswith(".ems") else 2)]
    )
    padded = jax.tree_util.tree_map_with_path(lambda path, x: pad(x, jax.tree_util.keystr(path)), observation)
    wider, same = agent.apply(padded)
    wider = np.asarray(wider).reshape(legal.shape[0] + 3, -1)[:-3, :-2]
    np.testing.assert_allclose(wider, by_pair, atol=1e-4)
    np.testing.assert_allclose(same, value, atol=1e-5)


@situations(SIZES, "refused in one line", *OTHERS)
def test_observations_that_are_not_those_of_the_task(situation, agent):
    for call in (agent.apply, agent.act, jax.jit(agent.act)):
        with pytest.raises(evaluate.UsageError, match="^expected .*, got .*; give .*") as raised:
            call(OTHERS[situation]())
        assert "\n" not in str(raised.value)


@situations(SIZES, "the same logits", "numpy arrays in 64 bits", "BinPack-v2 of Jumanji itself")
def test_observations_that_are(situation, agent, observation):
    if "numpy" in situation:
        wide = lambda x: np.asarray(x, np.float64) if x.dtype == np.float32 else np.asarray(x)
        found = agent.apply(jax.tree.map(wide, observation))
    else:
        key = evaluate.evaluation_keys(0, 1)[0]
        found = agent.apply(jumanji.make("BinPack-v2").reset(key)[1].observation)
    assert all(np.array_equal(x, y) for x, y in zip(found, agent.apply(observation), strict=True))


# ============================================== Other operating systems ===============================================
@pytest.mark.slow
@situations(SYSTEMS, "imported, trains and plays; says that it cannot lock", "no fcntl, pwd, grp, resource, termios")
def test_without_the_modules_that_windows_lacks(situation, tmp_path):
    code = f"""
import sys
for name in ("fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None
import evaluate, train_search_distill_binpack as script, signal
assert script.main({override("max_num_iters=1", f"save_dir={tmp_path}")!r}) == 0
assert evaluate.main(["{folder(tmp_path)}", "num_episodes=2"]) == 0
"""
    process = program("-c", code, PYTHONPATH=str(ROOT))
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and out.count("cannot be locked here") == 1 and is_whole(tmp_path, last=1), err


@situations(SYSTEMS, "trains", "no SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU", "no os.sched_getaffinity")
def test_without_what_other_systems_lack(situation, tmp_path, monkeypatch):
    for name in situation.replace(",", "").split()[1:]:
        monkeypatch.delattr(os if "os." in name else signal, name.removeprefix("os."))
    assert train(tmp_path) == 0 and is_whole(tmp_path)


@situations(SYSTEMS, "trains, and saves", "a folder cannot be opened, as on Windows")
def test_folders_that_cannot_be_opened(situation, tmp_path, monkeypatch):
    refused = refuse(monkeypatch, os, "open", PermissionError(errno.EACCES, "Permission denied"), is_folder)
    assert train(tmp_path) == 0 and is_whole(tmp_path) and refused


@situations(SYSTEMS, "saves, and ends with status 0", "Ctrl-Break on Windows (SIGBREAK)")
def test_ctrl_break(situation, tmp_path, monkeypatch, capsys):
    """Another signal has its name here, one that nothing else uses."""
    monkeypatch.setattr(signal, "SIGBREAK", signal.SIGWINCH, raising=False)
    interrupt(monkeypatch, signal.SIGWINCH)
    assert train(tmp_path) == 0 and is_whole(tmp_path, last=1)
    assert "Stopped at iteration 1" in capsys.readouterr().out


@situations(SYSTEMS, "runs", "a console that has write and flush alone (IDLE, Spyder)")
def test_a_console_of_an_editor(situation, monkeypatch):
    said = []
    console = SimpleNamespace(write=said.append, flush=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        patch.setattr(sys, "argv", ["train_search_distill_binpack.py", "--help"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(script.__file__, run_name="__main__")
    assert end.value.code == 0 and "preset=NAME" in "".join(said)


@situations(SYSTEMS, "figures without a commit", "no git")
def test_without_git(situation, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert scores(tmp_path / "scores.json", "largest_first") and evaluate.commit() == ""


@situations(SYSTEMS, "escaped", "a console of code page 1252, a folder named 箱")
def test_a_console_of_windows(situation, tmp_path, monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", shown)
    assert train(tmp_path / "箱") == 0 and is_whole(tmp_path / "箱")
    shown.flush()
    assert rb"\u7bb1" in shown.buffer.getvalue()


def test_the_committed_table_is_of_these_tests():
    rows = json.loads((ROOT / "tests" / "results" / "situations.json").read_text())["rows"]
    assert [{key: value for key, value in row.items() if key != "failed_before"} for row in rows] == TABLE
    assert len({row["situation"] for row in TABLE}) == len(TABLE) and {row["kind"] for row in TABLE} == set(KINDS)
