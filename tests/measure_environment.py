"""Compares FastBinPack with Jumanji's BinPack, field by field, and writes `tests/results/environment.json`.

    python tests/measure_environment.py            # at least 100,000 steps: about 20 minutes on 2 cores

The same actions are played in both environments, from random, heuristic and searched episodes of 20, 50 and 100 items.
A state counts as an overflow if the cut EMSs would need more slots than there are, found by repeating Jumanji's update
with twice as many.
"""

import functools
import itertools
import json
import platform
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jumanji.environments import BinPack
from jumanji.environments.packing.bin_pack.generator import RandomGenerator

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import train_search_distill_binpack as script  # noqa: E402

# Item slots, batches of episodes of each kind, episodes of a batch.
PLAYED = ((20, 5, 512), (50, 2, 128), (100, 4, 16))


def make_policy(kind: str, env, config) -> evaluate.Policy:
    if kind == "searched":
        return script.make_search_policy(env, script.make_network(config), config, 4, 1.0)
    make = {"random": evaluate.make_random_policy, "heuristic": evaluate.make_largest_first_policy}[kind]
    return make(evaluate.without_network(config))


@functools.cache
def make_compare(kind: str, config):
    items, spaces = config.max_num_items, config.max_num_ems
    jumanji_env = lambda num_ems: BinPack(RandomGenerator(items, num_ems, split_num_same_items=2), config.obs_num_ems)
    fast, jumanji, wide = script.make_env(config), jumanji_env(spaces), jumanji_env(2 * spaces)
    policy = make_policy(kind, fast, config)

    def overflows(state, action):
        """Whether placing the item needs more slots than there are."""
        pad = lambda x: jnp.concatenate([x, jnp.zeros_like(x)])
        ems_id, item_id = state.sorted_ems_indexes[action // items], action % items
        state = state.replace(ems=jax.tree.map(pad, state.ems), ems_mask=pad(state.ems_mask))
        return wide._pack_item(state, ems_id, item_id).ems_mask.sum() > spaces

    def play(env, step, params, key):
        state, timestep = env.reset(key)

        def body(carry, t):
            state, observation, memory = carry
            action, _, memory = policy.act(params, jax.random.fold_in(key, t), state, observation, memory)
            next_state, timestep = step(state, action)
            real = script.has_legal_action(observation)
            return (next_state, timestep.observation, memory), (state, action, real, next_state, timestep)

        memory = policy.start(params, state, timestep.observation)
        carry = (state, timestep.observation, memory)
        return (state, timestep), jax.lax.scan(body, carry, jnp.arange(config.max_decisions))[1]

    def replay(key, actions):
        """Jumanji's environment with the same actions, its own state carried on."""
        state, timestep = jumanji.reset(key)

        def body(state, action):
            next_state, timestep = jumanji.step(state, jnp.stack([action // items, action % items]))
            return next_state, (next_state, timestep)

        return (state, timestep), jax.lax.scan(body, state, actions)[1]

    @jax.jit
    def compare(params, keys):
        start, (states, actions, real, next_states, timesteps) = jax.vmap(
            functools.partial(play, fast, functools.partial(script.step_flat, fast)), in_axes=(None, 0)
        )(params, keys)
        reference = jax.vmap(replay)(keys, actions)
        overflow = jax.vmap(jax.vmap(overflows))(states, actions) & real
        return (start, (next_states, timesteps)), reference, real.sum(), overflow.sum(), timesteps.reward.sum(1)

    return compare


def compare_episodes(kind: str, num_episodes: int, seed: int, **sizes: int) -> dict:
    """Plays episodes of one kind in both environments -> steps, overflow states and the fields that differ."""
    config = script.Config(num_transformer_layers=1, transformer_num_heads=2, transformer_key_size=8, **sizes)
    env = script.make_env(config)
    params = script.init_train_state(env, script.make_network(config), config).params
    keys = jax.random.split(jax.random.PRNGKey(seed), num_episodes)
    mine, reference, steps, overflow, returns = make_compare(kind, config)(params, keys)
    is_ours = lambda x: hasattr(x, "blocks")  # The field that Jumanji has not.
    replace = lambda x: x.replace(blocks=None) if hasattr(x, "replace") else x._replace(blocks=None)
    mine = jax.tree.map(lambda x: replace(x) if is_ours(x) else x, mine, is_leaf=is_ours)
    mine, reference = (jax.tree_util.tree_leaves_with_path(x) for x in (mine, reference))
    assert len(mine) == len(reference)
    differing = [
        jax.tree_util.keystr(path)
        for (path, x), (_, y) in zip(mine, reference, strict=True)
        if x.dtype != y.dtype or not np.array_equal(np.asarray(x), np.asarray(y))
    ]
    return dict(
        steps=int(steps),
        overflow_states=int(overflow),
        differing_fields=differing,
        returns=np.asarray(returns).tolist(),
    )


def main() -> None:
    results = {}
    for kind, (items, batches, num_episodes) in itertools.product(("random", "heuristic", "searched"), PLAYED):
        of_batch = functools.partial(compare_episodes, kind, num_episodes)
        batches = [of_batch(seed, max_num_items=items, max_num_ems=max(40, 8 * items // 5)) for seed in range(batches)]
        total = {key: sum((batch[key] for batch in batches), type(batches[0][key])()) for key in batches[0]}
        returns = total.pop("returns")
        error = np.std(returns, ddof=1) / len(returns) ** 0.5
        total |= dict(episodes=len(returns), utilisation=float(np.mean(returns)), utilisation_se=float(error))
        results[f"{kind}, {items} items"] = total
        print(kind, items, total, flush=True)
    summary = dict(
        commit=evaluate.commit(),
        command="python tests/measure_environment.py",
        device=f"CPU, {platform.machine()}",
        versions=evaluate.library_versions(),
        steps=sum(x["steps"] for x in results.values()),
        overflow_states=sum(x["overflow_states"] for x in results.values()),
        differing_fields=sum((x["differing_fields"] for x in results.values()), []),
        by_kind=results,
    )
    enough = summary["steps"] >= 100_000 and all(
        sum(total["overflow_states"] for name, total in results.items() if name.endswith(f" {items} items")) >= 1000
        for items, *_ in PLAYED
    )
    if summary["differing_fields"] or not enough:
        sys.exit(f"not written: {summary}")
    path = ROOT / "tests" / "results" / "environment.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
