"""The planners: right on endgames with a known answer, and never below greedy play."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_evaluate import run
from test_search import best_return, rows

import evaluate
import train_search_distill_binpack as script


@pytest.fixture(scope="module")
def endgames(played):
    """States with three items left, and at most eight legal actions."""
    legal = np.asarray(played[1].action_mask)
    count, items = legal.sum((-2, -1)), legal.any(-2).sum(-1)
    states, observations = rows(played, (items == 3) & (count >= 5) & (count <= 8))
    return jax.tree.map(lambda x: x[:16], (states, observations))


@pytest.fixture(scope="module")
def checkpoint(env, config, params):
    """With passes of the size of endgames."""
    config = config.model_copy(update=dict(token_sizes=((8, 12), (40, 20))))
    network = script.make_network(config)
    return evaluate.Checkpoint(Path("x.pkl"), script.METHOD, 0, 0, config, config, params, script, env, network)


@pytest.fixture(scope="module")
def returns_of(env, checkpoint, params, endgames):
    """(name, words) -> what a planner packs from each endgame, [16], and its moves [16, 3]."""

    @functools.cache
    def player(name: str, **words):
        def play(epsilon, state, observation):
            config = evaluate.Config(**words).model_copy(update=dict(epsilon=epsilon))
            policy = evaluate.make_attempts(name, checkpoint, [], config)[0][-1][0]

            def move(carry, key):
                state, observation, memory = carry
                action, _, memory = policy.act(params, key, state, observation, memory)
                state, timestep = script.step_flat(env, state, action)
                return (state, timestep.observation, memory), (action, timestep.reward)

            init = (state, observation, policy.start(params, state, observation))
            _, (actions, rewards) = jax.lax.scan(move, init, jax.random.split(jax.random.PRNGKey(0), 3))
            return rewards.sum(), actions

        return jax.jit(jax.vmap(play, (None, 0, 0)))

    def returns_of(name: str, epsilon: float = 1e-6, **words):
        return jax.tree.map(np.asarray, player(name, **words)(epsilon, *endgames))

    return returns_of


@pytest.fixture(scope="module")
def best(env, endgames):
    """The largest return of each endgame, by trying everything."""
    step = jax.jit(functools.partial(script.step_flat, env))
    endgame = lambda i: jax.tree.map(lambda x: x[i], endgames)
    return np.array([best_return(step, *endgame(i)) for i in range(len(endgames[1].ems_mask))])


def test_one_ply_takes_the_best_completed_action(env, network, params, endgames, returns_of):
    """By plain loops, at the first move; a gain below epsilon changes nothing."""
    step = jax.jit(functools.partial(script.step_flat, env))
    apply = jax.jit(lambda observation: network.apply(params, None, observation)[0])

    def completed(state, timestep) -> float:
        total = float(timestep.reward)
        while timestep.observation.action_mask.any():
            state, timestep = step(state, apply(timestep.observation).argmax().astype(jnp.int32))
            total += float(timestep.reward)
        return total

    returns, moves = returns_of("one_ply", n=4)
    deviates = 0
    for i in range(8):
        state, observation = jax.tree.map(lambda x, i=i: x[i], endgames)
        logits = np.asarray(apply(observation))
        legal = np.flatnonzero(np.asarray(observation.action_mask))
        ranked = sorted(legal, key=lambda action: -logits[action])[:4]
        outcomes = [completed(*step(state, jnp.int32(action))) for action in ranked]
        assert outcomes[ranked.index(moves[i, 0])] == pytest.approx(max(outcomes), abs=1e-6)
        assert returns[i] >= max(outcomes) - 1e-6
        deviates += moves[i, 0] != ranked[0]
    assert deviates > 0
    assert (returns_of("one_ply", n=4, epsilon=1.0)[1] == returns_of("greedy")[1]).all()


@pytest.mark.slow
def test_a_wide_beam_finds_the_optimum_and_a_narrow_one_plays_greedily(best, returns_of):
    greedy, _ = returns_of("greedy")
    wide, _ = returns_of("beam", n=8, beam_width=32)
    assert wide == pytest.approx(best, abs=1e-6) and (greedy < best - 1e-6).mean() > 0.2
    assert (returns_of("beam", n=1, beam_width=1)[1] == returns_of("greedy")[1]).all()


def test_a_packing_is_the_same_in_any_order_of_moves(env):
    """And any other one has another hash."""
    step = jax.jit(functools.partial(script.step_flat, env))
    hash_of = jax.jit(evaluate.packing_hash)
    state, timestep = jax.jit(env.reset)(jax.random.PRNGKey(0))
    hashes: dict[tuple, set] = {}
    for first in np.flatnonzero(timestep.observation.action_mask)[:6]:
        after, seen = step(state, jnp.int32(first))
        for second in np.flatnonzero(seen.observation.action_mask)[:24]:
            end = jax.device_get(step(after, jnp.int32(second))[0])
            items = np.flatnonzero(end.items_placed)
            packing = tuple((i, *(int(x[i]) for x in end.items_location)) for i in items)
            hashes.setdefault(packing, set()).add(int(hash_of(end)))
    assert all(len(found) == 1 for found in hashes.values())
    assert len(set().union(*hashes.values())) == len(hashes) > 50


@pytest.mark.slow
def test_fine_tuning_finds_better_moves_and_is_kept_only_where_it_does(best, returns_of):
    greedy, _ = returns_of("greedy")
    returns, _ = returns_of("rl_search", num_updates=8, num_rollouts=16, horizon=2, tuning_rate=0.03)
    room = greedy < best - 1e-6
    assert (returns >= greedy - 1e-6).all() and (returns <= best + 1e-6).all()
    assert (returns > greedy + 1e-6)[room].mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("tuned", ["all", "policy_head"])
def test_fine_tuning_changes_the_parameters_that_it_names(
    tuned, checkpoint, network, params, endgames, best, returns_of, monkeypatch
):
    """By what the optimizer gets, which here changes nothing."""
    found = []

    def record(grads, state, params=None):
        changed = jax.tree.map(lambda x: (x != 0).any(), grads)
        jax.debug.callback(lambda changed: found.append(jax.tree.leaves_with_path(changed)), changed)
        return jax.tree.map(jnp.zeros_like, grads), state

    monkeypatch.setattr(evaluate.optax, "adam", lambda rate: optax.GradientTransformation(lambda params: (), record))
    greedy = lambda params, observation: network.apply(params, None, observation)[0].argmax().astype(jnp.int32)
    config = evaluate.Config(tuned=tuned, num_updates=3, num_rollouts=16, horizon=2)
    look_ahead = jax.jit(evaluate.make_fine_tuning(checkpoint, greedy, config))
    index = (best - returns_of("greedy")[0]).argmax()  # Its rollouts differ in what they pack.
    root = jax.tree.map(lambda x: x[index], endgames)
    moves, count, _ = look_ahead(params, jax.random.PRNGKey(0), *root)
    jax.effects_barrier()
    assert count == 1 and moves[0] == greedy(params, root[1])  # It was not changed, so it found nothing better.
    of_head = {key for key in params if "k/policy_" in key or "k/pair_" in key}
    changed = {path[0].key for leaves in found for path, is_changed in leaves if is_changed}
    assert 5 <= len(of_head) < len(params) / 2 and of_head <= changed
    assert changed == of_head if tuned == "policy_head" else len(changed) > len(of_head) + 10


@pytest.mark.slow
def test_fine_tuning_plays_checkpoints_and_only_adds_to_greedy_play(ppo_run, tmp_path, monkeypatch):
    """From the command line, as `test_own_items.py` plays by the other planners."""
    monkeypatch.setattr(evaluate, "instances_at_a_time", lambda: 8)
    small = "num_updates=1", "num_rollouts=4", "horizon=2", "num_episodes=8"
    rows = run(tmp_path, ppo_run / "iter_000001.pkl", "policy=greedy,rl_search", *small)["rows"]
    greedy, planned = (np.array(row["returns"]) for row in rows)
    assert [row["policy"] for row in rows] == ["greedy", "rl_search"] and (planned >= greedy).all()
