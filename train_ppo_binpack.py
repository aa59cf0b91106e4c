"""PPO on 3D bin packing: the policy-gradient baseline on Jumanji's BinPack-v2.

Every iteration, on the devices and inside one `pmap`:

1. collect    A batch of episodes is played with actions drawn from the policy network.
2. advantage  Generalised advantage estimates, normalised over all decisions of the iteration.
3. learn      Several epochs of minibatches on the clipped surrogate (or CISPO's), a clipped value loss and an
              entropy bonus.

The environment, the network and the symmetry are those of search distillation (`train_search_distill_binpack.py`), so
that what differs between the two is the search. The small presets take about the same time, the full runs play the
same number of episodes.

Shapes: B episodes, T steps, E empty maximal spaces (EMS), I items, A = E x I flat actions `ems * I + item`,
D model width, H attention heads, M minibatch.

    python train_ppo_binpack.py preset=cpu               # two CPU cores
    python train_ppo_binpack.py                          # an accelerator
    python train_ppo_binpack.py --loss cispo --seed 42 learning_rate=1e-4
    python train_ppo_binpack.py --help                   # every key, its default and its meaning
"""

from __future__ import annotations

import builtins
import contextlib
import difflib
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import signal
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, get_args
from unittest import mock

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import wandb
from jax.experimental import multihost_utils
from jax.flatten_util import ravel_pytree
from omegaconf import OmegaConf
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

if TYPE_CHECKING:
    from jumanji.environments import BinPack
    from jumanji.environments.packing.bin_pack.types import EMS, Observation, State
    from jumanji.types import TimeStep

METHOD = "ppo"


# ======================================================================================================================
# Configuration of a run (twin section: the same in both training scripts)
# ======================================================================================================================

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NotNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]

DEVICES = "devices"  # The pmapped axis.
MAX_DECISIONS = 19  # Every BinPack-v2 instance has 19 items, and each decision places one or ends the episode.
LARGEST_SIZE = (40, 20)  # Spaces and items of an observation.
NUM_ACTIONS = 800
NOT_OF_THE_RESULT = ("resume", "overwrite", "save_dir", "save_minutes", "keep_checkpoints", "compilation_cache_dir",
                     "distributed", "coordinator_address", "num_processes", "process_id")  # fmt: skip


class RunConfig(BaseModel):
    """The keys that both training scripts have: type, limits, default and meaning stand here and nowhere else."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # The run.
    env_id: Literal["BinPack-v2"] = Field("BinPack-v2", description="the Jumanji environment")
    seed: Seed = Field(0, description="seed of parameters, instances, search noise and shuffling")
    max_num_iters: Count = Field(800, description="iterations of collecting and learning")
    rollout_batch_size: Count = Field(1024, description="episodes an iteration, over all devices")
    discount: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="discount of rewards")
    # Learning.
    training_batch_size: Count = Field(4096, description="decisions in a minibatch, over all devices")
    num_epochs: Count = Field(1, description="passes over an iteration's decisions, in whole minibatches")
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1e-3, description="step size of Adam")
    learning_rate_decay_iters: CountOrZero = Field(0, description="iterations of cosine decay to 0 (0: constant rate)")
    max_grad_norm: Positive = Field(1.0, description="global norm to which gradients are clipped")
    max_skipped_updates: Count = Field(
        100, description="the run ends after so many updates in a row that were left out, as not finite"
    )
    permute_axes: bool = Field(True, description="learn each sample under a random permutation of the axes, a symmetry")
    # Network.
    num_transformer_layers: Count = Field(4, description="transformer layers")
    transformer_num_heads: Count = Field(4, description="attention heads H")
    transformer_key_size: Count = Field(32, description="size of a head; the model width D is heads x key size")
    transformer_mlp_units: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        (256, 256), description="hidden units of a layer's MLP"
    )
    pair_units: Count = Field(32, description="units of the per-pair layer in the policy head")
    token_sizes: tuple[tuple[Count, Count], ...] = Field(
        ((8, 12), (16, 20), (40, 20)), description="numbers of [spaces, items] that the network is compiled for"
    )
    # Evaluation, log and files.
    eval_interval: Count = Field(20, description="iterations between evaluations of the greedy policy")
    eval_batch_size: Annotated[int, Field(ge=2, le=10**7)] = Field(1024, description="evaluation instances")
    eval_seed: Seed = Field(1_000_000, description="seed that fixes the evaluation instances")
    save_dir: Folder = Field("./checkpoints", description="folder of all runs")
    save_interval: Count = Field(20, description="iterations between checkpoints; the last iteration is always saved")
    save_minutes: NotNegative = Field(10.0, description="minutes after which a checkpoint is saved anyway (0: never)")
    keep_checkpoints: CountOrZero = Field(0, description="newest checkpoints that are kept (0: all)")
    resume: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        "", description="'auto' (this run's newest checkpoint, if any) or the path of a checkpoint"
    )
    overwrite: bool = Field(False, description="delete this run's earlier checkpoints and log, and start again")
    wandb_project: str = Field("jumanji-binpack", min_length=1, description="Weights & Biases project")
    compilation_cache_dir: str = Field(
        "~/.cache/search-distill-binpack", description="folder for compiled programs (empty: no cache)"
    )
    # Several processes. Slurm, Open MPI, Kubernetes and TPU pods tell the last three.
    distributed: bool = Field(False, description="this process is one of several that make one run together")
    coordinator_address: str = Field("", description="host:port of process 0, where the cluster does not tell")
    num_processes: CountOrZero = Field(0, description="number of processes, likewise")
    process_id: CountOrZero = Field(0, description="number of this process from 0, likewise")

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value: Any, info) -> Any:
        entries = jax.tree.leaves(value)
        if cls.model_fields[info.field_name].annotation is not bool and any(isinstance(x, bool) for x in entries):
            raise ValueError("expected a value that is not true or false")
        return value

    @field_validator("token_sizes")
    @classmethod
    def _sizes_hold_one_another(cls, sizes: tuple) -> tuple:
        pairs = itertools.pairwise(sizes)
        if sizes[-1:] != (LARGEST_SIZE,) or not all(a <= c and b <= d and (a, b) != (c, d) for (a, b), (c, d) in pairs):
            raise ValueError(
                "expected sizes that are each at least the one before in both numbers, none twice, the last one"
                f" {_as_typed(LARGEST_SIZE)}"
            )
        return sizes

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        if self.training_batch_size > self.rollout_batch_size * MAX_DECISIONS:
            raise ValueError(
                f"training_batch_size={self.training_batch_size}: expected at most {MAX_DECISIONS} x rollout_batch_size"
                f" = {self.rollout_batch_size * MAX_DECISIONS}, the decisions of one iteration; use"
                f" training_batch_size={self.rollout_batch_size} or a larger rollout_batch_size"
            )
        if 0 < self.learning_rate_decay_iters < self.max_num_iters:
            raise ValueError(
                f"learning_rate_decay_iters={self.learning_rate_decay_iters}: expected 0 or at least max_num_iters"
                f" = {self.max_num_iters}, since nothing is learned at rate 0; type"
                f" learning_rate_decay_iters={self.max_num_iters}"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite=true exclude each other; drop one of them")
        given = self.coordinator_address or self.num_processes or self.process_id
        is_address = re.fullmatch(r"\S+:\d+", self.coordinator_address)
        if given and not (self.distributed and is_address and self.process_id < self.num_processes):
            raise ValueError(
                "coordinator_address, num_processes and process_id (below num_processes) belong together; type"
                " distributed=true coordinator_address=HOST:PORT num_processes=2 process_id=0, or none of them"
            )
        return self


# ======================================================================================================================
# Configuration of PPO
# ======================================================================================================================


class Config(RunConfig):
    """Every key of a run: those of `RunConfig` and those of PPO."""

    num_epochs: Count = Field(4, description="passes over an iteration's decisions, in whole minibatches")
    learning_rate: Positive = Field(3e-4, description="step size of Adam")
    loss: Literal["ppo", "cispo"] = Field(
        "ppo", description="clipped surrogate, or log-probabilities under capped importance weights"
    )
    clip_eps: Positive = Field(0.2, description="the surrogate's ratio is clipped to 1 +- this (loss=ppo)")
    epsilon_high: Positive = Field(5.0, description="cap of the importance weights (loss=cispo)")
    gae_lambda: Fraction = Field(0.95, description="lambda of generalised advantage estimation")
    entropy_coef: NotNegative = Field(0.01, description="weight of the entropy bonus")
    value_coef: NotNegative = Field(0.5, description="weight of the value loss")
    value_clip_eps: Positive = Field(0.2, description="a value may move by this from the one that was acted with")

    def run_dir(self) -> Path:
        return Path(self.save_dir) / self.env_id / METHOD / f"seed_{self.seed}"


PRESETS: dict[str, dict[str, Any]] = {
    "full": {},
    "cpu": dict(
        max_num_iters=700,
        rollout_batch_size=64,
        training_batch_size=256,
        learning_rate=8e-3,
        learning_rate_decay_iters=700,
        gae_lambda=0.9,
        entropy_coef=0.003,
        num_transformer_layers=1,
        transformer_num_heads=4,
        transformer_key_size=8,
        transformer_mlp_units=(64,),
        eval_interval=50,
        save_interval=50,
    ),
}


# ======================================================================================================================
# Command line (twin section: the same in both training scripts)
# ======================================================================================================================


class UsageError(Exception):
    """A mistake of the user: one line that says what was expected, what came and what to type instead. It stays one
    line of bearable length whatever came."""

    def __str__(self) -> str:
        line = "".join(x if x.isprintable() else repr(x)[1:-1] for x in super().__str__())
        return line if len(line) <= 1000 else f"{line[:600]} ... {line[-300:]}"


class DamagedFile(UsageError):
    """A checkpoint that is not as it was written."""


class CannotWrite(UsageError):
    """A full disk or a read-only folder in the middle of a run."""


def parse_command_line(argv: list[str], config_class: type[BaseModel], presets: dict[str, dict]) -> tuple[Any, str]:
    """Parses `key=value`, `--key value`, `--key=value` and `--some-key value` into (config, preset name).

    Values follow YAML's grammar (OmegaConf). Raises `UsageError` for anything that does not fit.
    """
    fields = config_class.model_fields
    known = ["preset", *fields] if presets else [*fields]
    overrides: dict[str, str] = {}
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        key, equals, raw = word.partition("=")
        dashes = key.startswith("--")
        key = key[2:].replace("-", "_") if dashes else key
        if key not in known and (dashes or equals):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else "--help lists the keys"
            raise UsageError(f"unknown key '{key}'; {hint}")
        if dashes:
            is_switch = key in fields and fields[key].annotation is bool
            if not equals and is_switch and (not queue or queue[0].lower() not in ("true", "false")):
                raw = "true"
            elif not equals:
                if not queue:
                    raise UsageError(f"{word}: expected a value after it, but the line ends; type {word} VALUE")
                raw = queue.pop(0)
        elif not equals:
            raise UsageError(f"expected key=value or --key value, got '{word}'; --help lists the keys")
        if key in overrides:
            raise UsageError(f"{key} is given twice, as {overrides[key]!r} and {raw!r}; keep one of them")
        overrides[key] = raw

    preset = overrides.pop("preset", "full")
    if presets and preset not in presets:
        raise UsageError(f"preset={preset}: expected one of {', '.join(presets)}; type preset=cpu")
    values = presets.get(preset, {}) | {
        key: _parse_value(key, raw, fields[key].annotation) for key, raw in overrides.items()
    }
    try:
        return config_class(**values), preset
    except ValidationError as error:
        raise UsageError(_one_line(error, fields, overrides)) from None


def _parse_value(key: str, raw: str, annotation: Any) -> Any:
    """One value in YAML's grammar; text stays as typed, integers are decimal, and (1,2) is a list too."""
    if annotation is str or re.fullmatch(r"[+-]?\d+", raw):
        return raw
    if re.fullmatch(r"\(.*\)", raw):
        raw = f"[{raw[1:-1].rstrip(',')}]"
    try:
        value = OmegaConf.from_dotlist([f"{key}={raw}"])[key]
    except Exception:  # YAML and OmegaConf raise errors of many classes for text that they cannot read.
        return raw
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _one_line(error: ValidationError, fields: dict, overrides: dict[str, str]) -> str:
    """The first problem that pydantic found, in words that say what to type."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should be", "expected").split(", unable to parse")[0]
    if not first["loc"]:
        return reason
    key = first["loc"][0]
    return f"{key}={overrides.get(key)}: {reason}; for example {key}={_as_typed(fields[key].default)}"


def _as_typed(value: Any) -> str:
    """A value as one would type it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(map(_as_typed, value)) + "]"
    return str(value)


def help_text(doc: str, config_class: type[BaseModel], presets: dict[str, dict]) -> str:
    """The script's docstring, every key with type, default and meaning, and the presets."""
    lines = [doc.strip(), "", "Keys, as key=value or --key value (type, default, meaning):", ""]
    for key, field in config_class.model_fields.items():
        kind = getattr(field.annotation, "__name__", "choice")
        if kind == "Literal" or kind == "choice":
            kind = "|".join(map(str, get_args(field.annotation)))
        default = _as_typed(field.default) or "''"
        lines.append(f"  {key:28} {kind:18} {default:32} {field.description}")
    if presets:
        lines += ["", "Presets, as preset=NAME; single keys still override them:", ""]
    for name, values in presets.items():
        words = " ".join(f"{key}={_as_typed(value)}" for key, value in values.items())
        lines.append(f"  {name:6} {words or 'the defaults above'}")
    return "\n".join(lines)


# ======================================================================================================================
# Environment (twin section: the same in both training scripts)
# ======================================================================================================================


def make_env() -> BinPack:
    """Jumanji's BinPack, equal bit for bit, with an update of the EMSs that has no sequential loop."""
    # Imported here and not at the top: Jumanji creates arrays when it is imported, which starts JAX's devices. In a
    # notebook it would also switch the drawing of plots to a package that is not among its requirements (ipympl).
    with mock.patch.dict(vars(builtins), {"__IPYTHON__": False}):
        from jumanji.environments import BinPack

    class FastBinPack(BinPack):
        def _update_ems(self, state: State, item_id: jax.Array) -> State:
            state.ems, state.ems_mask = update_ems(state, item_id)
            return state

        def _get_set_of_largest_ems(self, ems: EMS, ems_mask: jax.Array) -> tuple[EMS, jax.Array, jax.Array]:
            indexes = decreasing_order(ems.volume() * ems_mask)
            shown = indexes[: self.obs_num_ems]
            return jax.tree.map(lambda x: x[shown], ems), ems_mask[shown], indexes

    return FastBinPack()


def step_flat(env: BinPack, state: State, action: jax.Array) -> tuple[State, TimeStep]:
    """`env.step` with a flat action `ems * I + item`, int32 []. A state without legal actions absorbs any action: it
    stays as it is and the reward is 0."""
    return env.step(state, jnp.stack(jnp.divmod(action, env.generator.max_num_items)))


def decreasing_order(x: jax.Array) -> jax.Array:
    """Indices that sort x [n] in decreasing order, where equal entries keep theirs: jnp.argsort(-x), and many times
    faster for a batch of short rows on a CPU."""
    slots = jnp.arange(len(x))
    ahead = (x[:, None] > x) | ((x[:, None] == x) & (slots[:, None] < slots))  # [n, n]: the first before the second.
    return jnp.zeros_like(slots).at[ahead.sum(0)].set(slots, unique_indices=True)


WORD_BITS = 20  # Of a bit mask: two words hold 40 EMSs without padding.


def _pack_bits(x: jax.Array) -> jax.Array:
    """Bool [..., n, m] -> uint32 [..., ceil(n / WORD_BITS), m]."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % WORD_BITS), (0, 0)])
    x = x.reshape(*x.shape[:-2], -1, WORD_BITS, x.shape[-1]).astype(jnp.uint32)
    return (x << jnp.arange(WORD_BITS, dtype=jnp.uint32)[:, None]).sum(-2, dtype=jnp.uint32)


def update_ems(state: State, item_id: jax.Array) -> tuple[EMS, jax.Array]:
    """EMSs and their mask after an item was placed: Jumanji's `_update_ems`, slot for slot.

    Jumanji adds the pieces of cut EMSs one by one, in 240 dependent steps. Which pieces survive has a closed form,
    because inclusion is transitive and pieces cut in different directions never contain each other.
    """
    lower = jnp.stack([state.ems.x1, state.ems.y1, state.ems.z1])  # [3, E], as all [3, E] below: axis, slot.
    upper = jnp.stack([state.ems.x2, state.ems.y2, state.ems.z2])
    location = jnp.stack([axis[item_id] for axis in state.items_location])
    item = jnp.stack([location, location + jnp.stack([axis[item_id] for axis in state.items])], 1)  # [3, 2]
    num_ems = lower.shape[1]

    overlaps = (jnp.maximum(lower, item[:, :1]) < jnp.minimum(upper, item[:, 1:])).all(0)
    hit = state.ems_mask & overlaps
    kept = state.ems_mask & ~overlaps

    # A candidate (face, j) is what a plane through a face of the item leaves of the hit EMS j: one bound moves.
    # Sets of EMSs are bit masks, [..., W, E] with W words for each j, which makes the 40 x 40 comparisons cheap to
    # combine: inside[f, :, j] holds the EMSs k that j does not reach out of on side f, around[f, :, j] those that j
    # surrounds. Reductions run over an axis before the last: along the last, a CPU makes one entry at a time.
    sides = jnp.stack([lower, -upper], 1).reshape(6, num_ems)
    inside = _pack_bits(sides[:, None, :] >= sides[:, :, None])  # [6, W, E]
    around = _pack_bits(sides[:, None, :] <= sides[:, :, None])
    moved = np.arange(6) ^ 1  # The part below the item's lower face gets a new upper bound, and vice versa.
    inside, around = (_and_of_others(x)[moved] for x in (inside, around))

    plane = jnp.stack([item[:, 0], -item[:, 1]], 1).reshape(6, 1)  # A candidate lies below it, in sides' signs.
    candidate = hit & (sides < plane)  # [6, E], not empty
    candidates = _pack_bits(candidate[..., None])  # [6, W, 1]
    kept_around = _pack_bits((kept & (plane <= -sides[moved]))[..., None])  # Reach as far as the plane.
    slots = np.arange(num_ems)
    earlier = _pack_bits(slots[:, None] < slots)  # [W, E]
    first = _pack_bits(slots[:, None] == 0)  # [W, 1]

    candidate &= ~(inside & ~around & candidates).any(-2)  # Strictly inside another one.
    twins = inside & around & candidates & earlier  # Earlier candidates that are equal.
    inside_kept = inside & kept_around
    accepted = candidate & ~(twins | inside_kept).any(-2)  # [6, E]; flat, it is in Jumanji's order

    # The i-th accepted candidate takes the i-th free slot. Ranks are numbers of bits up to a place.
    count = jax.lax.population_count
    words = _pack_bits(accepted.reshape(-1, 1))  # [W', 1]
    before = jnp.tril(jnp.broadcast_to(count(words[:, 0]), (len(words), len(words))), -1).sum(-1)  # [W'], exclusive
    up_to = _pack_bits(np.tri(WORD_BITS, dtype=bool).T)[0]  # [WORD_BITS]
    rank = (before[:, None] + count(words & up_to)).reshape(-1)[: 6 * num_ems].astype(jnp.int32)  # [6E], from 1.
    free_rank = count(_pack_bits(~kept[:, None]) & _pack_bits(np.tri(num_ems, dtype=bool).T)).sum(-2)  # [E]
    free_rank = free_rank.astype(jnp.int32)
    word = (before[:, None] < free_rank).sum(0) - 1  # [E]: that of the candidate with this rank,
    in_word = free_rank - before[word]
    bit = (count(words[word, 0] & up_to[:, None]) < in_word).sum(0)  # and its place there.
    source = word * WORD_BITS + bit
    filled = ~kept & (free_rank <= rank[-1])

    # Overflow: with every slot taken Jumanji overwrites slot 0. A late candidate counts unless another slot
    # contains it; if one of them is not inside the first occupant of slot 0, the last of them ends there.
    accepted, order = accepted.reshape(-1), np.arange(6 * num_ems)
    num_free = free_rank[-1]
    late = (rank - accepted) >= num_free  # The buffer was full when its turn came.
    placed = accepted & ~late
    took_first = placed & (rank == 1) & ~kept[0]
    elsewhere = _pack_bits((placed & ~took_first).reshape(6, num_ems, 1))
    in_other = ((inside_kept & ~first) | (twins & elsewhere)).any(-2)
    in_first = ((inside_kept & first) | (twins & _pack_bits(took_first.reshape(6, num_ems, 1)))).any(-2)
    counts = late & (candidate & ~in_other).reshape(-1)
    not_in_first = ~in_first.reshape(-1)
    last = jnp.max(jnp.where(counts, order, -1))
    overwritten = (counts & not_in_first).any()
    source = source.at[0].set(jnp.where(overwritten, last, source[0]))
    filled = filled.at[0].set(filled[0] | overwritten)

    slot, face = source % num_ems, source // num_ems
    bounds = {}
    for axis, name in enumerate("xyz"):
        new_lower = jnp.where(face == 2 * axis + 1, item[axis, 1], lower[axis, slot])
        new_upper = jnp.where(face == 2 * axis, item[axis, 0], upper[axis, slot])
        bounds[f"{name}1"] = jnp.where(filled, new_lower, lower[axis])
        bounds[f"{name}2"] = jnp.where(filled, new_upper, upper[axis])
    return state.ems.replace(**bounds), kept | filled


def _and_of_others(x: jax.Array) -> jax.Array:
    """[n, ...] -> [n, ...]: entry i is the bitwise and of all entries but i."""
    rest = [[x[j] for j in range(len(x)) if j != i] for i in range(len(x))]
    return jnp.stack([functools.reduce(jnp.bitwise_and, arrays) for arrays in rest])


def is_decision(observation: Observation) -> jax.Array:
    """Whether any action is legal, shape [...]. BinPack ends exactly when none is."""
    return observation.action_mask.any((-2, -1))


def legal_actions(observation: Observation) -> jax.Array:
    """Legal flat actions, bool [..., A]. A finished row gets entry 0, so that no row is empty."""
    mask = observation.action_mask.reshape(*observation.action_mask.shape[:-2], -1)
    first = jnp.arange(mask.shape[-1]) == 0
    return mask | (first & ~mask.any(-1, keepdims=True))


def permute_axes(observation: Observation, permutation: jax.Array) -> Observation:
    """Relabels the axes of an observation by one of the six permutations, int [] in [0, 6).

    The task is symmetric under it in normalised coordinates: legal actions, their order and rewards stay the same.
    """
    axes = jnp.array(list(itertools.permutations(range(3))))[permutation]
    ems, items = observation.ems, observation.items
    lower = jnp.stack([ems.x1, ems.y1, ems.z1])[axes]
    upper = jnp.stack([ems.x2, ems.y2, ems.z2])[axes]
    ems = ems.replace(x1=lower[0], x2=upper[0], y1=lower[1], y2=upper[1], z1=lower[2], z2=upper[2])
    return observation._replace(ems=ems, items=type(items)(*jnp.stack(items)[axes]))


# ======================================================================================================================
# Network (twin section: the same in both training scripts)
# ======================================================================================================================

MASKED = -1e9  # A logit that no softmax sees, and finite, so that no gradient becomes NaN.


def _heads(x: jax.Array, num_heads: int, key_size: int, name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of tokens [..., n, D], each [..., n, H, d]. No bias: x has the offset of its norm."""
    x = hk.Linear(3 * num_heads * key_size, with_bias=False, name=name)(x)
    x = x.reshape(*x.shape[:-1], 3, num_heads, key_size)
    return x[..., 0, :, :], x[..., 1, :, :], x[..., 2, :, :]


def _attend(query, key, value, mask: jax.Array, bias: jax.Array | None, name: str) -> jax.Array:
    """Multi-head attention with an additive bias of its logits (Vaswani et al. 2017, section 3.2; Shaw et al. 2018).

    query [..., n, H, d], key and value [..., m, H, d], mask [..., n or 1, m], bias [..., H, n, m] -> [..., n, H * d].
    A row that may look at nothing gets zeros.
    """
    logits = jnp.einsum("...nhd,...mhd->...hnm", query, key) / math.sqrt(query.shape[-1])
    if bias is not None:
        logits += bias
    weights = jax.nn.softmax(jnp.where(mask[..., None, :, :], logits, MASKED))
    mixed = jnp.einsum("...hnm,...mhd->...nhd", weights, value)
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    return hk.Linear(mixed.shape[-1], name=name)(mixed) * mask.any(-1, keepdims=True)


def _norm(x: jax.Array, name: str) -> jax.Array:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)(x)


class PackingNetwork(hk.Module):
    """Transformer over EMS and item tokens with a policy over their pairs and a bounded value.

    Spaces and items attend to their own kind, then to each other along legal actions. Exact fits are what full
    packings are made of, and no bilinear form of embeddings can see them; so the relations of each (space, item)
    pair are given to the cross-attention, as a bias, and to the policy head.

    Only what some legal action uses is a token: spaces shrink and items go, so whatever fits nowhere now never will.
    Good play leaves few such tokens. So the network is compiled for several numbers of them, `token_sizes`, each of
    which holds the one before, and a batch is run at the first size that holds all of its rows.
    """

    def __init__(self, config: RunConfig, name: str = "packing_network"):
        super().__init__(name=name)
        self.config = config

    def __call__(self, observation: Observation, size: tuple[int, int] = LARGEST_SIZE) -> tuple[jax.Array, jax.Array]:
        """Observation with leading dimensions [...] -> masked logits [..., A] and value [...], an estimate of the
        volume still to be packed: at most that of the items that still fit somewhere, 0 where no action is legal.

        `size` bounds the spaces and the items that legal actions use in any row; E and I are those from here on."""
        config = self.config
        width = config.transformer_num_heads * config.transformer_key_size
        ems, all_legal = observation.ems, observation.action_mask
        corners = jnp.stack([ems.x1, ems.y1, ems.z1, ems.x2, ems.y2, ems.z2], -1)
        rows, columns = _slots_of(all_legal.any(-1), size[0]), _slots_of(all_legal.any(-2), size[1])
        legal = _take(_take(all_legal, rows, -2), columns, -1)  # [..., E, I]
        lower, upper = jnp.split(_take(corners, rows, -2), 2, -1)  # [..., E, 3]
        item = _take(jnp.stack(list(observation.items), -1), columns, -2)  # [..., I, 3]
        usable, waiting = legal.any(-1), legal.any(-2)  # [..., E], [..., I]
        space = upper - lower
        space_volume, item_volume = space.prod(-1), item.prod(-1)
        open_volume = (item_volume * waiting).sum(-1)  # [...]

        def embed(lengths: list[jax.Array], volume: jax.Array, name: str) -> jax.Array:
            left = jnp.broadcast_to(open_volume[..., None], volume.shape)
            scalars = [x[..., None] for x in (jnp.cbrt(volume), volume, left)]
            return hk.Linear(width, name=name)(jnp.concatenate([*lengths, *scalars], -1))

        spaces = embed([lower, upper, space], space_volume, "embed_ems")  # [..., E, D]
        items = embed([item], item_volume, "embed_items")  # [..., I, D]
        pairs = _space_item_relations(space, item, space_volume, item_volume, waiting)  # [..., E, I, F]
        same = _item_item_relations(item)  # [..., I, I, F']

        num_heads = config.transformer_num_heads
        heads = functools.partial(_heads, num_heads=num_heads, key_size=config.transformer_key_size)

        def layer(spaces, items):
            own = heads(_norm(spaces, "ems_norm"), name="ems_self")
            spaces += _attend(*own, usable[..., None, :], None, "ems_self_out")
            own = heads(_norm(items, "items_norm"), name="items_self")
            bias = _bias(same, num_heads, "same_bias")
            items += _attend(*own, waiting[..., None, :], bias, "items_self_out")

            # Across kinds, each asks with its queries for the keys and values of the other.
            x, y = _norm(spaces, "ems_cross_norm"), _norm(items, "items_cross_norm")
            ems_query, *of_ems = heads(x, name="ems_cross")
            items_query, *of_items = heads(y, name="items_cross")
            bias = _bias(pairs, 2 * num_heads, "pair_bias")
            spaces += _attend(ems_query, *of_items, legal, bias[..., :num_heads, :, :], "ems_cross_out")
            bias, mask = (jnp.swapaxes(x, -1, -2) for x in (bias[..., num_heads:, :, :], legal))
            items += _attend(items_query, *of_ems, mask, bias, "items_cross_out")

            mlp = functools.partial(hk.nets.MLP, [*config.transformer_mlp_units, width])
            spaces += mlp(name="ems_mlp")(_norm(spaces, "ems_mlp_norm"))
            items += mlp(name="items_mlp")(_norm(items, "items_mlp_norm"))
            return spaces, items

        # One program for all layers, with parameters [layers, ...]: it compiles as fast as one layer.
        spaces, items = hk.layer_stack(config.num_transformer_layers, name="layers")(layer)(spaces, items)
        spaces, items = _norm(spaces, "ems_final_norm"), _norm(items, "items_final_norm")

        # Policy: bilinear in the tokens, plus a small layer that sees each pair and its relations.
        q, k = hk.Linear(width, name="policy_ems")(spaces), hk.Linear(width, name="policy_items")(items)
        logits = jnp.einsum("...ed,...id->...ei", q, k) / math.sqrt(width)
        units = config.pair_units
        hidden = jax.nn.relu(
            hk.Linear(units, with_bias=False, name="pair_ems")(spaces)[..., :, None, :]
            + hk.Linear(units, with_bias=False, name="pair_items")(items)[..., None, :, :]
            + hk.Linear(units, name="pair_relations")(pairs)
        )
        logits += hk.Linear(1, with_bias=False, name="pair_out")(hidden)[..., 0]
        # Back from tokens to slots; a slot that has no token reads that of another, and is masked.
        space_token, item_token = (jnp.maximum(jnp.cumsum(all_legal.any(axis), -1) - 1, 0) for axis in (-1, -2))
        pair_token = space_token[..., :, None] * size[1] + item_token[..., None, :]
        logits, all_legal, pair_token = (x.reshape(*x.shape[:-2], -1) for x in (logits, all_legal, pair_token))
        logits = jnp.where(all_legal, jnp.take_along_axis(logits, pair_token, -1, mode="promise_in_bounds"), MASKED)

        # Value: what the items that still fit somewhere can add, times a fraction.
        pooled = jnp.concatenate(
            [
                _masked_mean(spaces, usable),
                _masked_mean(items, waiting),
                _masked_mean(hidden.reshape(*logits.shape[:-1], -1, units), legal.reshape(*logits.shape[:-1], -1)),
            ],
            -1,
        )
        fraction = jax.nn.sigmoid(hk.nets.MLP([width, 1], name="value")(pooled)[..., 0] + 1.0)
        return logits, open_volume * fraction


def _slots_of(mask: jax.Array, size: int) -> jax.Array:
    """The slots that are set in mask [..., n], in order: int32 [..., size], filled up with n, which is no slot."""
    return (jnp.cumsum(mask, -1)[..., None] <= jnp.arange(size)).sum(-2)


def _take(x: jax.Array, slots: jax.Array, axis: int) -> jax.Array:
    """x [..., n, m] at slots [..., k] of axis -2 or -1, zeros at a slot n, which there is not."""
    slots = slots[..., None] if axis == -2 else slots[..., None, :]
    return jnp.take_along_axis(x, slots, axis, mode="fill", fill_value=0)


def _space_item_relations(space, item, space_volume, item_volume, waiting) -> jax.Array:
    """Relations of each (space, item) pair, [..., E, I, F]: slack and exact fit along each axis, number of exact
    fits, share of the space's volume, and whether the slack is the length of an item that still fits somewhere."""
    space, item = jnp.moveaxis(space, -1, 0), jnp.moveaxis(item, -1, 0)
    slack = space[..., :, None] - item[..., None, :]  # [3, ..., E, I]
    fits = _equal_length(slack)
    count = fits.sum(0)
    share = item_volume[..., None, :] / jnp.maximum(space_volume[..., :, None], 1e-6)
    lengths = jnp.where(waiting, item, jnp.inf)
    refill = [_equal_length(slack - lengths[..., k, None, None]) for k in range(item.shape[-1])]
    refill = functools.reduce(jnp.logical_or, refill)  # One pass over the pairs, where a reduction would make I.
    features = [*slack, *fits, count == 2, count == 3, jnp.minimum(share, 2.0), *refill]
    return jnp.moveaxis(jnp.stack([x.astype(jnp.float32) for x in features], -3), -3, -1)


def _item_item_relations(item) -> jax.Array:
    """Relations of each pair of items, [..., I, I, 5]: equal lengths along each axis, and on two or all axes."""
    equal = _equal_length(item[..., :, None, :] - item[..., None, :, :])
    count = equal.sum(-1, keepdims=True)
    return jnp.concatenate([equal, count == 2, count == 3], -1).astype(jnp.float32)


def _bias(relations: jax.Array, num_heads: int, name: str) -> jax.Array:
    """Attention bias of each head from relations [..., n, m, F]: [..., H, n, m]. A softmax does not see a constant."""
    return jnp.moveaxis(hk.Linear(num_heads, with_bias=False, name=name)(relations), -1, -3)


def _equal_length(difference: jax.Array) -> jax.Array:
    """Whether two normalised lengths are the same: a millimetre is at least 1 / 5870 = 1.7e-4 of the container."""
    return jnp.abs(difference) < 5e-5


def _masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of x [..., n, D] over the rows of mask [..., n]; zeros where there are none."""
    return (x * mask[..., None]).sum(-2) / jnp.maximum(mask.sum(-1, keepdims=True), 1)


class Model(NamedTuple):
    """What a policy plays with."""

    params: Any
    state: Any


def make_network(config: RunConfig) -> hk.TransformedWithState:
    """The network as Haiku functions: init(key, observation) -> (params, state), and
    apply(params, state, None, observation, size) -> ((logits, value), state), with the largest size as default."""
    network = hk.transform_with_state(lambda observation, *size: PackingNetwork(config)(observation, *size))
    return network._replace(apply=jax.jit(network.apply, static_argnums=4))  # Traced once for all of a program's uses.


def index_of_smallest_size(sizes: tuple, observation: Observation) -> jax.Array:
    """Index of the first of the sizes that holds an observation, int32 [...]."""
    legal = observation.action_mask
    spaces, items = legal.any(-1).sum(-1), legal.any(-2).sum(-1)
    return sum(((spaces > size[0]) | (items > size[1]) for size in sizes[:-1]), start=jnp.zeros_like(spaces))


def at_smallest_size(function: Callable, sizes: tuple, observation: Observation, *arguments: Any) -> Any:
    """function(size, *arguments) at the first of the sizes that holds every row of a batch of observations.

    A loss is differentiated inside of it: the gradient of a switch would move the residuals of all sizes.
    """
    branches = [functools.partial(function, size) for size in sizes]
    return jax.lax.switch(index_of_smallest_size(sizes, observation).max(), branches, *arguments)


def make_predict(
    network: hk.TransformedWithState, config: RunConfig
) -> Callable[[Model, Observation], tuple[jax.Array, jax.Array]]:
    """Returns predict(model, observation) -> (logits [A], value []), for one model and, under `vmap`, for a batch at
    its smallest size; one observation alone is run at the largest.

    The size must be chosen from all rows together, which only a rule of our own sees: a plain `vmap` would make a
    switch compute every size, and a second one around this does. Not differentiable; losses use `network.apply`.
    """

    def at_size(size, model, observation):
        return network.apply(model.params, model.state, None, observation, size)[0]

    @jax.custom_batching.custom_vmap
    def predict(model, observation):
        return at_size(LARGEST_SIZE, model, observation)

    @predict.def_vmap
    def _(axis_size, in_batched, model, observation):
        model_batched, batched = in_batched
        assert not any(jax.tree.leaves(model_batched)), "one model for the whole batch"
        observation = jax.tree.map(  # After a reset some leaves are the same for every row.
            lambda x, is_batched: x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape)), observation, batched
        )
        return at_smallest_size(at_size, config.token_sizes, observation, model, observation), (True, True)

    return predict


def argmax(logits: jax.Array) -> jax.Array:
    """The first index of the largest entry, int32 [...], or of a NaN: jnp.argmax over the last axis, and many times
    faster on a CPU."""
    is_largest = (logits == logits.max(-1, keepdims=True)) | jnp.isnan(logits)
    return jnp.where(is_largest, jnp.arange(logits.shape[-1]), logits.shape[-1]).min(-1)


# ======================================================================================================================
# Policies and rollout (twin section: the same in both training scripts)
# ======================================================================================================================


class Policy(NamedTuple):
    """How to play an episode: `start(model, state, observation)` -> memory, and
    `act(model, key, state, observation, memory)` -> (flat action, decision, memory)."""

    start: Callable
    act: Callable


def make_greedy_policy(network: hk.TransformedWithState, config: RunConfig) -> Policy:
    """The network's most probable action."""
    predict = make_predict(network, config)

    def act(model, key, state, observation, memory):
        logits, _ = predict(model, observation)
        return argmax(logits), None, memory

    return Policy(start=lambda model, state, observation: (), act=act)


class Trajectory(NamedTuple):
    """Episodes, padded to T steps. A padding row is a finished state: mask False, reward 0."""

    observation: Observation  # leaves [B, T, ...]
    decision: Any  # what the policy says of its decisions, leaves [B, T, ...]
    reward: jax.Array  # [B, T], share of the container's volume
    mask: jax.Array  # bool [B, T], a real decision
    solved: jax.Array  # bool [B], every item placed


def make_rollout(env: BinPack, policy: Policy) -> Callable[[Model, jax.Array], Trajectory]:
    """Returns rollout(model, keys [B, 2]) -> Trajectory. An episode is a function of model and key alone, up to the
    rounding of the network, whose size depends on the whole batch.
    """

    def play(model: Model, key: jax.Array) -> Trajectory:
        state, timestep = env.reset(jax.random.fold_in(key, MAX_DECISIONS))
        memory = policy.start(model, state, timestep.observation)

        def step(carry, t):
            state, observation, memory = carry
            action, decision, memory = policy.act(model, jax.random.fold_in(key, t), state, observation, memory)
            state, timestep = step_flat(env, state, action)
            row = (observation, decision, timestep.reward, is_decision(observation))
            return (state, timestep.observation, memory), row

        carry = (state, timestep.observation, memory)
        (state, _, _), rows = jax.lax.scan(step, carry, jnp.arange(MAX_DECISIONS))
        return Trajectory(*rows, solved=(state.items_placed | ~state.items_mask).all())

    return jax.vmap(play, in_axes=(None, 0))


def episode_metrics(trajectory: Trajectory, num_episodes: int) -> dict[str, jax.Array]:
    """Means over the episodes of all devices, to be called inside `pmap`."""
    values = {
        "rollout/avg_return": trajectory.reward.sum(1),
        "rollout/avg_steps": trajectory.mask.sum(1),
        "rollout/solved_rate": trajectory.solved,
    }
    return {name: jax.lax.psum(x.sum(), DEVICES) / num_episodes for name, x in values.items()}


# ======================================================================================================================
# Acting
# ======================================================================================================================


class Decision(NamedTuple):
    """What learning needs to know of an action that was drawn."""

    action: jax.Array  # int32 [], flat action
    log_prob: jax.Array  # [], its log-probability when it was drawn
    value: jax.Array  # [], the network's value at that time
    permutation: jax.Array  # int32 [], number of the permutation of the axes under which the network saw the state


def make_sampling_policy(network: hk.TransformedWithState, config: Config) -> Policy:
    """Actions drawn from the network's distribution.

    With `permute_axes` the network sees each state under a random permutation, here and again when it learns from
    it: the ratio of new to old probabilities compares the same view.
    """
    predict = make_predict(network, config)

    def act(model: Model, key: jax.Array, state: State, observation: Observation, memory):
        action_key, permutation_key = jax.random.split(key)
        permutation = jnp.int32(0)
        if config.permute_axes:
            permutation = jax.random.randint(permutation_key, (), 0, 6)
            observation = permute_axes(observation, permutation)
        logits, value = predict(model, observation)
        action = jax.random.categorical(action_key, logits).astype(jnp.int32)
        log_prob = jax.nn.log_softmax(logits)[action]
        return action, Decision(action, log_prob, value, permutation), memory

    return Policy(start=lambda model, state, observation: (), act=act)


# ======================================================================================================================
# Advantages and loss
# ======================================================================================================================


class Samples(NamedTuple):
    """Training rows. `mask` is 0 for padding, which counts in no mean and no gradient."""

    observation: Observation  # leaves [..., ...]
    decision: Decision  # leaves [...]
    advantage: jax.Array  # [...]
    returns: jax.Array  # [...], value target: advantage (before it is normalised) plus value
    mask: jax.Array  # bool [...]


def generalised_advantages(reward: jax.Array, value: jax.Array, discount: float, gae_lambda: float) -> jax.Array:
    """GAE (Schulman et al. 2016, equation 16), [B, T] from rewards and values [B, T].

    A_t = d_t + discount * lambda * A_{t+1} with d_t = r_t + discount * V_{t+1} - V_t. Nothing follows the last step,
    and padding rows have reward 0 and value 0, so that nothing follows the end of a shorter episode either.
    """
    following = jnp.concatenate([value[:, 1:], jnp.zeros_like(value[:, :1])], 1)
    delta = reward + discount * following - value

    def step(advantage, delta):
        advantage = delta + discount * gae_lambda * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(step, jnp.zeros_like(delta[:, 0]), delta.T, reverse=True)
    return advantages.T


def make_samples(trajectory: Trajectory, config: Config) -> Samples:
    """Flattens episodes into rows: leaves [B * T, ...]. Advantages are not normalised yet."""
    value = trajectory.decision.value
    advantage = generalised_advantages(trajectory.reward, value, config.discount, config.gae_lambda)
    samples = Samples(trajectory.observation, trajectory.decision, advantage, advantage + value, trajectory.mask)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)


def normalise(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean 0 and standard deviation 1 over the real rows."""
    mean, variance = masked_moments(x, mask)
    return (x - mean) / (jnp.sqrt(variance) + 1e-8)


def masked_moments(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the rows where the mask is set."""
    mean = jnp.where(mask, x, 0.0).sum() / mask.sum()
    return mean, jnp.where(mask, jnp.square(x - mean), 0.0).sum() / mask.sum()


def policy_loss(config: Config, log_prob: jax.Array, old_log_prob: jax.Array, advantage: jax.Array) -> jax.Array:
    """The loss of each row, [...].

    ppo: the clipped surrogate (Schulman et al. 2017, equation 7). cispo: the policy gradient under importance weights
    that are capped and detached, so that no action loses its gradient (MiniMax 2025, 'MiniMax-M1', section 3.1).
    """
    ratio = jnp.exp(log_prob - old_log_prob)
    if config.loss == "cispo":
        return -jax.lax.stop_gradient(jnp.minimum(ratio, config.epsilon_high)) * advantage * log_prob
    clipped = jnp.clip(ratio, 1.0 - config.clip_eps, 1.0 + config.clip_eps)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def value_loss(config: Config, value: jax.Array, old_value: jax.Array, returns: jax.Array) -> jax.Array:
    """The larger of the squared errors of the value and of the value kept near the old one, [...]."""
    near = old_value + jnp.clip(value - old_value, -config.value_clip_eps, config.value_clip_eps)
    return jnp.maximum(jnp.square(value - returns), jnp.square(near - returns))


def approximate_kl(log_prob: jax.Array, old_log_prob: jax.Array) -> jax.Array:
    """KL(old || new) from actions of the old policy, [...]: (r - 1) - log r with r = new / old, unbiased, never
    negative and of low variance (Schulman 2020, 'Approximating KL divergence', k3)."""
    log_ratio = log_prob - old_log_prob
    return jnp.expm1(log_ratio) - log_ratio


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy over the legal actions, [...] from masked logits [..., A]."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.where(logits > MASKED / 2, jnp.exp(log_probs) * log_probs, 0.0).sum(-1)


def make_loss(network: hk.TransformedWithState, config: Config):
    """Returns loss(size, params, net_state, samples, count) -> (scalar, metrics), summed over real rows and divided
    by `count`, the number of real rows on all devices. Sums over devices of the result and its gradient are then the
    global mean and its gradient."""

    def loss(size, params, net_state, samples: Samples, count):
        (logits, value), _ = network.apply(params, net_state, None, samples.observation, size)
        old = samples.decision
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), old.action[..., None], -1)[..., 0]
        ratio = jnp.exp(log_prob - old.log_prob)
        clipped = jnp.abs(ratio - 1.0) > config.clip_eps if config.loss == "ppo" else ratio > config.epsilon_high
        per_row = {
            "policy_loss": policy_loss(config, log_prob, old.log_prob, samples.advantage),
            "value_loss": value_loss(config, value, old.value, samples.returns),
            "entropy": entropy(logits),
            "approx_kl": approximate_kl(log_prob, old.log_prob),
            "clip_fraction": clipped,
        }
        metrics = {name: jnp.where(samples.mask, x, 0.0).sum() / count for name, x in per_row.items()}
        total = metrics["policy_loss"] + config.value_coef * metrics["value_loss"]
        return total - config.entropy_coef * metrics["entropy"], metrics

    return loss


# ======================================================================================================================
# Training state and minibatches (twin section: the same in both training scripts)
# ======================================================================================================================


class TrainState(NamedTuple):
    params: Any
    net_state: Any
    opt_state: optax.OptState
    key: jax.Array  # Never changes: iteration i draws from fold_in(key, i).
    iteration: jax.Array  # int32 [], iterations done


def make_optimizer(config: RunConfig) -> optax.GradientTransformation:
    """Adam with clipped gradients, before the learning rate. Gradients that are not finite are counted, no more."""
    adam = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam())
    return optax.apply_if_finite(adam, max_consecutive_errors=2**31 - 1)


def learning_rate(config: RunConfig, iteration: jax.Array) -> jax.Array:
    """Constant within an iteration; cosine decay over iterations if the configuration asks for it."""
    if not config.learning_rate_decay_iters:
        return jnp.float32(config.learning_rate)
    progress = jnp.minimum(iteration / config.learning_rate_decay_iters, 1.0)
    return config.learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def steps_per_epoch(config: RunConfig) -> int:
    return config.rollout_batch_size * MAX_DECISIONS // config.training_batch_size


def init_train_state(env: BinPack, network: hk.TransformedWithState, config: RunConfig) -> TrainState:
    """A fresh state from `config.seed` (not replicated)."""

    @jax.jit  # One program compiles faster than the many small ones of its operations.
    def init(key):
        observation = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(env.reset, key)[1].observation)
        params, net_state = network.init(key, observation)
        opt_state = make_optimizer(config).init(ravel_pytree(params)[0])
        return TrainState(params, net_state, opt_state, key, jnp.int32(0))

    return init(jax.random.PRNGKey(config.seed))


def local_keys(key: jax.Array, num_keys: int) -> jax.Array:
    """This device's keys, [num_keys, 2], inside `pmap`: a key depends on the global number of its episode alone."""
    first = jax.lax.axis_index(DEVICES) * num_keys
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, first + jnp.arange(num_keys))


def local_share(x: jax.Array, size: int) -> jax.Array:
    """This device's [size] entries of an array that all devices have whole, inside `pmap`."""
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(DEVICES) * size, size)


def minibatch_rows(key: jax.Array, mask: jax.Array, config: RunConfig) -> jax.Array:
    """Row numbers of all minibatches of an iteration, int32 [epochs * steps, M]: real rows only, a new shuffle each
    epoch, cut after its last whole minibatch. Where short episodes leave fewer rows than that, it is begun again."""

    def epoch(key):
        order = jnp.argsort(jnp.where(mask, jax.random.uniform(key, mask.shape), 2.0))  # Real rows first.
        slots = jnp.arange(steps_per_epoch(config) * config.training_batch_size)
        return order[slots % mask.sum()].reshape(-1, config.training_batch_size)

    return jnp.concatenate([epoch(k) for k in jax.random.split(key, config.num_epochs)])


PARTS = 4  # Of a minibatch, as far as its rows divide.


def gradients_in_parts(
    gradients: Callable, config: RunConfig, batch: Any, params: Any, net_state: Any, count: Any
) -> Any:
    """gradients(size, params, net_state, batch, count) -> ((loss, metrics), grads), all of them sums over rows; returns
    them with grads as one vector, so that what follows is one operation and not one for each parameter.

    A minibatch has rows of all kinds. Those that need the same size are brought together, and the sum is taken over
    parts, each at its own size.
    """
    order = jnp.argsort(index_of_smallest_size(config.token_sizes, batch.observation))
    num_parts = math.gcd(len(order), PARTS) if len(config.token_sizes) > 1 else 1
    parts = jax.tree.map(lambda x: x[order].reshape(num_parts, -1, *x.shape[1:]), batch)

    def of_part(part):
        inputs = (params, net_state, part, count)
        sums, grads = at_smallest_size(gradients, config.token_sizes, part.observation, *inputs)
        return sums, ravel_pytree(grads)[0]

    return jax.tree.map(lambda x: x.sum(0), jax.lax.map(of_part, parts))


def apply_gradients(
    config: RunConfig, params: Any, opt_state: optax.OptState, loss: jax.Array, grads: jax.Array, rate: jax.Array
) -> tuple[Any, optax.OptState]:
    """One step of the optimizer along grads [number of parameters] -> (params, opt_state); none where the loss or the
    gradient's norm is not finite."""
    sound = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    updates, opt_state = make_optimizer(config).update(jnp.where(sound, grads, jnp.nan), opt_state)
    as_params = ravel_pytree(params)[1]
    return optax.apply_updates(params, as_params(-rate * updates)), opt_state


def skip_metrics(before: optax.OptState, after: optax.OptState) -> dict[str, jax.Array]:
    """How many updates were left out in an iteration, and how many in a row up to now."""
    number = after.total_notfinite - before.total_notfinite
    return {"train/skipped_updates": number, "skipped_in_a_row": after.notfinite_count}


def replicate(tree: Any) -> Any:
    """Adds a leading axis with one copy for each device, as pmap takes it."""
    copy = jax.pmap(lambda tree, _: tree, axis_name=DEVICES, in_axes=(None, 0))
    return copy(tree, np.arange(jax.local_device_count()))


def host_copy(tree: Any) -> Any:
    """One device's copy of a replicated tree, as numpy arrays."""
    return jax.tree.map(lambda x: np.asarray(np.asarray(x.addressable_shards[0].data)[0]), tree)


# ======================================================================================================================
# One training iteration
# ======================================================================================================================


def make_train_iteration(
    env: BinPack, network: hk.TransformedWithState, config: Config
) -> Callable[[TrainState], tuple[TrainState, dict[str, jax.Array]]]:
    """Returns iterate(state) -> (state, metrics), to be pmapped over all devices with axis name DEVICES.

    Each device plays its share of the episodes; the rows are gathered, their advantages normalised and their order
    shuffled the same way everywhere, and each device takes its share of every minibatch. So neither the data nor the
    minibatches depend on the devices.
    """
    rollout = make_rollout(env, make_sampling_policy(network, config))
    gradients = jax.value_and_grad(make_loss(network, config), argnums=1, has_aux=True)
    psum = functools.partial(jax.lax.psum, axis_name=DEVICES)

    def minibatch_step(carry, rows, net_state, samples: Samples, rate: jax.Array):
        params, opt_state = carry
        rows = local_share(rows, config.training_batch_size // jax.device_count())
        batch = jax.tree.map(lambda x: x[rows], samples)
        seen = jax.vmap(permute_axes)(batch.observation, batch.decision.permutation)
        batch = batch._replace(observation=seen)
        count = psum(batch.mask.sum())
        (loss, metrics), grads = psum(gradients_in_parts(gradients, config, batch, params, net_state, count))
        metrics["grad_norm"] = optax.tree.norm(grads)
        return apply_gradients(config, params, opt_state, loss, grads, rate), metrics

    def iterate(state: TrainState):
        collect_key, shuffle_key = jax.random.split(jax.random.fold_in(state.key, state.iteration))
        keys = local_keys(collect_key, config.rollout_batch_size // jax.device_count())
        trajectory = rollout(Model(state.params, state.net_state), keys)

        samples = make_samples(trajectory, config)
        samples = jax.tree.map(lambda x: jax.lax.all_gather(x, DEVICES, tiled=True), samples)
        mask, residual = samples.mask, samples.returns - samples.decision.value
        _, residual_variance = masked_moments(residual, mask)
        _, returns_variance = masked_moments(samples.returns, mask)
        samples = samples._replace(advantage=normalise(samples.advantage, mask))

        rate = learning_rate(config, state.iteration)
        step = functools.partial(minibatch_step, net_state=state.net_state, samples=samples, rate=rate)
        rows = minibatch_rows(shuffle_key, mask, config)  # [S, M]
        (params, opt_state), train = jax.lax.scan(step, (state.params, state.opt_state), rows)

        metrics = episode_metrics(trajectory, config.rollout_batch_size)
        metrics |= {f"train/{name}": x.mean() for name, x in train.items()}
        metrics["train/explained_variance"] = 1.0 - residual_variance / jnp.maximum(returns_variance, 1e-8)
        metrics |= {"train/learning_rate": rate, "decisions": mask.sum()}
        metrics |= skip_metrics(state.opt_state, opt_state)
        return TrainState(params, state.net_state, opt_state, state.key, state.iteration + 1), metrics

    return iterate


def visits_per_decision(config: Config) -> float:
    """Network passes and environment steps that a decision costs, learning included, for the estimate at the start."""
    return 1 + 3 * config.num_epochs  # A gradient is about 3 passes.


# ======================================================================================================================
# Players and outcomes (twin section: the same in both training scripts)
# ======================================================================================================================


class Episodes(NamedTuple):
    """Outcomes of N played instances, numpy arrays [N]."""

    returns: np.ndarray  # volume utilisation
    steps: np.ndarray  # items packed
    solved: np.ndarray  # bool, every item packed


def evaluation_keys(seed: int, num_episodes: int) -> np.ndarray:
    """One key for each instance, uint32 [N, 2]: the i-th is fixed by the seed and i alone."""
    key = jax.random.PRNGKey(seed)
    return np.asarray(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, np.arange(num_episodes)))


def instances_at_a_time() -> int:
    """How many instances the devices play together. Few, on a CPU, so that they fit its caches."""
    num_devices = jax.device_count()
    return num_devices * (32 if jax.default_backend() == "cpu" else -(-1024 // num_devices))


def make_player(env: BinPack, policy: Policy) -> Callable[[Model, np.ndarray], Episodes]:
    """Returns play(replicated model, keys [N, 2]) -> Episodes. Chunks of one size serve every N with one program."""
    rollout = make_rollout(env, policy)
    size = instances_at_a_time()

    def play_chunk(model, keys, _):
        trajectory = rollout(model, local_share(keys, size // jax.device_count()))
        episodes = Episodes(trajectory.reward.sum(1), trajectory.mask.sum(1), trajectory.solved)
        return jax.lax.all_gather(episodes, DEVICES, tiled=True)

    play_chunk = jax.pmap(play_chunk, axis_name=DEVICES, in_axes=(0, None, 0))
    each_device = np.arange(jax.local_device_count())  # For a player without a model, too, there is something to map.

    def play(model: Model, keys: np.ndarray) -> Episodes:
        chunks = np.resize(keys, (-(-len(keys) // size), size, 2))  # Repeats fill the last chunk.
        played = [host_copy(play_chunk(model, chunk, each_device)) for chunk in chunks]
        return Episodes(*(np.concatenate(field)[: len(keys)] for field in zip(*played)))

    return play


def summarise(episodes: Episodes) -> dict[str, float]:
    """Means over instances, with the standard error of the utilisation."""
    returns = episodes.returns.astype(np.float64)
    return {
        "avg_return": float(returns.mean()),
        "avg_return_se": float(returns.std(ddof=1) / math.sqrt(len(returns))),
        "solved_rate": float(episodes.solved.mean()),
        "packed_items": float(episodes.steps.mean()),
    }


def is_due(config: RunConfig, iteration: int, interval: int) -> bool:
    """Whether something that is done every `interval` iterations, and after the last, is due (0: only then)."""
    return iteration == config.max_num_iters or (interval > 0 and iteration % interval == 0)


# ======================================================================================================================
# Evaluation
# ======================================================================================================================


def make_evaluate(
    env: BinPack, network: hk.TransformedWithState, config: Config
) -> Callable[[Model, int], dict[str, Episodes]]:
    """Returns evaluate(replicated model, iteration) -> the episodes of each evaluation that is due, by name."""
    keys = evaluation_keys(config.eval_seed, config.eval_batch_size)
    play_greedy = make_player(env, make_greedy_policy(network, config))

    def evaluate(model: Model, iteration: int) -> dict[str, Episodes]:
        return {"greedy": play_greedy(model, keys)} if is_due(config, iteration, config.eval_interval) else {}

    return evaluate


# ======================================================================================================================
# Checkpoints (twin section: the same in both training scripts)
# ======================================================================================================================

FORMAT_VERSION = 1
CONTENTS = dict(
    format_version=int, method=str, iteration=int, frames=int, seconds=float, model=tuple, config=dict, opt_state=list,
    wandb_id=str,
)  # fmt: skip
MAX_ENTRIES = 1_000_000
DIGEST = b"sha256:"  # After the pickle, which ends by itself: pickle.load does not read on.


class _Refusing:
    """A stand-in for what numpy's pickles name. A pickle can call it, and nothing else can be done to it."""

    def __setstate__(self, state: Any) -> None:  # On the class itself, BUILD fails for want of an instance.
        raise pickle.UnpicklingError(f"{type(self).__name__.strip('_')} was given a state")


class _Dtype(_Refusing):
    """numpy.dtype of numbers and truth values; None for any other."""

    def __init__(self, name: str, align: bool = False, copy: bool = True):
        self.value = np.dtype(name) if re.fullmatch(r"[biufc]\d{1,2}", name) else None

    def __setstate__(self, state: tuple) -> None:
        self.value = None if self.value is None else self.value.newbyteorder(state[1])


class _Array(_Refusing):
    """numpy.ndarray, made from bytes."""

    def __init__(self, data: Any = b"", dtype: Any = None, shape: tuple = (), order: str = "C"):
        self.value = None
        if dtype is not None:
            self._fill(data, dtype, shape, order)

    def _fill(self, data: Any, dtype: Any, shape: tuple, order: str) -> None:
        if not (isinstance(data, (bytes, bytearray)) and type(dtype) is _Dtype and dtype.value is not None):
            raise pickle.UnpicklingError("it has an array of objects, and only numbers are allowed")
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order=order)  # Copied when it is counted.

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self._fill(data, dtype, shape, "F" if fortran else "C")


class _Reconstruct(_Refusing):
    def __new__(cls, subtype: Any, shape: Any, kind: Any):
        return _Array()  # Its state comes next.


class _Scalar(_Refusing):
    def __new__(cls, dtype: Any, data: Any):
        return _Array(data, dtype)


class _FromBuffer(_Refusing):
    def __new__(cls, data: Any, dtype: Any, shape: Any, order: Any):
        return _Array(data, dtype, shape, order)


_PICKLE_GLOBALS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Reconstruct for core in ("_core", "core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("_core", "core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _FromBuffer for core in ("_core", "core")},
}


class _PlainUnpickler(pickle._Unpickler):
    """Reads arrays of numbers and plain containers; anything else is refused before it runs. Even numpy's own
    classes are not handed out: called in the wrong way they read memory that is not theirs. (The unpickler in C makes
    as much room as a file names; the one in Python does not.)"""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))
        self._entries, self._bytes_left = MAX_ENTRIES, len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PICKLE_GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only numpy arrays are allowed")
        return _PICKLE_GLOBALS[module, name]

    def load(self) -> Any:
        return self._plain(super().load())

    def _load_bytearray(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        if size > self._bytes_left:
            raise pickle.UnpicklingError("it has bytes without end")
        self.append(bytearray(self.read(size)))

    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: _load_bytearray}

    def _plain(self, x: Any) -> Any:
        """The same with arrays in the place of stand-ins. Sharing is undone, so entries and bytes are counted."""
        self._entries -= 1
        if self._entries < 0:
            raise pickle.UnpicklingError(f"it has more than {MAX_ENTRIES:,} entries")
        if type(x) is dict:
            return {self._plain(key): self._plain(value) for key, value in x.items()}
        if type(x) in (list, tuple):
            return type(x)(map(self._plain, x))
        if type(x) is _Array and x.value is not None:
            self._bytes_left -= x.value.nbytes
            if self._bytes_left < 0:
                raise pickle.UnpicklingError("its arrays are larger than the file")
            return x.value.copy()
        if x is None or type(x) in (bool, int, float, str, bytes):
            return x
        raise pickle.UnpicklingError(f"it holds a {type(x).__name__.strip('_')}, and only plain values are allowed")


def write_checkpoint(path: Path, contents: dict) -> None:
    """Writes a dict of plain values and numpy arrays, and its digest, in one atomic step: a reader finds the whole file
    or none. Raises `OSError` and leaves nothing where there is no room."""
    data = pickle.dumps(contents, protocol=4)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data + DIGEST + hashlib.sha256(data).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_checkpoint(path: str | Path, method: str | None = None, env_id: str | None = None) -> dict:
    """Reads a checkpoint, of the method and environment if they are given. Raises `UsageError` for anything else, of
    which `DamagedFile` for one that is not as it was written."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError(0, "no regular file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise DamagedFile(f"{path}: expected a checkpoint file, got '{error.strerror}'; give an iter_*.pkl") from None
    body, marker, digest = data[:-39], data[-39:-32], data[-32:]
    if marker == DIGEST and hashlib.sha256(body).digest() != digest:
        raise DamagedFile(f"{path}: damaged, its digest does not fit what it holds; give another iter_*.pkl")
    try:
        contents = _PlainUnpickler(data).load()
    except Exception as error:  # A damaged pickle can raise nearly anything.
        raise DamagedFile(f"{path}: not a checkpoint that can be read: {error}; give another iter_*.pkl") from None
    contents = contents if isinstance(contents, dict) else {}
    version = contents.get("format_version")
    if type(version) is int and version != FORMAT_VERSION:
        raise UsageError(
            f"{path}: expected format_version={FORMAT_VERSION}, got {version}; give a checkpoint that"
            " this version wrote, or use the version that wrote this one"
        )
    fits = all(type(contents.get(key)) is kind for key, kind in CONTENTS.items())
    try:
        fits = fits and len(contents["model"]) == 2 and 0 <= contents["iteration"] < 2**31
        json.dumps(contents.get("config"))
    except (TypeError, ValueError, RecursionError):  # Not what a configuration is made of.
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


def remove_older(newest: Path, keep: int) -> None:
    """Deletes a run's checkpoints before the last `keep` up to the newest (0: none). Later ones, which a resumed run
    skipped as damaged, do not count."""
    found = find_checkpoints(newest.parent)
    for path in found[: found.index(newest) + 1][:-keep] if keep else []:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path):
    """Turns an error of the file system, while a run writes to a path, into a line that says what is left."""
    try:
        yield
    except OSError as error:
        raise CannotWrite(
            f"{path}: cannot be written ({error.strerror or error}); the checkpoints in {path.parent} are whole: make"
            " room there and type resume=auto (no overwrite)"
        ) from None


_held_locks: list = []


def lock_folder(run_dir: Path) -> None:
    """Keeps other processes from writing to a run's folder until `unlock_folder`, or until this process ends, however
    it does. Raises `UsageError` if another run is at work there."""
    unlock_folder()
    file = open(run_dir / ".lock", "a+", errors="replace")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UsageError(
            f"{run_dir}: expected a folder that no other run writes to, and {file.read() or 'another one'} is at work"
            " there; wait for its end, or choose another save_dir or seed"
        ) from None
    except OSError as error:
        print(f"{run_dir} cannot be locked here ({error.strerror}): start no second run in it")
    _held_locks.append(file)
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} of {platform.node()}")
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from None


def unlock_folder() -> None:
    while _held_locks:
        _held_locks.pop().close()


def newest_sound(checkpoints: list[Path], env_id: str) -> dict:
    """The newest checkpoint that can be read, of some, oldest first; says which it skips. Raises `UsageError`."""
    for path in reversed(checkpoints[1:]):
        try:
            return read_checkpoint(path, METHOD, env_id)
        except DamagedFile as error:
            print(f"Skipped {str(error).rpartition(';')[0]}")
    try:
        return read_checkpoint(checkpoints[0], METHOD, env_id)
    except DamagedFile as error:
        found = str(error).rpartition(";")[0]
        raise UsageError(
            f"{found}, and no other is sound; type overwrite=true (without resume) to start again"
        ) from None


def prepare_run(config: RunConfig) -> dict | None:
    """Applies `resume` and `overwrite`: returns the checkpoint to continue from, None for a fresh start.

    Raises `UsageError` if files of an earlier run are in the way. Makes and deletes nothing: `take_folder` does."""
    run_dir = config.run_dir()
    with using(config):
        if (run_dir / ".lock").exists() and os.access(run_dir, os.W_OK):
            lock_folder(run_dir)  # Before its files are looked at.
        earlier = find_checkpoints(run_dir)
        files = [*earlier, *run_dir.glob("metrics.jsonl")]
    checkpoint, in_the_way = None, []
    if config.resume == "auto" and earlier:
        checkpoint = newest_sound(earlier, config.env_id)
    elif config.resume and config.resume != "auto":
        checkpoint = read_checkpoint(config.resume, METHOD, config.env_id)
        if Path(config.resume).resolve().parent == run_dir.resolve():
            in_the_way = [path for path in earlier if int(path.stem[5:]) > checkpoint["iteration"]]
        else:
            in_the_way = files
            checkpoint["wandb_id"] = uuid.uuid4().hex[:8]  # A branch is a run of its own.
    elif not config.overwrite and config.resume != "auto":
        in_the_way = files
    if in_the_way:
        raise UsageError(
            f"{in_the_way[-1]} of an earlier run would be lost; type resume=auto to continue from the newest checkpoint"
            " there, overwrite=true (without resume) to delete the run, or another save_dir"
        )
    return checkpoint


def take_folder(config: RunConfig) -> None:
    """Makes and locks the run's folder, and deletes what a killed run left half-written there, and the whole of an
    earlier run for `overwrite`. Raises `UsageError`."""
    run_dir = config.run_dir()
    with using(config):
        run_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(run_dir, os.W_OK):
            raise PermissionError(f"no permission to write in {run_dir}")
        if not _held_locks:
            lock_folder(run_dir)
        earlier = [*find_checkpoints(run_dir), *run_dir.glob("metrics.jsonl")] if config.overwrite else []
        for file in [*run_dir.glob(".*.tmp"), *earlier]:
            file.unlink()


@contextlib.contextmanager
def using(config: RunConfig):
    """Turns an error of the file system, while a run starts, into a line."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"save_dir={config.save_dir}: cannot be used ({error}); make room, or choose another save_dir"
        ) from None


def check_fit(template: Any, saved: Any, hint: str) -> None:
    """Raises `UsageError` unless `saved` is a tree of arrays with the names, shapes and types of `template`."""
    describe = lambda tree: jax.tree.map(lambda x: (np.shape(x), str(getattr(x, "dtype", None))), tree)
    try:
        same = describe(saved) == describe(template)
    except (TypeError, ValueError):  # Names that do not compare, lists that are no arrays.
        same = False
    if not same:
        raise UsageError(f"resume: the checkpoint's arrays do not fit this configuration; {hint}")


def library_versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "dm-haiku", "optax", "mctx", "jumanji", "numpy")
    return {"python": sys.version.split()[0]} | {name: metadata.version(name) for name in names}


# ======================================================================================================================
# Run log (twin section: the same in both training scripts)
# ======================================================================================================================


class RunLog:
    """`metrics.jsonl` in the run's folder, a progress bar, and Weights & Biases where it works."""

    def __init__(self, config: RunConfig, start_iteration: int, wandb_id: str):
        run_dir = config.run_dir()
        run_dir.mkdir(parents=True, exist_ok=True)
        self.path = run_dir / "metrics.jsonl"
        temporary = run_dir / ".metrics.jsonl.tmp"
        temporary.write_text("".join(_rows_up_to(self.path, start_iteration) if start_iteration else []))
        os.replace(temporary, self.path)
        self._file = open(self.path, "a", buffering=1)
        self._wandb = _start_wandb(config, run_dir, wandb_id)
        self.bar = tqdm.tqdm(total=config.max_num_iters, initial=start_iteration, unit="it", disable=None)

    def say(self, line: str) -> None:
        """A line that stays above the progress bar."""
        self.bar.write(line)

    def advance(self, line: str) -> None:
        """One iteration more on the progress bar, with a line that stands beside it."""
        self.bar.set_postfix_str(line)
        self.bar.update()

    def record(self, row: dict[str, float]) -> None:
        """One row an iteration: `iteration`, `frames` (decisions so far), `hours`, and the metrics."""
        with writing(self.path):
            finite = {key: value if math.isfinite(value) else None for key, value in row.items()}  # As JSON has it.
            self._file.write(json.dumps(finite) + "\n")
        if self._wandb is not None:
            try:
                self._wandb.log(row)
            except Exception as error:  # W&B is never the reason that training stops.
                self.say(_without_wandb("stopped", error, self.path))
                self._wandb = None

    def sync(self) -> None:
        """Rows reach the disk before the checkpoint that continues after them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.bar.close()
        with contextlib.suppress(OSError):  # Said when the row was written.
            self._file.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                print(_without_wandb("did not finish", error, self.path))


class NoLog:
    """The log of a process that is not the first: the first one writes for all."""

    say = advance = record = sync = close = lambda self, *_: None


def _rows_up_to(path: Path, iteration: int) -> list[str]:
    """The lines of an earlier log up to an iteration; what came after its checkpoint will be made again."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            if json.loads(line)["iteration"] <= iteration:
                rows.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # A line torn by a crash.
            continue
    return rows


def _start_wandb(config: RunConfig, run_dir: Path, run_id: str):
    """A W&B run, online if the user has set it up and offline if not; the user's WANDB_* settings win."""
    settings = dict(
        WANDB_PROJECT=("project", config.wandb_project),
        WANDB_NAME=("name", "/".join(run_dir.parts[-3:])),
        WANDB_RUN_GROUP=("group", "/".join(run_dir.parts[-3:-1])),
        WANDB_RUN_ID=("id", run_id),
        WANDB_RESUME=("resume", "allow"),
        WANDB_DIR=("dir", str(run_dir)),
    )
    arguments = dict(value for variable, value in settings.items() if variable not in os.environ)
    try:
        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False, verify=False):
            arguments["mode"] = "offline"
        quiet = {} if "WANDB_CONSOLE" in os.environ else {"console": "off"}
        arguments |= dict(config=config.model_dump() | {"method": METHOD}, settings=wandb.Settings(**quiet))
        try:
            run = wandb.init(**arguments)
        except wandb.errors.CommError as error:
            print(f"W&B cannot be reached ({_first_line(error)}): offline, and `wandb sync` uploads it later")
            run = wandb.init(**arguments | {"mode": "offline"})
        for axis in ("iteration", "frames", "hours"):
            run.define_metric(axis)
        run.define_metric("*", step_metric="iteration")
        return run
    except Exception as error:  # W&B is never the reason that training stops.
        print(_without_wandb("did not start", error, run_dir / "metrics.jsonl"))
        return None


def _without_wandb(what: str, error: Exception, log: Path) -> str:
    with contextlib.suppress(Exception):
        wandb.teardown()  # Else what is left of it raises at the end of the process.
    line = f"W&B {what} ({_first_line(error)}); training goes on, and"
    return f"{line} `wandb.log` of each line of {log} uploads it later"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


class StopRequest:
    """Ctrl-C or SIGTERM: the first asks to stop after the iteration, the second ends the process at once."""

    def __init__(self):
        self.made = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.made = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # print may not be re-entered.
            os.write(2, b"\nStopping after this iteration; once more to leave at once.\n")


# ======================================================================================================================
# Several processes (twin section: the same in both training scripts)
# ======================================================================================================================


JOIN_SECONDS = 120


def join_processes(config: RunConfig) -> None:
    """Makes this process one of several with JAX's own runtime; comes before the first use of a device.

    A process that hears nothing of another for half a minute ends; where they do not find together, JAX ends it after
    the time that the line below tells. Raises `UsageError` if there is no cluster, or for unequal configurations."""
    if not config.distributed:
        return
    keys = ("coordinator_address", "num_processes", "process_id")
    given = {}
    if config.coordinator_address:
        given = {key: getattr(config, key) for key in keys} | {"cluster_detection_method": "deactivate"}
        place = f"process {config.process_id} of {config.num_processes} waits for {config.coordinator_address}"
        print(f"{place}, up to {JOIN_SECONDS} s", flush=True)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=30,
            shutdown_timeout_seconds=30,
        )
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"distributed=true: the processes did not find together ({str(error).splitlines()[0]}); start all of them,"
            " by a cluster's launcher or with coordinator_address, num_processes and process_id"
        ) from None
    mine = config.model_dump(mode="json", exclude={"process_id"})
    theirs = from_first_process(mine)
    others = [f"{key}={_as_typed(mine[key])}, not {_as_typed(theirs[key])}" for key in mine if mine[key] != theirs[key]]
    if in_any_process(bool(others)):
        what = (
            f"process {jax.process_index()} was given {', '.join(others)}"
            if others
            else "another process was given others"
        )
        raise UsageError(f"distributed=true: expected the keys of process 0 in every process; {what}")


def from_first_process(value: Any) -> Any:
    """The plain value that process 0 has, in every process."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    return pickle.loads(multihost_utils.broadcast_one_to_all(np.resize(data, size)).tobytes())


def in_any_process(flag: bool) -> bool:
    """Whether a flag is set in any process; all have to ask together."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(flag)).any())


def on_first_process(function: Callable[[], Any]) -> Any:
    """What the function returns, called in process 0 alone. Where it raises `UsageError` every process ends."""
    result = error = None
    if jax.process_index() == 0:
        try:
            result = function()
        except UsageError as raised:
            error = raised
    if from_first_process(error is not None):
        raise error or SystemExit(2)  # Said once, by process 0.
    return from_first_process(result)


# ======================================================================================================================
# Main (twin section: the same in both training scripts)
# ======================================================================================================================


def estimate_seconds(env: BinPack, network: hk.TransformedWithState, config: RunConfig, state: TrainState) -> float:
    """Seconds of one iteration, from network passes and environment steps that all devices make at a time."""
    num_devices = jax.local_device_count()
    batch = min(64, config.rollout_batch_size // num_devices)
    starts = jax.vmap(env.reset)(jax.random.split(state.key, batch))
    predict, model = make_predict(network, config), Model(state.params, state.net_state)

    @jax.pmap
    @jax.vmap
    def visit(start):
        env_state, timestep = start
        logits, value = predict(model, timestep.observation)
        return step_flat(env, env_state, argmax(logits)), value

    starts = replicate(starts)
    jax.block_until_ready(visit(starts))
    start = time.perf_counter()
    jax.block_until_ready(visit(starts))
    seconds = (time.perf_counter() - start) / (batch * num_devices)
    return seconds * visits_per_decision(config) * config.rollout_batch_size * MAX_DECISIONS


def use_cpu_cores(*batch_sizes: int) -> None:
    """Makes every core a device of its own, if there is no accelerator: operations as small as ours run faster side by
    side than each of them split over the cores. As many as divide the batches and leave a device 16 rows; a number that
    the user has set for JAX wins. To be called before JAX starts its devices, and without effect after.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.config.jax_num_cpu_devices >= 0 or "device_count" in flags:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fitting = [n for n in range(1, cores + 1) if not any(size % n or size < 16 * n for size in batch_sizes)]
    # XLA ends a process whose devices wait for one another for more than a minute; ours may, over a long iteration.
    patience = "--xla_cpu_collective_call_terminate_timeout_seconds"
    if patience not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {patience}=86400".strip()
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", max(fitting, default=1))


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder (empty: does not); JAX's own variable wins."""
    if folder and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))


def train(config: RunConfig, preset: str) -> int:
    """Runs or resumes a training run; returns the exit status."""
    if not config.distributed:
        use_cpu_cores(config.rollout_batch_size, config.training_batch_size)
    join_processes(config)
    num_devices, is_first = jax.device_count(), jax.process_index() == 0
    for key in ("rollout_batch_size", "training_batch_size"):
        value = getattr(config, key)
        if value % num_devices:
            nearest = max(round(value / num_devices), 1) * num_devices
            raise UsageError(f"{key}={value}: expected a multiple of the {num_devices} devices; type {key}={nearest}")
    use_compilation_cache(config.compilation_cache_dir)
    stop = StopRequest()
    if not is_first:
        sys.stdout = None  # The first process speaks, and writes, for all.
    checkpoint = on_first_process(lambda: prepare_run(config))
    env, network = make_env(), make_network(config)
    state = init_train_state(env, network, config)
    frames, seconds_before, wandb_id = 0, 0.0, uuid.uuid4().hex[:8]
    if checkpoint:
        changed = {
            key: (_as_typed(checkpoint["config"].get(key)), _as_typed(value))
            for key, value in config.model_dump(mode="json").items()
            if checkpoint["config"].get(key) != value and key not in NOT_OF_THE_RESULT
        }
        (params, net_state), opt_leaves = checkpoint["model"], checkpoint["opt_state"]
        of_network = [
            f"{key}={old}" for key, (old, _) in changed.items() if "transformer" in key or key == "pair_units"
        ]
        hint = " ".join(["type", *of_network]) if of_network else "give another one"
        if not opt_leaves:
            hint = "it is for evaluation, without the optimizer's state; give one that a run saved"
        expected, opt_tree = jax.tree.flatten(state.opt_state)
        check_fit((state.params, state.net_state, expected), (params, net_state, opt_leaves), hint)
        opt_state = jax.tree.unflatten(opt_tree, opt_leaves)
        state = TrainState(params, net_state, opt_state, state.key, jnp.int32(checkpoint["iteration"]))
        frames, seconds_before, wandb_id = checkpoint["frames"], checkpoint["seconds"], checkpoint["wandb_id"]
        if checkpoint["iteration"] >= config.max_num_iters:
            print(f"Complete: {checkpoint['iteration']} iterations are done; a larger max_num_iters continues.")
            return 0
        for key, (old, new) in changed.items():
            print(f"{key} changes from {old} to {new}")
    iteration = int(state.iteration)
    on_first_process(lambda: take_folder(config))

    run_dir, num_params = config.run_dir(), sum(x.size for x in jax.tree.leaves(state.params))
    kind = f"{num_devices} x {jax.devices()[0].device_kind}"
    print(f"{run_dir}: {num_params:,} parameters, {kind}, from iteration {iteration}")
    if jax.default_backend() == "cpu" and preset == "full":
        seconds = estimate_seconds(env, network, config, state)
        print(
            f"No accelerator: an iteration will take about {seconds:,.1f} s here, {config.max_num_iters} of them"
            f" {seconds * config.max_num_iters / 3600:,.1f} h. preset=cpu is a complete run for two cores."
        )

    with writing(run_dir / "metrics.jsonl"):
        log = RunLog(config, iteration, wandb_id) if is_first else NoLog()
    state = replicate(state)
    iterate = jax.pmap(make_train_iteration(env, network, config), axis_name=DEVICES, donate_argnums=0)
    evaluate = make_evaluate(env, network, config)
    start = saved_at = time.perf_counter()
    saved_iteration = iteration

    def evaluation_metrics() -> dict[str, float]:
        metrics = {}
        for name, episodes in evaluate(Model(state.params, state.net_state), iteration).items():
            results = summarise(episodes)
            log.say(
                f"iteration {iteration:5d}  {frames:10,} decisions  {elapsed() / 60:6.1f} min  {name:6}  utilisation"
                f" {results['avg_return']:.4f} +- {results['avg_return_se']:.4f}, filled {results['solved_rate']:.1%},"
                f" {results['packed_items']:.2f} items"
            )
            metrics |= {f"eval/{name}/{key}": value for key, value in results.items()}
        return metrics

    def elapsed() -> float:
        return seconds_before + time.perf_counter() - start

    def save() -> None:
        nonlocal saved_at, saved_iteration
        saved_at, saved_iteration = time.perf_counter(), iteration
        if not is_first:
            return
        model = host_copy(Model(state.params, state.net_state))
        contents = dict(
            format_version=FORMAT_VERSION,
            method=METHOD,
            iteration=iteration,
            frames=frames,
            seconds=elapsed(),
            model=(model.params, model.state),
            config=config.model_dump(mode="json"),
            opt_state=jax.tree.leaves(host_copy(state.opt_state)),
            wandb_id=wandb_id,
            versions=library_versions(),
        )
        path = run_dir / f"iter_{iteration:06d}.pkl"
        with writing(path):
            log.sync()
            write_checkpoint(path, contents)
            remove_older(path, config.keep_checkpoints)

    def give_up(metrics: dict[str, float]) -> None:
        name = next((key for key, value in metrics.items() if not math.isfinite(value)), "the loss")
        saved = run_dir / f"iter_{saved_iteration:06d}.pkl" if saved_iteration else "none"
        raise UsageError(
            f"iteration {iteration}: {name} is not finite, and {in_a_row} updates in a row were left out; the last"
            f" checkpoint before that is {saved}; type a smaller learning_rate, and"
            " resume=auto or overwrite=true"
        )

    stopped = in_any_process(stop.made)
    in_a_row, save_due = 0, False  # None is saved while updates are left out.
    try:
        if iteration and not (run_dir / f"iter_{iteration:06d}.pkl").exists():
            save()  # A branch: resume=auto continues it from now on.
        if iteration == 0 and not stopped:
            log.record({"iteration": 0, "frames": 0, "hours": 0.0} | evaluation_metrics())
        while iteration < config.max_num_iters and not stopped:
            began = time.perf_counter()
            state, metrics = iterate(state)
            metrics = {name: float(x) for name, x in host_copy(metrics).items()}  # Waits for the iteration.
            seconds = time.perf_counter() - began
            iteration += 1
            decisions, in_a_row = int(metrics.pop("decisions")), int(metrics.pop("skipped_in_a_row"))
            frames += decisions
            metrics |= {"perf/decisions_per_second": decisions / seconds, "perf/iteration_seconds": seconds}
            hours = elapsed() / 3600  # An evaluation counts for what comes after it.
            log.record({"iteration": iteration, "frames": frames, "hours": hours} | metrics | evaluation_metrics())
            if in_a_row >= config.max_skipped_updates:
                on_first_process(functools.partial(give_up, metrics))
            is_late = 0 < 60 * config.save_minutes < time.perf_counter() - saved_at
            save_due |= is_late or is_due(config, iteration, config.save_interval)
            if save_due and not in_a_row:
                save()
                save_due = False
            log.advance(
                f"return {metrics['rollout/avg_return']:.3f}, loss {metrics['train/policy_loss']:.3f},"
                f" {metrics['perf/decisions_per_second']:,.0f} decisions/s"
            )
            stopped = in_any_process(stop.made)
        if iteration != saved_iteration and not in_a_row:
            save()
    finally:
        log.close()
    if in_a_row:
        print(f"Not saved after iteration {saved_iteration}: the last {in_a_row} updates were left out as not finite.")
    if stopped and iteration < config.max_num_iters:
        print(f"Stopped at iteration {iteration}; the same command with resume=auto (no overwrite) continues.")
    elif not in_a_row:
        print(f"Done: {run_dir}/iter_{saved_iteration:06d}.pkl")
    return 0


def main(argv: list[str]) -> int:
    """The command line: 0 for a finished or cleanly stopped run, 2 with one line for a user's mistake."""
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__, Config, PRESETS))
        return 0
    try:
        config, preset = parse_command_line(argv, Config, PRESETS)
        return train(config, preset)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, CannotWrite) and jax.process_count() > 1:
            os._exit(2)  # As below.
        return 2
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            print(
                "error: a device has not enough memory; type a smaller rollout_batch_size", file=sys.stderr, flush=True
            )
            if jax.process_count() == 1:
                return 2
            os._exit(2)
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0]
        print(f"error: a process of this run ended ({reason}); start all again with resume=auto", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)  # An orderly exit would wait for the other processes.
    except Exception as error:
        if isinstance(error, OSError) and jax.process_count() == 1:  # Standard output, mostly.
            print(f"error: {error}; type resume=auto to continue from the last checkpoint", file=sys.stderr)
            return 2
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        os._exit(1)
    finally:
        unlock_folder()


if __name__ == "__main__":
    # A log in a file is read while the run goes on; a path may hold what the terminal cannot show.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
