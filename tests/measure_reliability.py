"""Injects faults into runs and files, and writes `tests/results/reliability.json`, from which
`tests/collect_results.py` makes the table of faults.

    python tests/measure_reliability.py            # about 15 minutes on 2 cores
    python tests/measure_reliability.py killed     # some kinds only; the others stay as they are

Each kind is a function that injects its faults for real and returns one outcome for each: None if all was as promised,
or what went wrong. `test_reliability.py` runs the same functions with small numbers.
"""

import contextlib
import ctypes
import io
import itertools
import json
import multiprocessing
import os
import pickle
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results" / "reliability.json"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402 (sets JAX up for tests before it is imported)
import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
from hypothesis import strategies  # noqa: E402

import evaluate  # noqa: E402
import train_ppo_binpack as ppo  # noqa: E402
import train_search_distill_binpack as script  # noqa: E402

TIMES = ("hours", "perf/decisions_per_second", "perf/iteration_seconds")
ENDLESS = "max_num_iters=100"  # As many as the learning rate of preset=cpu allows; a test needs a few of them.
Outcomes = list[str | None]


# ======================================================== Runs ========================================================
def folder_of(save_dir: Path) -> Path:
    return save_dir / "BinPack-v2" / "nsim_2" / "seed_0"


def run_here(save_dir: Path, *words: str) -> tuple[int, str, str]:
    """A run in this process: exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        status = script.main(conftest.override(*words, f"save_dir={save_dir}"))
    return status, out.getvalue(), err.getvalue()


OBEY_PERMISSIONS = """
import ctypes, os, sys
for capability in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH leave the bounding set.
    ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def start(save_dir: Path, *words: str, **environment: str | None) -> subprocess.Popen:
    """A run in a process of its own, for which file permissions hold even if root starts it. None unsets a variable."""
    command = [sys.executable, "-c", OBEY_PERMISSIONS, str(ROOT / "train_search_distill_binpack.py")]
    command += [*conftest.override(*words), f"save_dir={save_dir}"]
    environment = {key: value for key, value in (os.environ | environment).items() if value is not None}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], pause: float = 0.005) -> None:
    while process.poll() is None and not condition():
        time.sleep(pause)


def num_rows(run_dir: Path) -> int:
    log = run_dir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def log_of(run_dir: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def iterations_of(run_dir: Path) -> list[int]:
    """Of the checkpoints, each of which is read to the end."""
    return [evaluate.read_checkpoint(path)["iteration"] for path in evaluate.find_checkpoints(run_dir)]


def contents_of(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run_dir.iterdir() if path.name != ".lock"}


def same_arrays(a, b) -> bool:
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(map(np.array_equal, *leaves))


def differences(run_dir: Path, undisturbed: Path) -> str | None:
    """What differs between two finished runs, times apart: checkpoints, log, parameters, state of the optimizer."""
    numbers = [iterations_of(folder) for folder in (run_dir, undisturbed)]
    if numbers[0] != numbers[1]:
        return f"checkpoints {numbers[0]} instead of {numbers[1]}"
    if log_of(run_dir) != log_of(undisturbed):
        return "another log"
    if any(path.suffix == ".tmp" for path in run_dir.iterdir()):
        return "a temporary file is left"
    mine, theirs = (
        evaluate.read_checkpoint(evaluate.find_checkpoints(folder)[-1]) for folder in (run_dir, undisturbed)
    )
    changed = [key for key in ("model", "opt_state", "frames") if not same_arrays(mine[key], theirs[key])]
    return f"another {changed[0]}" if changed else None


def one_line(text: str, *parts: object) -> str | None:
    """Whether standard error is one line of an error with these parts in it."""
    fine = text.count("\n") == 1 and text.startswith("error: ") and all(str(part) in text for part in parts)
    return None if fine else f"expected one line with {parts}, got {text[-500:]!r}"


def goes_on(text: str, saved: list[int]) -> str | None:
    """Whether a resumed run began where it had been saved, and nowhere before."""
    fine = f"from iteration {saved[-1] if saved else 0}\n" in text or "Complete: " in text
    return None if fine else f"saved {saved}, and resumed: {text[:300]}"


def first_of(*outcomes: str | None) -> str | None:
    return next(filter(None, outcomes), None)


# ================================================== Kinds of faults ===================================================
def killed(number: int, folder: Path, iterations: int = 5) -> Outcomes:
    """SIGKILL: every other one while a checkpoint is being written, the rest at a random moment."""
    words = (f"max_num_iters={iterations}", "eval_interval=3")
    undisturbed = folder / "undisturbed"
    assert run_here(undisturbed, *words)[0] == 0
    outcomes, rng, seconds, missed = [], random.Random(0), 0.0, 0
    while len(outcomes) < number:
        save_dir = folder / "killed"
        run_dir = folder_of(save_dir)
        began, process = time.time(), start(save_dir, *words)
        if len(outcomes) % 2:
            time.sleep(seconds * rng.random())  # Of the longest life so far.
        else:
            last = rng.randrange(1, iterations)
            wait_for(process, (run_dir / f"iter_{last:06d}.pkl").exists)
            temporary = run_dir / f".iter_{last + 1:06d}.pkl.tmp"
            wait_for(process, temporary.exists, pause=0)  # It is written in milliseconds.
        seconds = max(seconds, time.time() - began)
        process.kill()
        process.communicate()
        half_written = any(run_dir.glob(".iter_*.tmp"))
        if len(outcomes) % 2 == 0 and not half_written and missed < 3 * number:
            missed += 1  # It had been written by then: again.
        elif process.returncode == -signal.SIGKILL:  # Else it had come to its end.
            rows, saved = num_rows(run_dir), iterations_of(run_dir)
            unaimed = None if half_written or len(outcomes) % 2 else "not killed while it wrote a checkpoint"
            lost = None if len(saved) >= rows - 2 else f"{rows} rows, and of the checkpoints only {saved}"
            status, out, said = run_here(save_dir, *words, "resume=auto")
            ends = f"status {status}: {said}" if status else differences(run_dir, folder_of(undisturbed))
            outcomes.append(first_of(unaimed, lost, ends, goes_on(out, saved)))
        shutil.rmtree(save_dir, ignore_errors=True)
    return outcomes


def signalled(number: int, folder: Path) -> Outcomes:
    """SIGTERM or Ctrl-C: the run saves, says how it goes on and leaves with status 0; a second one ends it at once."""
    outcomes = []
    for i in range(number):
        kind, twice = (signal.SIGTERM, signal.SIGINT)[i % 2], i % 4 >= 2
        save_dir = folder / f"signalled_{i}"
        run_dir = folder_of(save_dir)
        process = start(save_dir, ENDLESS, "eval_interval=250", "save_interval=250")
        wait_for(process, lambda: num_rows(run_dir) > 3)
        process.send_signal(kind)
        if twice:
            process.stderr.readline(), process.stderr.readline()  # It says that it has heard the first.
            process.send_signal(kind)
        out, said = process.communicate(timeout=60)
        saved = iterations_of(run_dir)
        at_once = twice and process.returncode == -kind
        told = process.returncode == 0 and "the same command with resume=auto" in out and "Traceback" not in said
        whole = at_once or (told and saved == [log_of(run_dir)[-1]["iteration"]])
        ends = None if whole else f"{process.returncode}, saved {saved}: {said[-500:]}"
        status, out, said = run_here(save_dir, f"max_num_iters={(saved or [0])[-1] + 1}", "resume=auto")
        outcomes.append(first_of(ends, f"status {status}: {said}" if status else goes_on(out, saved)))
    return outcomes


def damaged(number: int, folder: Path) -> Outcomes:
    """One checkpoint in five is cut off, one bit is flipped in the others: detected, or nothing has changed."""
    assert run_here(folder, "max_num_iters=2")[0] == 0
    path = evaluate.find_checkpoints(folder_of(folder))[-1]
    good, expected, rng = path.read_bytes(), evaluate.read_checkpoint(path), np.random.default_rng(0)
    words = conftest.override("resume=auto", f"save_dir={folder}")
    config, _ = evaluate.parse_command_line(words, script.Config, script.PRESETS)
    outcomes, detected = [], 0
    for i in range(number):
        place = int(rng.integers(len(good) - 39 if i % 10 == 1 else 0, len(good)))  # Some of them in the digest.
        flipped = bytearray(good)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(good[:place] if i % 5 == 0 else flipped)
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.closing(evaluate.Run(config, script.METHOD)) as run:
            found = run.checkpoint_to_resume()
        if found["iteration"] == 1:  # What went before it, and a line about it.
            detected += 1
            outcomes.append(None if said.getvalue().startswith(f"Skipped {path}: ") else f"said {said.getvalue()!r}")
        else:
            outcomes.append(None if same_arrays(found, expected) else f"a change at byte {place} was not detected")
    if detected < 0.9 * number:  # A bit of the marker that is gone is harmless; others are not.
        outcomes[0] = f"only {detected} of {number} were detected"
    return outcomes


@contextlib.contextmanager
def disk(folder: Path):
    """A disk of its own in a folder, where one may be mounted; else limits on the size of files. Yields what sets the
    room on it, in bytes."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1g", "none", folder]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        try:
            yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)
        finally:
            subprocess.run(["umount", folder], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (min(size // 4, soft % 2**62), hard))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def no_room(number: int, folder: Path) -> Outcomes:
    """A full disk, in the middle or at the start: a line names the file, what was saved is whole, and with more room
    the run goes on as if nothing had been."""
    assert run_here(folder / "undisturbed", "eval_interval=1")[0] == 0
    size = evaluate.find_checkpoints(folder_of(folder / "undisturbed"))[-1].stat().st_size
    outcomes, rng = [], random.Random(0)
    for i in range(number):
        save_dir, middle = folder / f"full_{i}", i % 2 == 0
        save_dir.mkdir()
        run_dir = folder_of(save_dir)
        with disk(save_dir) as set_room:
            if middle:
                assert run_here(save_dir, "eval_interval=1", "max_num_iters=1")[0] == 0
            set_room(int(size * rng.uniform(1.2, 2.9)) if middle else 4096 * (i // 2 % 3 + 1))
            status, _, said = run_here(save_dir, "eval_interval=1", "resume=auto")
            ends = one_line(said, "cannot be written", save_dir) if status == 2 else f"status {status}: {said}"
            if not any(name in said for name in (".lock", "metrics.jsonl", "iter_", "seed_0:")):
                ends = ends or f"names no file: {said}"
            saved = iterations_of(run_dir)
            whole = saved == list(range(1, len(saved) + 1)) and len(saved) < 4 and bool(saved) == middle
            set_room(2**30)
            status, out, said = run_here(save_dir, "eval_interval=1", "resume=auto")
            after = f"after that: {said}" if status else differences(run_dir, folder_of(folder / "undisturbed"))
        outcomes.append(first_of(ends, None if whole else f"left {saved}", after, goes_on(out, saved)))
    return outcomes


def read_only(number: int, folder: Path) -> Outcomes:
    """The folder may not be written to, from the middle of the run on or from its start."""
    outcomes = []
    for i in range(number):
        save_dir = folder / f"read_only_{i}"
        run_dir = folder_of(save_dir)
        run_dir.mkdir(parents=True)
        if i % 2:
            run_dir.chmod(0o555)
        process = start(save_dir, ENDLESS)
        if i % 2 == 0:
            wait_for(process, (run_dir / "iter_000002.pkl").exists)
            run_dir.chmod(0o555)
        _, said = process.communicate(timeout=120)
        run_dir.chmod(0o755)
        ends = (
            one_line(said, "cannot be written", run_dir) if process.returncode == 2 else f"{process.returncode}: {said}"
        )
        saved = iterations_of(run_dir)
        fine = saved == list(range(1, len(saved) + 1)) and (len(saved) >= 2) == (i % 2 == 0)
        outcomes.append(first_of(ends, None if fine else f"left {saved}"))
    return outcomes


def not_finite(number: int, folder: Path) -> Outcomes:
    """Gradients that overflow: no update is applied, each is counted, no checkpoint comes of them, and too many in a
    row end the run with a line."""
    origin = folder / "origin"
    assert run_here(origin, "max_num_iters=2")[0] == 0
    contents = evaluate.read_checkpoint(evaluate.find_checkpoints(folder_of(origin))[-1])
    outcomes = []
    for i in range(number):
        save_dir = folder / f"not_finite_{i}"
        shutil.copytree(origin, save_dir)
        run_dir = folder_of(save_dir)
        last = run_dir / "iter_000002.pkl"
        factor = 10.0 ** (25 + i % 8)
        evaluate.write_checkpoint(last, contents | {"model": jax.tree.map(lambda x: factor * x, contents["model"])})
        iterations = 4 if i % 2 == 0 else 3  # With four updates in each, so one is not enough for an early end.
        words = ("resume=auto", "max_skipped_updates=5", f"max_num_iters={iterations}")
        status, out, said = run_here(save_dir, *words)
        if i % 2 == 0:
            line = one_line(
                said, "iteration 4: train/", "is not finite, and 8 updates in a row were skipped", last, "learning_rate"
            )
            ends = line if status == 2 else f"status {status}: {said}"
        else:
            line = "Not saved after iteration 2: the last 4 updates were skipped as not finite."
            ends = None if status == 0 and line in out else f"status {status}: {out}{said}"
        counted = [row["train/skipped_updates"] for row in log_of(run_dir)[1:]] == [0, 0, 4, 4][:iterations]
        saved = iterations_of(run_dir)
        fine = None if counted and saved == [1, 2] else f"counted: {counted}, saved {saved}"
        outcomes.append(first_of(ends, fine))
    return outcomes


def two_runs(number: int, folder: Path) -> Outcomes:
    """A second run is refused while the first lives, and changes nothing; once the first is killed it is not."""
    outcomes = []
    for i in range(number):
        save_dir = folder / f"two_{i}"
        run_dir = folder_of(save_dir)
        process = start(save_dir, ENDLESS)
        wait_for(process, (run_dir / "iter_000001.pkl").exists)
        process.send_signal(signal.SIGSTOP)  # Else its own writing could not be told from the other's.
        before = contents_of(run_dir)
        status, _, said = run_here(save_dir, ENDLESS, ("resume=auto", "overwrite=true", "seed=0")[i % 3])
        refused = one_line(said, f"process {process.pid} of ", run_dir) if status == 2 else f"status {status}"
        unchanged = None if contents_of(run_dir) == before else "the second run changed files"
        process.kill()
        process.communicate()
        iterations = iterations_of(run_dir)[-1] + 1
        status, _, said = run_here(save_dir, f"max_num_iters={iterations}", "resume=auto")
        goes_on = None if status == 0 and iterations_of(run_dir)[-1] == iterations else f"after its end: {said}"
        outcomes.append(first_of(refused, unchanged, goes_on))
    return outcomes


def wandb_misbehaves(number: int, folder: Path) -> Outcomes:
    """No key, no network, a service that does not start or dies, a folder that is read-only: training goes on, its log
    is whole, and a line tells how to upload it later."""
    home, own, locked = folder / "home", folder / "own", folder / "locked"
    for path in (home, own, locked):
        path.mkdir()
    locked.chmod(0o555)
    online = dict(WANDB_MODE="online", WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    cases = {
        "no key": dict(WANDB_DIR=str(own)),
        "the service dies": dict(WANDB_MODE="offline"),
        "no network": online | dict(WANDB_INIT_TIMEOUT="5"),
        "no service": dict(WANDB_MODE="offline", WANDB_SERVICE="3-1-tcp-localhost-9"),
        "a read-only folder": dict(WANDB_MODE="offline", WANDB_DIR=str(locked)),
    }
    outcomes = []
    for i in range(number):
        name = list(cases)[i % len(cases)]
        save_dir = folder / f"wandb_{i}"
        run_dir = folder_of(save_dir)
        given = (
            dict(HOME=str(home), NETRC="/dev/null", WANDB_MODE=None, WANDB_API_KEY=None, WANDB_SILENT="false")
            | cases[name]
        )
        process = start(save_dir, "max_num_iters=8", **given)
        if name == "the service dies":
            wait_for(process, lambda: num_rows(run_dir) > 2)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            name = name if children else "no service was found"
        out, said = process.communicate(timeout=300)
        rows = [row["iteration"] for row in log_of(run_dir)] if num_rows(run_dir) else []
        told = "wandb sync" in out + said or "uploads it later" in out
        fine = process.returncode == 0 and rows == list(range(9)) and "Traceback" not in said and told
        outcomes.append(None if fine else f"{name}: {process.returncode}, rows {rows}: {out}{said}")
        if name == "no key" and not list(own.glob("wandb/offline-run-*/run-*.wandb")):
            outcomes[-1] = f"WANDB_DIR was not obeyed: {list(own.rglob('*'))}"
    locked.chmod(0o755)
    return outcomes


READER = """
import resource, sys
import evaluate

paths, events = sys.stdin.read().split(), []
forbidden = ("exec", "compile", "import", "os.", "subprocess.", "socket.", "ctypes.", "shutil.", "pathlib.")

def note(event, arguments):
    if event.startswith(forbidden) or event == "open" and set(str(arguments[1])) & set("wax+"):
        events.append((event, str(arguments)[:100]))

def read(path):
    try:
        evaluate.read_checkpoint(path, "search_distill", "BinPack-v2")
        return "read"
    except evaluate.UsageError as error:
        if isinstance(error.__context__, MemoryError):
            return "out of memory"
        return "refused" if path in str(error) and "\\n" not in str(error) else f"not one line: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

read(paths[0])  # What reading imports once is no deed of the file's.
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
sys.addaudithook(note)
for path in paths:
    events.clear()
    said = read(path)
    print(path, f"it did {events[:3]}" if events else said.replace("\\n", " "), flush=True)
"""


class _Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _copies(contents: dict) -> np.ndarray:
    return max(jax.tree.leaves(contents["model"]), key=np.size)


def attacks(contents: dict, marker: Path) -> list[bytes]:
    """Pickles that would do something, or use up all memory."""
    return [
        pickle.dumps(contents | {"model": _Calls(os.system, f"touch {marker}")}),
        pickle.dumps(contents | {"opt_state": [_Calls(eval, f"open({str(marker)!r}, 'w')")]}),
        pickle.dumps(contents | {"wandb_id": _Calls(np.save, str(marker), np.zeros(1))}),
        pickle.dumps(contents | {"model": (np.array([_Calls(os.mkdir, str(marker))], object), {})}),
        pickle.dumps(contents | {"model": _Calls(np.ndarray, (2**40,))}),
        pickle.dumps(contents | {"model": _Calls(bytearray, 2**40)}),
        b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",  # Deep.
        b"\x80\x04]\x94" + b"".join(b"h%ch%c\x86\x94" % (i, i) for i in range(40)) + b".",  # Wide by sharing.
        pickle.dumps(
            contents | {"model": ([_copies(contents)] * 10_000, {})}
        ),  # A file of one array, ten thousand times.
        b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b".",  # A string of 2**62 bytes.
        b"\x80\x04Nr\xff\xff\xff\x3f.",  # A memo of 2**30 entries.
        b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
        b"\x80\x02cbuiltins\ngetattr\ncbuiltins\n__import__\nX\x02\x00\x00\x00os\x85R\x86R.",
        b"",
        b".",
    ]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """With up to five places overwritten, filled with opcodes, cut out or copied from elsewhere."""
    data, opcodes = bytearray(data), list(b"(RtbcoiN\x81\x82\x85\x86\x87\x93\x94h}])Qsue0")
    for _ in range(int(rng.integers(1, 6))):
        place, other = rng.integers(len(data), size=2).tolist()
        length = int(rng.integers(1, 40))
        match int(rng.integers(4)):
            case 0:
                data[place : place + length] = rng.bytes(length)
            case 1:
                data[place:place] = bytes(rng.choice(opcodes, length).tolist())
            case 2:
                del data[place : place + length]
            case 3:
                data[place : place + length] = data[other : other + length]
    return bytes(data)


def hostile_files(number: int, folder: Path) -> Outcomes:
    """Attacks made by hand and mutated checkpoints without a digest: refused, nothing done, at most 1 GiB of memory."""
    assert run_here(folder, "max_num_iters=1")[0] == 0
    good = (folder_of(folder) / "iter_000001.pkl").read_bytes()[: -len(evaluate.DIGEST) - 32]
    marker, rng = folder / "marker", np.random.default_rng(0)
    by_hand = attacks(pickle.loads(good), marker)
    files = [*by_hand, *(mutated(good, rng) for _ in range(number - len(by_hand)))]
    paths = [folder / f"hostile_{i}.pkl" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    reader = [sys.executable, "-c", READER]
    run = subprocess.run(reader, cwd=ROOT, input="\n".join(map(str, paths)), capture_output=True, text=True)
    said = dict(line.split(" ", 1) for line in run.stdout.splitlines())
    outcomes: Outcomes = []
    for i, path in enumerate(paths):
        outcome = said.get(str(path), f"the reader died: {run.stderr[-300:]}")
        allowed = ("refused",) if i < len(by_hand) else ("refused", "read")  # A mutation may hit a number.
        outcomes.append(None if outcome in allowed else outcome)
    if marker.exists():
        outcomes[0] = "something was executed"
    return outcomes


def hostile_command_lines(number: int, folder: Path) -> Outcomes:
    """Generated overrides for the three scripts, up to where work would begin: status 0, or 2 with one line, and
    nothing written."""
    scraps = (
        "0 1 -1 2 7 1e-3 1e400 nan inf -inf true false null None [] [1] [[40,20]] [[8,12],[40,20]] (1,2) {a:1} ${x}"
        " ${oc.env:HOME} 'a \" \\ | : # & * ! % @ ` ~ cpu full auto 0x10 1_000 999999999999999999999 BinPack-v2 greedy"
    ).split() + ["", " ", "\x00", "٣", "a\nb", "=", "-", "--"]
    st = strategies
    values = st.one_of(
        st.sampled_from(scraps), st.text(max_size=12), st.integers().map(str), st.floats().map(str), st.just("1" * 5000)
    )
    started, outcomes = [], []

    def overrides(module) -> st.SearchStrategy[list[str]]:
        known = ["preset", *module.Config.model_fields]
        keys = st.one_of(st.sampled_from(known), st.sampled_from(known).map(lambda x: x[:-1]), st.text(max_size=8))
        words = st.one_of(
            st.builds("{}={}".format, keys, values),
            st.builds(lambda key, value: f"--{key.replace('_', '-')}={value}", keys, values),
            st.builds("--{}".format, keys),
            values,
        )
        return st.lists(words, max_size=4).map(lambda argv: (module, argv))

    def begin(*arguments) -> int:
        started.append(arguments)
        return 0

    @hypothesis.settings(
        max_examples=number, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.seed(0)
    @hypothesis.given(st.one_of(map(overrides, (script, ppo, evaluate))))
    def check(given) -> None:
        module, argv = given
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                status = module.main(argv)
        except BaseException as error:
            outcomes.append(f"{module.__name__} {argv}: {type(error).__name__}: {error}")
            return
        line = one_line(said.getvalue()) or (len(said.getvalue()) > 1000 and f"a long line: {said.getvalue()}") or None
        fine = status == 0 or (status == 2 and line is None)
        outcomes.append(None if fine else f"{module.__name__} {argv}: status {status}, {line}")

    before = Path.cwd()
    with contextlib.ExitStack() as stack:
        for module, name in ((script, "train"), (ppo, "train"), (evaluate, "evaluate")):
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, begin)
        stack.callback(os.chdir, before)
        os.chdir(folder)
        check()
    if list(folder.iterdir()):
        outcomes[0] = f"written: {list(folder.iterdir())}"
    if not 0 < len(started) < len(outcomes):
        outcomes[0] = f"{len(started)} command lines of {len(outcomes)} were good"
    return outcomes


EXTREME = [
    ("num_simulations=1", "max_num_considered_actions=1", "search_width=1", "rollout_batch_size=1", "num_epochs=1",
     "training_batch_size=7", "transformer_num_heads=1", "transformer_key_size=1", "pair_units=1",
     "transformer_mlp_units=[1]", "eval_batch_size=2", "gumbel_scale=0"),
    ("token_sizes=[[1,1],[40,20]]", "transformer_mlp_units=[8,8,8]", "permute_axes=false", "training_batch_size=31"),
    ("search_width=800", "max_num_considered_actions=800", "rescale_values=true", "eval_num_simulations=1",
     "discount=0.01"),
    ("leaf_value=completion", "num_transformer_layers=3", "training_batch_size=152",
     "rollout_batch_size=8", "value_loss_weight=0", "max_grad_norm=1e-6"),
    ("value_scale=1e6", "maxvisit_init=0", "num_epochs=9", "gumbel_scale=100"),
]  # fmt: skip


def extreme_values(number: int, folder: Path) -> Outcomes:
    """Extreme but legal configurations run and log numbers."""
    outcomes = []
    for i, words in enumerate(itertools.islice(itertools.cycle(EXTREME), number)):
        save_dir = folder / f"extreme_{i}"
        status, _, said = run_here(save_dir, "max_num_iters=2", *words)
        logs = list(save_dir.glob("*/*/*/metrics.jsonl"))
        rows = log_of(logs[0].parent) if logs else []
        fine = status == 0 and len(rows) == 3 and all(np.isfinite(x) for row in rows for x in row.values())
        conftest.forget_many_programs()
        outcomes.append(None if fine else f"{words}: {status}, {rows[-1:]} {said}")
    return outcomes


def long_life(number: int, folder: Path) -> Outcomes:
    """Iterations with evaluations and checkpoints: after the first two, nothing is compiled and no array more is held
    on the devices; after the twentieth, the host's memory grows by less than 4 %. One outcome for each."""
    compiled, seen = [], []

    def listen(event: str, seconds: float, **more) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(seconds)

    def record(run, row: dict) -> None:
        ctypes.CDLL(None).malloc_trim(0)  # What was freed does not count.
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((pages, sum(x.nbytes for x in jax.live_arrays()), len(compiled)))
        own(run, row)

    own, evaluate.Run.record = evaluate.Run.record, record
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        words = (f"max_num_iters={number}", f"learning_rate_decay_iters={number}", "eval_interval=2", "save_interval=2")
        more = ("eval_num_simulations=2", "eval_search_interval=2", "keep_checkpoints=2")
        status, _, said = run_here(folder, *words, *more)
    finally:
        evaluate.Run.record = own
        jax.monitoring.clear_event_listeners()
    if status or not compiled:
        return [f"status {status}, {len(compiled)} programs: {said}"] * number
    settled, (_, held, programs) = seen[min(20, number)][0], seen[2]  # By then, both kinds of evaluation were made.
    return [
        None if i <= 2 or (i <= 20 or pages < 1.04 * settled) and size <= held and compiled_by_now == programs else
        f"iteration {i}: {pages} pages, {size} bytes, {compiled_by_now} programs, once {settled}, {held}, {programs}"
        for i, (pages, size, compiled_by_now) in enumerate(seen) if i > 0
    ]  # fmt: skip


class Kind(NamedTuple):
    inject: Callable[[int, Path], Outcomes]
    number: int  # Of faults here,
    few: int  # and in the tests.
    label: str


KINDS = {
    "killed": Kind(
        killed, 30, 1, "SIGKILL, half of them while a checkpoint is written: resumed, and equal bit for bit"
    ),
    "signalled": Kind(signalled, 8, 1, "SIGTERM or Ctrl-C, once: saved; twice: gone"),
    "damaged": Kind(damaged, 250, 100, "checkpoints cut off at 50 places, or with one of 200 bits flipped"),
    "no_room": Kind(no_room, 12, 1, "disk full in the middle or at the start, and room made later"),
    "read_only": Kind(read_only, 6, 1, "folder read-only from the middle or the start on"),
    "not_finite": Kind(not_finite, 8, 1, "gradients that are not finite"),
    "two_runs": Kind(two_runs, 6, 1, "second run in the folder of one that lives, and after its death"),
    "wandb": Kind(wandb_misbehaves, 5, 1, "W&B without key, network or service, with a service that dies or no folder"),
    "hostile_files": Kind(hostile_files, 515, 60, "checkpoint files mutated, or made by hand as attacks"),
    "hostile_command_lines": Kind(hostile_command_lines, 5000, 300, "generated command lines"),
    "extreme_values": Kind(extreme_values, 5, 1, "extreme but legal configurations"),
    "long_life": Kind(long_life, 200, 6, "iterations without growth of memory and compiled programs"),
}


def inject(kind: str) -> dict:
    """All faults of a kind: how many, how many of them survived, and what went wrong with the others."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcomes = KINDS[kind].inject(KINDS[kind].number, Path(folder))
        except Exception as error:  # The other kinds go on.
            outcomes = [f"{type(error).__name__}: {error}"] * KINDS[kind].number
    lost = [outcome for outcome in outcomes if outcome is not None]
    counts = dict(injected=len(outcomes), survived=len(outcomes) - len(lost), lost=len(lost))
    return dict(faults=KINDS[kind].label, **counts, minutes=round((time.time() - began) / 60, 2), first_lost=lost[:3])


def main(argv: list[str]) -> int:
    if set(argv) - set(KINDS):
        print(f"error: expected kinds of {', '.join(KINDS)}, got {' '.join(argv)}", file=sys.stderr)
        return 2
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"kinds": {}}
    stamp = dict(
        commit=evaluate.commit(),
        device=f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        versions=evaluate.library_versions(),
    )
    kinds, lost = argv or list(KINDS), 0
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        running = {pool.submit(inject, kind): kind for kind in kinds}
        for done in as_completed(running):  # Each is kept as soon as it is known.
            kind, found = running[done], done.result()
            lost += found["lost"]
            counts = f"{kind:22} {found['survived']:5} of {found['injected']:5}"
            print(counts, *found["first_lost"], sep="\n    ", flush=True)
            result["kinds"][kind] = found | stamp
            ordered = {kind: result["kinds"][kind] for kind in KINDS if kind in result["kinds"]}
            result = dict(command="python tests/measure_reliability.py", kinds=ordered)
            RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
