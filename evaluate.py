"""Scores, compares and draws checkpoints of both training scripts, on fixed instances of BinPack-v2.

    python evaluate.py checkpoints/BinPack-v2/nsim_4/seed_0             # greedy play of the newest checkpoint there
    python evaluate.py CHECKPOINT OTHER policy=greedy,search,best_of_n json=scores.json
    python evaluate.py policy=random,largest_first,lookahead            # the floors, without a checkpoint
    python evaluate.py CHECKPOINT OTHER render=episode.gif              # one instance, side by side
    python evaluate.py RUN_FOLDER... 'policy=[]' curves=curves.png      # learning curves, runs as bands
    python evaluate.py --help

A CHECKPOINT is a .pkl that a run saved or that `checkpoints/` has, or the folder of a run. In a notebook:
`from evaluate import load_checkpoint`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

import train_ppo_binpack as ppo
import train_search_distill_binpack as search_distill
from train_search_distill_binpack import MASKED, MAX_DECISIONS, Episodes, Model, Policy, RunConfig, UsageError

if TYPE_CHECKING:
    from jumanji.environments import BinPack
    from jumanji.environments.packing.bin_pack.types import Observation, State

METHODS = {script.METHOD: script for script in (search_distill, ppo)}
SEARCH_KEYS = set(search_distill.Config.__annotations__) - {
    "eval_num_simulations",
    "eval_search_interval",
    "num_simulations",
}
FLOORS = ("random", "largest_first", "lookahead")
PolicyName = Literal["greedy", "sample", "search", "best_of_n", "random", "largest_first", "lookahead"]
OutputPath = Annotated[str, AfterValidator(os.path.expanduser)]

with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # The key `json` hides a deprecated method of BaseModel.

    class Config(BaseModel):
        """Every key of an evaluation."""

        model_config = ConfigDict(frozen=True, extra="forbid")

        policy: tuple[PolicyName, ...] = Field(
            ("greedy",),
            description="a list of: greedy, sample, search, best_of_n; without a checkpoint: random, largest_first,"
            " lookahead",
        )
        num_simulations: Annotated[int, Field(ge=1)] = Field(32, description="simulations a decision (policy=search)")
        leaf_value: Literal["checkpoint", "network", "completion"] = Field(
            "checkpoint", description="value of a new node (policy=search): as in training (PPO: completion), or this"
        )
        n: Annotated[int, Field(ge=1)] = Field(32, description="sampled episodes beside the greedy (policy=best_of_n)")
        seed: Annotated[int, Field(ge=0, lt=2**31)] = Field(
            1_000_000, description="seed that fixes the instances; the default is that of training's evaluations"
        )
        num_episodes: Annotated[int, Field(ge=2)] = Field(1024, description="number of instances")
        json: OutputPath = Field("", description="file for the table's figures and each instance's utilisation")
        render: OutputPath = Field("", description=".gif or .png of the first two rows on one instance, side by side")
        instance: Annotated[int, Field(ge=0)] = Field(0, description="number of the instance to render")
        curves: OutputPath = Field("", description=".png of the learning curves: means, bands over runs of a folder")

        @field_validator("policy", mode="before")
        @classmethod
        def _one_or_more(cls, value: Any) -> Any:
            return [x.strip() for x in value.split(",")] if isinstance(value, str) else value

        @field_validator("json", "render", "curves")
        @classmethod
        def _can_be_written(cls, value: str, info) -> str:
            endings = {"json": (".json",), "render": (".gif", ".png"), "curves": (".png",)}[info.field_name]
            if value and not value.endswith(endings):
                raise ValueError(f"expected a file that ends in {' or '.join(endings)}")
            path = Path(value)
            target = path if path.exists() else path.parent
            if value and (path.is_dir() or not path.parent.is_dir() or not os.access(target, os.W_OK)):
                raise ValueError("expected a file that can be written, in a folder that exists")
            return value


# ======================================================================================================================
# Checkpoints
# ======================================================================================================================


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained network, ready to use. Made by `load_checkpoint`."""

    path: Path
    method: str  # "search_distill" or "ppo"
    iteration: int
    frames: int  # decisions played to learn from
    config: RunConfig  # the training script's `Config`
    params: dict = dataclasses.field(repr=False)  # Haiku parameters, numpy arrays
    state: dict = dataclasses.field(repr=False)  # Haiku state

    @property
    def model(self) -> Model:
        return Model(self.params, self.state)

    @functools.cached_property
    def env(self) -> BinPack:
        """The environment, equal to Jumanji's BinPack-v2."""
        return METHODS[self.method].make_env()

    @functools.cached_property
    def network(self):
        return METHODS[self.method].make_network(self.config)

    @functools.cached_property
    def _greedy(self) -> Policy:
        return search_distill.make_greedy_policy(self.network, self.config)

    @functools.cached_property
    def _apply(self) -> Callable:
        return jax.jit(lambda model, observation: self.network.apply(model.params, model.state, None, observation)[0])

    def apply(self, observation: Observation) -> tuple[jax.Array, jax.Array]:
        """Observation with leading dimensions [...] -> logits of the flat actions [..., A], very negative where
        illegal, and value [...], the volume that the network expects still to be packed."""
        return self._apply(self.model, observation)

    def act(self, observation: Observation) -> np.ndarray:
        """The most probable action as `env.step` takes it: int32 [..., 2], number of the space and of the item."""
        action = np.asarray(self.apply(observation)[0]).argmax(-1)
        return np.stack(np.divmod(action, observation.items_mask.shape[-1]), -1).astype(np.int32)

    def play(self, seed: int) -> list[State]:
        """The states of one greedy episode, first to last, as `env.animate` takes them."""
        return play_states(self.env, self._greedy, self.model, jax.random.PRNGKey(seed))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads an iter_*.pkl of either method, or the newest one in a run's folder.

    A file that holds anything but numpy arrays and plain containers is refused before any of it runs. Raises
    `UsageError` with one line that says what was expected.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        found = search_distill.find_checkpoints(path)
        if not found:
            raise UsageError(f"{path}: expected a run's folder with an iter_*.pkl in it; give a file or another folder")
        path = found[-1]
    contents = search_distill.read_checkpoint(path)
    if contents["method"] not in METHODS:
        raise UsageError(f"{path}: expected a checkpoint of {' or '.join(METHODS)}, got method={contents['method']}")
    try:
        config = METHODS[contents["method"]].Config(**contents["config"])
        params, state = contents["model"]
        network = METHODS[contents["method"]].make_network(config)
        env = METHODS[contents["method"]].make_env()
        expected = jax.eval_shape(
            lambda key: network.init(key, env.reset(key)[1].observation), jax.ShapeDtypeStruct((2,), np.uint32)
        )
        search_distill.check_fit(expected, (params, state), "")
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg'].replace('Input should be', 'expected')}"
        raise UsageError(f"{path}: its configuration is not one of this version ({reason})") from None
    except (UsageError, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0].removeprefix("resume: ").rstrip("; ")
        raise UsageError(f"{path}: its configuration and arrays do not belong together ({reason})") from None
    return Checkpoint(
        path.absolute(), contents["method"], contents["iteration"], contents["frames"], config, params, state
    )


# ======================================================================================================================
# Policies
# ======================================================================================================================


def make_sample_policy(network, config: RunConfig) -> Policy:
    """An action drawn from the network's distribution. The model is (Model, number): each number gives an episode
    of its own on the same instance."""

    predict = search_distill.make_predict(network, config)

    def act(numbered, key, state, observation, memory):
        model, number = numbered
        logits, _ = predict(model, observation)
        return jax.random.categorical(jax.random.fold_in(key, number), logits).astype(jnp.int32), None, memory

    return Policy(start=lambda *_: (), act=act)


def make_random_policy() -> Policy:
    """A uniformly random legal action."""

    def act(model, key, state, observation, memory):
        logits = jnp.where(search_distill.legal_actions(observation), 0.0, MASKED)
        return jax.random.categorical(key, logits).astype(jnp.int32), None, memory

    return Policy(start=lambda *_: (), act=act)


def _rule(observation: Observation) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the simple rule looks at, [A] each: whether an action is legal, its item's volume, its space's volume."""
    x, y, z = observation.items
    ems = observation.ems
    space = (ems.x2 - ems.x1) * (ems.y2 - ems.y1) * (ems.z2 - ems.z1)
    item, space = jnp.broadcast_arrays((x * y * z)[None], space[:, None])
    return search_distill.legal_actions(observation), item.reshape(-1), space.reshape(-1)


def largest_first(observation: Observation) -> jax.Array:
    """The largest item into the smallest space that holds it, int32 []."""
    legal, item, space = _rule(observation)
    largest = legal & (item == jnp.where(legal, item, -1.0).max())
    return jnp.where(largest, space, jnp.inf).argmin().astype(jnp.int32)


def largest_first_order(observation: Observation) -> jax.Array:
    """All flat actions in the order of that rule, int32 [A]: by item, then by space. Illegal actions come last."""
    legal, item, space = _rule(observation)
    return jax.lax.sort((~legal, -item, space, jnp.arange(legal.size)), num_keys=3)[-1]


def make_largest_first_policy() -> Policy:
    def act(model, key, state, observation, memory):
        return largest_first(observation), None, memory

    return Policy(start=lambda *_: (), act=act)


def make_lookahead_policy(env: BinPack, num_candidates: int = 16) -> Policy:
    """One ply of look-ahead without any learning: each of the rule's best actions is completed by the rule, and the
    one with the best outcome is taken."""

    def complete(state: State, observation: Observation) -> jax.Array:
        def body(carry):
            state, observation, total = carry
            state, timestep = search_distill.step_flat(env, state, largest_first(observation))
            return state, timestep.observation, total + timestep.reward

        init = (state, observation, jnp.float32(0.0))
        return jax.lax.while_loop(lambda carry: search_distill.is_decision(carry[1]), body, init)[2]

    def act(model, key, state, observation, memory):
        def outcome(action):
            after, timestep = search_distill.step_flat(env, state, action)
            return timestep.reward + complete(after, timestep.observation)

        actions = largest_first_order(observation)[:num_candidates]
        legal = search_distill.legal_actions(observation)[actions]
        return actions[jnp.where(legal, jax.vmap(outcome)(actions), -1.0).argmax()], None, memory

    return Policy(start=lambda *_: (), act=act)


def search_settings(checkpoints: list[Checkpoint], config: Config) -> dict[Checkpoint, search_distill.Config]:
    """How `policy=search` searches with each checkpoint: as in its training, or, for one of PPO, as in that of the
    first other one (without any: by default, with completions)."""
    own = {c: c.config for c in checkpoints if c.method == search_distill.METHOD}
    other = next(iter(own.values()), search_distill.Config(leaf_value="completion"))
    settings = {checkpoint: own.get(checkpoint, other) for checkpoint in checkpoints}
    if config.leaf_value == "checkpoint":
        return settings
    return {key: one.model_copy(update=dict(leaf_value=config.leaf_value)) for key, one in settings.items()}


def attempts(name: str, checkpoint: Checkpoint | None, env: BinPack, config: Config, settings: dict) -> list[tuple]:
    """What a row of the table plays: pairs of policy and model, of whose episodes the best counts."""
    if name in FLOORS:
        make = {
            "random": make_random_policy,
            "largest_first": make_largest_first_policy,
            "lookahead": functools.partial(make_lookahead_policy, env),
        }
        return [(make[name](), ())]
    network, model = checkpoint.network, checkpoint.model
    greedy, sample = (checkpoint._greedy, model), make_sample_policy(network, checkpoint.config)
    if name == "sample":
        return [(sample, (model, np.int32(0)))]
    if name == "best_of_n":
        return [greedy] + [(sample, (model, np.int32(number))) for number in range(config.n)]
    if name == "search":
        search = settings[checkpoint], config.num_simulations
        return [greedy, (search_distill.make_playing_search(env, network, *search), model)]
    return [greedy]


# ======================================================================================================================
# Scores
# ======================================================================================================================


def score(name: str, pairs: list[tuple[Policy, Any]], env: BinPack, keys: np.ndarray) -> tuple[Episodes, float]:
    """Plays every instance -> (episodes, decisions per second).

    The speed is that of trying everything on as many instances as the devices play at a time: the decisions of the
    episodes that count, over the time of all that were played for them. Compilation is not in it.
    """
    size = search_distill.instances_at_a_time()
    players = {policy: search_distill.make_player(env, policy) for policy, _ in pairs}
    seconds: dict[Policy, list[float]] = {policy: [] for policy in players}  # The first compiles.

    def timed(policy: Policy, model: Any, keys: np.ndarray) -> Episodes:
        start = time.perf_counter()
        episodes = players[policy](model, keys)
        seconds[policy].append(time.perf_counter() - start)
        return episodes

    def in_pieces(policy: Policy, model: Any, keys: np.ndarray) -> Episodes:
        parts = []
        for start in range(0, len(keys), size):
            parts.append(timed(policy, model, keys[start : start + size]))
            bar.update(len(parts[-1].steps))
        return Episodes(*(np.concatenate(field) for field in zip(*parts)))

    episodes = None
    with tqdm.tqdm(total=len(keys) * len(pairs), desc=name, unit="episode", disable=None, leave=False) as bar:
        for policy, model in pairs:
            play = functools.partial(in_pieces, policy)
            if episodes is None:
                episodes = play(search_distill.replicate(model), keys)
            else:
                bar.update(int(episodes.solved.sum()))
                episodes = search_distill.keep_better(play, search_distill.replicate(model), keys, episodes)
    for policy, model in pairs:
        while len(seconds[policy]) < 2:
            timed(policy, search_distill.replicate(model), keys[:size])
    cost = sum(np.median(seconds[policy][1:]) for policy, _ in pairs)
    return episodes, float(np.resize(episodes.steps, size).sum() / cost)


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
        cells.append(
            [
                row["checkpoint"],
                row["policy"],
                f"{row['avg_return']:.4f} +- {row['avg_return_se']:.4f}",
                f"{row['solved_rate']:.1%}",
                f"{row['packed_items']:.2f}",
                f"{row['decisions_per_second']:,.0f}",
                f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]" if row is not rows[0] else "",
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


# ======================================================================================================================
# Pictures
# ======================================================================================================================


def play_states(env: BinPack, policy: Policy, model: Any, key: jax.Array) -> list[State]:
    """The states of one episode on the host, first to last: the same episode that `make_rollout` plays for the key."""
    reset, start, act, step = _compiled(env, policy)
    state, timestep = reset(jax.random.fold_in(key, MAX_DECISIONS))
    memory = start(model, state, timestep.observation)
    states = [jax.device_get(state)]
    while search_distill.is_decision(timestep.observation):
        t = len(states) - 1
        action, _, memory = act(model, jax.random.fold_in(key, t), state, timestep.observation, memory)
        state, timestep = step(state, action)
        states.append(jax.device_get(state))
    return states


@functools.lru_cache(maxsize=8)
def _compiled(env: BinPack, policy: Policy) -> tuple[Callable, ...]:
    """reset, start, act and step as programs that serve every episode of a policy."""
    step = functools.partial(search_distill.step_flat, env)
    return tuple(map(jax.jit, (env.reset, policy.start, policy.act, step)))


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
    import matplotlib.pyplot as plt
    from matplotlib.animation import FuncAnimation

    figure = plt.figure(figsize=(5.5 * len(episodes), 4.2), layout="constrained")
    axes = [
        figure.add_subplot(1, len(episodes), i + 1, projection="3d", proj_type="ortho", computed_zorder=False)
        for i in range(len(episodes))
    ]
    colours = plt.get_cmap("tab20").colors

    def draw(t: int) -> None:
        for ax, (title, states) in zip(axes, episodes):
            ax.clear()
            state = states[min(t, len(states) - 1)]
            lower = np.stack(state.items_location, -1).astype(float)
            size = np.stack(state.items, -1).astype(float)
            for zorder, i in enumerate(back_to_front(np.flatnonzero(state.items_placed), lower, lower + size)):
                colour = colours[i % 20]
                ax.bar3d(*lower[i], *size[i], color=colour, edgecolor="black", linewidth=0.5, zorder=zorder)
            box = jax.tree.map(float, state.container)
            ax.set(xlim=(box.x1, box.x2), ylim=(box.y1, box.y2), zlim=(box.z1, box.z2), xticks=[], yticks=[], zticks=[])
            ax.set_box_aspect((box.x2 - box.x1, box.y2 - box.y1, box.z2 - box.z1), zoom=0.95)
            placed, items = int(state.items_placed.sum()), int(state.items_mask.sum())
            ax.set_title(f"{title}\n{utilisation(state):.1%} of the volume, {placed} of {items} items", fontsize=9)

    length = max(len(states) for _, states in episodes)
    if path.endswith(".png"):
        draw(length - 1)
        figure.savefig(path, dpi=150)
    else:
        frames = [*range(length), *[length - 1] * 4]  # The result stays for a moment.
        FuncAnimation(figure, draw, frames=frames, interval=400).save(path, writer="pillow", dpi=80)
    plt.close(figure)


def read_curve(run_dir: Path) -> np.ndarray:
    """The evaluations of a run, [rows, 3]: decisions, hours of collecting and learning, greedy utilisation. Time that
    went into evaluations is not in the hours, so that their number does not count against a run."""
    log, rows, seconds = run_dir / "metrics.jsonl", [], 0.0
    try:
        for line in search_distill._rows_up_to(log, sys.maxsize):
            row = json.loads(line)
            seconds += row.get("perf/iteration_seconds", 0.0)
            if row["iteration"] > 0 and "eval/greedy/avg_return" in row:
                rows.append([row["frames"], seconds / 3600, row["eval/greedy/avg_return"]])
        curve = np.array(rows, np.float64)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{log}: expected the log of a run, got something else; give the folder of a run") from None
    if not rows:
        raise UsageError(f"{log}: expected evaluations after the first iteration, got none; give the folder of a run")
    return curve


def draw_curves(path: str, groups: dict[str, list[np.ndarray]]) -> None:
    """Greedy utilisation against decisions and against hours: for each group of runs their mean, with a band from the
    lowest to the highest."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
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
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ======================================================================================================================
# Main
# ======================================================================================================================


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """-> (paths of checkpoints, overrides)."""
    paths, overrides = [], []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if word.startswith("--"):
            overrides += [word] + ([queue.pop(0)] if "=" not in word and queue else [])
        elif "=" in word and not os.path.exists(word):
            overrides.append(word)
        else:
            paths.append(word)
    return paths, overrides


def distinct_names(paths: list[Path], parts: int) -> list[str]:
    """The last parts of each path, as many as tell the paths apart."""
    while parts < max((len(path.parts) for path in paths), default=0):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
        parts += 1
    return ["/".join(path.parts[-parts:]) for path in paths]


def evaluate(words: list[str], paths: list[str], config: Config) -> None:
    """Does what the configuration asks for. `words` is the command line, to be kept with the figures."""
    wanting = [name for name in config.policy if name not in FLOORS]
    if not paths and (wanting or config.curves or not config.policy):
        asked = f"policy={wanting[0]}" if wanting else "curves" if config.curves else "policy=[]"
        raise UsageError(
            f"{asked}: expected a checkpoint, got none; type python evaluate.py CHECKPOINT ..., or one of policy="
            + ",".join(FLOORS)
        )
    if config.render and config.instance >= config.num_episodes:
        raise UsageError(
            f"instance={config.instance}: expected less than num_episodes={config.num_episodes}; type instance=0"
        )
    if config.render and not config.policy:
        raise UsageError("render: expected a policy to play with, got policy=[]; type policy=greedy")
    checkpoints = [load_checkpoint(path) for path in paths]
    run_dirs = list(dict.fromkeys(checkpoint.path.parent for checkpoint in checkpoints))
    curves = {run_dir: read_curve(run_dir) for run_dir in run_dirs if config.curves}

    parts = 3 if any(c.path.name.startswith("iter_") for c in checkpoints) else 1  # iter_000300 needs its folders.
    names = dict(zip(checkpoints, distinct_names([c.path.with_suffix("") for c in checkpoints], parts)))
    settings = search_settings(checkpoints, config)
    env = search_distill.make_env()
    keys = search_distill.evaluation_keys(config.seed, config.num_episodes)
    plan = [(name, c) for name in config.policy for c in ([None] if name in FLOORS else checkpoints)]
    rows, pictures = [], []
    for name, checkpoint in plan:
        title = f"{names[checkpoint]} {name}" if checkpoint else name
        pairs = attempts(name, checkpoint, env, config, settings)
        episodes, speed = score(title, pairs, env, keys)
        row = dict(checkpoint=names.get(checkpoint, ""), policy=name) | search_distill.summarise(episodes)
        row |= dict(decisions_per_second=speed, returns=episodes.returns.tolist())
        row["difference"] = difference(episodes.returns, np.array(rows[0]["returns"]) if rows else episodes.returns)
        if name == "search":
            row["search"] = settings[checkpoint].model_dump(mode="json", include=SEARCH_KEYS)
        if checkpoint:
            training = dict(method=checkpoint.method, iteration=checkpoint.iteration, frames=checkpoint.frames)
            row["training"] = training | dict(config=checkpoint.config.model_dump(mode="json"))
        rows.append(row)
        if config.render and len(pictures) < 2:
            played = (play_states(env, policy, model, keys[config.instance]) for policy, model in pairs)
            pictures.append((title, max(played, key=lambda states: utilisation(states[-1]))))
    if rows:
        print(table(rows))
    if config.json:
        device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        results = dict(command=shlex.join(["python", "evaluate.py", *words]), commit=commit(), device=device)
        results |= dict(versions=search_distill.library_versions(), **config.model_dump(mode="json"), rows=rows)
        Path(config.json).write_text(json.dumps(results, indent=1) + "\n")
    if pictures:
        draw_episodes(config.render, pictures)
    if config.curves:
        parents = list(dict.fromkeys(run_dir.parent for run_dir in run_dirs))
        labels = dict(zip(parents, distinct_names(parents, 1)))
        draw_curves(
            config.curves,
            {labels[parent]: [curves[d] for d in run_dirs if d.parent == parent] for parent in parents},
        )


def commit() -> str:
    """The commit of this checkout, marked if it was changed; empty outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def main(argv: list[str]) -> int:
    """The command line: 0, or 2 with one line for a user's mistake."""
    if {"-h", "--help"} & set(argv):
        print(search_distill.help_text(__doc__, Config, {}))
        return 0
    try:
        paths, overrides = split_words(argv)
        config, _ = search_distill.parse_command_line(overrides, Config, {})
        search_distill.use_cpu_cores(config.num_episodes)
        search_distill.use_compilation_cache(search_distill.Config().compilation_cache_dir)
        evaluate(argv, paths, config)
        return 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}; make room, or give another file", file=sys.stderr)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print("error: a device has not enough memory; type a smaller num_simulations or n", file=sys.stderr)
    return 2


if __name__ == "__main__":
    os.environ.setdefault("MPLBACKEND", "Agg")  # Pictures go to files.
    sys.exit(main(sys.argv[1:]))
