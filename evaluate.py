"""Scores, compares and draws checkpoints of both training scripts, on fixed instances of BinPack-v2 or of other sizes.

    python evaluate.py checkpoints/BinPack-v2/nsim_4/seed_0             # greedy play of the newest checkpoint there
    python evaluate.py CHECKPOINT OTHER policy=greedy,search,best_of_n json=scores.json
    python evaluate.py policy=random,largest_first,lookahead            # the floors, without a checkpoint
    python evaluate.py CHECKPOINT max_num_items=50 max_num_ems=80       # larger instances than it was trained on
    python evaluate.py CHECKPOINT instances=items.csv plan=plan.csv     # own items: what goes where
    python evaluate.py CHECKPOINT OTHER render=episode.gif              # one instance, side by side
    python evaluate.py RUN_FOLDER... 'policy=[]' curves=curves.png      # learning curves, runs as bands
    python evaluate.py --help

A CHECKPOINT is a .pkl that a run saved or that `checkpoints/` has, or the folder of a run. It is played by the
environment, network, policies and rollout of its own training script, which is imported when the checkpoint is loaded.
The training scripts import from here what both need: command line, checkpoint files, a run's folder and log, W&B,
devices, playing and scoring.
"""

from __future__ import annotations

import builtins
import collections
import contextlib
import csv
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pydantic
import tqdm
from jax.experimental import multihost_utils
from omegaconf import OmegaConf
from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt, ValidationError, field_validator

try:
    import fcntl
except ImportError:  # On Windows.
    fcntl = None

if TYPE_CHECKING:
    from jumanji.environments import BinPack
    from jumanji.environments.packing.bin_pack.types import EMS, State

METHODS = {"search_distill": "train_search_distill_binpack", "ppo": "train_ppo_binpack"}  # The script of each method.
COLUMNS = ("Item_Name", "Length", "Width", "Height", "Quantity")  # Jumanji's, of a file of items.
HEADER = ",".join(COLUMNS)
MOST = 1000  # Item slots, and spaces.
DEVICES = "devices"  # The axis that pmap maps over all devices.
CACHE_DIR = "~/.cache/search-distill-binpack"
NO_INSTANCE = np.uint32(2**32 - 1)  # A key of these gives a finished state without items, to fill up a batch.


def no_address(path: str) -> str:
    """The same path. Raises `ValueError` for the address of something that is not on this machine."""
    if re.match(r"[\w.@+-]{2,}:/", path):
        raise ValueError("expected a path of this machine, not an address; mount it, or save here and copy it there")
    return path


def with_home(path: str) -> str:
    """The path with the home folder in the place of `~`. Raises `ValueError` where none is known."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("expected a path, and no home folder is known for this ~; type the whole path")
    return expanded


Seed = Annotated[int, Field(ge=0, lt=2**31)]
LocalPath = Annotated[str, AfterValidator(no_address)]
UserPath = Annotated[LocalPath, AfterValidator(with_home)]
Folder = Annotated[UserPath, Field(min_length=1)]
Units = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Millimetres = Annotated[int, Field(ge=1, le=19_000)]  # In longer containers `EQUAL` is more than a millimetre.


class FrozenModel(pydantic.BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """A configuration: a fixed set of keys with types, limits, defaults and descriptions."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info) -> Any:
        is_switch = cls.model_fields[info.field_name].annotation is bool
        if not is_switch and any(isinstance(x, bool) for x in jax.tree.leaves(value)):
            raise ValueError("expected a value that is not true or false")
        return value


class Sizes(FrozenModel):
    """The sizes of instances and observations, in Jumanji's names, by default BinPack-v2's. An instance has at most
    `max_num_items` - 1 items, and BinPack-v2's exactly so many."""

    env_id: Literal["BinPack-v2"] = Field("BinPack-v2", description="the Jumanji environment")
    max_num_items: Annotated[int, Field(ge=2, le=MOST)] = Field(20, description="item slots; one more than items")
    max_num_ems: Annotated[int, Field(ge=1, le=MOST)] = Field(40, description="spaces (EMSs) that are kept")
    obs_num_ems: Annotated[int, Field(ge=1, le=MOST)] = Field(40, description="spaces that are shown, the largest")
    split_num_same_items: Annotated[int, Field(ge=2)] = Field(
        2, description="pieces that a space is cut into at a time, at most; above 2 the number of items varies"
    )

    @property
    def max_decisions(self) -> int:
        """T: each decision places one item."""
        return self.max_num_items - 1

    @property
    def env_name(self) -> str:
        """The environment and, where they are not its own, the sizes: the name of a folder of runs."""
        own = {key: getattr(self, key) for key in SIZES if getattr(self, key) != Sizes.model_fields[key].default}
        return "_".join([self.env_id, *(f"{key}_{value}" for key, value in own.items())])

    @pydantic.model_validator(mode="after")
    def _sizes_fit_together(self) -> Self:
        if self.obs_num_ems > self.max_num_ems:
            what = f"obs_num_ems={self.obs_num_ems}: expected at most max_num_ems={self.max_num_ems}, the spaces"
            raise ValueError(f"{what} that are kept; type obs_num_ems={self.max_num_ems}")
        if self.split_num_same_items > max(2, self.max_num_items - 1):  # Jumanji would cut nothing.
            what = f"split_num_same_items={self.split_num_same_items}: expected below max_num_items"
            raise ValueError(f"{what}={self.max_num_items}; type split_num_same_items=2")
        return self


SIZES = tuple(key for key in Sizes.model_fields if key != "env_id")


# ==================================================== Command line ====================================================
class UsageError(Exception):
    """A mistake of the user, in one line of bearable length: what was expected, what came, what to type instead."""

    def __str__(self) -> str:
        line = "".join(x if x.isprintable() else repr(x)[1:-1] for x in super().__str__())
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


class DamagedFile(UsageError):
    """A checkpoint that is not as it was written."""


class CannotWrite(UsageError):
    """A full disk or a read-only folder in the middle of a run."""


def parse_command_line(argv: list[str], config_class: Any, presets: dict[str, str], paths: list | None = None) -> tuple:
    """Parses `key=value`, `--key value`, `--key=value` and `--some-key value` into (config, preset name). A preset is
    such a line itself, and single keys override it. Paths are added to `paths`, if that is given. Raises `UsageError`
    for anything that does not fit."""
    fields, overrides, queue = config_class.model_fields, {}, list(argv)
    known = ["preset", *fields] if presets else [*fields]
    while queue:
        word = queue.pop(0)
        key, equals, raw = word.partition("=")
        dashes = key.startswith("--")
        key = key[2:].replace("-", "_") if dashes else key
        if paths is not None and not dashes and (not equals or os.path.exists(word)):
            paths.append(word)
            continue
        if not dashes and not equals:
            raise UsageError(f"expected key=value or --key value, got '{word}'; --help lists the keys")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else "--help lists the keys"
            raise UsageError(f"unknown key '{key}'; {hint}")
        if not equals:
            is_switch = key in fields and fields[key].annotation is bool
            if is_switch and (not queue or queue[0].lower() not in ("true", "false")):
                raw = "true"
            elif queue:
                raw = queue.pop(0)
            else:
                raise UsageError(f"{word}: expected a value after it, but the line ends; type {word} VALUE")
        if key in overrides:
            raise UsageError(f"{key} is given twice, as {overrides[key]!r} and {raw!r}; keep one of them")
        overrides[key] = raw
    preset = overrides.pop("preset", "full")
    if presets and preset not in presets:
        raise UsageError(f"preset={preset}: expected one of {', '.join(presets)}; type preset=cpu")
    typed, overrides = overrides, dict(word.split("=") for word in presets.get(preset, "").split()) | overrides
    try:
        config = config_class(**{key: _parse_value(key, raw, fields[key]) for key, raw in overrides.items()})
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        reason = reason.replace("Input should be", "expected").replace("Field required", "expected one more value")
        reason = reason.split(", unable to parse")[0]
        for key in first["loc"][:1]:
            default = fields[key].default
            example = shlex.quote(f"{key}={as_typed(default)}")
            hint = f"or leave {key} out" if default in ("", ()) else f"for example {example}"
            reason = f"{key}={overrides.get(key)}: {reason}; {hint}"
        raise UsageError(reason) from None
    for key, need in getattr(config, "needs", {}).items():
        other, _, value = need.partition("=")
        if key in typed and getattr(config, key) != fields[key].default and getattr(config, other) != value:
            raise UsageError(f"{key}={typed[key]}: expected with {need} alone; type {need}, or drop {key}")
    return config, preset


def _parse_value(key: str, raw: str, field: Any) -> Any:
    """One value in YAML's grammar. Text stays as typed, integers are decimal, and a list may lack its brackets. A list
    of words is split at its commas, unless there is a file of this name."""
    if raw and get_origin(field.annotation) is tuple:
        inner = raw[1:-1] if re.fullmatch(r"\[.*\]|\(.*\)", raw) else raw
        if all(isinstance(word, str) for word in field.default):
            return [raw] if os.path.exists(raw) else [x.strip(" '\"") for x in inner.split(",") if x.strip()]
        raw = f"[{inner}]"
    if field.annotation is str or re.fullmatch(r"[+-]?\d+", raw):
        return raw
    try:
        value = OmegaConf.from_dotlist([f"{key}={raw}"])[key]
        return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    except Exception:  # YAML and OmegaConf raise errors of many classes for text that they cannot read.
        return raw


def as_typed(value: Any) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return "[" + ",".join(map(as_typed, value)) + "]" if isinstance(value, (tuple, list)) else str(value)


def help_text(doc: str, config_class: type[pydantic.BaseModel], presets: dict[str, str]) -> str:
    """The script's docstring, every key with type, default and meaning, and the presets."""
    lines = [doc.strip(), "", "Keys, as key=value or --key value (type, default, meaning):", ""]
    for key, field in config_class.model_fields.items():
        choices = "|".join(map(str, get_args(field.annotation)))
        kind = choices if get_origin(field.annotation) is Literal else field.annotation.__name__
        lines.append(f"  {key:28} {kind:18} {as_typed(field.default) or repr(''):32} {field.description}")
    if presets:
        lines += ["", "Presets, as preset=NAME; single keys still override them:", ""]
    return "\n".join(lines + [f"  {name:6} {words or 'the defaults above'}" for name, words in presets.items()])


class Output:
    """Takes the place of `sys.stdout` or `sys.stderr` for a while. Nothing that is written can end a run: a reader may
    go away, a disk be full, an encoding lack a character. `error` is the first error that its reader did not want."""

    def __init__(self, name: str):
        self.name, self.stream, self.error = name, getattr(sys, name), None
        if self.stream is None or getattr(self.stream, "closed", False):
            while (descriptor := os.open(os.devnull, os.O_WRONLY)) < 3:
                pass  # Else a file of the run would take the number of a closed stream.
            self.stream = open(descriptor, "w")

    def __enter__(self) -> Self:
        self._before = getattr(sys, self.name)
        setattr(sys, self.name, self)
        return self

    def __exit__(self, *_: Any) -> None:
        self._try(self.stream.flush, last=True)
        setattr(sys, self.name, self._before)

    def write(self, text: str) -> int:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._try(lambda: self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding)))
        if "\n" in text:  # A log in a file is read while the run goes on.
            self.flush()
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, call: Callable[[], Any], last: bool = False) -> None:
        try:
            call()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed.
            is_full = isinstance(error, BlockingIOError)  # A terminal or pipe, for the moment.
            if isinstance(error, OSError) and not is_full and error.errno not in (errno.EPIPE, errno.EIO):
                self.error = self.error or error
            if last or not is_full:  # What is left in its buffer goes nowhere, or Python would fail at its end.
                with contextlib.suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def exit_status(command: Callable[[], int | None], smaller: str, after_file_error: str) -> int:
    """What `command` returns, or 2 with one line on standard error for a user's mistake or a lack of memory or room.
    One of several processes ends at once where the others do not know of it: an orderly exit would wait for them."""
    status, told = 2, False
    with Output("stdout"), Output("stderr"), usual_numbers():
        try:
            return command() or 0
        except UsageError as error:
            line, told = str(error), not isinstance(error, CannotWrite)
        except OSError as error:
            line = f"{error}; {after_file_error}"
        except Exception as error:
            of_jax = isinstance(error, jax.errors.JaxRuntimeError)
            line = f"a device has not enough memory; type a smaller {smaller}"
            if not (of_jax and "RESOURCE_EXHAUSTED" in str(error)):
                if not jax.distributed.is_initialized():
                    raise
                reason = str(error).split("\n")[0] if of_jax else traceback.format_exc()
                line, status = f"a process of this run ended ({reason}); start all again with resume=auto", 1
        if line:  # The first of several processes speaks for all.
            print(f"error: {line}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized() and not told:
        os._exit(status)
    return status


class StopRequest:
    """Asks a run to stop after its iteration: Ctrl-C, SIGTERM, a closed terminal (SIGHUP), and what batch systems send
    before they kill (SIGUSR1, SIGUSR2, SIGXCPU). A second Ctrl-C or SIGTERM ends the process at once. What is ignored
    already, as under nohup, stays so. Outside of the main thread Python hears no signal."""

    def __init__(self):
        self.made, self._handlers = False, {}

    def __enter__(self) -> Self:
        for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
            number = getattr(signal, name, None)  # Windows has three of them.
            if number and threading.current_thread() is threading.main_thread():
                before = signal.getsignal(number) or signal.SIG_DFL
                if before != signal.SIG_IGN or number == signal.SIGINT:  # A shell's background job ignores SIGINT.
                    self._handlers[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._handlers.items():
            signal.signal(number, before)

    def _handle(self, number: int, frame: Any) -> None:
        self.made = True
        if number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # print may not be re-entered.
            os.write(2, b"\nStopping after this iteration; once more to leave at once.\n")


# ================================================== Checkpoint files ==================================================
FORMAT_VERSION = 1
CONTENTS = dict(format_version=int, method=str, iteration=int, frames=int, seconds=float, model=tuple, config=dict,
                opt_state=list, wandb_id=str)  # fmt: skip
MAX_ENTRIES = 1_000_000  # A file of some bytes can name the same entry again and again.
DIGEST = b"sha256:"  # Stands after the pickle, which marks its own end: pickle.load does not read on.


class _Stub:
    """Takes the place of what numpy's pickles name: it keeps what it is given, and nothing runs. numpy's own classes
    are not handed out, since called in the wrong way they read memory that is not theirs."""

    state: Any = None

    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:  # On the class itself, BUILD fails for want of an instance.
        self.state = state

    def to_array(self) -> np.ndarray:
        """A view of the bytes that the pickle holds. Raises errors of many classes if they are no array of numbers."""
        kind, order = type(self).__name__, "C"
        if kind == "_reconstruct":
            _, shape, dtype, is_fortran, data = self.state
            order = "F" if is_fortran else "C"
        elif kind == "_frombuffer":
            data, dtype, shape, order = self.arguments
        elif kind == "scalar":
            (dtype, data), shape = self.arguments, ()
        else:
            raise pickle.UnpicklingError(f"it holds a {kind}, and only plain values are allowed")
        name = dtype.arguments[0] if type(dtype) is _STUBS["dtype"] else ""
        if not (isinstance(data, (bytes, bytearray)) and re.fullmatch(r"[biufc]\d{1,2}", name)):
            raise pickle.UnpicklingError("it has an array of objects, and only numbers are allowed")
        dtype = np.dtype(name).newbyteorder(dtype.state[1] if dtype.state else "=")
        return np.frombuffer(data, dtype).reshape(shape, order=order)


_MODULES = dict(ndarray="", dtype="", _reconstruct=".multiarray", scalar=".multiarray", _frombuffer=".numeric")
_STUBS = {name: type(name, (_Stub,), {}) for name in _MODULES}


class _PlainUnpickler(pickle._Unpickler):
    """Reads arrays of numbers and plain containers, and refuses anything else before it runs. The unpickler in C
    allocates whatever size a file names; this one, in Python, does not."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._entries, self._bytes_left = MAX_ENTRIES, len(data)

    def find_class(self, module: str, name: str) -> Any:
        if not (name in _MODULES and re.fullmatch(r"numpy(\._?core)?" + re.escape(_MODULES[name]), module)):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays are allowed")
        return _STUBS[name]

    def load(self) -> Any:
        return self._plain(super().load())

    def _load_bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(min(size, self._bytes_left))))

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _load_bytearray}

    def _plain(self, x: Any) -> Any:
        """The same with arrays in the place of stubs. Shared objects are copied, so entries and bytes are counted."""
        self._entries -= 1
        if self._entries < 0:
            raise pickle.UnpicklingError(f"it has more than {MAX_ENTRIES:,} entries")
        if type(x) is dict:
            return {self._plain(key): self._plain(value) for key, value in x.items()}
        if type(x) in (list, tuple):
            return type(x)(map(self._plain, x))
        if isinstance(x, _Stub):
            array = x.to_array()
            self._bytes_left -= array.nbytes
            if self._bytes_left < 0:
                raise pickle.UnpicklingError("its arrays are larger than the file")
            return array.copy()
        if x is None or type(x) in (bool, int, float, str, bytes):
            return x
        raise pickle.UnpicklingError(f"it holds a {type(x).__name__}, and only plain values are allowed")


def write_checkpoint(path: Path, contents: dict) -> None:
    """Writes a dict of plain values and numpy arrays, and its digest, in one atomic step: a reader finds the whole file
    or none. Raises `OSError` and leaves nothing where there is no room."""
    data = pickle.dumps(contents, protocol=4)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data + DIGEST + hashlib.sha256(data).digest())
        sync(temporary)
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Waits until a file or a folder has reached the disk. Some network mounts refuse it, and Windows for folders."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        refused = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM, errno.EBADF)
        if error.errno not in refused:
            raise


def read_checkpoint(path: str | Path, method: str | None = None, env_id: str | None = None) -> dict:
    """Reads a checkpoint, of the method and environment if they are given. Raises `UsageError` for anything else, and
    its subclass `DamagedFile` for a file that is not as it was written."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(0, "no regular file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise DamagedFile(f"{path}: expected a checkpoint file, got '{error.strerror}'; give an iter_*.pkl") from None
    body, marker, digest = data[:-39], data[-39:-32], data[-32:]  # DIGEST has 7 bytes, a SHA-256 32.
    if marker == DIGEST and hashlib.sha256(body).digest() != digest:
        raise DamagedFile(f"{path}: damaged, its digest does not fit what it holds; give another iter_*.pkl")
    try:
        contents = _PlainUnpickler(data).load()
    except Exception as error:  # A damaged pickle can raise nearly anything.
        raise DamagedFile(f"{path}: not a checkpoint that can be read: {error}; give another iter_*.pkl") from None
    contents = contents if isinstance(contents, dict) else {}
    version = contents.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        expected = f"expected format_version={FORMAT_VERSION}, got {version}"
        raise UsageError(f"{path}: {expected}; give a checkpoint that this version wrote, or use the one that wrote it")
    fits = all(type(contents.get(key)) is kind for key, kind in CONTENTS.items())
    try:
        fits = fits and len(contents["model"]) == 2 and 0 <= contents["iteration"] < 2**31
        json.dumps(contents.get("config"))
    except (TypeError, ValueError, RecursionError):  # A configuration holds plain values alone.
        fits = False
    if not fits:
        raise UsageError(f"{path}: expected a checkpoint of this project, got something else; give an iter_*.pkl")
    for key, expected in (("method", method), ("env_id", env_id)):
        found = contents["method"] if key == "method" else contents["config"].get("env_id")
        if expected is not None and found != expected:
            raise UsageError(f"{path}: expected {key}={expected}, got {found}; give a checkpoint that has it")
    return contents


def find_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in run_dir.glob("iter_*.pkl") if re.fullmatch(r"iter_\d+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem[5:]))


def newest_readable(checkpoints: list[Path], method: str, env_id: str) -> dict | None:
    """The last of some checkpoints that can be read; says which it skips. None where there are none."""
    for path in reversed(checkpoints):
        try:
            return read_checkpoint(path, method, env_id)
        except DamagedFile as error:
            problem = str(error).rpartition(";")[0]
            if path == checkpoints[0]:
                hint = "no other can be read; type overwrite=true (without resume) to start again"
                raise UsageError(f"{problem}, and {hint}") from None
            print(f"Skipped {problem}")


def lock_folder(folder: Path) -> Any:
    """Keeps other processes from locking a folder until the returned file is closed or this process ends, however it
    does. Raises `UsageError` if another process holds the lock."""
    file = open(folder / ".lock", "a+", errors="replace")
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no flock on this system")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        what = f"expected a folder that no other run writes to, and {file.read() or 'another one'} is at work there"
        raise UsageError(f"{folder}: {what}; wait for its end, or choose another save_dir or seed") from None
    except OSError as error:
        print(f"{folder} cannot be locked here ({error.strerror}): start no second run in it")
    with file_errors(folder / ".lock"):
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}")
        file.flush()
    return file


@contextlib.contextmanager
def file_errors(path: Path):
    """Turns an error of the file system, while a run writes to a path, into a line that says what is left."""
    try:
        yield
    except OSError as error:
        hint = "make room or choose another save_dir; resume=auto (no overwrite) continues from what was saved"
        raise CannotWrite(f"{path}: cannot be written ({error}); {hint}") from None


def newest_in(path: str | Path) -> Path:
    """A checkpoint's path, or that of the newest in the folder of a run. Raises `UsageError` if there is none."""
    found = find_checkpoints(Path(path)) if Path(path).is_dir() else [Path(path)]
    if not found:
        raise UsageError(f"{path}: expected a run's folder with an iter_*.pkl in it; give a file or another folder")
    return found[-1]


def check_fit(key: str, template: Any, saved: Any, hint: str) -> None:
    """Raises `UsageError` unless `saved` is a tree of arrays with the names, shapes and types of `template`."""
    describe = lambda tree: jax.tree.map(lambda x: (np.shape(x), str(getattr(x, "dtype", None))), tree)
    try:
        same = describe(saved) == describe(template)
    except (TypeError, ValueError):  # Names that do not compare, lists that are no arrays.
        same = False
    if not same:
        raise UsageError(f"{key}: the checkpoint's arrays do not fit this configuration; {hint}")


def sweep_trial() -> str:
    """Folders of a trial in the folders of a run, empty outside of a sweep: a W&B agent names sweep and trial."""
    sweep, trial = (os.environ.get(name) for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))
    return f"sweep_{sweep}/trial_{trial}" if sweep and trial else ""


def library_versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "dm-haiku", "optax", "mctx", "jumanji", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in names}


def read_log(path: Path) -> list[dict]:
    """The rows of a run's metrics.jsonl, without lines that a crash has torn."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("iteration"), int)]


# =========================================== JAX: numbers, devices, processes =========================================
# Settings of JAX under which nothing here runs, and how they usually stand.
CANNOT_WORK = dict(jax_disable_jit=False, jax_no_execution=False, jax_error_checking_behavior_nan="ignore",
                   jax_error_checking_behavior_divide="ignore", jax_error_checking_behavior_oob="ignore")  # fmt: skip


@contextlib.contextmanager
def importing_jumanji():
    """Keeps two things from an import of Jumanji, which imports matplotlib: a backend that is not installed, whose name
    programs started from a notebook inherit, and in a notebook the switch to a package for plots (ipympl) that is not
    among the requirements. Jumanji also starts JAX's devices, so it is not imported at the top."""
    with mock.patch.dict(os.environ), mock.patch.dict(vars(builtins), {"__IPYTHON__": False}):
        if "matplotlib" not in sys.modules and (backend := os.environ.pop("MPLBACKEND", None)):
            import matplotlib

            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
        yield


@contextlib.contextmanager
def usual_numbers():
    """JAX's random generator and number types as they are by default, in the place of what the environment or a
    notebook has set: the same keys make the same instances everywhere. A context, or a function's decorator."""
    settings = dict(default_prng_impl="threefry2x32", threefry_partitionable=True, enable_custom_prng=False,
                    legacy_prng_key="allow", enable_x64=False, numpy_dtype_promotion="standard",
                    numpy_rank_promotion="allow", transfer_guard="allow")  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


def seed_key(seed: int) -> np.ndarray:
    """The key of a seed, uint32 [2]: that of `jax.random.PRNGKey`, which may also add `jax_random_seed_offset`."""
    return np.array([0, seed], np.uint32)


def start_jax(*batch_sizes: int) -> None:
    """Starts JAX. Without an accelerator each core is a device, as far as the batches divide and leave it 16 rows:
    operations this small run faster side by side than split. A number set for JAX wins. Raises `UsageError`."""
    for name, usual in CANNOT_WORK.items():
        if (found := getattr(jax.config, name)) != usual:
            what = f"{name.upper()}={found}: expected {usual}, since nothing here runs without compiled programs"
            raise UsageError(f"{what}; type unset {name.upper()}")
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices < 0 and "device_count" not in flags:
        use_cpu_cores(batch_sizes, flags)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        what = f"expected devices that JAX can start, got JAX_PLATFORMS={jax.config.jax_platforms}"
        raise UsageError(f"{what} ({str(error).split(chr(10))[0] or 'none here'}); type JAX_PLATFORMS=cpu") from None


def use_cpu_cores(batch_sizes: tuple, flags: str) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fitting = [n for n in range(1, cores + 1) if not any(size % n or size < 16 * n for size in batch_sizes)]
    # XLA warns of devices that wait for one another for 20 seconds, and ends the process later. Ours may, over a long
    # iteration or plan.
    for event in ("warn_stuck", "terminate"):
        patience = f"--xla_cpu_collective_call_{event}_timeout_seconds"
        flags += f" {patience}=86400" if patience not in flags else ""
    os.environ["XLA_FLAGS"] = flags.strip()
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(fitting, default=1))


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder (empty: does not); JAX's own setting wins."""
    folder = os.path.expanduser(folder)  # Without a home it still begins with ~.
    if folder and not folder.startswith("~") and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", folder)


def device_slice(x: jax.Array) -> jax.Array:
    """This device's share of an array that all devices have whole, inside `pmap`."""
    size = len(x) // jax.device_count()
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(DEVICES) * size, size)


def replicate(tree: Any) -> Any:
    """Adds a leading axis with one copy for each device, as pmap takes it."""
    copy = jax.pmap(lambda tree, _: tree, axis_name=DEVICES, in_axes=(None, 0))
    return copy(tree, np.arange(jax.local_device_count()))


def host_copy(tree: Any) -> Any:
    """One device's copy of a replicated tree, as numpy arrays."""
    return jax.tree.map(lambda x: np.asarray(np.asarray(x.addressable_shards[0].data)[0]), tree)


def in_any_process(flag: bool) -> bool:
    """Whether a flag is set in any process; all have to ask together."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def on_first_process(function: Callable[[], Any]) -> Any:
    """What the function, called in process 0 alone, returns or raises (`UsageError`) there, in every process."""
    result = error = None
    if jax.process_index() == 0:
        try:
            result = function()
        except UsageError as raised:
            error = raised
    if jax.process_count() > 1:
        data = np.frombuffer(pickle.dumps((result, error)), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        result, error = pickle.loads(multihost_utils.broadcast_one_to_all(np.resize(data, size)).tobytes())
    if error:
        raise error if jax.process_index() == 0 else type(error)("")  # Said once.
    return result


# ========================================== Training runs: folder, log, W&B ===========================================
@dataclasses.dataclass
class Progress:
    """Where a run stands, beside its TrainState. A checkpoint has these under the same names."""

    iteration: int = 0
    frames: int = 0  # decisions played to learn from
    seconds: float = 0.0  # wall-clock
    wandb_id: str = dataclasses.field(default_factory=lambda: os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex())


class Run:
    """The folder of a run with its checkpoints and metrics.jsonl, a lock against a second run, a progress bar, and
    Weights & Biases where it works. Of several processes the first writes; the others do not."""

    def __init__(self, config: Any, method: str):
        self.config, self.method = config, method
        self.path, self.log = config.run_dir(), config.run_dir() / "metrics.jsonl"
        self._lock = self._file = self._wandb = self._bar = None

    def checkpoint(self, iteration: int) -> Path:
        return self.path / f"iter_{iteration:06d}.pkl"

    def checkpoint_to_resume(self) -> dict | None:
        """Applies `resume` and `overwrite`: the checkpoint to continue from, None for a fresh start. Makes and deletes
        nothing. Raises `UsageError` if files of an earlier run are in the way."""
        config, checkpoint = self.config, None
        with file_errors(self.path):
            if (self.path / ".lock").exists() and os.access(self.path, os.W_OK):
                self._lock = lock_folder(self.path)  # Before its files are looked at.
            earlier = find_checkpoints(self.path)
            in_the_way = [*earlier, *self.path.glob(self.log.name)]
        if config.resume == "auto":
            checkpoint, in_the_way = newest_readable(earlier, self.method, config.env_id), []
        elif config.resume:
            checkpoint = read_checkpoint(config.resume, self.method, config.env_id)
            if Path(config.resume).resolve().parent == self.path.resolve():
                in_the_way = [path for path in earlier if int(path.stem[5:]) > checkpoint["iteration"]]
            else:
                checkpoint["wandb_id"] = Progress().wandb_id  # A branch is a run of its own.
        if in_the_way and not config.overwrite:
            what = f"{in_the_way[-1]} of an earlier run would be lost; type resume=auto to continue from the newest"
            hint = "overwrite=true (without resume) to delete the run, or another save_dir"
            raise UsageError(f"{what} checkpoint there, {hint}")
        return checkpoint

    def take(self) -> None:
        """Makes and locks the folder, and deletes what a killed run left half-written there, or all for `overwrite`."""
        with file_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(f"no permission to write in {self.path}")
            self._lock = self._lock or lock_folder(self.path)
            earlier = [*find_checkpoints(self.path), *self.path.glob(self.log.name)] if self.config.overwrite else []
            for file in [*self.path.glob(".*.tmp"), *earlier]:
                file.unlink()

    def start_log(self, progress: Progress) -> None:
        """Opens metrics.jsonl, W&B and the progress bar. Rows that came after the checkpoint will be made again."""
        last, temporary = progress.iteration or -1, self.path / ".metrics.jsonl.tmp"  # A fresh run keeps no row.
        with file_errors(self.log):
            rows = [row for row in read_log(self.log) if row["iteration"] <= last]
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(temporary, self.log)
            self._file = open(self.log, "a", buffering=1)
        start = lambda: start_wandb(self.config, self.method, self.path, progress.wandb_id, rows)
        self._wandb = self._try_wandb("did not start", start)
        self._bar = tqdm.tqdm(total=self.config.max_num_iters, initial=progress.iteration, unit="it", disable=None)

    def _try_wandb(self, what: str, call: Callable[[], Any]) -> Any:
        """W&B is never the reason that training stops."""
        try:
            return call()
        except Exception as error:
            self._wandb = None
            with contextlib.suppress(Exception):
                sys.modules["wandb"].teardown()  # Else what is left of it raises at the end of the process.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            hint = f"`wandb.log` of each line of {self.log} uploads it later"
            tqdm.tqdm.write(f"W&B {what} ({reason}); training goes on, and {hint}")

    def record(self, row: dict[str, float]) -> None:
        """Logs one row an iteration: `iteration`, `frames` (decisions so far), `hours` and the metrics; says what was
        evaluated, and shows return, loss and speed beside the progress bar."""
        if self._file is None:  # In all processes but the first.
            return
        for name in [name for name in ("greedy", "search") if f"eval/{name}/avg_return" in row]:
            keys = ("avg_return", "avg_return_se", "solved_rate", "packed_items")
            mean, error, solved, items = (row[f"eval/{name}/{key}"] for key in keys)
            tqdm.tqdm.write(
                f"iteration {row['iteration']:5d}  {row['frames']:10,} decisions  {60 * row['hours']:6.1f} min"
                f"  {name:6}  utilisation {mean:.4f} +- {error:.4f}, filled {solved:.1%}, {items:.2f} items"
            )
        with file_errors(self.log):
            finite = {key: value if math.isfinite(value) else None for key, value in row.items()}  # As JSON has it.
            self._file.write(json.dumps(finite) + "\n")
        if self._wandb is not None:
            self._try_wandb("stopped", lambda: self._wandb.log(row))
        if row["iteration"] > 0:
            packed, loss = row["rollout/avg_return"], row["train/policy_loss"]
            rate = f"{row['perf/decisions_per_second']:,.0f} decisions/s"
            self._bar.set_postfix_str(f"return {packed:.3f}, loss {loss:.3f}, {rate}")
            self._bar.update()

    def save(self, contents: dict) -> None:
        """Writes the checkpoint of an iteration and deletes those before the last `keep_checkpoints` up to it. Later
        ones, which a resumed run skipped as damaged, do not count."""
        path, keep = self.checkpoint(contents["iteration"]), self.config.keep_checkpoints
        contents |= dict(config=self.config.model_dump(mode="json"), versions=library_versions())
        with file_errors(path):
            sync(self.log)  # The rows reach the disk before the checkpoint that continues after them.
            write_checkpoint(path, contents | {"format_version": FORMAT_VERSION})
            found = find_checkpoints(self.path)
            for older in found[: found.index(path) + 1][: -keep or 0]:
                older.unlink(missing_ok=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._wandb is not None:
            self._try_wandb("did not finish", self._wandb.finish)
        for file in filter(None, (self._file, self._lock)):  # The lock last.
            with contextlib.suppress(OSError):  # Said when the row was written.
                file.close()


def start_wandb(config: Any, method: str, run_dir: Path, run_id: str, rows: list[dict]) -> SimpleNamespace:
    """A W&B run, online if the user has set it up and offline if not, which gets each iteration once; `rows` are those
    of an earlier part of the run. The user's WANDB_* settings win. A W&B run that the surrounding program has open, as
    a sweep's function may, is used and stays open."""
    import wandb

    settings = dict(
        WANDB_PROJECT=("project", config.wandb_project),
        WANDB_NAME=("name", "/".join(run_dir.parts[-3:])),
        WANDB_RUN_GROUP=("group", "/".join(run_dir.parts[-3:-1])),
        WANDB_RUN_ID=("id", run_id),
        WANDB_RESUME=("resume", "allow"),
        WANDB_DIR=("dir", str(run_dir)),
        WANDB_CONSOLE=("settings", wandb.Settings(console="off")),
    )
    arguments = dict(value for variable, value in settings.items() if variable not in os.environ)
    arguments["config"] = config.model_dump() | {"method": method}
    if run := wandb.run:
        print(f"W&B: logged to {run.name}, a run that is open already")
        run.config.update(arguments["config"], allow_val_change=True)
        return SimpleNamespace(log=run.log, finish=lambda: None)
    if os.path.expanduser("~") == "~":  # W&B wants a home.
        os.environ["HOME"] = str(run_dir / "wandb")
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
        arguments["mode"] = "offline"
    try:
        run = wandb.init(**arguments)
    except wandb.errors.CommError as error:
        print(f"W&B cannot be reached ({str(error).splitlines()[0]}): offline; wandb sync {run_dir}/wandb uploads it")
        run = wandb.init(**arguments | {"mode": "offline"})
    for axis in ("iteration", "frames", "hours"):
        run.define_metric(axis)
    run.define_metric("*", step_metric="iteration")
    # Of several offline runs with one id the last upload erases the others: the newest gets all rows and stays alone.
    for folder in Path(run.dir).parents[1].glob(f"offline-run-*-{run.id}"):
        if folder != Path(run.dir).parent:
            shutil.rmtree(folder, ignore_errors=True)
    first = run.step  # Online, W&B knows which comes next.

    def log(row: dict[str, float]) -> None:
        if row["iteration"] >= first:
            run.log(row, step=row["iteration"], commit=True)

    for row in rows:
        log(row)
    return SimpleNamespace(log=log, finish=run.finish)


def join_processes(config: Any) -> None:
    """Makes this process one of several with JAX's own runtime. A process that hears nothing of another for half a
    minute ends; where they cannot connect, JAX ends it after `initialization_timeout`, in seconds."""
    given: dict[str, Any] = dict(initialization_timeout=120, heartbeat_timeout_seconds=30, shutdown_timeout_seconds=30)
    if config.coordinator_address:
        given |= config.model_dump(include={"coordinator_address", "num_processes", "process_id"})
        given |= {"cluster_detection_method": "deactivate"}
        place = f"process {config.process_id} of {config.num_processes}"
        print(f"{place} waits for {config.coordinator_address}, up to {given['initialization_timeout']} s", flush=True)
    try:
        jax.distributed.initialize(**given)
    except (RuntimeError, ValueError) as error:
        hint = "start all, by a cluster's launcher or with coordinator_address, num_processes and process_id"
        raise UsageError(f"distributed=true: {str(error).splitlines()[0]}; {hint}") from None
    mine = config.model_dump(mode="json", exclude={"process_id"})
    first = on_first_process(lambda: mine)
    others = [f"{k}={as_typed(mine[k])}, not {as_typed(first[k])}" for k in mine if mine[k] != first[k]]
    if in_any_process(bool(others)):
        found = ", ".join(others) or "others in another one"
        raise UsageError(f"distributed=true: expected the keys of process 0 in every process, got {found}")


def start_devices(config: Any) -> None:
    """Starts JAX's devices, of one or of several processes. Raises `UsageError` where the batches do not divide."""
    if config.distributed:
        join_processes(config)
    else:
        start_jax(config.rollout_batch_size, config.training_batch_size)
    num_devices = jax.device_count()
    for key in ("rollout_batch_size", "training_batch_size"):
        value = getattr(config, key)
        if value % num_devices:
            nearest = max(round(value / num_devices), 1) * num_devices
            raise UsageError(f"{key}={value}: expected a multiple of the {num_devices} devices; type {key}={nearest}")
    use_compilation_cache(config.compilation_cache_dir)


# ============================================= The environment's geometry =============================================
def decreasing_order(x: jax.Array) -> jax.Array:
    """Indices that sort x [n] in decreasing order, stable: jnp.argsort(-x), much faster on a CPU."""
    slots = jnp.arange(len(x))
    ahead = (x[:, None] > x) | ((x[:, None] == x) & (slots[:, None] < slots))  # [n, n]: the first before the second.
    return jnp.zeros_like(slots).at[ahead.sum(0)].set(slots, unique_indices=True)


def random_generator(sizes: Sizes) -> Any:
    """Jumanji's random instances, bit for bit. Jumanji compiles a cut for each axis; here the axes rotate instead."""
    with importing_jumanji():
        from jumanji.environments.packing.bin_pack.generator import RandomGenerator

    def rolled(space: Any, by: jax.Array) -> Any:
        bounds, tree = jax.tree.flatten(space)  # x1, x2, y1, y2, z1, z2
        return jax.tree.unflatten(tree, jnp.roll(jnp.stack(bounds), 2 * by, 0))

    class FastGenerator(RandomGenerator):
        def _split_space_into_sub_spaces(self, spaces: Any, mask: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
            axis_key, split_key = jax.random.split(key)
            axis = jax.random.randint(axis_key, (), 0, 3)
            spaces, mask = self._split_along_axis("x", rolled(spaces, -axis), mask, split_key)
            return rolled(spaces, axis), mask & ~spaces.is_empty()

    return FastGenerator(sizes.max_num_items, sizes.max_num_ems, split_num_same_items=sizes.split_num_same_items)


WORD_BITS = 20  # Bits of a mask that one word holds: two words hold 40 EMSs without padding.


def _pack_bits(x: jax.Array) -> jax.Array:
    """Bool [..., n, m] -> uint32 [..., ceil(n / WORD_BITS), m]."""
    xp = np if isinstance(x, np.ndarray) else jnp  # What is constant is packed here, not by the compiler.
    x = xp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % WORD_BITS), (0, 0)])
    x = x.reshape(*x.shape[:-2], -1, WORD_BITS, x.shape[-1]).astype(np.uint32)
    return (x << np.arange(WORD_BITS, dtype=np.uint32)[:, None]).sum(-2, dtype=np.uint32)


def _and_of_others(x: jax.Array) -> jax.Array:
    """[n, ...] -> [n, ...]: entry i is the bitwise and of all entries but i."""
    rest = [[x[j] for j in range(len(x)) if j != i] for i in range(len(x))]
    return jnp.stack([functools.reduce(jnp.bitwise_and, arrays) for arrays in rest])


def update_ems(state: State, item_id: jax.Array) -> tuple[EMS, jax.Array]:
    """EMSs and their mask after an item was placed: Jumanji's `_update_ems`, slot for slot. Jumanji adds the pieces of
    cut EMSs one by one, in 240 dependent steps. Which of them survive has a closed form, because inclusion is
    transitive and pieces cut in different directions never contain each other."""
    lower = jnp.stack([state.ems.x1, state.ems.y1, state.ems.z1])  # [3, E], as all [3, E] below: axis, slot.
    upper = jnp.stack([state.ems.x2, state.ems.y2, state.ems.z2])
    location = jnp.stack([axis[item_id] for axis in state.items_location])
    item = jnp.stack([location, location + jnp.stack([axis[item_id] for axis in state.items])], 1)  # [3, 2]
    num_ems = lower.shape[1]
    overlaps = (jnp.maximum(lower, item[:, :1]) < jnp.minimum(upper, item[:, 1:])).all(0)
    hit, kept = state.ems_mask & overlaps, state.ems_mask & ~overlaps

    # A candidate (face, j) is what a plane through a face of the item leaves of the hit EMS j: one bound moves.
    # Sets of EMSs are bit masks, [..., W, E] with W words for each j, which makes the 40 x 40 comparisons cheap to
    # combine: inside[f, :, j] holds the EMSs k that j does not reach out of on side f, around[f, :, j] those that j
    # surrounds. Reductions run over an axis before the last: along the last one they are slow on a CPU.
    sides = jnp.stack([lower, -upper], 1).reshape(6, num_ems)
    inside = _pack_bits(sides[:, None, :] >= sides[:, :, None])  # [6, W, E]
    around = _pack_bits(sides[:, None, :] <= sides[:, :, None])
    opposite = np.arange(6) ^ 1  # The part below the item's lower face gets a new upper bound, and vice versa.
    inside, around = (_and_of_others(x)[opposite] for x in (inside, around))
    plane = jnp.stack([item[:, 0], -item[:, 1]], 1).reshape(6, 1)  # With the signs of `sides`: candidates are below.
    candidate = hit & (sides < plane)  # [6, E], not empty
    candidates = _pack_bits(candidate[..., None])  # [6, W, 1]
    kept_around = _pack_bits((kept & (plane <= -sides[opposite]))[..., None])  # Kept EMSs that reach the plane.
    slots = np.arange(num_ems)
    earlier, first = _pack_bits(slots[:, None] < slots), _pack_bits(slots[:, None] == 0)  # [W, E], [W, 1]
    candidate &= ~(inside & ~around & candidates).any(-2)  # Strictly inside another one.
    equals = inside & around & candidates & earlier  # Equal candidates that come before.
    inside_kept = inside & kept_around
    accepted = candidate & ~(equals | inside_kept).any(-2)  # [6, E]; flat, it is in Jumanji's order
    source, filled, rank, num_free = _assign_slots(accepted, kept)

    # Overflow: with every slot taken Jumanji overwrites slot 0. A late candidate counts unless another slot
    # contains it; if one of them is not inside the first occupant of slot 0, the last of them ends there.
    late = (rank - accepted) >= num_free  # [6, E]: the buffer was full when its turn came.
    placed = accepted & ~late
    took_first = placed & (rank == 1) & ~kept[0]
    in_other = ((inside_kept & ~first) | (equals & _pack_bits((placed & ~took_first)[..., None]))).any(-2)
    in_first = ((inside_kept & first) | (equals & _pack_bits(took_first[..., None]))).any(-2)
    counts = late & candidate & ~in_other
    overwritten = (counts & ~in_first).any()
    last = jnp.max(jnp.where(counts, np.arange(6 * num_ems).reshape(6, num_ems), -1))
    source = source.at[0].set(jnp.where(overwritten, last, source[0]))
    filled = filled.at[0].set(filled[0] | overwritten)

    slot, face, bounds = source % num_ems, source // num_ems, {}
    for axis, name in enumerate("xyz"):
        new_lower = jnp.where(face == 2 * axis + 1, item[axis, 1], lower[axis, slot])
        new_upper = jnp.where(face == 2 * axis, item[axis, 0], upper[axis, slot])
        bounds[f"{name}1"] = jnp.where(filled, new_lower, lower[axis])
        bounds[f"{name}2"] = jnp.where(filled, new_upper, upper[axis])
    return state.ems.replace(**bounds), kept | filled


def _assign_slots(accepted: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The i-th accepted candidate takes the i-th free slot. From accepted [6, E] and kept [E]: the candidate of each
    slot [E], whether it takes one [E], how many are accepted up to each [6, E], how many slots are free []."""
    num_ems, count = len(kept), jax.lax.population_count  # A rank is a number of bits up to a place.
    words = _pack_bits(accepted.reshape(-1, 1))  # [W', 1]
    before = jnp.tril(jnp.broadcast_to(count(words[:, 0]), (len(words), len(words))), -1).sum(-1)  # [W'], exclusive
    up_to = _pack_bits(np.tri(WORD_BITS, dtype=bool).T)[0]  # [WORD_BITS]
    rank = (before[:, None] + count(words & up_to)).reshape(-1)[: 6 * num_ems].astype(jnp.int32)  # From 1.
    up_to_slot = _pack_bits(np.tri(num_ems, dtype=bool).T)
    free_rank = count(_pack_bits(~kept[:, None]) & up_to_slot).sum(-2).astype(jnp.int32)  # [E]
    word = (before[:, None] < free_rank).sum(0) - 1  # [E], the word of the candidate with this rank
    bit = (count(words[word, 0] & up_to[:, None]) < free_rank - before[word]).sum(0)  # [E], its place in that word
    return word * WORD_BITS + bit, ~kept & (free_rank <= rank[-1]), rank.reshape(6, num_ems), free_rank[-1]


EQUAL = 5e-5  # Normalised lengths that differ by less are the same: a millimetre is at least 1 / 5870 = 1.7e-4.


class Blocks(NamedTuple):
    """Boxes without gaps that items of an instance make, alone or together, as in block building for container loading
    (Eley 2002; Fanslau and Bortfeldt 2010). Items with the same lengths are of one kind, whose number is that of its
    first item. There is room for P, of several items 4 I and at most 400; where fewer were found, zeros stand."""

    length: jax.Array  # [..., 3, P], shares of the container
    uses: jax.Array  # int16 [..., I, P], how many items of each kind
    kind: jax.Array  # int32 [..., I], of each item


class Observation(NamedTuple):
    """Jumanji's observation, and the blocks of all items, placed or not."""

    ems: Any
    ems_mask: jax.Array
    items: Any
    items_mask: jax.Array
    items_placed: jax.Array
    action_mask: jax.Array
    blocks: Blocks


def find_blocks(length: jax.Array, mask: jax.Array) -> Blocks:
    """The kinds of items with lengths [3, I] and bool mask [I] as blocks of one item, and then the first blocks of
    several. Two blocks that are equally long on two axes make one along the third, if there are items enough for both;
    smaller ones come first.

    What stands in a row along an axis could be joined in many orders. It is joined in the order of its parts' numbers:
    a row takes a part that is no row along this axis itself, and comes after its last one or equals it."""
    num_items, most_new = mask.size, 16  # A part makes at most so many new blocks with earlier ones: fixed shapes.
    size = num_items + min(4 * num_items, 400)
    slots, axes = np.arange(size + most_new), np.arange(3)[:, None]
    same = (jnp.abs(length[:, :, None] - length[:, None]) < EQUAL).all(0) & mask[:, None] & mask
    kind = same.argmax(1)
    available = (kind == slots[:num_items, None]).sum(1, where=mask, keepdims=True)  # [I, 1], of each kind
    pad = lambda x: jnp.pad(x, [(0, 0), (0, len(slots) - num_items)])

    def join(carry):
        p, count, length, uses, along, last = carry
        at_p = lambda x: jax.lax.dynamic_slice_in_dim(x, p, 1, -1)
        joined = length + at_p(length)  # [3, M]
        x, y, z = jnp.abs(length - at_p(length)) < EQUAL
        fits = jnp.stack([y & z, x & z, x & y]) & (joined < 1.0 + EQUAL)
        exist = (uses + at_p(uses) <= available).all(0) & uses.any(0) & at_p(uses).any()
        next_part = (along != axes) & (slots >= at_p(last))
        new = (fits & exist & (slots <= p) & (next_part | (at_p(along) != axes))).reshape(-1)
        rank = jnp.where(new, jnp.cumsum(new) - 1, most_new)
        number = jnp.zeros(most_new, jnp.int32).at[rank].set(np.arange(new.size), mode="drop")
        axis, q = jnp.divmod(number, len(slots))
        of_new = jnp.where(axis == axes, joined[:, q], at_p(length)), uses[:, q] + at_p(uses)
        of_new = *of_new, axis, jnp.where(at_p(along) == axis, q, p)
        write = lambda x, rows: jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), count, -1)
        arrays = map(write, (length, uses, along, last), of_new)
        return p + 1, jnp.minimum(count + jnp.minimum(new.sum(), most_new), size), *arrays

    uses = jnp.diag(available[:, 0] > 0).astype(jnp.int16)  # Own items may be 999 of a kind.
    init = 0, num_items, pad(length), pad(uses), jnp.full(len(slots), 3), jnp.asarray(slots)
    _, count, length, uses, *_ = jax.lax.while_loop(lambda carry: carry[0] < carry[1], join, init)
    is_block = (slots[:size] < count) & uses[:, :size].any(0)
    return Blocks(*(jnp.where(is_block, x[:, :size], 0) for x in (length, uses)), kind.astype(jnp.int32))


@functools.cache
def state_with_blocks() -> Callable[[State, Observation], State]:
    """Returns add(state, observation of Jumanji) -> the state with a field more, `blocks`."""
    with importing_jumanji():
        from jumanji.environments.packing.bin_pack import types
    attributes = {"__annotations__": {"blocks": Blocks}, "blocks": None}
    with_blocks = types.dataclass(type("State", (types.State,), attributes))

    def add(state: State, observation: Any) -> State:
        fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(types.State)}
        return with_blocks(**fields, blocks=find_blocks(jnp.stack(list(observation.items)), observation.items_mask))

    return add


HASH_FACTORS = np.random.default_rng(0).integers(2**32, size=(2, 9, 1), dtype=np.uint32) | 1


def state_hash(state: State) -> jax.Array:
    """uint32 [2], never 0, of what the future of a state depends on: the spaces, and the lengths of the items that are
    still to be placed, whatever the order of either. (Where the list of spaces overflows, or not all are shown and the
    last ones tie, their order counts too.)"""

    def combined(words: list[jax.Array], factors: np.ndarray, mask: jax.Array) -> jax.Array:
        mixed = (jnp.stack(words).astype(jnp.uint32) * factors).sum(1, dtype=jnp.uint32)  # [2, n]
        mixed = (mixed ^ (mixed >> 15)) * np.uint32(2246822519)
        return jnp.where(mask, mixed ^ (mixed >> 13), 0).sum(1, dtype=jnp.uint32)

    spaces = combined(jax.tree.leaves(state.ems), HASH_FACTORS[:, :6], state.ems_mask)
    items = combined(jax.tree.leaves(state.items), HASH_FACTORS[:, 6:], state.items_mask & ~state.items_placed)
    return jnp.maximum(spaces + items, 1)


# ================================================= Playing instances ==================================================
class Policy(NamedTuple):
    """How to play an episode: `act(params, key, state, observation, memory)` -> (flat action, decision, memory), and
    `start(params, state, observation)` -> memory."""

    act: Callable
    start: Callable = lambda params, state, observation: ()


class Episodes(NamedTuple):
    """Outcomes of N played instances, numpy arrays [N]."""

    returns: np.ndarray  # volume utilisation
    steps: np.ndarray  # items packed
    solved: np.ndarray  # bool, every item packed


@usual_numbers()
def evaluation_keys(seed: int, num_episodes: int) -> np.ndarray:
    """One key of threefry2x32 for each instance, uint32 [N, 2]: the i-th is fixed by the seed and i alone."""
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return np.asarray(fold_in(seed_key(seed), np.arange(num_episodes)))


def instances_at_a_time() -> int:
    """How many instances the devices play together. Few, on a CPU, so that they fit its caches."""
    return jax.device_count() * (32 if jax.default_backend() == "cpu" else -(-1024 // jax.device_count()))


def make_player(rollout: Callable) -> Callable[[Any, np.ndarray], Episodes]:
    """Returns play(replicated params, keys [N, 2]) -> Episodes, from a training script's rollout(params, keys) ->
    Trajectory. Chunks of one size serve every N with one program; where instances are missing they cost little."""
    size = instances_at_a_time()

    def play_chunk(params, keys, _):
        trajectory = rollout(params, device_slice(keys))
        episodes = Episodes(trajectory.reward.sum(1), trajectory.mask.sum(1), trajectory.solved)
        return jax.lax.all_gather(episodes, DEVICES, tiled=True)

    play_chunk = jax.pmap(play_chunk, axis_name=DEVICES, in_axes=(0, None, 0))
    each_device = np.arange(jax.local_device_count())  # Something to map where a policy has no parameters.

    @usual_numbers()
    def play(params: Any, keys: np.ndarray, advance: Callable[[int], Any] = lambda count: None) -> Episodes:
        played = []
        for start in range(0, len(keys), size):
            some = keys[start : start + size]
            slots = np.arange(len(some)) * size // len(some)  # The devices share the last chunk evenly.
            chunk = np.full((size, 2), NO_INSTANCE)
            chunk[slots] = some
            played.append(jax.tree.map(lambda x: x[slots], host_copy(play_chunk(params, chunk, each_device))))
            advance(len(some))
        return Episodes(*map(np.concatenate, zip(*played)))

    return play


def keep_better(play: Callable, params: Any, keys: np.ndarray, episodes: Episodes) -> Episodes:
    """Plays the instances that earlier episodes did not fill completely, and keeps the better episode of each: the
    dynamics are exact and deterministic, so either can be kept. So is search put on top of greedy play."""
    rest = np.flatnonzero(~episodes.solved)
    if not len(rest):
        return episodes
    played = play(params, keys[rest])
    better = played.returns > episodes.returns[rest]
    merged = Episodes(*(x.copy() for x in episodes))
    for old, new in zip(merged, played):
        old[rest[better]] = new[better]
    return merged


def summarise(episodes: Episodes) -> dict[str, float]:
    """Means over instances, with the standard error of the utilisation."""
    returns = episodes.returns.astype(np.float64)
    return {
        "avg_return": float(returns.mean()),
        "avg_return_se": float(returns.std(ddof=1) / math.sqrt(len(returns))),
        "solved_rate": float(episodes.solved.mean()),
        "packed_items": float(episodes.steps.mean()),
    }


# ================================================= Loaded checkpoints =================================================
@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained network, ready to use. Made by `load_checkpoint` (by `without_network` with nothing but a script)."""

    path: Path
    method: str  # "search_distill" or "ppo"
    iteration: int
    frames: int  # decisions played to learn from
    config: Any  # the training script's `Config`
    sizes: Sizes  # of the instances that it plays
    params: dict = dataclasses.field(repr=False)  # Haiku parameters, numpy arrays
    script: ModuleType = dataclasses.field(repr=False)  # the training script, whose code plays the checkpoint
    env: BinPack = dataclasses.field(repr=False)  # equal to Jumanji's BinPack of these sizes
    network: Any = dataclasses.field(repr=False)  # Haiku functions

    def __reduce__(self) -> tuple:
        load = functools.partial(load_checkpoint, **self.sizes.model_dump(include={*SIZES}))
        return load, (self.path,)  # How another process gets it, as from Ray or multiprocessing.

    @functools.cached_property
    def _apply(self) -> Callable:
        return jax.jit(lambda params, observation: self.network.apply(params, None, observation))

    @functools.cached_property
    def _play(self) -> Callable:
        return make_state_player(self, self.script.make_greedy_policy(self.network, self.config))

    @usual_numbers()
    def apply(self, observation: Observation) -> tuple[jax.Array, jax.Array]:
        """Observation with leading dimensions [...] -> logits of the flat actions [..., A], very negative where
        illegal, and value [...], the volume that the network expects still to be packed. May be transformed by JAX.
        The observation may have any number of spaces E and items I, and A = E x I. Raises `UsageError` for one whose
        shapes do not belong together, or with lengths in millimetres."""
        return self._apply(self.params, checked(observation))

    @usual_numbers()
    def act(self, observation: Observation) -> jax.Array:
        """The most probable action as `env.step` takes it: int32 [..., 2], number of the space and of the item."""
        action = self.apply(observation)[0].argmax(-1).astype(jnp.int32)
        return jnp.stack(jnp.divmod(action, observation.items_mask.shape[-1]), -1)

    @usual_numbers()
    def play(self, seed: int) -> list[State]:
        """The states of one greedy episode, first to last, as `env.animate` takes them."""
        return self._play(self.params, seed_key(seed))


def checked(observation: Any) -> Observation:
    """The observation in float32 and bool, with its blocks. Raises `UsageError` if its shapes or types are not such as
    Jumanji's."""
    if not hasattr(observation, "ems") or np.ndim(observation.action_mask) < 2:
        what = f"expected an observation of Jumanji's BinPack, got {type(observation).__name__}"
        raise UsageError(f"{what}; give timestep.observation")
    *batch, spaces, items = np.shape(observation.action_mask)
    blocks = getattr(observation, "blocks", None)  # Jumanji's own has none.
    observation = Observation(*(getattr(observation, name) for name in Observation._fields[:-1]), blocks=None)
    for path, x in jax.tree.leaves_with_path(observation):
        name = jax.tree_util.keystr(path)
        shape = batch + ([spaces, items] if "action" in name else [spaces] if name.startswith(".ems") else [items])
        kind = bool if "mask" in name or "placed" in name else np.floating  # Millimetres are whole numbers.
        if list(np.shape(x)) != shape or not jnp.issubdtype(x.dtype, kind):
            found = f"{x.dtype}{list(np.shape(x))}; give one of Jumanji's, with lengths as shares of the container"
            word = "bool" if kind is bool else "float32"
            raise UsageError(f"expected {word}{shape} as observation{name}, got {found}")
    observation = jax.tree.map(lambda x: jnp.asarray(x, bool if x.dtype == bool else np.float32), observation)
    if blocks is None:
        find = functools.reduce(lambda function, _: jax.vmap(function), batch, find_blocks)
        blocks = find(jnp.stack(list(observation.items), -2), observation.items_mask)
    return observation._replace(blocks=blocks)


def import_script(method: str) -> ModuleType:
    """The training script of a method, which lies beside this file. Raises `UsageError` if it does not."""
    if not util.find_spec(METHODS[method]):
        raise UsageError(f"method={method}: expected {METHODS[method]}.py beside evaluate.py; copy it there")
    return importlib.import_module(METHODS[method])


def without_network(sizes: Sizes) -> Checkpoint:
    """What plays a policy that needs no checkpoint: the environment and rollout of a training script."""
    script = import_script(next((name for name in METHODS if util.find_spec(METHODS[name])), "search_distill"))
    return Checkpoint(Path(), "", 0, 0, None, sizes, {}, script, script.make_env(sizes), None)


@usual_numbers()
def load_checkpoint(path: str | Path, **sizes: int) -> Checkpoint:
    """Reads an iter_*.pkl of either method, or the newest one in a run's folder. It plays instances of the sizes of
    its training, but for those that are given (`max_num_items=50`). Raises `UsageError`; a file that holds anything but
    numpy arrays and plain containers is refused before any of it runs."""
    try:
        path = Path(with_home(no_address(str(path))))
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    path = newest_in(path)
    contents = read_checkpoint(path)
    method, model = contents["method"], contents["model"]
    if method not in METHODS:
        raise UsageError(f"{path}: expected a checkpoint of {' or '.join(METHODS)}, got method={method}")
    script = import_script(method)
    try:
        config = script.Config(**contents["config"])
        env, network = script.make_env(config), script.make_network(config)
        init = lambda key: network.init(key, env.reset(key)[1].observation)
        check_fit("", (jax.eval_shape(init, jax.ShapeDtypeStruct((2,), np.uint32)), {}), model, "")
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].replace('Input should be', 'expected')}"
        raise UsageError(f"{path}: its configuration is not one of this version ({reason})") from None
    except (UsageError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0].removeprefix(": ").rstrip("; ")
        raise UsageError(f"{path}: its configuration and arrays do not belong together ({reason})") from None
    sizes = other_sizes(config, sizes)
    stands = contents["iteration"], contents["frames"]
    env = script.make_env(sizes)
    return Checkpoint(path.absolute(), method, *stands, config, sizes, model[0], script, env, network)


def other_sizes(trained: Sizes, given: dict[str, int]) -> Sizes:
    """The sizes of a training run with those that are given in their place. Raises `UsageError`."""
    try:
        return Sizes(**trained.model_dump(include={*SIZES}) | given)
    except ValidationError as error:
        first = error.errors()[0]
        place = "".join(f"{key}={given.get(key)}: " for key in first["loc"][:1])
        reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        example = "" if "; type" in reason else "; for example max_num_items=50 max_num_ems=80"
        raise UsageError(f"{place}{reason}{example}") from None


def played_sizes(checkpoints: list[Checkpoint], given: dict[str, int]) -> Sizes:
    """The sizes that all checkpoints play, or without one BinPack-v2's but for those that are given. Raises
    `UsageError` where they differ: then no two rows would be of the same instances."""
    found = list(dict.fromkeys(checkpoint.sizes for checkpoint in checkpoints)) or [other_sizes(Sizes(), given)]
    if len(found) > 1:
        words = " ".join(f"{key}={getattr(found[0], key)}" for key in SIZES)
        names = " and ".join(sizes.env_name for sizes in found)
        raise UsageError(f"expected checkpoints that play instances of the same sizes, got {names}; type {words}")
    return found[0]


# ====================================================== Policies ======================================================
def make_sample_policy(checkpoint: Checkpoint) -> Policy:
    """An action drawn from the network's distribution. Its params are (network's params, number): each number gives an
    episode of its own on the same instance."""
    predict = checkpoint.script.make_predict(checkpoint.network, checkpoint.config)

    def act(numbered, key, state, observation, memory):
        params, number = numbered
        logits, _ = predict(params, observation)
        action = jax.random.categorical(jax.random.fold_in(key, number), logits, mode="low")
        return action.astype(jnp.int32), None, memory

    return Policy(act)


def numbered(make_search: Callable[..., Policy], num_simulations: int) -> Policy:
    """A search that plays an instance again and again. Its params are (network's params, number): the first number, 0,
    gives the search without noise, and each further one an episode of its own, with Gumbel noise."""

    def act(numbered, key, *state):
        params, number = numbered
        search = make_search(num_simulations, gumbel_scale=jnp.minimum(number, 1))
        return search.act(params, jax.random.fold_in(key, number), *state)

    first = make_search(num_simulations)
    return Policy(act, lambda numbered, *state: first.start(numbered[0], *state))


def make_random_policy(checkpoint: Checkpoint) -> Policy:
    """A uniformly random legal action."""

    def act(params, key, state, observation, memory):
        logits = jnp.where(observation.action_mask.reshape(-1), 0.0, -1e9)
        return jax.random.categorical(key, logits, mode="low").astype(jnp.int32), None, memory

    return Policy(act)


def _volumes(observation: Observation) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each flat action, [A]: whether it is legal, its item's volume, its space's volume."""
    (x, y, z), ems = observation.items, observation.ems
    space = (ems.x2 - ems.x1) * (ems.y2 - ems.y1) * (ems.z2 - ems.z1)
    item, space = jnp.broadcast_arrays((x * y * z)[None], space[:, None])
    return observation.action_mask.reshape(-1), item.reshape(-1), space.reshape(-1)


def largest_first(observation: Observation) -> jax.Array:
    """The largest item into the smallest space that holds it, int32 []."""
    legal, item, space = _volumes(observation)
    largest = legal & (item == jnp.where(legal, item, -1.0).max())
    return jnp.where(largest, space, jnp.inf).argmin().astype(jnp.int32)


def largest_first_order(observation: Observation) -> jax.Array:
    """All flat actions in the order of that rule, int32 [A]: by item, then by space. Illegal actions come last."""
    legal, item, space = _volumes(observation)
    return jax.lax.sort((~legal, -item, space, jnp.arange(legal.size)), num_keys=3)[-1]


def make_largest_first_policy(checkpoint: Checkpoint) -> Policy:
    return Policy(lambda params, key, state, observation, memory: (largest_first(observation), None, memory))


def make_lookahead_policy(checkpoint: Checkpoint, num_candidates: int = 16) -> Policy:
    """One ply of look-ahead without any learning: each of the rule's best actions is completed by the rule, and the
    one with the best outcome is taken."""
    ranked = lambda params, observation: largest_first_order(observation)[:num_candidates]
    return make_one_ply(checkpoint, lambda params, observation: largest_first(observation), ranked)


# ====================================================== Planners ======================================================
# They look ahead with a policy's own play: `greedy(params, observation)` -> its action, int32 [], and
# `ranked(params, observation)` -> its n best actions, int32 [n], best first.
def make_completion(checkpoint: Checkpoint, greedy: Callable) -> tuple[Callable, Callable]:
    """Returns complete(params, state, observation) -> (share of the container that `greedy` still packs, [], and
    whether it places every item, bool []), and try_out(params, state, observation, action) -> the same for an action
    and greedy play after it; the share is -1 where the action is illegal."""
    step = functools.partial(checkpoint.script.step_flat, checkpoint.env)

    def complete(params, state, observation, packed=0.0):
        def body(carry):
            state, observation, packed = carry
            state, timestep = step(state, greedy(params, observation))
            return state, timestep.observation, packed + timestep.reward

        init = (state, observation, jnp.float32(packed))
        end, _, packed = jax.lax.while_loop(lambda carry: carry[1].action_mask.any(), body, init)
        return packed, (end.items_placed | ~end.items_mask).all()

    def try_out(params, state, observation, action):
        legal = observation.action_mask.reshape(-1)[action]
        after, timestep = step(state, action)
        mask = timestep.observation.action_mask & legal  # What follows an illegal action is not played.
        packed, solved = complete(params, after, timestep.observation._replace(action_mask=mask), timestep.reward)
        return jnp.where(legal, packed, -1.0), solved & legal

    return complete, try_out


def make_one_ply(checkpoint: Checkpoint, greedy: Callable, ranked: Callable, epsilon: float = 1e-6) -> Policy:
    """Each of the best actions is completed greedily. The one with the best outcome is taken if that packs more than
    `epsilon` above the first one's: the single-agent search of SPARTA (Lerer et al. 2020, 'Improving Policies via
    Search in Cooperative Partially Observable Games')."""
    _, try_out = make_completion(checkpoint, greedy)

    def act(params, key, state, observation, memory):
        actions = ranked(params, observation)
        packed, _ = jax.vmap(try_out, (None, None, None, 0))(params, state, observation, actions)
        gains = packed.max() > packed[0] + epsilon
        return actions[jnp.where(gains, packed.argmax(), 0)], None, memory

    return Policy(act)


def following(plan: Callable, greedy: Callable) -> Policy:
    """The first moves of `plan(params, state, observation)` -> (actions, how many of them to play), and greedy ones
    after these."""

    def act(params, key, state, observation, memory):
        actions, count, t = memory
        return jnp.where(t < count, actions[t], greedy(params, observation)), None, (actions, count, t + 1)

    return Policy(act, lambda params, state, observation: (*plan(params, state, observation), 0))


def packing_hash(state: State) -> jax.Array:
    """uint32 [], of which items are placed where, whatever the order of the moves."""
    place = jnp.stack(list(state.items_location)).astype(jnp.uint32)  # [3, I], millimetres
    mixed = (place * np.array([[73856093], [19349663], [83492791]], np.uint32)).sum(0) + 1
    odd = 2 * np.arange(mixed.size, dtype=np.uint32) + 1
    return jnp.where(state.items_placed, (mixed ^ (mixed >> 15)) * odd * np.uint32(2654435761), 0).sum(dtype=np.uint32)


def make_beam(checkpoint: Checkpoint, greedy: Callable, ranked: Callable, width: int) -> Policy:
    """Beam search guided by completions (Choo et al. 2022, 'Simulation-guided Beam Search for Neural Combinatorial
    Optimization'). Each state of the beam has a child for each of its best actions, and the `width` children
    whose greedy completions pack most are the next beam. The best of all completions is played. Orders of moves that
    lead to the same packing count once, and a completion that places every item ends the search."""
    step = functools.partial(checkpoint.script.step_flat, checkpoint.env)
    _, try_out = make_completion(checkpoint, greedy)

    def try_child(params, beam, action):
        state, observation, packed, _ = beam
        rest, solved = try_out(params, state, observation, action)
        return jnp.where(rest < 0, -1.0, packed + rest), solved, packing_hash(step(state, action)[0])

    def extend(params, t, beam):
        """The next beam, and what its first completion packs: -1 if there is none."""
        actions = jax.vmap(ranked, (None, 0))(params, beam[1])  # [width, n]
        try_children = jax.vmap(jax.vmap(try_child, (None, None, 0)), (None, 0, 0))
        packed, solved, hashes = map(jnp.ravel, try_children(params, beam, actions))
        before = (packed > packed[:, None]) | ((packed == packed[:, None]) & np.tri(packed.size, k=-1, dtype=bool))
        has_twin = ((hashes[:, None] == hashes) & before).any(1)  # Which packs as much, or more.
        packed, chosen = jax.lax.top_k(jnp.where(has_twin, -1.0, packed), width)
        state, _, total, moves = jax.tree.map(lambda x: x[chosen // actions.shape[1]], beam)
        action = actions.ravel()[chosen]
        state, timestep = jax.vmap(step)(state, action)
        goes_on = (packed >= 0) & ~solved.any()
        mask = timestep.observation.action_mask & goes_on[:, None, None]
        observation = timestep.observation._replace(action_mask=mask)
        return (state, observation, total + timestep.reward, moves.at[:, t].set(action)), packed[0]

    def plan(params, state, observation):
        def body(carry):
            t, beam, best, most = carry
            beam, packed = extend(params, t, beam)
            best = jax.tree.map(lambda x, y: jnp.where(packed > most, x, y), (beam[-1][0], t + 1), best)
            return t + 1, beam, best, jnp.maximum(packed, most)

        states, observations = jax.tree.map(lambda x: jnp.broadcast_to(x, (width, *x.shape)), (state, observation))
        only_first = observations.action_mask & (np.arange(width) == 0)[:, None, None]
        moves = jnp.zeros((width, checkpoint.sizes.max_decisions), jnp.int32)
        beam = states, observations._replace(action_mask=only_first), jnp.zeros(width), moves
        init = jnp.int32(0), beam, (moves[0], jnp.int32(0)), jnp.float32(-1.0)
        return jax.lax.while_loop(lambda carry: carry[1][1].action_mask.any(), body, init)[2]

    return following(plan, greedy)


OF_POLICY_HEAD = re.compile(r"/(policy|pair)_(ems|items|relations|out)$")  # Names of the modules.


def make_fine_tuning(checkpoint: Checkpoint, greedy: Callable, config: Config) -> Callable:
    """Returns look_ahead(params, key, state, observation) -> (moves [H], how many of them to play, whether greedy play
    after these places every item). `params` are the blueprint's, the network as it was. Before each PPO update and
    after the last, the tuned network's own greedy moves are tried, beside the rollouts that it learns from. The first
    such moves are the blueprint's, and one of them is played where no later ones are better."""
    script, network = checkpoint.script, checkpoint.network
    step = jax.vmap(functools.partial(script.step_flat, checkpoint.env))
    complete, _ = make_completion(checkpoint, greedy)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(config.tuning_rate))

    def at_size(function, observations, *arguments):
        """function(size, *arguments), with a size of the network that holds the observations: one of two, since each is
        compiled."""
        sizes = script.sizes_of_tokens(checkpoint.config, observations)
        sizes = tuple(dict.fromkeys((sizes[len(sizes) // 2], sizes[-1])))
        return script.at_smallest_size(function, sizes, observations, *arguments)

    logits_of = lambda size, params, observations: network.apply(params, None, observations, size)[0]

    def play(params, states, observations, keys):
        """`horizon` moves, most probable ones in the first row and drawn ones in the others -> end, rows [H, M]."""

        def move(carry, key):
            states, observations = carry
            logits = at_size(logits_of, observations, params, observations)
            drawn = jax.random.categorical(key, logits).astype(jnp.int32)
            actions = drawn.at[0].set(script.argmax(logits[0]))
            after, timestep = step(states, actions)
            log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), actions[:, None], -1)[:, 0]
            return (after, timestep.observation), (observations, actions, log_prob, timestep.reward)

        return jax.lax.scan(move, (states, observations), keys)

    def loss(tuned, size, blueprint, rows, advantage):
        """PPO's clipped surrogate (Schulman et al. 2017, equation 7) over rows of legal moves [B]."""
        seen, actions, old, _ = rows
        log_probs = jax.nn.log_softmax(logits_of(size, blueprint | tuned, seen))
        ratio = jnp.exp(jnp.take_along_axis(log_probs, actions[:, None], -1)[:, 0] - old)
        gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
        return -jnp.where(seen.action_mask.any((-1, -2)), gain, 0.0).mean()

    def improve(tuned, opt_state, blueprint, rows, packed):
        spread = packed[1:].std()
        advantage = jnp.where(spread > 1e-6, (packed - packed[1:].mean()) / spread, 0.0)  # Less is rounding.
        advantage = jnp.tile(advantage.at[0].set(0.0), config.horizon)
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)

        def gradient_step(_, carry):
            tuned, opt_state = carry
            gradient = lambda size, *arguments: jax.grad(loss)(tuned, size, *arguments)
            grads = at_size(gradient, rows[0], blueprint, rows, advantage)
            updates, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(tuned, updates), opt_state

        return jax.lax.fori_loop(0, 2, gradient_step, (tuned, opt_state))

    def look_ahead(blueprint, key, state, observation):
        root = jax.tree.map(lambda x: jnp.broadcast_to(x, (config.num_rollouts, *x.shape)), (state, observation))
        tuned = {name: x for name, x in blueprint.items() if config.tuned == "all" or OF_POLICY_HEAD.search(name)}

        def update(carry):
            number, learned, bar, best = carry
            keys = jax.random.split(jax.random.fold_in(key, number), config.horizon)
            ends, rows = play(blueprint | learned[0], *root, keys)
            rest, solved = jax.vmap(complete, (None, 0, 0))(blueprint, *ends)
            packed, is_first = rows[-1].sum(0) + rest, number == 0  # The blueprint's.
            better = is_first | (packed[0] > bar)
            found = rows[1][:, 0], jnp.where(is_first, 1, config.horizon), solved[0]
            best = jax.tree.map(functools.partial(jnp.where, better), found, best)
            bar = jnp.where(better, packed[0] + jnp.where(is_first, config.epsilon, 0.0), bar)
            learns = (number < config.num_updates) & ~solved[0]
            learned = jax.lax.cond(learns, improve, lambda *x: x[:2], *learned, blueprint, rows, packed)
            return number + 1, learned, bar, best

        nothing = jnp.zeros(config.horizon, jnp.int32), jnp.int32(1), jnp.array(False)
        init = jnp.int32(0), (tuned, optimizer.init(tuned)), jnp.float32(0.0), nothing
        goes_on = lambda carry: (carry[0] <= config.num_updates) & ~carry[-1][-1]
        return jax.lax.while_loop(goes_on, update, init)[-1]

    return look_ahead


def make_rl_search(checkpoint: Checkpoint, greedy: Callable, config: Config) -> Policy:
    """Fine-tunes the network for each state that it stands in, by PPO on the moves ahead (Fickinger et al. 2021,
    'Scalable Online Planning via Reinforcement Learning Fine-Tuning', algorithm 1). Each of `num_updates`, of two
    gradient steps, has rollouts of `horizon` moves, which the network as it was, the blueprint, completes greedily.
    Where as many greedy moves of the tuned network, completed in the same way, pack more than `epsilon` above the
    blueprint, they are played, else one of the blueprint's. `tuned=policy_head` tunes few parameters, as efficient
    active search does (Hottung et al. 2022), which adds a layer for them. Each instance has parameters of its own, so
    that on a CPU one is planned after the other."""
    step = functools.partial(checkpoint.script.step_flat, checkpoint.env)
    look_ahead = make_fine_tuning(checkpoint, greedy, config)

    def plan(params, state, observation):
        def body(carry):
            t, state, observation, actions, _ = carry
            moves, count, solved = look_ahead(params, jax.random.fold_in(state.key, t), state, observation)

            def move(i, carry):
                state, timestep = step(carry[0], moves[i])
                return state, timestep.observation

            state, observation = jax.lax.fori_loop(0, count, move, (state, observation))
            return t + count, state, observation, jax.lax.dynamic_update_slice(actions, moves, (t,)), solved

        actions = jnp.zeros(checkpoint.sizes.max_decisions + config.horizon, jnp.int32)
        init = jnp.int32(0), state, observation, actions, jnp.array(False)
        goes_on = lambda carry: carry[2].action_mask.any() & ~carry[-1]
        t, _, _, actions, _ = jax.lax.while_loop(goes_on, body, init)
        return actions, t

    one_by_one = jax.custom_batching.sequential_vmap if jax.default_backend() == "cpu" else lambda function: function
    return following(one_by_one(plan), greedy)


PLANNERS = {  # From the checkpoint, its greedy action, its n best actions, and the configuration.
    "one_ply": lambda *arguments, config: make_one_ply(*arguments, config.epsilon),
    "beam": lambda *arguments, config: make_beam(*arguments, config.beam_width),
    "rl_search": lambda checkpoint, greedy, ranked, config: make_rl_search(checkpoint, greedy, config),
}
FLOORS = {"random": make_random_policy, "largest_first": make_largest_first_policy, "lookahead": make_lookahead_policy}
SEARCH_KEYS = {"leaf_value", "search_width", "max_num_considered_actions", "value_scale", "eval_value_scale",
               "maxvisit_init", "rescale_values"}  # fmt: skip


# ======================================================= Scores =======================================================
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # The key `json` hides a deprecated method of BaseModel.

    class Config(FrozenModel):
        """Every key of an evaluation."""

        policy: tuple[Literal["greedy", "sample", "search", "best_of_n", *PLANNERS, *FLOORS], ...] = Field(
            ("greedy",),
            description=f"{', '.join(['greedy, sample, search, best_of_n', *PLANNERS])}; without a checkpoint: "
            + ", ".join(FLOORS),
        )
        num_simulations: PositiveInt = Field(32, description="simulations a decision (policy=search)")
        leaf_value: Literal["checkpoint", "network", "completion"] = Field(
            "checkpoint", description="value of a new node (policy=search): as in training (PPO: completion), or this"
        )
        tries: PositiveInt = Field(
            1, description="plays of what the search has not filled, the later ones with noise (policy=search)"
        )
        n: PositiveInt = Field(
            32, description="sampled episodes beside the greedy one (best_of_n); actions of a state (one_ply, beam)"
        )
        beam_width: PositiveInt = Field(4, description="states that are kept after each move (policy=beam)")
        epsilon: float = Field(
            1e-6, ge=0, description="gain in utilisation above which a plan replaces greedy play (one_ply, rl_search)"
        )
        num_updates: PositiveInt = Field(8, description="PPO updates of a fine-tuning (policy=rl_search)")
        num_rollouts: Annotated[int, Field(ge=3)] = Field(
            16, description="rollouts of an update, of which one is greedy (policy=rl_search)"
        )
        horizon: PositiveInt = Field(4, description="moves of a rollout, and of a plan (policy=rl_search)")
        tuning_rate: float = Field(3e-3, gt=0, description="step size of Adam in fine-tuning (policy=rl_search)")
        tuned: Literal["all", "policy_head"] = Field("all", description="parameters that are tuned (policy=rl_search)")
        seed: Seed = Field(1_000_000, description="seed that fixes the instances, by default as in training")
        num_episodes: Annotated[int, Field(ge=2)] = Field(1024, description="number of instances")
        instances: tuple[UserPath, ...] = Field((), description=f"own items instead: files of {HEADER}, in millimetres")
        container: tuple[Millimetres, Millimetres, Millimetres] = Field(
            (5870, 2330, 2200), description="length, width and height of the container for own items, in millimetres"
        )
        plan: UserPath = Field(
            "", description=".csv or .json of what goes where in the order of loading: each file's best row"
        )
        max_num_items: NonNegativeInt = Field(0, description="item slots of the instances (0: as in training)")
        max_num_ems: NonNegativeInt = Field(0, description="spaces that are kept (0: as in training)")
        obs_num_ems: NonNegativeInt = Field(0, description="spaces that are shown (0: as in training)")
        split_num_same_items: NonNegativeInt = Field(0, description="most pieces of a cut (0: as in training)")
        json: UserPath = Field("", description="file for the table's figures and each instance's utilisation")
        render: UserPath = Field("", description=".gif or .png of the first two rows on one instance, side by side")
        instance: NonNegativeInt = Field(0, description="number, from 0, of the instance or file to render")
        curves: UserPath = Field("", description=".png of the learning curves: means, bands over runs of a folder")

        @field_validator("json", "plan", "render", "curves")
        @classmethod
        def _can_be_written(cls, value: str, info) -> str:
            endings = dict(json=(".json",), plan=(".csv", ".json"), render=(".gif", ".png"), curves=(".png",))
            endings = endings[info.field_name]
            if value and not value.endswith(endings):
                raise ValueError(f"expected a file that ends in {' or '.join(endings)}")
            path = Path(value)
            target = path if path.exists() else path.parent
            if value and (path.is_dir() or not path.parent.is_dir() or not os.access(target, os.W_OK)):
                raise ValueError("expected a file that can be written, in a folder that exists")
            return value


def make_attempts(name: str, checkpoint: Checkpoint, others: list[Checkpoint], config: Config) -> tuple[list, dict]:
    """Pairs of policy and params, of whose episodes the best one counts, and the settings of the search: those of the
    checkpoint, or of the first other checkpoint that has some, or the defaults."""
    script, env, network, params = checkpoint.script, checkpoint.env, checkpoint.network, checkpoint.params
    if name in FLOORS:
        return [(FLOORS[name](checkpoint), ())], {}
    greedy = [(script.make_greedy_policy(network, checkpoint.config), params)]
    if name == "search":
        searching = [c for c in (checkpoint, *others) if hasattr(c.script, "make_playing_search")]
        searcher = searching[0].script if searching else import_script("search_distill")
        how = searching[0].config if searching else searcher.Config()
        if config.leaf_value != "checkpoint":
            how = how.model_copy(update=dict(leaf_value=config.leaf_value))
        make_search = functools.partial(searcher.make_playing_search, env, network, how)
        # What a small search fills is not searched at length.
        small, large = (numbered(make_search, number) for number in (4, config.num_simulations))
        attempts = [(small, (params, np.int32(0)))] if config.num_simulations > 4 else []
        attempts += [(large, (params, np.int32(number))) for number in range(config.tries)]
        return [*greedy, *attempts], how.model_dump(mode="json", include=SEARCH_KEYS)
    if name in PLANNERS:
        predict = script.make_predict(network, checkpoint.config)
        best = lambda params, observation: script.argmax(predict(params, observation)[0])
        count = min(config.n, checkpoint.sizes.obs_num_ems * checkpoint.sizes.max_num_items)
        ranked = lambda params, observation: jax.lax.top_k(predict(params, observation)[0], count)[1]
        return [*greedy, (PLANNERS[name](checkpoint, best, ranked, config=config), params)], {}
    sample = make_sample_policy(checkpoint)
    sampled = [(sample, (params, np.int32(number))) for number in range(config.n)]
    return {"greedy": greedy, "sample": sampled[:1], "best_of_n": greedy + sampled}[name], {}


def score(title: str, checkpoint: Checkpoint, attempts: list, keys: np.ndarray) -> tuple[Episodes, float]:
    """Plays every instance -> (episodes, decisions per second): the decisions of the episodes that count, over the time
    of all that were played for them, without compilation."""
    players: dict[Policy, Callable] = {}
    zeros, total, seconds = np.zeros(len(keys), int), len(keys) * len(attempts), 0.0
    episodes = Episodes(np.full(len(keys), -1.0, np.float32), zeros, zeros.astype(bool))
    with tqdm.tqdm(total=total, desc=title, unit="episode", disable=None, leave=False) as bar:
        for policy, params in attempts:
            if episodes.solved.all():
                break
            bar.update(int(episodes.solved.sum()))
            params = replicate(params)
            if policy not in players:
                players[policy] = make_player(checkpoint.script.make_rollout(checkpoint.env, policy))
                players[policy](params, np.full((1, 2), NO_INSTANCE))  # Compiles.
            start = time.perf_counter()
            episodes = keep_better(functools.partial(players[policy], advance=bar.update), params, keys, episodes)
            seconds += time.perf_counter() - start
    return episodes, float(episodes.steps.sum() / seconds)


def difference(returns: np.ndarray, first: np.ndarray) -> tuple[float, float, float]:
    """Mean of the paired difference over instances, and the ends of its 95 % interval."""
    delta = (returns - first).astype(np.float64)
    mean, half = delta.mean(), 1.96 * delta.std(ddof=1) / math.sqrt(len(delta))
    return float(mean), float(mean - half), float(mean + half)


def table(rows: list[dict]) -> str:
    """The rows as text, one line each."""
    cells = [["", "policy", "utilisation", "filled", "items", "decisions/s", "difference from the first row"]]
    for row in rows:
        mean, low, high = row["difference"]
        cells.append([row["checkpoint"], row["policy"], f"{row['avg_return']:.4f} +- {row['avg_return_se']:.4f}"])
        cells[-1] += [f"{row['solved_rate']:.1%}", f"{row['packed_items']:.2f}"]
        cells[-1] += [f"{row['decisions_per_second']:,.0f}", f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"]
    cells[1][-1] = ""
    return aligned(cells)


def aligned(cells: list[list[str]]) -> str:
    """Lines of cells as text, in columns."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)


# ===================================================== Own items ======================================================
class Item(NamedTuple):
    """An item of a file, in millimetres along x, y and z."""

    name: str
    length: int
    width: int
    height: int


def read_rows(path: str) -> Iterator[tuple[int, list[str]]]:
    """Number, as a spreadsheet counts, and values of each row of a CSV file that is not blank. Spaces around values do
    not count, nor empty values at the end of a row. Raises `UsageError`."""
    row = 0
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(0, "no regular file")
        text = Path(path).read_bytes().decode("utf-8-sig")
        for row, cells in enumerate(csv.reader(io.StringIO(text, None), skipinitialspace=True, strict=True), 1):
            cells = [" ".join(cell.split()) for cell in cells]
            while cells and not cells[-1]:
                cells.pop()
            if cells:
                yield row, cells
    except OSError as error:
        raise UsageError(f"{path}: expected a .csv with {HEADER}, got '{error.strerror}'; give another file") from None
    except UnicodeDecodeError as error:
        row = len(re.findall(rb"\r\n?|\n", error.object[: error.start])) + 1
        raise UsageError(f"{path}, row {row}: expected text in UTF-8, got other bytes; save it as CSV UTF-8") from None
    except csv.Error as error:
        hint = 'type " around a whole value or not at all'
        raise UsageError(f"{path}, row {row + 1}: expected values with commas between, got '{error}'; {hint}") from None


def read_items(path: str, container: tuple[int, int, int]) -> list[Item]:
    """The items of a file in the format of Jumanji's `CSVGenerator`, with its columns in any order. Raises
    `UsageError`, with the row, for anything that is not plainly a list of items that each fit the container."""

    def expect(fits: Any, what: str, got: Any, hint: str) -> None:
        if not fits:
            raise UsageError(f"{path}, row {row}: expected {what}, got {str(got)[:60]!r}; type {hint}")

    items, columns, row = [], [], 0
    for row, cells in read_rows(path):
        line = ",".join(cells)
        if not columns:
            columns = [cell.lower().replace(" ", "_") for cell in cells]
            expect(
                sorted(columns) == sorted(HEADER.lower().split(",")), HEADER, line, "these names, with commas between"
            )
            continue
        expect(len(cells) == 5, "5 values, with commas between", line, f'{HEADER}, with " around a name with a comma')
        values = dict(zip(columns, cells))
        name, *numbers = (values[column.lower()] for column in COLUMNS)
        expect(name and not re.search(r"[\x00-\x1f\x7f-\x9f]", name), "an Item_Name", line, f"one, such as item_{row}")
        for column, number in zip(COLUMNS[1:], numbers):
            is_number = re.fullmatch(r"\+?[0-9]{1,9}", number) and int(number) > 0
            expect(is_number, f"{column} as a whole number above 0", number, "digits alone, lengths in millimetres")
        *lengths, quantity = map(int, numbers)
        for column, length, most in zip(COLUMNS[1:], lengths, container):
            what = f"{column} of {name[:60]} up to {most}, the container's"
            expect(length <= most, what, length, "lengths that fit (items are not turned), or another container=")
        total = len(items) + quantity
        expect(total < MOST, f"at most {MOST - 1} items in a file", f"{total} up to here", "a smaller Quantity")
        items += [Item(name, *lengths)] * quantity
    row += 1
    what, example = ("an item", "Carton,600,400,400,12") if columns else (HEADER, HEADER)
    expect(items, what, "end of the file", example)
    return items


def sizes_for(files: dict[str, list[Item]], config: Config) -> dict[str, int]:
    """Sizes that hold the items of every file. The keys may set the numbers of spaces."""
    items = max(map(len, files.values()))
    spaces = config.max_num_ems or max(40, min(2 * items, MOST))
    shown = config.obs_num_ems or min(40, spaces)
    return dict(max_num_items=items + 1, max_num_ems=spaces, obs_num_ems=shown, split_num_same_items=2)


def make_own_generator(files: dict[str, list[Item]], keys: np.ndarray, sizes: Sizes, container: tuple) -> Any:
    """A generator of Jumanji: the i-th key, as `make_rollout` folds it, gives the items of the i-th file."""
    with importing_jumanji():
        from jumanji.environments.packing.bin_pack.generator import CSVGenerator

    class OwnItems(CSVGenerator):
        def _read_csv(self, items: list[Item]) -> list[tuple]:
            return [(*item, 1) for item in items] + [("padding", 0, 0, 0, sizes.max_num_items - len(items))]

        def __call__(self, key: jax.Array) -> State:
            found = (folded == key).all(1).argmax()
            items = jax.tree.map(lambda *x: jnp.stack(x)[found], *(x.instance_from_csv.items for x in generators))
            return self.instance_from_csv.replace(items=items, items_mask=items.x_len > 0)

    folded = np.asarray(jax.vmap(jax.random.fold_in, (0, None))(keys, sizes.max_decisions))
    generators = [OwnItems(items, sizes.max_num_ems, container) for items in files.values()]
    return generators[0]


PLACE = ("x", "y", "z", "length", "width", "height")


def overlap(lower: np.ndarray, upper: np.ndarray, axes: list[int]) -> np.ndarray:
    """Whether two of N boxes overlap along all of some axes, bool [N, N]."""
    lower, upper = lower[:, axes], upper[:, axes]
    return ((lower[:, None] < upper) & (lower < upper[:, None])).all(-1)


def loading_order(lower: np.ndarray, upper: np.ndarray) -> list[int]:
    """The order in which boxes [N, 3] go through a door at the far end of x: each after what lies under it and behind
    it, and from the back to the door. Where boxes wait for one another in a circle, what lies under comes first."""
    under = (upper[:, None, 2] <= lower[:, 2]) & overlap(lower, upper, [0, 1])  # [N, N], the first under the second.
    behind = (upper[:, None, 0] <= lower[:, 0]) & overlap(lower, upper, [1, 2])
    order, waiting = [], np.ones(len(lower), bool)
    for _ in range(len(lower)):
        free = waiting & ~(under | behind)[waiting].any(0)
        free = free if free.any() else waiting & ~under[waiting].any(0)
        order.append(min(np.flatnonzero(free).tolist(), key=lambda i: lower[i, [0, 2, 1]].tolist()))
        waiting[order[-1]] = False
    return order


def make_plan(state: State, items: list[Item]) -> list[dict]:
    """What goes where, in the order of loading."""
    placed = np.flatnonzero(state.items_placed)
    lower, size = (np.stack(x, -1)[placed].astype(int) for x in (state.items_location, state.items))
    plan = []
    for i in loading_order(lower, lower + size):
        place = dict(zip(PLACE, [*lower[i].tolist(), *size[i].tolist()]))
        plan.append(dict(item=len(plan) + 1, name=items[placed[i]].name, **place))
    return plan


def check_plan(file: str, plan: list[dict], items: list[Item], container: tuple[int, int, int]) -> None:
    """Raises `UsageError` unless the plan can be carried out with the items of its file."""
    lower, size = np.split(np.array([[row[key] for key in PLACE] for row in plan], int).reshape(-1, 6), 2, axis=1)
    used = collections.Counter(Item(row["name"], *lengths) for row, lengths in zip(plan, size.tolist()))
    for fits, what in (
        ((lower >= 0).all() and (lower + size <= container).all(), "every item inside the container"),
        (not np.triu(overlap(lower, lower + size, [0, 1, 2]), 1).any(), "no two items in one place"),
        (used <= collections.Counter(items), "only the file's items, each once"),
    ):
        if not fits:
            raise UsageError(f"{file}: expected a plan with {what}, got another; nothing was written, please report it")


def pack(files: dict[str, list[Item]], play: Callable, keys: np.ndarray, container: tuple) -> list[dict]:
    """Plays the instance of each file -> its figures and plan."""
    rows = []
    for (file, items), key in zip(files.items(), keys):
        state = play(key)[-1]
        plan = make_plan(state, items)
        check_plan(file, plan, items, container)
        rest = collections.Counter(item.name for item in items) - collections.Counter(row["name"] for row in plan)
        row = dict(file=file, utilisation=utilisation(state), items=len(items), packed_items=len(plan))
        rows.append(row | dict(left_out=dict(rest), plan=plan))
    return rows


def own_table(rows: list[dict]) -> str:
    """The rows as text, one line each."""
    cells = [["", "policy", "file", "utilisation", "items", "left out"]]
    for row in rows:
        rest = ", ".join(f"{count} x {name}" for name, count in row["left_out"].items()) or "nothing"
        packed = f"{row['packed_items']} of {row['items']}"
        cells.append([row["checkpoint"], row["policy"], row["file"], f"{row['utilisation']:.2%}", packed, rest])
    return aligned(cells)


def write_plan(path: str, container: tuple[int, int, int], rows: list[dict]) -> None:
    """Writes the plan of each file's best row, and in each line the file where there are several."""
    best = {row["file"]: row for row in sorted(rows[::-1], key=lambda row: row["utilisation"])}
    files = list(dict.fromkeys(row["file"] for row in rows))
    lines = [(dict(file=file) if files[1:] else {}) | item for file in files for item in best[file]["plan"]]
    text = io.StringIO()
    if path.endswith(".json"):
        text.write(json.dumps(dict(container=container, items=lines), indent=1) + "\n")
    else:
        columns = ["file", "item", "name", *PLACE] if files[1:] else ["item", "name", *PLACE]
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    Path(path).write_text(text.getvalue(), encoding="utf-8")


# ====================================================== Pictures ======================================================
def make_state_player(checkpoint: Checkpoint, policy: Policy) -> Callable[[Any, jax.Array], list[State]]:
    """Returns play(params, key [2]) -> the states of the episode that the rollout plays, on the host, first to last."""

    def act(params, key, state, observation, memory):
        action, _, memory = policy.act(params, key, state, observation, memory)
        return action, (state, action), memory  # The state in the place of the decision.

    rollout = jax.jit(checkpoint.script.make_rollout(checkpoint.env, policy._replace(act=act)))
    step = jax.jit(functools.partial(checkpoint.script.step_flat, checkpoint.env))

    def play(params: Any, key: jax.Array) -> list[State]:
        trajectory = jax.device_get(rollout(params, key[None]))
        length = trajectory.mask[0].sum()
        pairs = [jax.tree.map(lambda x: x[0, t], trajectory.decision) for t in range(length)]
        return [state for state, _ in pairs] + [jax.device_get(step(*pairs[-1])[0])]

    return play


def make_best_player(checkpoint: Checkpoint, attempts: list) -> Callable[[jax.Array], list[State]]:
    """Returns play(key [2]) -> the states of the best of the attempts' episodes. One that places all is the last."""
    players = {policy: make_state_player(checkpoint, policy) for policy, _ in attempts}

    def play(key: jax.Array) -> list[State]:
        best: list[State] = []
        for policy, params in attempts:
            if not best or (best[-1].items_mask & ~best[-1].items_placed).any():
                states = players[policy](params, key)
                best = states if not best or utilisation(states[-1]) > utilisation(best[-1]) else best
        return best

    return play


def utilisation(state: State) -> float:
    """Share of the container's volume that is filled."""
    volume = np.prod([np.asarray(x, np.float64) for x in state.items], 0)[np.asarray(state.items_placed)].sum()
    box = jax.tree.map(float, state.container)
    return float(volume / ((box.x2 - box.x1) * (box.y2 - box.y1) * (box.z2 - box.z1)))


def back_to_front(items: np.ndarray, lower: np.ndarray, upper: np.ndarray) -> list[int]:
    """The order in which boxes that do not overlap are painted, seen from large x, small y and large z, as matplotlib
    looks at them. A box hides another only if no plane between them has the other on the viewer's side."""
    lower, upper = lower * [1, -1, 1], upper * [1, -1, 1]
    near, far = np.minimum(lower, upper), np.maximum(lower, upper)
    order, rest = [], list(items)
    while rest:
        hides = lambda i, j: not (near[j] >= far[i]).any()
        free = (j for j in rest if not any(hides(j, i) for i in rest if i != j))
        order.append(next(free, rest[0]))
        rest.remove(order[-1])
    return order


def draw_episodes(path: str, episodes: list[tuple[str, list[State]]]) -> None:
    """Episodes on the same instance side by side, with their titles: a .gif of all steps or a .png of the last ones."""
    from matplotlib import colormaps
    from matplotlib.animation import FuncAnimation
    from matplotlib.figure import Figure  # Without pyplot, which needs a backend and the main thread.

    look = dict(projection="3d", proj_type="ortho", computed_zorder=False)
    figure = Figure(figsize=(5.5 * len(episodes), 4.2), layout="constrained")
    axes = figure.subplots(1, len(episodes), subplot_kw=look, squeeze=False)
    colours = colormaps["tab20"].colors

    def draw(t: int) -> None:
        for ax, (title, states) in zip(axes[0], episodes):
            ax.clear()
            state = states[min(t, len(states) - 1)]
            lower = np.stack(state.items_location, -1).astype(float)
            size = np.stack(state.items, -1).astype(float)
            for zorder, i in enumerate(back_to_front(np.flatnonzero(state.items_placed), lower, lower + size)):
                ax.bar3d(*lower[i], *size[i], color=colours[i % 20], edgecolor="black", linewidth=0.5, zorder=zorder)
            box = jax.tree.map(float, state.container)
            ax.set(xlim=(box.x1, box.x2), ylim=(box.y1, box.y2), zlim=(box.z1, box.z2), xticks=[], yticks=[], zticks=[])
            ax.set_box_aspect((box.x2 - box.x1, box.y2 - box.y1, box.z2 - box.z1), zoom=0.95)
            placed, items = int(state.items_placed.sum()), int(state.items_mask.sum())
            ax.set_title(
                f"{title}\n{utilisation(state):.1%} of the volume, {placed} of {items} items",
                fontsize=9,
                parse_math=False,
            )

    length = max(len(states) for _, states in episodes)
    if path.endswith(".png"):
        draw(length - 1)
        figure.savefig(path, dpi=150)
    else:
        frames = [*range(length), *[length - 1] * 4]  # The result stays for a moment.
        FuncAnimation(figure, draw, frames=frames, interval=400).save(path, writer="pillow", dpi=80)


def read_curve(run_dir: Path) -> np.ndarray:
    """The evaluations of a run, [rows, 3]: decisions, hours of collecting and learning, greedy utilisation. Time that
    went into evaluations is not in the hours, so that their number does not count against a run."""
    log, points, seconds = run_dir / "metrics.jsonl", [], 0.0
    with contextlib.suppress(OSError, ValueError, TypeError):  # Of a file that no run has written.
        for row in read_log(log):
            seconds += row.get("perf/iteration_seconds", 0.0)
            if row["iteration"] > 0 and {"frames", "eval/greedy/avg_return"} <= row.keys():
                points.append([row["frames"], seconds / 3600, row["eval/greedy/avg_return"]])
        if points:
            return np.array(points, np.float64)
    raise UsageError(f"{log}: expected evaluations after the first iteration, got none; give the folder of a run")


def draw_curves(path: str, groups: dict[str, list[np.ndarray]]) -> None:
    """Greedy utilisation against decisions and against hours: for each group of runs their mean, with a band from the
    lowest to the highest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, column, label in zip(axes, (0, 1), ("decisions", "hours of collecting and learning")):
        for name, curves in groups.items():
            grid = np.unique(np.concatenate([curve[:, column] for curve in curves]))
            low, high = max(curve[0, column] for curve in curves), min(curve[-1, column] for curve in curves)
            grid = grid[(grid >= low) & (grid <= high)]
            lines = [np.interp(grid, curve[:, column], curve[:, 2]) for curve in curves]
            (line,) = ax.plot(grid, np.mean(lines, 0), label=f"{name} ({len(lines)} run{'s' * (len(lines) > 1)})")
            ax.fill_between(grid, np.min(lines, 0), np.max(lines, 0), color=line.get_color(), alpha=0.2)
        ax.set(xlabel=label)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel="utilisation, network alone", xscale="log")
    axes[0].xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=StrMethodFormatter("{x:,.0f}"))
    axes[0].xaxis.set(minor_formatter=NullFormatter())
    legend = figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    for text in legend.get_texts():
        text.set_parse_math(False)  # A folder may have dollars in its name.
    figure.savefig(path, dpi=150)


# ======================================================== Main ========================================================
def distinct_names(paths: list[Path], parts: int) -> list[str]:
    """The last parts of each path, as many as tell the paths apart."""
    names = ["/".join(path.parts[-parts:]).encode(errors="backslashreplace").decode() for path in paths]
    told_apart = len(set(names)) == len(set(paths)) or all(parts >= len(path.parts) for path in paths)
    return names if told_apart else distinct_names(paths, parts + 1)


def check_keys(paths: list[str], config: Config) -> None:
    """Raises `UsageError` for keys that do not go together."""
    for path in filter(re.compile(r".*\.csv", re.I).fullmatch, paths):
        raise UsageError(f"{path}: expected a checkpoint, got a .csv; type instances={path} (commas between several)")
    wanting = [name for name in config.policy if name not in FLOORS]
    if not paths and (wanting or config.curves or not config.policy):
        asked = f"policy={wanting[0]}" if wanting else "curves" if config.curves else "policy=[]"
        hint = f"type python evaluate.py CHECKPOINT ..., or one of policy={','.join(FLOORS)}"
        raise UsageError(f"{asked}: expected a checkpoint, got none; {hint}")
    number, own = len(config.instances) or config.num_episodes, bool(config.instances)
    if config.render and config.instance >= number:
        what = f"expected below {number}, the number of {'files' if own else 'instances, num_episodes'}"
        raise UsageError(f"instance={config.instance}: {what}; type instance=0")
    if (config.render or own) and not config.policy:
        key = "render" if config.render else "instances"
        raise UsageError(f"{key}: expected a policy to play with, got policy=[]; type policy=greedy")
    excluded = ("num_episodes", "max_num_items", "split_num_same_items") if own else ("plan", "container")
    for key in excluded:
        if key in config.model_fields_set:
            what = "expected no such key beside instances" if own else "expected instances=FILE.csv beside it, got none"
            raise UsageError(f"{key}: {what}; drop {key}")
    named = (*config.instances, config.plan, config.json, config.render, config.curves)
    resolved = [Path(path).resolve() for path in named if path]
    if len(set(resolved)) < len(resolved):
        keys = "instances, plan, json, render, curves"
        raise UsageError(f"{keys}: expected different files, got one of them twice; give another name")


def evaluate(words: list[str], paths: list[str], config: Config) -> None:
    """Does what the configuration asks for. `words`, the command line, is kept with the figures."""
    check_keys(paths, config)
    titles = distinct_names([Path(path) for path in config.instances], 1)
    files = {title: read_items(path, config.container) for title, path in zip(titles, config.instances)}
    start_jax(1 if files else config.num_episodes)
    use_compilation_cache(CACHE_DIR)
    given = sizes_for(files, config) if files else {key: getattr(config, key) for key in SIZES if getattr(config, key)}
    checkpoints = [load_checkpoint(path, **given) for path in paths]
    sizes = played_sizes(checkpoints, given) if config.policy else None
    keys, rows, pictures = evaluation_keys(config.seed, len(files) or config.num_episodes), [], []
    without = [without_network(sizes)] if {*config.policy} & {*FLOORS} else []
    if files:
        generator = make_own_generator(files, keys, sizes, config.container)
        with_items = lambda c: dataclasses.replace(c, env=c.script.make_env(sizes, generator))
        checkpoints, without = [*map(with_items, checkpoints)], [*map(with_items, without)]
    run_dirs = list(dict.fromkeys(checkpoint.path.parent for checkpoint in checkpoints))
    curves = {run_dir: read_curve(run_dir) for run_dir in run_dirs if config.curves}
    parts = 3 if any(c.path.name.startswith("iter_") for c in checkpoints) else 1  # iter_000300 needs its folders.
    names = dict(zip(checkpoints, distinct_names([c.path.with_suffix("") for c in checkpoints], parts)))
    for policy in config.policy:
        for checkpoint in without if policy in FLOORS else checkpoints:
            name = names.get(checkpoint, "")
            attempts, search = make_attempts(policy, checkpoint, checkpoints, config)
            play = make_best_player(checkpoint, attempts)
            row = dict(checkpoint=name, policy=policy, sizes=sizes.model_dump())
            origin = dict(search=search) if search else {}
            if name:
                training = dict(method=checkpoint.method, iteration=checkpoint.iteration, frames=checkpoint.frames)
                origin["training"] = training | dict(config=checkpoint.config.model_dump(mode="json"))
            if files:
                rows += [row | packed | origin for packed in pack(files, play, keys, config.container)]
            else:
                episodes, speed = score(f"{name} {policy}", checkpoint, attempts, keys)
                row |= summarise(episodes) | dict(decisions_per_second=speed, returns=episodes.returns.tolist())
                first = np.array(rows[0]["returns"] if rows else row["returns"])
                rows.append(row | dict(difference=difference(episodes.returns, first)) | origin)
            if config.render and len(pictures) < 2:
                title = [name, policy, *titles[config.instance : config.instance + 1]]
                pictures.append((" ".join(filter(None, title)), play(keys[config.instance])))
    if rows:
        print(own_table(rows) if files else table(rows))
    if config.json:
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        file = dict(command=shlex.join(["python", "evaluate.py", *words]), commit=commit(), device=device)
        file |= dict(versions=library_versions(), **config.model_dump(mode="json"), rows=rows)
        Path(config.json).write_text(json.dumps(file, indent=1) + "\n")
    if config.plan:
        write_plan(config.plan, config.container, rows)
    if pictures:
        draw_episodes(config.render, pictures)
    if config.curves:
        parents = list(dict.fromkeys(run_dir.parent for run_dir in run_dirs))
        labels = zip(parents, distinct_names(parents, 1))
        groups = {label: [curves[d] for d in run_dirs if d.parent == parent] for parent, label in labels}
        draw_curves(config.curves, groups)
    if error := getattr(sys.stdout, "error", None):
        raise error  # The table is lost, though not the files.


def commit(checkout: Path = Path(__file__).parent) -> str:
    """The commit of a checkout, by default this one, marked if it was changed; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):  # Where there is no git.
        return subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout.strip()
    return ""


def main(argv: list[str]) -> int:
    """The command line: 0, or 2 with one line for a user's mistake."""

    def command() -> None:
        paths: list[str] = []
        if {"-h", "--help"} & set(argv):
            print(help_text(__doc__, Config, {}))
        else:
            evaluate(argv, paths, parse_command_line(argv, Config, {}, paths)[0])

    return exit_status(
        command,
        smaller="num_simulations, n, beam_width or num_rollouts",
        after_file_error="make room, or give another file",
    )


if __name__ == "__main__":
    import evaluate as module  # As the training scripts import it, so that its classes exist once.

    sys.exit(module.main(sys.argv[1:]))
