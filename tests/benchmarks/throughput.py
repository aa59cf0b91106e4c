r"""Searched decisions per second, where the time of an iteration goes, and what each accelerator of the design buys.

    python tests/benchmarks/throughput.py preset=cpu rounds=3 checkpoint=checkpoints/search_distill_cpu.pkl \
        out=tests/benchmarks/cpu.json                                                       # about 10 minutes, 2 cores
    python tests/benchmarks/throughput.py out=tests/benchmarks/h200.json                    # one GPU
    python tests/benchmarks/throughput.py preset=cpu sweep=true out=tests/benchmarks/cpu_sweep.json

Every arm is the same iteration, from the same state, with one thing changed (in "all three", three); the arms take
turns in one process, so a ratio compares what ran side by side. Any key of train_search_distill_binpack.py can be
given. `checkpoint=` measures with a trained network, whose episodes are longer.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, PositiveInt

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import train_search_distill_binpack as script  # noqa: E402


class Config(script.Config):
    """The keys of a run, and those of the measurement."""

    rounds: PositiveInt = Field(5, description="measured iterations of each arm, after one that compiles")
    sweep: bool = Field(False, description="how speed depends on batch, simulations and width, instead of the arms")
    checkpoint: str = Field("", description="checkpoint of search distillation with the same network (empty: none)")
    out: str = Field("", description="file to write the measurements to (empty: none)")


def steps_per_epoch(config: script.Config) -> int:
    """Minibatches of one pass over an iteration's decisions."""
    return config.rollout_batch_size * config.max_decisions // config.training_batch_size


def seconds_of(function: Callable, *arguments: Any, rounds: int) -> float:
    """Median time of a call, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ======================================================== Arms ========================================================
class Arm(NamedTuple):
    name: str
    iterate: Callable  # state -> metrics on the host
    config: Config


def jumanji_env(sizes: evaluate.Sizes) -> Any:
    """The environment with Jumanji's own update of the EMSs, which is sequential."""
    from jumanji.environments import BinPack

    env = script.make_env(sizes)
    env._update_ems = functools.partial(BinPack._update_ems, env)
    return env


def device_arm(name: str, env, config: Config) -> Arm:
    """The script's own iteration."""
    network = script.make_network(config)
    step = jax.pmap(script.make_train_iteration(env, network, config), axis_name=evaluate.DEVICES, donate_argnums=0)
    return Arm(name, lambda state: evaluate.host_copy(step(jax.tree.map(jnp.copy, state))[1]), config)


def host_shuffling_arm(name: str, env, config: Config) -> Arm:
    """The same with the rows brought to the host, shuffled there by numpy, and sent back a minibatch at a time."""
    network = script.make_network(config)
    policy = script.make_search_policy(env, network, config, config.num_simulations, config.gumbel_scale)
    rollout = script.make_rollout(env, policy)
    gradients = jax.value_and_grad(script.make_loss(network, config), argnums=1, has_aux=True)

    def collect(state: script.TrainState):
        key, _ = jax.random.split(jax.random.fold_in(state.key, state.iteration))
        episodes = evaluate.device_slice(jnp.arange(config.rollout_batch_size))
        trajectory = rollout(state.params, jax.vmap(functools.partial(jax.random.fold_in, key))(episodes))
        return script.make_samples(trajectory, config)

    def learn(params, opt_state, batch: script.Samples, permutations):
        if config.permute_axes:
            batch = batch._replace(observation=jax.vmap(script.permute_axes)(batch.observation, permutations))
        (loss, metrics), grads = script.psum(script.gradients_in_parts(gradients, config, batch, params))
        return *script.apply_gradients(config, params, opt_state, loss, grads, config.learning_rate), metrics

    collect, learn = (jax.pmap(function, axis_name=evaluate.DEVICES) for function in (collect, learn))
    rng, devices = np.random.default_rng(0), jax.local_device_count()

    def iterate(state: script.TrainState) -> dict:
        samples = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.device_get(collect(state)))
        taught = np.flatnonzero(script.select_taught(samples, config).mask)
        params, opt_state = state.params, state.opt_state
        for _ in range(config.num_epochs):
            order = np.resize(rng.permutation(taught), (steps_per_epoch(config), config.training_batch_size))
            for rows in order:
                batch = jax.tree.map(lambda x: x[rows].reshape(devices, -1, *x.shape[1:]), samples)
                permutations = rng.integers(0, 6, batch.mask.shape)
                params, opt_state, metrics = learn(params, opt_state, batch, permutations)
        jax.block_until_ready(params)
        return evaluate.host_copy(metrics) | {"decisions": samples.mask.sum()}

    return Arm(name, iterate, config)


def make_arms(config: Config) -> list[Arm]:
    wide = config.model_copy(update=dict(search_width=config.obs_num_ems * config.max_num_items))
    one_size = config.model_copy(update=dict(token_sizes=config.token_sizes[-1:]))
    return [
        device_arm("as it is", script.make_env(config), config),
        device_arm("Jumanji's EMS update", jumanji_env(config), config),
        device_arm("800-wide search", script.make_env(config), wide),
        host_shuffling_arm("host-side shuffling", script.make_env(config), config),
        host_shuffling_arm("all three of these", jumanji_env(wide), wide),
        device_arm("every pass at full size", script.make_env(config), one_size),
    ]


def measure_arms(arms: list[Arm], state: script.TrainState, rounds: int) -> list[dict]:
    """Decisions per second of each arm; they take turns, and a ratio is the median over turns."""
    times: list[list[float]] = [[] for _ in arms]
    decisions: list[list[int]] = [[] for _ in arms]
    for turn in range(rounds + 1):
        for arm, seconds, count in zip(arms, times, decisions, strict=True):
            start = time.perf_counter()
            metrics = arm.iterate(state)
            if turn:  # The first compiles.
                seconds.append(time.perf_counter() - start)
                count.append(int(metrics["decisions"]))
    rows = []
    for arm, seconds, count in zip(arms, times, decisions, strict=True):
        slower = statistics.median(mine / base for mine, base in zip(seconds, times[0], strict=True))
        slower *= statistics.mean(decisions[0]) / statistics.mean(count)  # Noise differs, and so episodes' lengths.
        rows.append(
            dict(
                arm=arm.name,
                decisions_per_second=statistics.mean(count) / statistics.median(seconds),
                ratio=slower,
                seconds=seconds,
            )
        )
    return rows


# ======================================================= Phases =======================================================
def count_visits(config: Config, params: dict, keys: jax.Array) -> tuple[dict[tuple[int, tuple], int], int]:
    """In one collection: passes of the network by number of rows and size, and steps of the environment, of one row."""
    calls: collections.Counter = collections.Counter()

    @script.make_batched  # Under vmap itself, a callback is repeated for every row.
    def count_steps(_, action):
        jax.debug.callback(lambda rows: calls.update(environment=len(rows)), action[..., 0])
        return ()

    env, network = script.make_env(config), script.make_network(config)
    step, apply = env.step, network.apply

    def counted_step(state, action):
        count_steps((), action)
        return step(state, action)

    def counted_apply(params, rng, observation, size):
        rows_and_size = len(observation.action_mask), size
        jax.debug.callback(lambda: calls.update([rows_and_size]))
        return apply(params, rng, observation, size)

    env.step, network = counted_step, network._replace(apply=counted_apply)
    policy = script.make_search_policy(env, network, config, config.num_simulations, config.gumbel_scale)
    jax.block_until_ready(jax.jit(script.make_rollout(env, policy))(params, keys))
    jax.effects_barrier()
    steps = calls.pop("environment")
    return calls, steps


def measure_phases(config: Config, state: script.TrainState) -> dict[str, Any]:
    """Seconds of an iteration by phase, each measured with all devices at work on their shares of it, and the share of
    the floor: the FLOP per second of the network phase against the best of large matrix products, one on each."""
    env, network = script.make_env(config), script.make_network(config)
    devices = jax.device_count()
    size = config.rollout_batch_size // devices

    def seconds_everywhere(function: Callable, *arguments: Any) -> float:
        return seconds_of(jax.pmap(function), *evaluate.replicate(arguments), rounds=config.rounds)

    def seconds_in_a_loop(body: Callable, carry: Any, *arguments: Any, length: int = 100) -> float:
        """Of one turn of carry = body(carry, *arguments), without what it costs to start a program."""

        def loop(carry, arguments):
            return jax.lax.scan(lambda carry, _: (body(carry, *arguments), None), carry, length=length)[0]

        return seconds_everywhere(loop, carry, arguments) / length

    params, opt_state = jax.device_put(evaluate.host_copy((state.params, state.opt_state)))
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.PRNGKey(1)))(jnp.arange(size))
    policy = script.make_search_policy(env, network, config, config.num_simulations, config.gumbel_scale)
    rollout = script.make_rollout(env, policy)
    collect = seconds_everywhere(rollout, params, keys)
    trajectory = jax.jit(rollout)(params, keys)

    # Observations from half way through an episode; a step takes the same time from any state.
    half = config.max_decisions // 2
    observation = jax.tree.map(lambda x: x[:, half], trajectory.observation)
    states, _ = jax.vmap(env.reset)(keys)
    step = jax.vmap(functools.partial(script.step_flat, env))
    after = jax.jit(step)(states, jnp.zeros(size, jnp.int32))
    step_seconds = seconds_in_a_loop(lambda carry: step(carry[0], jnp.zeros(size, jnp.int32)), after)
    passes, env_steps = count_visits(config, params, keys)
    network_seconds = flop = 0.0
    for (num_rows, network_size), number in passes.items():
        some = jax.tree.map(lambda x: jnp.resize(x, (num_rows, *x.shape[1:])), observation)

        def act(params, observation, network_size=network_size):
            return script.argmax(network.apply(params, None, observation, network_size)[0])

        def again(actions, params, observation, act=act):
            """The observations depend on the turn before, as far as XLA can know: none of it is computed once."""
            never = actions < 0
            keep = lambda x: jnp.where(never.reshape(-1, *[1] * (x.ndim - 1)), jnp.zeros_like(x), x)
            return act(params, jax.tree.map(keep, observation))

        network_seconds += number * seconds_in_a_loop(again, jnp.zeros(num_rows, jnp.int32), params, some)
        flop += number * devices * jax.jit(act).lower(params, some).compile().cost_analysis()["flops"]

    samples = script.select_taught(script.make_samples(trajectory, config), config)
    local = config.training_batch_size // devices
    rows = np.resize(np.random.default_rng(0).permutation(np.flatnonzero(samples.mask)), local)
    batch = jax.tree.map(lambda x: x[rows], samples)
    gradients = jax.value_and_grad(script.make_loss(network, config), argnums=1, has_aux=True)

    def gradient_step(carry, batch):
        params, opt_state = carry
        (loss, _), grads = script.gradients_in_parts(gradients, config, batch, params)
        return script.apply_gradients(config, params, opt_state, loss, grads, 1e-9)

    gradient = seconds_in_a_loop(gradient_step, (params, opt_state), batch, length=10)
    steps = config.num_epochs * steps_per_epoch(config)

    side = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((side, side), jnp.float32)
    best = devices * 2 * side**3 / seconds_everywhere(jnp.matmul, matrix, matrix)
    mask = np.asarray(trajectory.mask)
    env_seconds = env_steps / size * step_seconds
    states_passed = devices * sum(rows * number for (rows, _), number in passes.items())
    return dict(
        collect=collect,
        network=network_seconds,
        environment=env_seconds,
        tree_and_rest=collect - network_seconds - env_seconds,
        gradient_steps=gradient * steps,
        batched_passes=sum(passes.values()),
        passes_by_size={f"{n} rows, {e} x {i}": number for (n, (e, i)), number in passes.items()},
        batched_steps=env_steps / size,
        microseconds_a_pass=1e6 * network_seconds / states_passed,
        microseconds_a_step=1e6 * step_seconds / (devices * size),
        megaflop_a_pass=flop / states_passed / 1e6,
        network_gigaflops=flop / network_seconds / 1e9,
        best_gigaflops=best / 1e9,
        share_of_floor=flop / network_seconds / best,
        padding_share=float(1 - mask.mean()),
    )


def measure_environment(rounds: int) -> dict[str, float]:
    """Microseconds of a step at batch 1024, six placements into an episode, beside Jumanji's own."""
    fast = script.make_env(evaluate.Sizes())
    states, timesteps = jax.vmap(fast.reset)(jax.random.split(jax.random.PRNGKey(0), 1024))

    def act(observation):
        return jnp.argmax(script.legal_actions(observation), -1)

    def advance(carry, _):
        states, observation = carry
        states, timesteps = jax.vmap(functools.partial(script.step_flat, fast))(states, act(observation))
        return (states, timesteps.observation), None

    advance_six = jax.jit(lambda carry: jax.lax.scan(advance, carry, length=6)[0])
    states, observation = advance_six((states, timesteps.observation))
    times = []
    for env in (fast, jumanji_env(evaluate.Sizes())):
        step = jax.jit(jax.vmap(functools.partial(script.step_flat, env)))
        times.append(1e6 / 1024 * seconds_of(step, states, act(observation), rounds=10 * rounds))
    return dict(microseconds=times[0], jumanji_microseconds=times[1], ratio=times[1] / times[0])


# ==================================================== Compilation =====================================================
COMPILE = """
import sys, time
sys.path.insert(0, {root!r})
import evaluate, jax, train_search_distill_binpack as script
evaluate.use_compilation_cache(sys.argv[1])
config, _ = evaluate.parse_command_line(sys.argv[2:], script.Config, script.PRESETS)
evaluate.start_jax(config.rollout_batch_size, config.training_batch_size)
env, network = script.make_env(config), script.make_network(config)
start = time.perf_counter()
state = evaluate.replicate(script.init_train_state(env, network, config))
iterate = jax.pmap(script.make_train_iteration(env, network, config), axis_name=evaluate.DEVICES, donate_argnums=0)
lowered = iterate.lower(state)
traced = time.perf_counter()
lowered.compile()
print(traced - start, time.perf_counter() - traced)
"""


def words_of(config: Config) -> list[str]:
    """The overrides that make a training run's configuration."""
    keys = script.Config.model_fields
    return [f"{key}={evaluate.as_typed(value)}" for key, value in config if key in keys and value != keys[key].default]


def measure_compilation(words: list[str]) -> dict[str, float]:
    """Seconds that a new process takes to trace and compile an iteration, with an empty cache and with one filled."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
        for name in ("cold", "warm"):
            command = [sys.executable, "-c", COMPILE.format(root=str(ROOT)), folder, *words]
            run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[f"{name}_tracing"], found[f"{name}_compiling"] = map(float, run.stdout.split())
    return found


# ======================================================== Main ========================================================
def make_state(config: Config) -> script.TrainState:
    state = script.init_train_state(script.make_env(config), script.make_network(config), config)
    if config.checkpoint:
        params, _ = evaluate.read_checkpoint(config.checkpoint, script.METHOD, config.env_id)["model"]
        evaluate.check_fit("checkpoint", state.params, params, "give the same network keys")
        state = state._replace(params=params)
    return evaluate.replicate(state)


def sweep(config: Config) -> list[dict]:
    """One key varied at a time around the configuration."""
    values = dict(
        rollout_batch_size=[config.rollout_batch_size * 2**i // 4 for i in range(5)],
        num_simulations=[config.num_simulations * 2**i // 2 for i in range(4)],
        search_width=[16, 32, 64, 128, config.obs_num_ems * config.max_num_items],
    )
    rows = []
    for key, candidates in values.items():
        for value in candidates:
            changed = config.model_copy(update={key: value})
            if steps_per_epoch(changed) == 0:
                continue
            (row,) = measure_arms(
                [device_arm("", script.make_env(config), changed)], make_state(changed), config.rounds
            )
            rows.append({"key": key, "value": value, "decisions_per_second": row["decisions_per_second"]})
            print(f"{key:24} {value:6}  {row['decisions_per_second']:10,.1f} decisions/s", flush=True)
    return rows


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(evaluate.help_text(__doc__, Config, script.PRESETS))
        return 0
    try:
        config, _ = evaluate.parse_command_line(argv, Config, script.PRESETS)
        evaluate.start_jax(config.rollout_batch_size, config.training_batch_size)
        if config.out and not Path(config.out).parent.is_dir():
            raise evaluate.UsageError(f"out={config.out}: expected a file in a folder that exists; type out=speed.json")
        for key in ("rollout_batch_size", "training_batch_size"):
            if getattr(config, key) % jax.device_count():
                raise evaluate.UsageError(f"{key}: expected a multiple of the {jax.device_count()} devices")
        state = make_state(config)
    except evaluate.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = dict(
        command="python tests/benchmarks/throughput.py " + " ".join(argv),
        commit=evaluate.commit(),
        device=f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        versions=evaluate.library_versions(),
    )
    if config.sweep:
        result["sweep"] = sweep(config)
    else:
        result["phases"] = phases = measure_phases(config, state)
        for name, value in phases.items():
            print(f"{name:22} {value if isinstance(value, dict) else format(value, '12.4g')}", flush=True)
        result["arms"] = measure_arms(make_arms(config), state, config.rounds)
        for row in result["arms"]:
            print(f"{row['arm']:24} {row['decisions_per_second']:10,.1f} decisions/s  {row['ratio']:6.2f} x the time")
        for name, found in (
            ("environment", measure_environment(config.rounds)),
            ("compilation", measure_compilation(words_of(config))),
            ("compilation_of_the_full_run", measure_compilation([])),
        ):
            result[name] = found
            print(f"{name}:", ", ".join(f"{key} {value:.3g}" for key, value in found.items()), flush=True)
    if config.out:
        Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
