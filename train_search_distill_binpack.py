"""Search distillation on 3D bin packing: AlphaZero-style policy iteration on Jumanji's BinPack-v2.

Every iteration, on the devices and inside one `pmap`:

1. collect    A batch of episodes is played. At each state Gumbel MuZero search over the true dynamics improves the
              policy network's distribution, and the search's action is taken. `improvement` names other operators.
2. target     Policy: the search's action weights. Value: the Monte-Carlo return of the episode.
3. distil     The network is trained on both: cross-entropy plus squared error. The next search starts from there.
              With `min_target_kl`, only on decisions that the search moved.

Shapes: B episodes, T steps, E empty maximal spaces (EMS), I items, A = E x I flat actions `ems * I + item`,
K searched actions, D model width, H attention heads, N simulations, M minibatch, P blocks.
Command line, files, log, W&B, devices, playing and scoring live in `evaluate.py`, which both scripts share.

    python train_search_distill_binpack.py preset=cpu               # two CPU cores
    python train_search_distill_binpack.py                          # an accelerator
    python train_search_distill_binpack.py --num_simulations 64 --seed 42 learning_rate=1e-4
    python train_search_distill_binpack.py --help                   # every key, its default and its meaning
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

import haiku as hk
import jax
import jax.numpy as jnp
import mctx
import optax
import tqdm
from jax.flatten_util import ravel_pytree
from jax.scipy.special import entr
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

import evaluate as ev
from evaluate import DEVICES, Observation, Policy, UsageError, device_slice, host_copy, replicate

if TYPE_CHECKING:
    from jumanji.environments import BinPack
    from jumanji.environments.packing.bin_pack.types import EMS, State
    from jumanji.types import TimeStep

METHOD = "search_distill"
psum = functools.partial(jax.lax.psum, axis_name=DEVICES)


# =================================================== Configuration ====================================================
class Config(ev.Sizes):
    """Every key of a run, with its type, limits, default and meaning. The first are those of `evaluate.Sizes`."""

    # The run.
    seed: ev.Seed = Field(0, description="seed of parameters, instances, noise and shuffling")
    max_num_iters: PositiveInt = Field(800, description="iterations of collecting and learning")
    rollout_batch_size: PositiveInt = Field(1024, description="episodes an iteration, over all devices")
    discount: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1.0, description="discount of rewards")
    # Search, the policy improvement of collection. Evaluations with search are played by Gumbel MuZero search.
    improvement: str = Field("gumbel", description="a name in IMPROVEMENTS: gumbel, alphazero, treepi or best_of_n")
    num_simulations: PositiveInt = Field(
        32, description="simulations a decision (treepi: rollouts, one at depth 1; best_of_n: sampled episodes)"
    )
    leaf_value: Literal["network", "completion"] = Field(
        "completion",
        description="value of a new node: the value head's, or the return of completing the episode greedily",
    )
    search_width: PositiveInt = Field(64, description="actions of highest prior that a search node keeps")
    max_num_considered_actions: PositiveInt = Field(16, description="root actions that sequential halving starts with")
    gumbel_scale: NonNegativeFloat = Field(1.0, description="scale of the Gumbel noise in collection (evaluation: 0)")
    value_scale: PositiveFloat = Field(0.5, description="scale of Q in the search's policy improvement")
    maxvisit_init: NonNegativeFloat = Field(50.0, description="visits added to the largest count in the scale of Q")
    rescale_values: bool = Field(False, description="rescale the Q of each node to [0, 1] before it is scaled")
    c_puct: PositiveFloat = Field(1.25, description="alphazero: weight of the prior in pUCT")
    dirichlet_alpha: PositiveFloat = Field(0.3, description="alphazero: concentration of the noise at the root")
    dirichlet_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.25, description="alphazero: share of that noise in the root's prior"
    )
    acting_temperature: PositiveFloat = Field(1.0, description="alphazero: actions are drawn from visits^(1/this)")
    num_workers: PositiveInt = Field(1, description="alphazero: workers on one tree; leaves are evaluated together")
    num_sampled_actions: PositiveInt = Field(8, description="treepi: actions that a rollout samples and evaluates")
    search_depth: PositiveInt = Field(3, description="treepi: moves that a rollout looks ahead (1: as MPO)")
    soft_temperature: PositiveFloat = Field(0.04, description="treepi: alpha, in units of the return")
    # Learning.
    min_target_kl: NonNegativeFloat = Field(
        0.01, description="learn only from decisions whose KL(target || prior) is at least this, in nats (see README)"
    )
    training_batch_size: PositiveInt = Field(4096, description="decisions in a minibatch, over all devices")
    num_epochs: PositiveInt = Field(2, description="epochs, each of as many minibatches as all decisions would fill")
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0)] = Field(1e-3, description="step size of Adam")
    learning_rate_decay_iters: NonNegativeInt = Field(800, description="iterations of cosine decay to 0 (0: none)")
    loss: Literal["cross_entropy", "cispo"] = Field(
        "cross_entropy", description="to the search's distribution, or a policy gradient along its actions"
    )
    epsilon_high: PositiveFloat = Field(5.0, description="cap of the importance weights (loss=cispo)")
    kl_penalty: NonNegativeFloat = Field(0.05, description="cispo: weight of KL(acting || new policy) in the loss")
    max_policy_kl: NonNegativeFloat = Field(0.0, description="mean KL(acting || new) that is aimed at, nats (0: none)")
    value_target: Literal["return", "search"] = Field("return", description="returns, or the root's searched value")
    value_loss_weight: NonNegativeFloat = Field(1.0, description="weight of the value's squared error in the loss")
    max_grad_norm: PositiveFloat = Field(1.0, description="global norm to which gradients are clipped")
    max_skipped_updates: PositiveInt = Field(100, description="the run ends after so many skipped updates in a row")
    permute_axes: bool = Field(True, description="train under random permutations of the axes, a symmetry of the task")
    # Network.
    num_transformer_layers: PositiveInt = Field(4, description="transformer layers")
    transformer_num_heads: PositiveInt = Field(4, description="attention heads H")
    transformer_key_size: PositiveInt = Field(32, description="size of a head; the model width D is heads x key size")
    transformer_mlp_units: ev.Units = Field((256, 256), description="hidden units of a layer's MLP")
    pair_units: PositiveInt = Field(32, description="units of the per-pair layer in the policy head")
    token_sizes: tuple[tuple[PositiveInt, PositiveInt], ...] = Field(
        ((8, 12), (16, 20), (40, 20)), description="numbers of [spaces, items] that the network is compiled for"
    )
    # Evaluation, log and files.
    eval_interval: PositiveInt = Field(20, description="iterations between evaluations of the greedy policy")
    eval_batch_size: Annotated[int, Field(ge=2, le=10**7)] = Field(1024, description="evaluation instances")
    eval_seed: ev.Seed = Field(1_000_000, description="seed that fixes the evaluation instances")
    eval_num_simulations: NonNegativeInt = Field(32, description="simulations of evaluation with search (0: none)")
    eval_value_scale: NonNegativeFloat = Field(10.0, description="scale of Q in that search (0: value_scale)")
    eval_search_interval: NonNegativeInt = Field(0, description="iterations between evaluations with search (0: last)")
    save_dir: ev.Folder = Field("./checkpoints", description="folder of all runs")
    save_interval: PositiveInt = Field(20, description="iterations between checkpoints; the last is always saved")
    save_minutes: NonNegativeFloat = Field(10.0, description="minutes until a checkpoint is saved anyway (0: never)")
    keep_checkpoints: NonNegativeInt = Field(0, description="newest checkpoints that are kept (0: all)")
    resume: ev.UserPath = Field("", description="'auto' (this run's newest checkpoint, if any) or a checkpoint's path")
    init_from: ev.UserPath = Field(
        "", description="checkpoint or run folder, of any sizes, whose weights a fresh run starts with"
    )
    overwrite: bool = Field(False, description="delete this run's earlier checkpoints and log, and start again")
    wandb_project: str = Field("jumanji-binpack", min_length=1, description="Weights & Biases project")
    compilation_cache_dir: ev.LocalPath = Field(ev.CACHE_DIR, description="folder for compiled programs (empty: none)")
    # Several processes. The last three are found under Slurm, Open MPI and Kubernetes and on TPU pods.
    distributed: bool = Field(False, description="this process is one of several that make one run together")
    coordinator_address: str = Field("", description="host:port of process 0, elsewhere")
    num_processes: NonNegativeInt = Field(0, description="number of processes, elsewhere")
    process_id: NonNegativeInt = Field(0, description="number of this process from 0, elsewhere")

    # Keys of one operator or loss, and what each needs: without it, `parse_command_line` takes the default alone.
    needs: ClassVar = dict(gumbel_scale="improvement=gumbel", epsilon_high="loss=cispo", kl_penalty="loss=cispo")
    needs |= dict.fromkeys(("c_puct", "dirichlet_alpha", "dirichlet_fraction", "acting_temperature", "num_workers"),
                           "improvement=alphazero")  # fmt: skip
    needs |= dict.fromkeys(("num_sampled_actions", "search_depth", "soft_temperature"), "improvement=treepi")

    def run_dir(self) -> Path:
        method = ("" if self.improvement == "gumbel" else f"{self.improvement}_") + f"nsim_{self.num_simulations}"
        return Path(self.save_dir) / self.env_name / method / ev.sweep_trial() / f"seed_{self.seed}"

    def is_due(self, iteration: int, interval: int) -> bool:
        """Whether a task of every `interval` iterations, and of the last one, is due. interval=0: of the last alone."""
        return iteration == self.max_num_iters or (interval > 0 and iteration % interval == 0)

    @model_validator(mode="after")
    def _keys_fit_together(self) -> Self:
        grow = all(a <= c and b <= d and (a, b) != (c, d) for (a, b), (c, d) in itertools.pairwise(self.token_sizes))
        if not grow:
            what = f"token_sizes={ev.as_typed(self.token_sizes)}: expected sizes that each hold the one before"
            raise ValueError(f"{what}, none twice; for example token_sizes=[[8,12],[40,20]]")
        rows, last = self.rollout_batch_size * self.max_decisions, self.max_num_iters
        if self.training_batch_size > rows:
            what = f"expected at most {self.max_decisions} x rollout_batch_size = {rows}, an iteration's decisions"
            raise ValueError(f"training_batch_size={self.training_batch_size}: {what}; type training_batch_size={rows}")
        if 0 < self.learning_rate_decay_iters < last:
            what = f"learning_rate_decay_iters={self.learning_rate_decay_iters}: expected 0 or at least max_num_iters"
            raise ValueError(f"{what}, since nothing is learned at rate 0; type learning_rate_decay_iters={last}")
        if self.improvement not in IMPROVEMENTS:
            what = f"improvement={self.improvement}: expected one of {', '.join(IMPROVEMENTS)}"
            raise ValueError(f"{what}; type improvement=gumbel")
        if self.improvement == "alphazero" and self.num_simulations % self.num_workers:
            what = f"num_workers={self.num_workers}: expected a divisor of num_simulations={self.num_simulations}"
            raise ValueError(f"{what}; type num_workers={math.gcd(self.num_simulations, self.num_workers)}")
        if self.resume and (self.overwrite or (self.init_from and self.resume != "auto")):
            other = "overwrite=true" if self.overwrite else "init_from"
            raise ValueError(f"resume={self.resume} and {other} exclude each other; drop one of them")
        several = self.coordinator_address or self.num_processes or self.process_id
        is_address = re.fullmatch(r"\S+:\d+", self.coordinator_address)
        if several and not (self.distributed and is_address and self.process_id < self.num_processes):
            keys = "distributed=true coordinator_address=HOST:PORT num_processes=2 process_id=0"
            raise ValueError(f"expected all or none of {keys}, process_id below num_processes; type all of these")
        return self


PRESETS = {  # As one would type them.
    "full": "",
    "cpu": "max_num_iters=100 rollout_batch_size=64 num_simulations=4 max_num_considered_actions=4"
    " training_batch_size=256 learning_rate=4e-3 learning_rate_decay_iters=100 num_transformer_layers=1"
    " transformer_num_heads=4 transformer_key_size=8 transformer_mlp_units=[64] eval_interval=10 save_interval=10",
    # Meant for init_from with a network trained on 20 items.
    "cpu_50": "max_num_items=50 max_num_ems=80 max_num_iters=20 rollout_batch_size=64 num_simulations=4"
    " max_num_considered_actions=4 training_batch_size=256 learning_rate=1e-3 learning_rate_decay_iters=20"
    " num_transformer_layers=1 transformer_num_heads=4 transformer_key_size=8 transformer_mlp_units=[64]"
    " eval_interval=4 eval_batch_size=256 eval_num_simulations=4 save_interval=4",
}


# ================================ Environment (twin section: the same in both scripts) ================================
def make_env(sizes: ev.Sizes, generator: Any = None) -> BinPack:
    """Jumanji's BinPack, bit for bit, of random instances or a generator's. States and observations have a field more,
    the blocks that items make together. The EMSs' update has no sequential loop."""
    with ev.importing_jumanji():
        from jumanji.environments import BinPack

    class FastBinPack(BinPack):
        reset, step = ev.usual_numbers()(BinPack.reset), ev.usual_numbers()(BinPack.step)

        def _update_ems(self, state: State, item_id: jax.Array) -> State:
            state.ems, state.ems_mask = ev.update_ems(state, item_id)
            return state

        def _get_set_of_largest_ems(self, ems: EMS, ems_mask: jax.Array) -> tuple[EMS, jax.Array, jax.Array]:
            indexes = ev.decreasing_order(ems.volume() * ems_mask)
            shown = indexes[: self.obs_num_ems]
            return jax.tree.map(lambda x: x[shown], ems), ems_mask[shown], indexes

        def _make_observation_and_extras(self, state: State) -> tuple[State, Observation, dict]:
            state, observation, extras = super()._make_observation_and_extras(state)
            if not hasattr(state, "blocks"):  # After a reset.
                state = ev.state_with_blocks()(state, observation)
            return state, Observation(*observation, blocks=state.blocks), extras

    return FastBinPack(generator or ev.random_generator(sizes), obs_num_ems=sizes.obs_num_ems)


def step_flat(env: BinPack, state: State, action: jax.Array) -> tuple[State, TimeStep]:
    """`env.step` with a flat action `ems * I + item`, int32 []. A state without legal actions absorbs any action: it
    stays as it is and the reward is 0."""
    return env.step(state, jnp.stack(jnp.divmod(action, env.generator.max_num_items)))


def has_legal_action(observation: Observation) -> jax.Array:
    """Whether any action is legal, shape [...]. BinPack ends exactly when none is."""
    return observation.action_mask.any((-2, -1))


def legal_actions(observation: Observation) -> jax.Array:
    """Legal flat actions, bool [..., A]. A finished row gets entry 0, so that no row is empty."""
    mask = observation.action_mask.reshape(*observation.action_mask.shape[:-2], -1)
    return mask | ((jnp.arange(mask.shape[-1]) == 0) & ~mask.any(-1, keepdims=True))


def permute_axes(observation: Observation, permutation: jax.Array) -> Observation:
    """Relabels the axes of an observation by one of the six permutations, int [] in [0, 6), a symmetry of the task in
    normalised coordinates: legal actions, their order and rewards stay the same."""
    axes = jnp.array(list(itertools.permutations(range(3))))[permutation]
    ems, items = observation.ems, observation.items
    lower = jnp.stack([ems.x1, ems.y1, ems.z1])[axes]
    upper = jnp.stack([ems.x2, ems.y2, ems.z2])[axes]
    ems = ems.replace(x1=lower[0], x2=upper[0], y1=lower[1], y2=upper[1], z1=lower[2], z2=upper[2])
    blocks = observation.blocks._replace(length=observation.blocks.length[axes])
    return observation._replace(ems=ems, items=type(items)(*jnp.stack(items)[axes]), blocks=blocks)


# ================================== Network (twin section: the same in both scripts) ==================================
CHUNK = 8  # Blocks C compared with the items at a time, as bits of an int32: at most 31. Measured on a CPU.
MASKED = -1e9  # The logit of an illegal action: its probability is 0, and being finite it makes no gradient NaN.


class Tokens(NamedTuple):
    """The E spaces and I items that legal actions use, gathered from the observation's slots; zeros fill them up. And
    the P blocks of the instance."""

    legal: jax.Array  # bool [..., E, I]
    lower: jax.Array  # [..., E, 3], corners of the spaces
    upper: jax.Array  # [..., E, 3]
    item: jax.Array  # [..., I, 3], lengths of the items
    open_volume: jax.Array  # [...], of the items that still fit somewhere
    block: jax.Array  # [..., 3, P], lengths of the blocks
    possible: jax.Array  # bool [..., P], there is such a block, and all its items are still to be placed
    uses: jax.Array  # int16 [..., I', P], how many items of each kind a block uses; as many kinds as slots of items
    kind: jax.Array  # int32 [..., I], of the items; 0 fills up
    waiting: jax.Array  # int32 [..., I], how many of the item's kind are still to be placed


class PackingNetwork(hk.Module):
    """Transformer over EMS and item tokens with a policy over their pairs and a bounded value.

    Spaces and items attend to their own kind, then to each other along legal actions. Full packings are made of exact
    fits, which no bilinear form of embeddings can see; so the relations of each (space, item) pair are given to the
    cross-attention, as a bias, and to the policy head.

    Only what some legal action uses is a token. Spaces shrink and items go, so a space or an item without a legal
    action never regains one, and good play leaves few tokens. The network is compiled for several numbers of them,
    `token_sizes`, each of which holds the one before, and a batch runs at the first size that holds all of its rows.
    """

    def __init__(self, config: Config, name: str = "packing_network"):
        super().__init__(name=name)
        self.config = config

    def __call__(self, observation: Observation, size: tuple[int, int] | None = None) -> tuple[jax.Array, jax.Array]:
        """Observation with leading dimensions [...] -> masked logits [..., A] and value [...], an estimate of the
        volume still to be packed: at most that of the items that still fit somewhere, 0 where no action is legal.
        `size` bounds the spaces and items that legal actions use in any row, by default those of the observation; E and
        I are those from here on. The parameters fit every size."""
        config = self.config
        tokens = gather_tokens(observation, size or observation.action_mask.shape[-2:])
        spaces, items, pairs, *same_kind = embed(config, tokens)
        layer = lambda spaces, items: transformer_layer(config, spaces, items, tokens.legal, pairs, *same_kind)
        # One program for all layers, with parameters [layers, ...]: it compiles as fast as one layer.
        spaces, items = hk.layer_stack(config.num_transformer_layers, name="layers")(layer)(spaces, items)
        spaces, items = _norm(spaces, "ems_final_norm"), _norm(items, "items_final_norm")
        logits, hidden = policy_head(config, spaces, items, pairs, tokens.legal)
        return scatter_logits(logits, observation.action_mask), value_head(spaces, items, hidden, tokens)


def gather_tokens(observation: Observation, size: tuple[int, int]) -> Tokens:
    """The tokens of an observation [...], as many as `size` says."""
    ems, legal = observation.ems, observation.action_mask
    # The slots that legal actions use, in order, filled up with a slot that is out of range and reads as zero.
    slots = [(jnp.cumsum(legal.any(-1 - i), -1)[..., None] <= jnp.arange(n)).sum(-2) for i, n in enumerate(size)]
    rows, columns = slots[0][..., :, None], slots[1][..., None, :]
    take = functools.partial(jnp.take_along_axis, mode="fill", fill_value=0)
    legal = take(take(legal, rows, -2), columns, -1)
    corners = jnp.stack([ems.x1, ems.y1, ems.z1, ems.x2, ems.y2, ems.z2], -1)
    lower, upper = jnp.split(take(corners, rows, -2), 2, -1)
    item = take(jnp.stack(list(observation.items), -1), slots[1][..., None], -2)
    length, uses, kind = observation.blocks
    open_volume = (item.prod(-1) * legal.any(-2)).sum(-1)
    is_of_kind = kind[..., None, :] == jnp.arange(kind.shape[-1])[:, None]
    is_waiting = (observation.items_mask & ~observation.items_placed)[..., None, :]
    waiting = (is_of_kind & is_waiting).sum(-1)  # [..., I'], items of each kind
    possible = (uses <= waiting[..., None]).all(-2) & (length > 0).any(-2)
    kind = take(kind, slots[1], -1)
    return Tokens(legal, lower, upper, item, open_volume, length, possible, uses, kind, take(waiting, kind, -1))


def embed(config: Config, tokens: Tokens) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Embeddings of spaces [..., E, D] and items [..., I, D], and the relations of (space, item) pairs [..., E, I, F],
    of pairs of spaces [..., E, E, F'] and of pairs of items [..., I, I, F"]."""
    width = config.transformer_num_heads * config.transformer_key_size
    legal, lower, upper, item, open_volume = tokens[:5]
    space = upper - lower
    space_volume, item_volume = space.prod(-1), item.prod(-1)

    def linear(lengths: list[jax.Array], volume: jax.Array, name: str) -> jax.Array:
        still_open = jnp.broadcast_to(open_volume[..., None], volume.shape)
        scalars = [x[..., None] for x in (jnp.cbrt(volume), volume, still_open)]
        return hk.Linear(width, name=name)(jnp.concatenate([*lengths, *scalars], -1))

    spaces = linear([lower, upper, space], space_volume, "embed_ems")
    items = linear([item], item_volume, "embed_items")
    pairs = space_item_relations(space, item, space_volume, item_volume, legal.any(-2))
    pairs = jnp.concatenate([pairs, end_relations(tokens)], -1)
    return spaces, items, pairs, space_space_relations(lower, upper), item_item_relations(item)


def space_item_relations(space, item, space_volume, item_volume, still_fits) -> jax.Array:
    """Relations of each (space, item) pair, [..., E, I, 12]: along each axis slack, exact fit, and whether the slack is
    the length of an item that still fits somewhere; whether two or three axes fit; share of the space's volume."""
    space, item = jnp.moveaxis(space, -1, 0), jnp.moveaxis(item, -1, 0)
    slack = space[..., :, None] - item[..., None, :]  # [3, ..., E, I]
    fits = _equal_length(slack)
    num_fits = fits.sum(0)
    share = item_volume[..., None, :] / jnp.maximum(space_volume[..., :, None], 1e-6)
    refill = _equals_any(slack, jnp.where(still_fits, item, jnp.inf))
    features = [*slack, *fits, num_fits == 2, num_fits == 3, jnp.minimum(share, 2.0), *refill]
    return jnp.moveaxis(jnp.stack([x.astype(jnp.float32) for x in features], -3), -3, -1)


def end_relations(tokens: Tokens) -> jax.Array:
    """Relations of each space and an item in its lower corner, [..., E, I, 10]: along each axis, whether the item ends
    where another space begins, and whether a block of other items, as wide and high as the space, fills exactly what it
    leaves of the space; whether a block that it is part of fits the space exactly along two axes, or three; and whether
    such a block ends along two axes, or three, with the space or where another space begins."""
    lower, upper, item = (jnp.moveaxis(x, -1, 0) for x in (tokens.lower, tokens.upper, tokens.item))  # [3, ..., n]
    begins = jnp.where(tokens.legal.any(-1), lower, -1.0)

    def in_corner(box: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What boxes [3, ..., C] leave of a space, [3, ..., E, C], and whether they end where another space begins."""
        end = lower[..., :, None] + box[..., None, :]
        return upper[..., :, None] - end, _equals_any(end, begins)

    def fitting_axes(block: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Axes along which blocks [3, ..., C] that go into a space are as long as it, bool [3, ..., E, C], and those
        along which they end with the space or where another one begins."""
        rest, flush = in_corner(block)
        x, y, z = rest > -ev.EQUAL
        return _equal_length(rest) & x & y & z, (_equal_length(rest) | flush) & x & y & z

    as_bits = lambda x: (x * 2 ** jnp.arange(CHUNK)).sum(-1)  # Bool [..., C] -> int32 [...]
    along_two = lambda x, y, z: (x & y) | (x & z) | (y & z)
    rest, flush = in_corner(item)  # [3, ..., E, I]

    # Few blocks end so along two axes. These alone are compared with the items, a chunk at a time. (`any` is slower.)
    ends = along_two(*fitting_axes(jnp.moveaxis(tokens.block, -2, 0))[1])  # [..., E, P]
    rank = jnp.cumsum(functools.reduce(jnp.logical_or, jnp.moveaxis(ends, -2, 0)) & tokens.possible, -1)

    def look_at_chunk(carry):
        start, fills, of_items = carry
        number = (rank[..., None] <= start + jnp.arange(CHUNK)).sum(-2, keepdims=True)  # [..., 1, C]; P: of length 0
        take = functools.partial(jnp.take_along_axis, indices=number, axis=-1, mode="fill", fill_value=0)
        block, uses = jnp.moveaxis(take(tokens.block), -2, 0), take(tokens.uses)  # [3, ..., C], [..., I', C]
        uses = jnp.take_along_axis(uses, tokens.kind[..., None], -2, mode="fill", fill_value=0)  # [..., I, C]
        (x, y, z), ends = fitting_axes(block)
        two_fit = as_bits(jnp.stack([y & z, x & z, x & y]))[..., None]  # [3, ..., E, 1]
        of_blocks = as_bits(jnp.stack([along_two(x, y, z), x & y & z, along_two(*ends), ends[0] & ends[1] & ends[2]]))
        is_beside, is_in = (as_bits(x)[..., None, :] for x in (uses < tokens.waiting[..., None], uses > 0))
        fitting = two_fit & is_beside  # [3, ..., E, I]
        for m in range(CHUNK):
            fills |= _equal_length(rest - block[..., m, None, None]) & ((fitting & 2**m) > 0)
        return start + CHUNK, fills, of_items | ((of_blocks[..., None] & is_in) > 0)

    most, none = rank[..., -1].max(initial=0), jnp.zeros_like(flush)
    init = 0, none, jnp.concatenate([none, none[:1]])
    _, *related = jax.lax.while_loop(lambda carry: carry[0] < most, look_at_chunk, init)
    return jnp.moveaxis(jnp.concatenate([flush, *related]), 0, -1).astype(jnp.float32)


def space_space_relations(lower, upper) -> jax.Array:
    """Relations of each pair of spaces, [..., E, E, 7]: along each axis, whether they begin and whether they end at the
    same place; whether they overlap."""
    same = [_equal_length(x[..., :, None, :] - x[..., None, :, :]) for x in (lower, upper)]
    reaches = (lower[..., :, None, :] < upper[..., None, :, :] - ev.EQUAL).all(-1, keepdims=True)
    overlap = reaches & jnp.swapaxes(reaches, -3, -2)
    return jnp.concatenate([*same, overlap], -1).astype(jnp.float32)


def item_item_relations(item) -> jax.Array:
    """Relations of each pair of items, [..., I, I, 5]: equal lengths along each axis, and on two or all axes."""
    equal = _equal_length(item[..., :, None, :] - item[..., None, :, :])
    num_equal = equal.sum(-1, keepdims=True)
    return jnp.concatenate([equal, num_equal == 2, num_equal == 3], -1).astype(jnp.float32)


def _equal_length(difference: jax.Array) -> jax.Array:
    """Whether two normalised lengths are the same."""
    return jnp.abs(difference) < ev.EQUAL


def _equals_any(length: jax.Array, others: jax.Array) -> jax.Array:
    """Whether lengths [..., n, m] are among others [..., k], 20 at a time: XLA does not vectorise 40 on a CPU."""
    count = others.shape[-1]
    if (num_passes := -(-count // 20)) > 1:
        parts = others[..., jnp.arange(-(-count // num_passes) * num_passes).reshape(num_passes, -1) % count]
        return jax.lax.map(lambda part: _equals_any(length, part), jnp.moveaxis(parts, -2, 0)).any(0)
    return functools.reduce(jnp.logical_or, (_equal_length(length - others[..., k, None, None]) for k in range(count)))


def transformer_layer(config, spaces, items, legal, pairs, space_pairs, item_pairs) -> tuple[jax.Array, jax.Array]:
    """Attention among spaces and among items, attention across along legal actions, and an MLP for each."""
    num_heads, width = config.transformer_num_heads, spaces.shape[-1]
    heads = functools.partial(_heads, num_heads=num_heads, key_size=config.transformer_key_size)
    qkv, bias = heads(_norm(spaces, "ems_norm"), name="ems_self"), _bias(space_pairs, num_heads, "same_ems_bias")
    spaces += _attend(*qkv, legal.any(-1)[..., None, :], bias, "ems_self_out")
    qkv, bias = heads(_norm(items, "items_norm"), name="items_self"), _bias(item_pairs, num_heads, "same_items_bias")
    items += _attend(*qkv, legal.any(-2)[..., None, :], bias, "items_self_out")
    # Across kinds, each asks with its queries for the keys and values of the other.
    ems_query, *of_ems = heads(_norm(spaces, "ems_cross_norm"), name="ems_cross")
    items_query, *of_items = heads(_norm(items, "items_cross_norm"), name="items_cross")
    bias = _bias(pairs, 2 * num_heads, "pair_bias")
    spaces += _attend(ems_query, *of_items, legal, bias[..., :num_heads, :, :], "ems_cross_out")
    bias, mask = (jnp.swapaxes(x, -1, -2) for x in (bias[..., num_heads:, :, :], legal))
    items += _attend(items_query, *of_ems, mask, bias, "items_cross_out")
    mlp = functools.partial(hk.nets.MLP, [*config.transformer_mlp_units, width])
    spaces += mlp(name="ems_mlp")(_norm(spaces, "ems_mlp_norm"))
    items += mlp(name="items_mlp")(_norm(items, "items_mlp_norm"))
    return spaces, items


def _heads(x: jax.Array, num_heads: int, key_size: int, name: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values of tokens [..., n, D], each [..., n, H, d]. No bias: x has the offset of its norm."""
    x = hk.Linear(3 * num_heads * key_size, with_bias=False, name=name)(x)
    x = x.reshape(*x.shape[:-1], 3, num_heads, key_size)
    return x[..., 0, :, :], x[..., 1, :, :], x[..., 2, :, :]


def _attend(query, key, value, mask: jax.Array, bias: jax.Array, name: str) -> jax.Array:
    """Multi-head attention with an additive bias of its logits (Vaswani et al. 2017, section 3.2; Shaw et al. 2018):
    query [..., n, H, d], key and value [..., m, H, d], mask [..., n or 1, m], bias [..., H, n, m] -> [..., n, H * d].
    A row that may look at nothing gets zeros."""
    logits = jnp.einsum("...nhd,...mhd->...hnm", query, key) / math.sqrt(query.shape[-1]) + bias
    weights = jax.nn.softmax(jnp.where(mask[..., None, :, :], logits, MASKED))
    mixed = jnp.einsum("...hnm,...mhd->...nhd", weights, value)
    mixed = mixed.reshape(*mixed.shape[:-2], -1)
    return hk.Linear(mixed.shape[-1], name=name)(mixed) * mask.any(-1, keepdims=True)


def _bias(relations: jax.Array, num_heads: int, name: str) -> jax.Array:
    """Attention bias of each head from relations [..., n, m, F]: [..., H, n, m]. A softmax does not see a constant."""
    return jnp.moveaxis(hk.Linear(num_heads, with_bias=False, name=name)(relations), -1, -3)


def _norm(x: jax.Array, name: str) -> jax.Array:
    return hk.LayerNorm(-1, create_scale=True, create_offset=True, name=name)(x)


def policy_head(config: Config, spaces, items, pairs, legal) -> tuple[jax.Array, jax.Array]:
    """Logits of the pairs of tokens [..., E, I], bilinear in the tokens plus a small layer that sees each pair and its
    relations, and the sum of that layer's hidden units over the legal pairs [..., U]."""
    width, units = spaces.shape[-1], config.pair_units
    q, k = hk.Linear(width, name="policy_ems")(spaces), hk.Linear(width, name="policy_items")(items)
    logits = jnp.einsum("...ed,...id->...ei", q, k) / math.sqrt(width)
    of_ems = hk.Linear(units, with_bias=False, name="pair_ems")(spaces)[..., :, None, :]
    of_items = hk.Linear(units, with_bias=False, name="pair_items")(items)[..., None, :, :]
    of_relations, out = hk.Linear(units, name="pair_relations"), hk.Linear(1, with_bias=False, name="pair_out")

    def pair_layer(arguments):
        of_ems, of_items, pairs, legal = arguments
        hidden = jax.nn.relu(of_ems + of_items + of_relations(pairs))  # [..., E, I, U]
        summed = jnp.einsum("...ei,...eiu->...u", legal.astype(jnp.float32), hidden)
        return out(hidden)[..., 0], summed

    arguments = of_ems, of_items, pairs, legal
    if jax.default_backend() != "cpu" or math.prod(legal.shape[-2:]) < 1000 or hk.running_init():
        more, summed = pair_layer(arguments)
    else:  # Observation by observation: so many hidden units of one stay in a core's cache, those of a batch do not.
        batch = legal.shape[:-2]
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(batch) :]), arguments)
        more, summed = (x.reshape(*batch, *x.shape[1:]) for x in hk.map(pair_layer, flat))
    return logits + more, summed


def scatter_logits(logits: jax.Array, action_mask: jax.Array) -> jax.Array:
    """Logits of flat actions [..., A] from those of pairs of tokens [..., E, I], `MASKED` where illegal."""
    space_token, item_token = (jnp.maximum(jnp.cumsum(action_mask.any(axis), -1) - 1, 0) for axis in (-1, -2))
    pair_token = space_token[..., :, None] * logits.shape[-1] + item_token[..., None, :]
    logits, legal, pair_token = (x.reshape(*x.shape[:-2], -1) for x in (logits, action_mask, pair_token))
    return jnp.where(legal, jnp.take_along_axis(logits, pair_token, -1, mode="promise_in_bounds"), MASKED)


def value_head(spaces, items, hidden_sum, tokens: Tokens) -> jax.Array:
    """Value [...]: what the items that still fit somewhere can add, times a fraction."""
    legal = tokens.legal
    pooled = [(spaces * legal.any(-1)[..., None]).sum(-2), (items * legal.any(-2)[..., None]).sum(-2), hidden_sum]
    counts = legal.any(-1).sum(-1), legal.any(-2).sum(-1), legal.sum((-1, -2))
    means = [x / jnp.maximum(count[..., None], 1) for x, count in zip(pooled, counts)]
    out = hk.nets.MLP([spaces.shape[-1], 1], name="value")(jnp.concatenate(means, -1))[..., 0]
    return tokens.open_volume * jax.nn.sigmoid(out + 1.0)


def make_network(config: Config) -> hk.Transformed:
    """The network as Haiku functions: init(key, observation) -> params, and
    apply(params, None, observation, size) -> (logits, value), by default at the observation's own size."""
    network = hk.transform(lambda observation, *size: PackingNetwork(config)(observation, *size))
    return network._replace(apply=jax.jit(network.apply, static_argnums=3))  # Traced once for all of a program's uses.


def sizes_of_tokens(config: Config, observation: Observation) -> tuple[tuple[int, int], ...]:
    """The sizes that the network is compiled for on such observations: `token_sizes`, or where these are of instances
    of another size, a quarter, half or all of the observation's spaces and half or all of its items. Each size takes
    seconds to compile, and with fewer pairs than 96 a pass costs about the same."""
    full = observation.action_mask.shape[-2:]
    if config.token_sizes[-1:] == (full,):
        return config.token_sizes
    sizes = itertools.product(*([-(-n * i // 4) for i in quarters] for n, quarters in zip(full, ((1, 2, 4), (2, 4)))))
    return tuple(size for size in dict.fromkeys(sizes) if math.prod(size) >= 96 or size == full)


def index_of_smallest_size(sizes: tuple, observation: Observation, batch: bool = False) -> jax.Array:
    """Index of the first of the sizes that holds an observation, int32 [...], or all of a batch, int32 []."""
    legal = observation.action_mask
    used = [legal.any(axis).sum(-1) for axis in (-1, -2)]  # Spaces, items.
    spaces, items = (x.max() for x in used) if batch else used
    holds = [(spaces <= size[0]) & (items <= size[1]) for size in sizes[:-1]]
    return jnp.stack([*holds, jnp.ones_like(spaces, bool)]).argmax(0).astype(jnp.int32)


def at_smallest_size(function: Callable, sizes: tuple, observation: Observation, *arguments: Any) -> Any:
    """function(size, *arguments) at the first of the sizes that holds every row of a batch of observations. A loss is
    differentiated inside of it: the gradient of the switch would store and copy the residuals of all sizes."""
    branches = [functools.partial(function, size) for size in sizes]
    return jax.lax.switch(index_of_smallest_size(sizes, observation, batch=True), branches, *arguments)


def rows_of_a_part(observation: Observation) -> int:
    """How many rows of a batch the network plays at a time: on a CPU at most 16, or 4 large ones, which fit caches."""
    num_rows, *size = observation.action_mask.shape
    most = num_rows if jax.default_backend() != "cpu" else 16 if math.prod(size) < 1000 else 4
    return max(n for n in range(1, most + 1) if num_rows % n == 0)


def in_parts(function: Callable, sizes: tuple, observation: Observation, carry: Any) -> Any:
    """carry = function(rows, carry) for each part of a batch of observations [n, ...]; `rows`, int32, are sorted by the
    size that they need. Rows without a legal action come first: parts of them alone are left out, one may have some."""
    index = index_of_smallest_size(((0, 0), *sizes), observation)
    order = jnp.argsort(index).reshape(-1, rows_of_a_part(observation))
    first = (index == 0).sum() // order.shape[1]
    return jax.lax.fori_loop(first, len(order), lambda i, carry: function(order[i], carry), carry)


def make_batched(function: Callable) -> Callable:
    """Returns run(params, *row), what `function` says of one row. function(params, *rows) gets all rows that `vmap`
    brings together, [n, ...], to choose parts from them; so we define the vmap rule ourselves. Not differentiable."""
    run_batch = jax.custom_batching.custom_vmap(jax.jit(function))  # Traced once, however often `vmap` asks.

    @run_batch.def_vmap
    def _(axis_size, in_batched, params, *batches):  # A batch of batches is a larger batch.
        assert not any(jax.tree.leaves(in_batched[0])), "one network for the whole batch"
        rows = lambda x, is_row: x if is_row else jnp.broadcast_to(x, (axis_size, *x.shape))
        batches = jax.tree.map(rows, batches, tuple(in_batched[1:]))  # Repeats what rows share.
        flat = run_batch(params, *jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches))
        result = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), flat)
        return result, jax.tree.map(lambda _: True, result)

    def run(params, *row):
        return jax.tree.map(lambda x: x[0], run_batch(params, *jax.tree.map(lambda x: jnp.asarray(x)[None], row)))

    return run


def make_predict(network: hk.Transformed, config: Config) -> Callable[[Any, Observation], tuple[jax.Array, jax.Array]]:
    """Returns predict(params, observation) -> (logits [A], value []) by `make_batched`. Losses use `network.apply`.
    What an observation without a legal action gets means nothing."""

    @make_batched
    def predict(params, observation):
        sizes, shape = sizes_of_tokens(config, observation), observation.action_mask.shape

        def of_part(rows, carry):
            part = jax.tree.map(lambda x: x[rows], observation)
            run = lambda size, part: network.apply(params, None, part, size)
            return jax.tree.map(lambda x, y: x.at[rows].set(y), carry, at_smallest_size(run, sizes, part, part))

        zeros = jnp.zeros((shape[0], math.prod(shape[1:]))), jnp.zeros(shape[0])
        return in_parts(of_part, sizes, observation, zeros)

    return predict


def argmax(logits: jax.Array) -> jax.Array:
    """The first index of the largest entry, int32 [...], or of a NaN: jnp.argmax(logits, -1), much faster on a CPU."""
    is_largest = (logits == logits.max(-1, keepdims=True)) | jnp.isnan(logits)
    return jnp.where(is_largest, jnp.arange(logits.shape[-1]), logits.shape[-1]).min(-1)


# =========================== Policies and rollout (twin section: the same in both scripts) ============================
def make_greedy_policy(network: hk.Transformed, config: Config) -> Policy:
    """The network's most probable action."""
    predict = make_predict(network, config)
    return Policy(lambda params, _, __, observation, memory: (argmax(predict(params, observation)[0]), None, memory))


class Trajectory(NamedTuple):
    """Episodes, padded to T steps. A padding row is a finished state: mask False, reward 0."""

    observation: Observation  # leaves [B, T, ...]
    decision: Any  # what the policy says of its decisions, leaves [B, T, ...]
    reward: jax.Array  # [B, T], share of the container's volume
    mask: jax.Array  # bool [B, T], a real decision
    solved: jax.Array  # bool [B], every item placed


def make_rollout(env: BinPack, policy: Policy) -> Callable[[Any, jax.Array], Trajectory]:
    """Returns rollout(params, keys [B, 2]) -> Trajectory. An episode is a function of params and key alone, up to the
    rounding of the network, whose size depends on the whole batch. A key of NO_INSTANCE gives padding alone."""
    num_steps = env.generator.max_num_items - 1  # T, the most items that an instance has.

    def play(params: Any, key: jax.Array) -> Trajectory:
        state, timestep = env.reset(jax.random.fold_in(key, num_steps))  # 0 ... T - 1 are the keys of the steps.
        exists = (key != ev.NO_INSTANCE).any()
        state = state.replace(items_mask=state.items_mask & exists, action_mask=state.action_mask & exists)
        observation = timestep.observation._replace(items_mask=state.items_mask, action_mask=state.action_mask)
        memory = policy.start(params, state, observation)

        def step(carry, t):
            state, observation, memory = carry
            action, decision, memory = policy.act(params, jax.random.fold_in(key, t), state, observation, memory)
            state, timestep = step_flat(env, state, action)
            row = (observation, decision, timestep.reward, has_legal_action(observation))
            return (state, timestep.observation, memory), row

        (state, _, _), rows = jax.lax.scan(step, (state, observation, memory), jnp.arange(num_steps))
        return Trajectory(*rows, solved=(state.items_placed | ~state.items_mask).all())

    return jax.vmap(play, in_axes=(None, 0))


# ======================================================= Search =======================================================
class Line(NamedTuple):
    """Greedy play from a node to the end. Entry n is of the move with n items placed, zeros where there is none."""

    hash: jax.Array  # uint32 [I, 2], `evaluate.state_hash` of the state before the move
    reward: jax.Array  # [I]
    solved: jax.Array  # bool [], it places every item


class Node(NamedTuple):
    """What the search knows of a state."""

    actions: jax.Array  # int32 [K], the flat actions of highest prior, best first; illegal ones fill up
    logits: jax.Array  # [K], their prior, `MASKED` where illegal
    value: jax.Array  # [], estimate of the return from here
    line: Line  # the completion from here; nothing with leaf_value=network


class Decision(NamedTuple):
    """What is kept of a search: its distribution over K actions, and the prior that it started from."""

    actions: jax.Array  # int32 [K], flat actions
    weights: jax.Array  # [K], sums to 1
    prior: jax.Array  # [K], the network's log-probabilities among these
    taken: jax.Array  # int32 [], which of them is played
    value: jax.Array  # [], of the root after the search


def make_tree_functions(env: BinPack, network: hk.Transformed, config: Config, num_nodes: int) -> tuple:
    """Returns start(params, state, observation) -> memory, and make_child((params, lines, blocks), state, node, index,
    wanted) -> (reward, discount, state, node) after the node's action `index`; an unwanted node costs little and means
    nothing. The memory of a search is its root and the lines of the last search's nodes, leaves [num_nodes, ...]. A
    completion that meets one of these, or its parent's, goes on like it: many orders of the same moves lead to the same
    state. The states of a tree do without blocks, which are large and never change."""
    predict = make_predict(network, config)
    shape = num_nodes, env.generator.max_num_items
    no_lines = Line(jnp.zeros((*shape, 2), jnp.uint32), jnp.zeros(shape), jnp.zeros(num_nodes, bool))
    depths, no_line = jnp.arange(shape[1]), jax.tree.map(lambda x: x[0], no_lines)

    @make_batched
    def complete(params: Any, state: State, observation: Observation, lines: jax.Array) -> tuple:
        """Plays rows [B, ...] greedily, each to the end or to a state of its lines, whose hashes are [B, L, I, 2] ->
        (items placed then [B, I], number of the line that was met or L [B], logits of the first move [B, A], and of the
        moves the hashes of the states after [B, I, 2] and the rewards [B, I])."""
        sizes, blocks, begin = sizes_of_tokens(config, observation), observation.blocks, state.items_placed.sum(-1)
        num_rows, num_lines, num_items, _ = lines.shape

        def play_part(rows, carry):
            old, prior, hashes, rewards = carry
            state, observation, _ = jax.tree.map(lambda x: x[rows], old)
            n, has_ended = state.items_placed.sum(-1), ~has_legal_action(observation)
            is_first, of_blocks = n == begin[rows], jax.tree.map(lambda x: x[rows], blocks)
            run = lambda size, observation: network.apply(params, None, observation, size)[0]
            logits = at_smallest_size(run, sizes, observation, observation._replace(blocks=of_blocks))
            state, timestep = jax.vmap(functools.partial(step_flat, env))(state, argmax(logits))
            found = jax.vmap(ev.state_hash)(state)
            meets = (lines[rows, :, n + 1] == found[:, None]).all(-1)
            met = jnp.where(meets, jnp.arange(num_lines), num_lines).min(-1)
            legal = timestep.observation.action_mask & (met == num_lines)[:, None, None]
            new = state, timestep.observation._replace(action_mask=legal), met
            rows = jnp.where(has_ended, num_rows, rows)  # There is no such row, and nothing is written.
            old = jax.tree.map(lambda x, y: x.at[rows].set(y), old, new)
            prior = prior.at[jnp.where(is_first, rows, num_rows)].set(logits)
            return old, prior, hashes.at[rows, n + 1].set(found), rewards.at[rows, n].set(timestep.reward)

        init = state, observation._replace(blocks=None), jnp.full(num_rows, num_lines)
        prior = jnp.where(legal_actions(observation), 0.0, MASKED)  # Stays where no action is legal.
        init = init, prior, jnp.zeros_like(lines[:, 0]), jnp.zeros((num_rows, num_items))
        body = lambda carry: in_parts(play_part, sizes, carry[0][1], carry)
        (state, _, met), *found = jax.lax.while_loop(lambda carry: has_legal_action(carry[0][1]).any(), body, init)
        return state.items_placed, met, *found

    def make_node(params: Any, state: State, observation: Observation, lines: Line) -> Node:
        """The value of a completion is the return of playing greedily to the end; its first pass gives the prior."""
        if config.leaf_value == "network":
            (logits, value), line = predict(params, observation), no_line
        else:
            placed, met, logits, *own = complete(params, state.replace(blocks=None), observation, lines.hash)
            begin, end = state.items_placed.sum(), placed.sum()
            rest = jax.tree.map(lambda x: x.at[met].get(mode="fill", fill_value=0), lines)
            hashes = jnp.where(depths[:, None] < end, own[0].at[begin].set(ev.state_hash(state)), rest.hash)
            rewards = jnp.where(depths < end, own[1], rest.reward)
            line = Line(hashes, rewards, rest.solved | (placed | ~state.items_mask).all())
            value = (rewards * config.discount ** (depths - begin)).sum(where=depths >= begin)
        logits, actions = jax.lax.top_k(logits, min(config.search_width, logits.size))
        return Node(actions, logits, value, line)

    start = lambda *of: (make_node(*of, no_lines), no_lines)

    def make_child(known: tuple, state: State, node: Node, index: jax.Array, wanted: Any = True) -> tuple:
        params, lines, blocks = known
        state, timestep = step_flat(env, state, node.actions[index])
        lines = jax.tree.map(lambda x, others: jnp.concatenate([x[None], others]), node.line, lines)
        observation = timestep.observation._replace(blocks=blocks, action_mask=state.action_mask & wanted)
        node = make_node(params, state, observation, lines)
        return timestep.reward, config.discount * timestep.discount, state, node

    return start, make_child


def conclude(root: Node, weights: jax.Array, taken, value, nodes: Node, child) -> tuple[jax.Array, Decision, tuple]:
    """What `act` returns after taking action number `taken`, which led to node number `child`: it, decision, memory."""
    decision = Decision(root.actions, weights, jax.nn.log_softmax(root.logits), taken, value)
    return root.actions[taken], decision, (jax.tree.map(lambda x: x[child], nodes), nodes.line)


def make_search_policy(
    env: BinPack, network: hk.Transformed, config: Config, num_simulations: int, gumbel_scale: float, plays=False
) -> Policy:
    """Gumbel MuZero search on the true dynamics (Danihelka et al. 2022, 'Policy improvement by planning with Gumbel').

    A node keeps its `search_width` best actions, so the tree's arrays are K wide and not A. With
    leaf_value=completion the value of a node is what greedy play from there achieves, an exact lower bound of the
    optimum. The memory has the next root: the chosen child has been evaluated by the search that chose it. A search
    that `plays`, and does not teach, looks at nothing but the completion from a node where this places every item."""
    start, make_child = make_tree_functions(env, network, config, 1 + num_simulations)
    settings = config.model_dump(include={"value_scale", "maxvisit_init", "rescale_values"})
    qtransform = functools.partial(mctx.qtransform_completed_by_mix_value, **settings)
    looked_at = lambda node: (jnp.arange(len(node.actions)) == 0) | ~(node.line.solved & plays)  # bool [K], actions

    def act(params: Any, key: jax.Array, state: State, observation: Observation, memory: tuple[Node, Line]):
        root, known = memory[0], (params, memory[1], observation.blocks)
        state = state.replace(blocks=None)
        legal = legal_actions(observation)[root.actions] & looked_at(root)
        # mctx first visits the actions of largest prior and noise, one by one. With its noise we make them together.
        noise = gumbel_scale * jax.random.gumbel(jax.random.split(key)[1], legal.shape)
        num_first = min(config.max_num_considered_actions, num_simulations, len(legal))
        _, first = jax.lax.top_k(jnp.where(legal, root.logits + noise, -jnp.inf), num_first)
        children = jax.vmap(make_child, (None, None, None, 0, 0))(known, state, root, first, legal[first])

        def expand(_, __, action: jax.Array, embedding: tuple):
            """mctx's recurrent function for a batch of one: step, prior of the new node, value of the new node."""
            parent, node = jax.tree.map(lambda x: x[0], embedding)
            made = (first == action) & (parent.items_placed == state.items_placed).all()
            new = make_child(known, parent, node, action[0], ~made.any())
            new = jax.tree.map(lambda x, y: jnp.where(made.any(), x[made.argmax()], y), children, new)
            reward, discount, state_after, node = new
            logits = jnp.where(looked_at(node), node.logits, MASKED)
            output = mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=logits, value=node.value)
            return jax.tree.map(lambda x: x[None], (output, (state_after, node)))

        output = mctx.RootFnOutput(prior_logits=root.logits, value=root.value, embedding=(state, root))
        output = mctx.gumbel_muzero_policy(
            params=(),
            rng_key=key,
            root=jax.tree.map(lambda x: x[None], output),
            recurrent_fn=expand,
            num_simulations=num_simulations,
            invalid_actions=~legal[None],
            qtransform=qtransform,
            max_num_considered_actions=config.max_num_considered_actions,
            gumbel_scale=gumbel_scale,
        )
        output = jax.tree.map(lambda x: x[0], output)
        tree, taken = output.search_tree, output.action
        nodes, child = tree.embeddings[1], tree.children_index[0, taken]
        return conclude(root, output.action_weights, taken, tree.node_values[0], nodes, child)

    # mctx draws one noise array for a batch. Searching each episode in a batch of one, under vmap, ties the noise
    # to the episode's own key, so that an episode does not depend on the device that plays it.
    return Policy(act, start)


def make_playing_search(
    env: BinPack, network: hk.Transformed, config: Config, num_simulations: int, gumbel_scale: float | jax.Array = 0.0
) -> Policy:
    """The search of evaluations, with `eval_value_scale`; noise makes further tries differ. As a teacher the search
    should move the policy little, since what a completion reaches is the network's luck as well as the action's merit.
    As a player it should take the best that it has seen. One completion tells what an action reaches, so it looks at as
    many actions as it has simulations, up to 16."""
    update = dict(value_scale=config.eval_value_scale or config.value_scale)
    if config.leaf_value == "completion":
        update["max_num_considered_actions"] = max(config.max_num_considered_actions, min(num_simulations, 16))
    config = config.model_copy(update=update)
    return make_search_policy(env, network, config, num_simulations, gumbel_scale, plays=True)


class Tree(NamedTuple):
    """The search of one episode: n nodes in the order in which they were made, the root first."""

    state: State  # leaves [n, ...]
    node: Node  # leaves [n, ...]
    parent: jax.Array  # int32 [n], -1 of the root
    child: jax.Array  # int32 [n, K], 0 where none was made
    reward: jax.Array  # [n], of the move that led here
    discount: jax.Array  # [n]
    visits: jax.Array  # [n]
    value: jax.Array  # [n], the node's own value and those below it, backed up


def start_tree(state: State, root: Node, num_nodes: int) -> Tree:
    repeat = lambda x: jnp.broadcast_to(x, (num_nodes, *jnp.shape(x)))
    zeros, children = jnp.zeros(num_nodes), jnp.zeros((num_nodes, len(root.actions)), jnp.int32)
    state, node = jax.tree.map(repeat, (state.replace(blocks=None), root))
    visits, value = zeros.at[0].set(1), zeros.at[0].set(root.value)
    return Tree(state, node, jnp.full(num_nodes, -1), children, zeros, zeros, visits, value)


def grow(make_child: Callable, known: tuple, tree: Tree, num_nodes, parents, indices, wanted: Any = True) -> Tree:
    """Makes the children of [W] parents for the actions of these indices, evaluated together, if they are wanted; the
    tree has `num_nodes` so far. Of a child that is chosen twice only the last copy is evaluated and kept."""
    new = num_nodes + jnp.arange(len(parents))
    child = tree.child.at[parents, indices].max(jnp.where(wanted, new, 0))
    states, nodes = jax.tree.map(lambda x: x[parents], (tree.state, tree.node))
    make_children, wanted = jax.vmap(make_child, (None, 0, 0, 0, 0)), child[parents, indices] == new
    reward, discount, state, node = make_children(known, states, nodes, indices, wanted)
    rows = Tree(state, node, parents, tree.child[new], reward, discount, tree.visits[new], node.value)
    return jax.tree.map(lambda x, y: x.at[new].set(y), tree, rows)._replace(child=child)


def child_values(tree: Tree, node: jax.Array) -> jax.Array:
    """Q [K] of a node's actions; the node's own value where no child was made."""
    child = tree.child[node]
    return jnp.where(child > 0, tree.reward[child] + tree.discount[child] * tree.value[child], tree.value[node])


def puct(tree: Tree, virtual_visits: jax.Array, node: jax.Array, c_puct: float) -> jax.Array:
    """The pUCT score of each action of a node, [K] (Schrittwieser et al. 2020, appendix B). As in mctx, Q is scaled by
    the range of the values of the node and its children; a range of at least 1e-4 keeps differences of rounding small.
    A virtual visit, of [n, K], counts as one with Q = 0."""
    child, q = tree.child[node], child_values(tree, node)
    visits = jnp.where(child > 0, tree.visits[child], 0.0)
    low, high = jnp.minimum(tree.value[node], q.min()), jnp.maximum(tree.value[node], q.max())
    q = jnp.where(child > 0, q - low, 0.0) / jnp.maximum(high - low, 1e-4)
    virtual = virtual_visits[node]
    taken, total = visits + virtual, tree.visits[node] + virtual.sum()
    weight = jnp.sqrt(total) * (c_puct + jnp.log((total + 19652 + 1) / 19652))
    return q * visits / jnp.maximum(taken, 1.0) + weight * jax.nn.softmax(tree.node.logits[node]) / (taken + 1.0)


def make_alphazero(env: BinPack, network: hk.Transformed, config: Config) -> Policy:
    """AlphaZero's search (Silver et al. 2018; as a teacher: Anthony et al. 2017): pUCT, noise at the root, and visit
    counts as the target. `num_workers` descend one after the other, each under the virtual losses of those before it
    (Chaslot et al. 2008), and their leaves are evaluated together. With one worker it is `mctx.muzero_policy` with two
    differences: noise goes to legal actions alone, and the scale of Q has a floor."""
    start, make_child = make_tree_functions(env, network, config, 1 + config.num_simulations)
    workers = config.num_workers

    def descend(tree: Tree, worker: jax.Array, carry: tuple) -> tuple:
        virtual, parents, indices = carry

        def body(carry):
            node, _, _, virtual = carry
            index = argmax(puct(tree, virtual, node, config.c_puct))
            return tree.child[node, index], node, index, virtual.at[node, index].add(1.0)

        # The root is left before the first test, since 0 also means that there is no child.
        _, node, index, virtual = jax.lax.while_loop(lambda c: c[0] > 0, body, body((0, 0, 0, virtual)))
        return virtual, parents.at[worker].set(node), indices.at[worker].set(index)

    def backup(tree: Tree, leaf: jax.Array) -> Tree:
        def body(carry):
            visits, values, node, total = carry
            value = (values[node] * visits[node] + total) / (visits[node] + 1.0)
            total = tree.reward[node] + tree.discount[node] * total
            return visits.at[node].add(1.0), values.at[node].set(value), tree.parent[node], total

        init = tree.visits, tree.value, leaf, tree.value[leaf]
        visits, values, _, _ = jax.lax.while_loop(lambda carry: carry[2] >= 0, body, init)
        return tree._replace(visits=visits, value=values)

    def act(params: Any, key: jax.Array, state: State, observation: Observation, memory: tuple[Node, Line]):
        root, known = memory[0], (params, memory[1], observation.blocks)
        (act_key, noise_key, _), fraction = jax.random.split(key, 3), config.dirichlet_fraction
        legal = legal_actions(observation)[root.actions]
        noise = jax.nn.softmax(jax.random.loggamma(noise_key, config.dirichlet_alpha, legal.shape), where=legal)
        mixed = jnp.log((1.0 - fraction) * jax.nn.softmax(root.logits) + fraction * noise)

        def simulate(i, tree):
            init = jnp.zeros(tree.child.shape), *jnp.zeros((2, workers), jnp.int32)
            _, parents, indices = jax.lax.fori_loop(0, workers, functools.partial(descend, tree), init)
            tree = grow(make_child, known, tree, 1 + i * workers, parents, indices)
            return jax.lax.fori_loop(0, workers, lambda w, tree: backup(tree, tree.child[parents[w], indices[w]]), tree)

        tree = start_tree(state, root._replace(logits=jnp.where(legal, mixed, MASKED)), 1 + config.num_simulations)
        tree = jax.lax.fori_loop(0, config.num_simulations // workers, simulate, tree)
        child = tree.child[0]
        visits = jnp.where(child > 0, tree.visits[child], 0.0)
        taken = jax.random.categorical(act_key, jnp.log(visits) / config.acting_temperature)
        return conclude(root, visits / visits.sum(), taken, tree.value[0], tree.node, child[taken])

    return Policy(act, start)


def make_treepi(env: BinPack, network: hk.Transformed, config: Config) -> Policy:
    """Local search for policy improvement (Springenberg et al. 2020, algorithm 1): a rollout resamples among a node's M
    samples by exp(Q / alpha), and values are soft, V = alpha log(1/M sum exp(Q / alpha)). It ends at the first node
    without samples, which gets them, evaluated together, if it is above `search_depth`, the paper's K. The target is
    the root's weights of its samples. With `search_depth=1` it is that of MPO (Abdolmaleki et al. 2018)."""
    num_rollouts = config.num_simulations if config.search_depth > 1 else 1  # Nothing changes after the first.
    num_samples, num_nodes = config.num_sampled_actions, 1 + num_rollouts * config.num_sampled_actions
    start, make_child = make_tree_functions(env, network, config, num_nodes)

    def improved(tree: Tree, count: jax.Array, node: jax.Array) -> jax.Array:
        """Unnormalised logits of the improved policy, over a node's actions; count says how often each was sampled."""
        logits = jnp.log(jnp.maximum(count[node], 1.0)) + child_values(tree, node) / config.soft_temperature
        return jnp.where(count[node] > 0, logits, MASKED)

    def act(params: Any, key: jax.Array, state: State, observation: Observation, memory: tuple[Node, Line]):
        root, known = memory[0], (params, memory[1], observation.blocks)

        def rollout(i, carry):
            tree, count = carry
            sample_key, rollout_key = jax.random.split(jax.random.fold_in(key, i))

            def descend(carry):
                node, depth = carry
                index = jax.random.categorical(jax.random.fold_in(rollout_key, depth), improved(tree, count, node))
                return tree.child[node, index], depth + 1

            leaf, depth = jax.lax.while_loop(lambda carry: count[carry[0]].any(), descend, (0, 0))
            samples = jax.random.categorical(sample_key, tree.node.logits[leaf], shape=(num_samples,))
            is_within, parents = depth < config.search_depth, jnp.full(num_samples, leaf)
            tree = grow(make_child, known, tree, 1 + i * num_samples, parents, samples, is_within)
            count = count.at[leaf, samples].add(jnp.where(is_within, 1.0, 0.0))

            def back_up(carry):
                value, node = carry
                soft = jax.nn.logsumexp(improved(tree._replace(value=value), count, node)) - math.log(num_samples)
                return value.at[node].set(config.soft_temperature * soft), tree.parent[node]

            lowest = jnp.where(is_within, leaf, tree.parent[leaf])
            value, _ = jax.lax.while_loop(lambda carry: carry[1] >= 0, back_up, (tree.value, lowest))
            return tree._replace(value=value), count

        tree = start_tree(state, root, num_nodes)
        tree, count = jax.lax.fori_loop(0, num_rollouts, rollout, (tree, jnp.zeros(tree.child.shape)))
        logits = improved(tree, count, 0)
        taken = jax.random.categorical(jax.random.fold_in(key, num_rollouts), logits)
        return conclude(root, jax.nn.softmax(logits), taken, tree.value[0], tree.node, tree.child[0, taken])

    return Policy(act, start)


def make_best_of_n(env: BinPack, network: hk.Transformed, config: Config) -> Policy:
    """Best-of-N distillation: of N sampled episodes of an instance and the greedy one, the best (if equal, a sampled
    one) is played and taught. The memory has its actions and returns [T], and the number of the next move."""
    predict, steps = make_predict(network, config), jnp.arange(env.generator.max_num_items - 1)

    def start(params: Any, state: State, observation: Observation):
        def episode(number: jax.Array):
            key = jax.random.fold_in(state.key, number)  # The state's key differs between instances.

            def step(carry, t):
                state, observation = carry
                logits, _ = predict(params, observation)
                noise = jax.random.gumbel(jax.random.fold_in(key, t), logits.shape)
                action = argmax(logits + jnp.where(number < config.num_simulations, noise, 0.0))
                state, timestep = step_flat(env, state, action)
                return (state, timestep.observation), (action, timestep.reward)

            return jax.lax.scan(step, (state, observation), steps)[1]

        actions, rewards = jax.vmap(episode)(jnp.arange(config.num_simulations + 1))  # The last one is greedy.
        returns = discounted_returns(rewards, config.discount)
        best = argmax(returns[:, 0] > returns[:, 0].max() - 1e-5)  # The first, where they differ by rounding alone.
        return actions[best], returns[best], 0

    def act(params: Any, key: jax.Array, state: State, observation: Observation, memory: tuple):
        episode, returns, t = memory
        logits, _ = predict(params, observation)
        _, actions = jax.lax.top_k(logits, min(config.search_width, logits.size))
        actions = actions.at[-1].set(jnp.where((actions == episode[t]).any(), actions[-1], episode[t]))
        weights, prior = (actions == episode[t]).astype(jnp.float32), jax.nn.log_softmax(logits[actions])
        return episode[t], Decision(actions, weights, prior, argmax(weights), returns[t]), (episode, returns, t + 1)

    return Policy(act, start)


IMPROVEMENTS = dict(  # Each takes the environment, the network and the configuration.
    gumbel=lambda *of: make_search_policy(*of, of[-1].num_simulations, of[-1].gumbel_scale),
    alphazero=make_alphazero,
    treepi=make_treepi,
    best_of_n=make_best_of_n,
)


# ================================================== Targets and loss ==================================================
class Samples(NamedTuple):
    """Training rows. Those whose `mask` is False, padding and what `select_taught` leaves out, enter no minibatch."""

    observation: Observation  # leaves [..., ...]
    decision: Decision  # leaves [..., ...]; its weights are the policy target
    returns: jax.Array  # [...], value target: Monte-Carlo returns, or as value_target says
    advantage: jax.Array  # [...], return minus the acting network's value, for loss=cispo
    kl_weight: jax.Array  # [...], of KL(acting || new policy) in the loss
    mask: jax.Array  # bool [...]
    target_kl: jax.Array  # [...], KL(policy target || prior), nats


def discounted_returns(reward: jax.Array, discount: float) -> jax.Array:
    """Monte-Carlo returns, [B, T]: G_t = r_t + discount * G_{t+1}."""

    def step(next_return, reward):
        total = reward + discount * next_return
        return total, total

    _, returns = jax.lax.scan(step, jnp.zeros_like(reward[:, 0]), reward.T, reverse=True)
    return returns.T


def make_samples(trajectory: Trajectory, config: Config, values: jax.Array | float = 0.0) -> Samples:
    """Flattens episodes into rows: leaves [B * T, ...]. `values` [B, T] are the acting network's, for loss=cispo."""
    decision, mask = trajectory.decision, trajectory.mask
    returns = discounted_returns(trajectory.reward, config.discount)
    target = decision.value if config.value_target == "search" else returns
    kl_weight = jnp.full(mask.shape, config.kl_penalty if config.loss == "cispo" else 0.0)
    kl = jnp.maximum(cross_entropy(decision.weights, decision.prior) - entr(decision.weights).sum(-1), 0.0)
    samples = Samples(trajectory.observation, decision, target, returns - values, kl_weight, mask, kl)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), samples)


def cross_entropy(weights: jax.Array, log_probs: jax.Array) -> jax.Array:
    """-sum_k weights log_probs over the last axis; a weight of 0 contributes 0."""
    return -jnp.where(weights > 0, weights * log_probs, 0.0).sum(-1)


def select_taught(samples: Samples, config: Config) -> Samples:
    """The rows of all devices, with a mask of those that are learned from: those whose target_kl is at least
    `min_target_kl` or, where they are few, those with the largest, an eighth of a minibatch. Where the search agrees
    with a good network, which is nearly everywhere, the policy has nothing to learn. KataGo's frequency of a row grows
    with the same divergence (its docs/KataGoMethods.md, 'Policy Surprise Weighting')."""
    divergence = jnp.where(samples.mask, samples.target_kl, -jnp.inf)
    largest, _ = jax.lax.top_k(divergence, max(config.training_batch_size // 8, 1))
    least = jnp.minimum(config.min_target_kl, largest[-1])
    # A row whose divergence is not finite stays, so that its update is found out and skipped.
    return samples._replace(mask=samples.mask & ~(divergence < least))


def make_loss(network: hk.Transformed, config: Config):
    """Returns loss(size, params, samples) -> (scalar, metrics), summed over rows and divided by their number in the
    minibatch of all devices: sums over devices of the result and its gradient are the global mean and its gradient.

    The policy's loss is the cross-entropy to the search's weights or, with loss=cispo, the policy gradient of the taken
    action under a capped and detached importance weight (MiniMax 2025, 'MiniMax-M1', section 3.1). `kl_penalty` and
    `max_policy_kl` add KL(acting || new policy). This and the importance weight are those of the policies restricted to
    the K actions that the search kept."""
    with_kl = config.loss == "cispo" or config.max_policy_kl > 0

    def loss(size, params, samples: Samples):
        logits, value = network.apply(params, None, samples.observation, size)
        acted = samples.decision
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), acted.actions, -1)
        kept = jax.nn.log_softmax(log_probs)
        if config.loss == "cispo":
            arrays = log_probs, kept, acted.prior
            taken, new, old = (jnp.take_along_axis(x, acted.taken[:, None], -1)[:, 0] for x in arrays)
            weight = jnp.minimum(jnp.exp(new - old), config.epsilon_high)
            policy_loss = -jax.lax.stop_gradient(weight) * samples.advantage * taken
        else:
            policy_loss = cross_entropy(acted.weights, log_probs)
        per_row = {"policy_loss": policy_loss, "value_loss": jnp.square(value - samples.returns)}
        if with_kl:
            per_row["policy_kl"] = cross_entropy(jnp.exp(acted.prior), kept) - entr(jnp.exp(acted.prior)).sum(-1)
        metrics = {name: x.sum() / config.training_batch_size for name, x in per_row.items()}
        total = metrics["policy_loss"] + config.value_loss_weight * metrics["value_loss"]
        if with_kl:
            total += (samples.kl_weight * per_row["policy_kl"]).sum() / config.training_batch_size
        return total, metrics

    return loss


# =============================================== One training iteration ===============================================
class TrainState(NamedTuple):
    params: Any
    opt_state: optax.ApplyIfFiniteState  # as of optax.apply_if_finite, which would not look at the loss
    key: jax.Array  # Never changes: iteration i draws from fold_in(key, i).
    iteration: jax.Array  # int32 [], iterations done


def kl_multiplier(bound: float) -> optax.GradientTransformationExtraArgs:
    """Keeps the Lagrange multiplier of `max_policy_kl`, and leaves the gradient as it is. In a minibatch it changes by
    at most a factor of 2, up where policy_kl exceeds the bound. It stays within limits from which it soon returns."""

    def update(updates, multiplier, params=None, *, policy_kl, **_):
        return updates, jnp.clip(multiplier * 2.0 ** jnp.clip(policy_kl / bound - 1.0, -1.0, 1.0), 1e-3, 1e3)

    return optax.GradientTransformationExtraArgs(lambda params: jnp.float32(1.0), update)


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """Adam with clipped gradients, before the learning rate; at the end the multiplier, if there is a bound."""
    bounds = [kl_multiplier(config.max_policy_kl)] if config.max_policy_kl else []
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(), *bounds)


def learning_rate(config: Config, iteration: jax.Array) -> jax.Array:
    """Constant within an iteration; cosine decay over iterations if the configuration asks for it."""
    if not config.learning_rate_decay_iters:
        return jnp.float32(config.learning_rate)
    progress = jnp.minimum(iteration / config.learning_rate_decay_iters, 1.0)
    return config.learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * progress))


def init_train_state(env: BinPack, network: hk.Transformed, config: Config) -> TrainState:
    """A fresh state from `config.seed` (not replicated)."""

    @jax.jit  # One program compiles faster than the many small ones of its operations.
    def init(key):
        observation = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(env.reset, key)[1].observation)
        params = network.init(key, observation)
        adam = make_optimizer(config).init(ravel_pytree(params)[0])
        opt_state = optax.ApplyIfFiniteState(jnp.int32(0), jnp.array(True), jnp.int32(0), adam)
        return TrainState(params, opt_state, key, jnp.int32(0))

    return init(ev.seed_key(config.seed))


def minibatch_rows(key: jax.Array, mask: jax.Array, config: Config) -> jax.Array:
    """Row numbers of all minibatches of an iteration, int32 [S, M]: those of the mask alone, shuffled anew each epoch.
    An epoch has as many minibatches as all rows, padding included, would fill; a small mask repeats its rows."""
    size = config.training_batch_size

    def epoch(key):
        order = jnp.argsort(jnp.where(mask, jax.random.uniform(key, mask.shape), 2.0))  # Rows of the mask first.
        return order[jnp.arange(len(mask) // size * size) % mask.sum()].reshape(-1, size)

    return jnp.concatenate([epoch(k) for k in jax.random.split(key, config.num_epochs)])


def gradients_in_parts(gradients: Callable, config: Config, batch: Any, params: Any) -> Any:
    """gradients(size, params, batch) -> ((loss, metrics), grads), sums over the rows of a minibatch, taken in up to
    four parts. The gradient is one vector, so that what follows is one operation and not one for each parameter."""
    sizes = sizes_of_tokens(config, batch.observation)
    num_parts = math.gcd(len(batch.mask), 4) if len(sizes) > 1 else 1
    order = jnp.argsort(index_of_smallest_size(sizes, batch.observation))

    def at_size(size, part):
        sums, grads = gradients(size, params, part)
        return sums, ravel_pytree(grads)[0]

    def of_part(rows):
        part = jax.tree.map(lambda x: jnp.asarray(x)[rows], batch)
        return at_smallest_size(at_size, sizes, part.observation, part)

    return jax.tree.map(lambda x: x.sum(0), jax.lax.map(of_part, order.reshape(num_parts, -1)))


def apply_gradients(
    config: Config, params: Any, opt_state: Any, loss: jax.Array, grads: jax.Array, rate: jax.Array, **for_optimizer
):
    """One step of the optimizer along grads [number of parameters] -> (params, opt_state); skipped and counted where
    the loss or the gradient's norm is not finite."""
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))

    def step():
        updates, adam = make_optimizer(config).update(grads, opt_state.inner_state, **for_optimizer)
        return optax.apply_updates(params, ravel_pytree(params)[1](-rate * updates)), adam

    params, adam = jax.lax.cond(finite, step, lambda: (params, opt_state.inner_state))
    in_a_row = jnp.where(finite, 0, opt_state.notfinite_count + 1)
    return params, optax.ApplyIfFiniteState(in_a_row, finite, opt_state.total_notfinite + ~finite, adam)


def rollout_metrics(trajectory: Trajectory, config: Config) -> dict[str, jax.Array]:
    """Means over the episodes of all devices, inside `pmap`."""
    returns, steps = trajectory.reward.sum(1), trajectory.mask.sum(1)
    values = {"avg_return": returns, "avg_steps": steps, "solved_rate": trajectory.solved}
    return {f"rollout/{name}": psum(x.sum()) / config.rollout_batch_size for name, x in values.items()}


def make_train_iteration(env: BinPack, network: hk.Transformed, config: Config) -> Callable[[TrainState], tuple]:
    """Returns iterate(state) -> (state, metrics), to be pmapped over all devices with axis name DEVICES.

    Each device plays its share of the episodes; the rows are gathered, shuffled the same way everywhere, and each
    device takes its share of every minibatch. So neither the data nor the minibatches depend on the devices.
    """
    rollout = make_rollout(env, IMPROVEMENTS[config.improvement](env, network, config))
    predict = jax.vmap(make_predict(network, config), (None, 0))
    gradients = jax.value_and_grad(make_loss(network, config), argnums=1, has_aux=True)

    def collect(params: Any, key: jax.Array) -> tuple[Samples, dict[str, jax.Array]]:
        """The rows of all devices, [rollout_batch_size * T, ...], and metrics."""
        episodes = device_slice(jnp.arange(config.rollout_batch_size))
        trajectory = rollout(params, jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, episodes))
        values = 0.0
        if config.loss == "cispo":
            by_step = jax.tree.map(lambda x: x.swapaxes(0, 1), trajectory.observation)
            values = jax.lax.map(lambda observation: predict(params, observation)[1], by_step).T
        samples = make_samples(trajectory, config, values)
        decisions = psum(samples.mask.sum())
        entropy = entr(samples.decision.weights).sum(-1)
        searched = {"train/target_entropy": entropy, "train/target_kl": samples.target_kl}
        metrics = {name: psum(jnp.where(samples.mask, x, 0.0).sum()) / decisions for name, x in searched.items()}
        metrics |= rollout_metrics(trajectory, config) | {"decisions": decisions}
        return jax.tree.map(lambda x: jax.lax.all_gather(x, DEVICES, tiled=True), samples), metrics

    def minibatch_step(carry, inputs, samples: Samples, rate: jax.Array, acting: Any):
        params, opt_state = carry
        rows, permutations = (device_slice(x) for x in inputs)  # From [M] each, equal on every device.
        batch = jax.tree.map(lambda x: x[rows], samples)
        if config.max_policy_kl:
            batch = batch._replace(kl_weight=batch.kl_weight + opt_state.inner_state[-1])
        if config.permute_axes:
            batch = batch._replace(observation=jax.vmap(permute_axes)(batch.observation, permutations))
        if config.permute_axes and (config.loss == "cispo" or config.max_policy_kl):  # Both policies see the same.
            logits = jnp.take_along_axis(predict(acting, batch.observation)[0], batch.decision.actions, -1)
            batch = batch._replace(decision=batch.decision._replace(prior=jax.nn.log_softmax(logits)))
        (loss, metrics), grads = psum(gradients_in_parts(gradients, config, batch, params))
        metrics["grad_norm"] = optax.tree.norm(grads)
        policy_kl = {"policy_kl": metrics["policy_kl"]} if config.max_policy_kl else {}
        return apply_gradients(config, params, opt_state, loss, grads, rate, **policy_kl), metrics

    def iterate(state: TrainState):
        collect_key, shuffle_key = jax.random.split(jax.random.fold_in(state.key, state.iteration))
        samples, metrics = collect(state.params, collect_key)
        samples = select_taught(samples, config)
        metrics["train/taught_share"] = samples.mask.sum() / metrics["decisions"]

        order_key, permutation_key = jax.random.split(shuffle_key)
        rows = minibatch_rows(order_key, samples.mask, config)  # [S, M]
        permutations = jax.random.randint(permutation_key, rows.shape, 0, 6)
        rate = learning_rate(config, state.iteration)
        step = functools.partial(minibatch_step, samples=samples, rate=rate, acting=state.params)
        (params, opt_state), learned = jax.lax.scan(step, (state.params, state.opt_state), (rows, permutations))
        metrics |= {f"train/{name}": x.mean() for name, x in learned.items()} | {"train/learning_rate": rate}
        metrics["train/skipped_updates"] = opt_state.total_notfinite - state.opt_state.total_notfinite
        metrics["skipped_in_a_row"] = opt_state.notfinite_count
        return TrainState(params, opt_state, state.key, state.iteration + 1), metrics

    return iterate


def make_evaluate(env: BinPack, network: hk.Transformed, config: Config) -> Callable[[Any, int], dict[str, float]]:
    """Returns evaluate(replicated params, iteration) -> metrics of the evaluations that are due."""
    keys = ev.evaluation_keys(config.eval_seed, config.eval_batch_size)
    play_greedy = ev.make_player(make_rollout(env, make_greedy_policy(network, config)))
    search = make_playing_search(env, network, config, config.eval_num_simulations or 1)  # With 0 it is never played.
    play_search = ev.make_player(make_rollout(env, search))

    def evaluate(params: Any, iteration: int) -> dict[str, float]:
        with_search = iteration > 0 and config.eval_num_simulations > 0
        with_search = with_search and config.is_due(iteration, config.eval_search_interval)
        if not (with_search or config.is_due(iteration, config.eval_interval)):
            return {}
        episodes = {"greedy": play_greedy(params, keys)}
        if with_search:
            episodes["search"] = ev.keep_better(play_search, params, keys, episodes["greedy"])
        return {f"eval/{name}/{key}": x for name, e in episodes.items() for key, x in ev.summarise(e).items()}

    return evaluate


# ======================================================== Main ========================================================
NOT_OF_THE_RESULT = ("resume", "overwrite", "save_dir", "save_minutes", "keep_checkpoints", "compilation_cache_dir",
                     "distributed", "coordinator_address", "num_processes", "process_id")  # fmt: skip


def network_hint(config: Config, checkpoint: dict) -> str:
    """What to type where a checkpoint's network is another one than the configuration's."""
    old, new = Config().model_dump(mode="json") | checkpoint["config"], config.model_dump(mode="json")
    keys = [key for key in new if ("transformer" in key or key == "pair_units") and old.get(key) != new[key]]
    return " ".join(["type", *(f"{key}={ev.as_typed(old.get(key))}" for key in keys)]) if keys else "give another one"


def restore(config: Config, fresh: TrainState, checkpoint: dict) -> TrainState:
    """The state that a checkpoint continues from; says which keys change that matter. Raises `UsageError`."""
    old, new = Config().model_dump(mode="json") | checkpoint["config"], config.model_dump(mode="json")
    changed = [key for key in new if old.get(key) != new[key] and key not in NOT_OF_THE_RESULT]
    kl = old["max_policy_kl"]
    hint = network_hint(config, checkpoint) if bool(kl) == bool(config.max_policy_kl) else f"type max_policy_kl={kl}"
    if not checkpoint["opt_state"]:
        hint = "it is for evaluation, without the optimizer's state; give one that a run saved"
    leaves, opt_tree = jax.tree.flatten(fresh.opt_state)
    ev.check_fit("resume", (fresh.params, {}, leaves), (*checkpoint["model"], checkpoint["opt_state"]), hint)
    for key in changed if checkpoint["iteration"] < config.max_num_iters else ():
        print(f"{key} changes from {ev.as_typed(old.get(key))} to {ev.as_typed(new[key])}")
    opt_state = jax.tree.unflatten(opt_tree, checkpoint["opt_state"])
    return TrainState(checkpoint["model"][0], opt_state, fresh.key, jnp.int32(checkpoint["iteration"]))


def train_to_the_end(
    config: Config, state: TrainState, progress: ev.Progress, run: ev.Run, stop: ev.StopRequest
) -> None:
    """Trains, evaluates, logs and saves until the last iteration or a request to stop."""
    env, network = make_env(config), make_network(config)
    iterate = jax.pmap(make_train_iteration(env, network, config), axis_name=DEVICES, donate_argnums=0)
    evaluate, state = make_evaluate(env, network, config), replicate(state)
    saved, saved_at, save_due, skipped_in_a_row = progress.iteration, time.perf_counter(), False, 0
    began = saved_at - progress.seconds

    def save() -> None:
        nonlocal saved, saved_at, save_due
        saved, saved_at, save_due = progress.iteration, time.perf_counter(), False
        progress.seconds = saved_at - began
        if jax.process_index() == 0:
            model = host_copy(state.params), {}  # The network has no Haiku state.
            opt_state = jax.tree.leaves(host_copy(state.opt_state))
            run.save(dict(method=METHOD, model=model, opt_state=opt_state, **dataclasses.asdict(progress)))

    stopped = ev.in_any_process(stop.made)
    if progress.iteration and not run.checkpoint(saved).exists():
        save()  # A branch: resume=auto continues it from now on.
    if progress.iteration == 0 and not stopped:
        run.record({"iteration": 0, "frames": 0, "hours": 0.0} | evaluate(state.params, 0))
    while progress.iteration < config.max_num_iters and not stopped:
        start = time.perf_counter()
        state, metrics = iterate(state)
        metrics = {name: float(x) for name, x in host_copy(metrics).items()}  # Waits for the iteration.
        seconds = time.perf_counter() - start
        decisions, skipped_in_a_row = int(metrics.pop("decisions")), int(metrics.pop("skipped_in_a_row"))
        metrics |= {"perf/decisions_per_second": decisions / seconds, "perf/iteration_seconds": seconds}
        progress.iteration, progress.frames = progress.iteration + 1, progress.frames + decisions
        hours = (time.perf_counter() - began) / 3600  # An evaluation counts for what comes after it.
        axes = {"iteration": progress.iteration, "frames": progress.frames, "hours": hours}
        run.record(axes | metrics | evaluate(state.params, progress.iteration))
        if skipped_in_a_row >= config.max_skipped_updates:
            name = next((key for key, value in metrics.items() if not math.isfinite(value)), "the loss")
            what = f"{name} is not finite, and {skipped_in_a_row} updates in a row were skipped"
            last = f"the last checkpoint before that is {run.checkpoint(saved) if saved else 'none'}"
            hint = "type a smaller learning_rate, and resume=auto or overwrite=true"
            line = f"iteration {progress.iteration}: {what}; {last}; {hint}"
            raise UsageError(line if jax.process_index() == 0 else "")
        is_late = config.save_minutes > 0 and time.perf_counter() - saved_at > 60 * config.save_minutes
        save_due |= is_late or config.is_due(progress.iteration, config.save_interval)
        if save_due and not skipped_in_a_row:  # While updates are skipped as not finite, no checkpoint is saved.
            save()
        stopped = ev.in_any_process(stop.made)
    if progress.iteration != saved and not skipped_in_a_row:
        save()
    if skipped_in_a_row:
        why = f"the last {skipped_in_a_row} updates were skipped as not finite"
        tqdm.tqdm.write(f"Not saved after iteration {saved}: {why}.")
    if stopped and progress.iteration < config.max_num_iters:
        where = f"Stopped at iteration {progress.iteration}"
        tqdm.tqdm.write(f"{where}; the same command with resume=auto (no overwrite) continues.")
    elif not skipped_in_a_row:
        tqdm.tqdm.write(f"Done: {run.checkpoint(saved)}")


def train(config: Config, preset: str) -> int:
    """Runs or resumes a training run; returns the exit status."""
    ev.start_devices(config)
    progress = ev.Progress()
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # The first process speaks, and writes, for all.
    with ev.StopRequest() as stop, contextlib.closing(ev.Run(config, METHOD)) as run:
        checkpoint = ev.on_first_process(run.checkpoint_to_resume)
        if config.resume and not checkpoint:
            print(f"resume=auto: no checkpoint in {run.path}; the run starts afresh")
        state = init_train_state(make_env(config), make_network(config), config)
        if checkpoint:
            state = restore(config, state, checkpoint)
            progress = ev.Progress(**{key: checkpoint[key] for key in dataclasses.asdict(progress)})
        elif config.init_from:
            start = ev.on_first_process(lambda: ev.read_checkpoint(ev.newest_in(config.init_from)))
            ev.check_fit("init_from", (state.params, {}), start["model"], network_hint(config, start))
            state = state._replace(params=start["model"][0])
        if progress.iteration >= config.max_num_iters:
            print(f"Complete: {progress.iteration} iterations are done; a larger max_num_iters continues.")
            return 0
        ev.on_first_process(run.take)
        what = f"{sum(x.size for x in jax.tree.leaves(state.params)):,} parameters"
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        print(f"{run.path}: {what}, {device}, from iteration {progress.iteration}")
        if jax.default_backend() == "cpu" and preset == "full":
            print("No accelerator here, and the defaults want one; preset=cpu is a complete run for two cores.")
        if jax.process_index() == 0:
            run.start_log(progress)
        train_to_the_end(config, state, progress, run, stop)
    return 0


def main(argv: list[str]) -> int:
    """The command line: 0 for a finished or cleanly stopped run, 2 with one line for a user's mistake."""

    def command() -> int:
        if {"-h", "--help"} & set(argv):
            print(ev.help_text(__doc__, Config, PRESETS))
            return 0
        return train(*ev.parse_command_line(argv, Config, PRESETS))

    return ev.exit_status(command, "rollout_batch_size", "type resume=auto to continue from the last checkpoint")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
