"""The improvement operators: known answers on small trees, and equality with mctx where it has the same search."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from conftest import override

import evaluate
import train_search_distill_binpack as script

ACTIONS = 3
NUM_STATES = sum(ACTIONS**depth for depth in range(4))  # A tree of three moves: state s leads to 3 s + 1, 2 and 3.


@pytest.fixture
def toy(monkeypatch, config):
    """A game with known values: (rewards [states], the move to each; values [states]; the configuration)."""
    noise = np.random.default_rng(0)
    rewards, values = (jnp.array(noise.uniform(0, 0.3, NUM_STATES), jnp.float32) for _ in range(2))
    logits = jnp.array(noise.normal(0, 0.2, (NUM_STATES, ACTIONS)), jnp.float32)

    def make_node_function(env, network, config):
        def make_node(params, state, *_):
            return script.Node(jnp.arange(ACTIONS), logits[state], values[state], jnp.array(False))

        return make_node

    def make_child_function(env, make_node, config):
        def make_child(params, state, node, index):
            state = 3 * state + 1 + index
            return rewards[state], jnp.float32(1.0), state, make_node(params, state)

        return make_child

    monkeypatch.setattr(script, "make_node_function", make_node_function)
    monkeypatch.setattr(script, "make_child_function", make_child_function)
    monkeypatch.setattr(script, "legal_actions", lambda observation: jnp.ones(ACTIONS, bool))
    return np.array(rewards, np.float64), np.array(values, np.float64), np.array(logits, np.float64), config


def searched(make, config, key=0, **keys):
    policy = make(None, None, config.model_copy(update=keys))
    root = policy.start((), jnp.int32(0), None)
    return jax.jit(policy.act)((), jax.random.PRNGKey(key), jnp.int32(0), None, root)


def test_treepi_backs_up_soft_values_as_brute_force_does(toy, monkeypatch):
    """With every action sampled once at each node, and all nodes up to the depth reached."""
    rewards, values, _, config = toy
    categorical = jax.random.categorical
    each_once = lambda key, logits, shape=None: jnp.arange(ACTIONS) if shape else categorical(key, logits)
    monkeypatch.setattr(jax.random, "categorical", each_once)
    alpha, depth = 0.2, 2

    def q(state: int, depth: int) -> np.ndarray:
        children = 3 * state + 1 + np.arange(ACTIONS)
        return rewards[children] + np.array([soft_value(child, depth - 1) for child in children])

    def soft_value(state: int, depth: int) -> float:
        return alpha * math.log(np.exp(q(state, depth) / alpha).mean()) if depth else values[state]

    for depth in (1, 2):
        keys = dict(num_sampled_actions=ACTIONS, num_simulations=40, search_depth=depth, soft_temperature=alpha)
        _, decision, _ = searched(script.make_treepi, config, **keys)
        weights = np.exp(q(0, depth) / alpha)
        np.testing.assert_allclose(decision.weights, weights / weights.sum(), rtol=1e-4)
        np.testing.assert_allclose(decision.value, soft_value(0, depth), rtol=1e-5)


def test_treepi_samples_from_the_policy_and_weighs_by_exponentiated_values(toy):
    """With many samples: the target is the policy times exp(Q / alpha), as in MPO."""
    rewards, values, logits, config = toy
    keys = dict(num_sampled_actions=20_000, search_depth=1, soft_temperature=0.1)
    action, decision, node = searched(script.make_treepi, config, **keys)
    children = 1 + np.arange(ACTIONS)
    expected = np.exp(logits[0] + (rewards[children] + values[children]) / 0.1)
    np.testing.assert_allclose(decision.weights, expected / expected.sum(), atol=0.02)
    np.testing.assert_allclose(node.value, values[1 + int(action)], rtol=1e-6)
    assert int(decision.taken) == int(action)


@pytest.mark.parametrize("seed", range(3))
def test_alphazero_with_one_worker_is_muzero_policy_visit_for_visit(toy, seed):
    rewards, values, logits, config = toy
    logits, rewards, values = (jnp.array(x, jnp.float32) for x in (logits, rewards, values))
    keys = dict(num_simulations=20, c_puct=1.0, acting_temperature=0.5, num_workers=1)

    def recurrent_fn(params, key, action, state):
        state = jnp.minimum(3 * state + 1 + action, NUM_STATES - 1)
        one = jnp.ones(1)
        return mctx.RecurrentFnOutput(
            reward=rewards[state], discount=one, prior_logits=logits[state], value=values[state]
        ), state

    root = jnp.zeros(1, jnp.int32)
    expected = mctx.muzero_policy(
        params=(),
        rng_key=jax.random.PRNGKey(seed),
        root=mctx.RootFnOutput(prior_logits=logits[root], value=values[root], embedding=root),
        recurrent_fn=recurrent_fn,
        num_simulations=20,
        pb_c_init=1.0,
        temperature=0.5,
    )
    action, decision, _ = searched(script.make_alphazero, config, key=seed, **keys)
    np.testing.assert_allclose(20 * decision.weights, 20 * expected.action_weights[0], atol=1e-4)
    assert int(action) == int(expected.action[0])
    np.testing.assert_allclose(decision.value, expected.search_tree.node_values[0, 0], rtol=1e-5)


def test_virtual_losses_spread_the_workers_over_the_leaves(toy, monkeypatch):
    """Three workers start from an empty tree and take its three actions; without virtual losses they take one."""
    config = toy[-1]
    keys = dict(num_simulations=3, num_workers=3, dirichlet_fraction=0.0)
    _, decision, _ = searched(script.make_alphazero, config, **keys)
    np.testing.assert_allclose(decision.weights, np.full(ACTIONS, 1 / 3), rtol=1e-6)
    puct = script.puct
    monkeypatch.setattr(script, "puct", lambda tree, virtual, *rest: puct(tree, jnp.zeros_like(virtual), *rest))
    _, decision, _ = searched(script.make_alphazero, config, **keys)
    assert sorted(decision.weights) == [0, 0, 1]


def test_best_of_n_plays_and_teaches_the_best_of_its_episodes(env, network, config, params):
    """Against the same episodes played one by one."""
    count = 3
    policy = script.make_best_of_n(env, network, config.model_copy(update=dict(num_simulations=count)))
    step, predict = jax.jit(functools.partial(script.step_flat, env)), jax.jit(script.make_predict(network, config))
    act = jax.jit(policy.act)
    greedy_is_best = 0
    for seed in range(6):
        state, timestep = env.reset(jax.random.PRNGKey(seed))
        returns = []
        for number in range(count + 1):
            s, t, total = state, timestep, 0.0
            key = jax.random.fold_in(state.key, number)
            for i in range(19):
                logits, _ = predict(params, t.observation)
                noise = jax.random.gumbel(jax.random.fold_in(key, i), logits.shape)
                s, t = step(s, script.argmax(logits + noise * (number > 0)))
                total += float(t.reward)
            returns.append(total)
        memory, total = jax.jit(policy.start)(params, state, timestep.observation), 0.0
        for _ in range(19):
            action, decision, memory = act(params, None, state, timestep.observation, memory)
            if timestep.observation.action_mask.any():
                assert decision.actions.tolist() == [int(action)] and decision.weights.tolist() == [1.0]
                np.testing.assert_allclose(decision.value, max(returns) - total, atol=1e-5)
            state, timestep = step(state, action)
            total += float(timestep.reward)
        np.testing.assert_allclose(total, max(returns), atol=1e-5)
        greedy_is_best += returns[0] == max(returns)
    assert greedy_is_best < 6


@pytest.mark.parametrize(
    "words",
    [
        "improvement=alphazero num_simulations=4 num_workers=2",
        "improvement=treepi leaf_value=completion num_sampled_actions=3 search_depth=2 max_policy_kl=0.005",
        "improvement=best_of_n loss=cispo value_target=search",
    ],
)
def test_each_operator_and_loss_trains(words, tmp_path):
    """Two iterations, in a folder that names the operator."""
    assert script.main([*override(*words.split(), "max_num_iters=2"), f"save_dir={tmp_path}"]) == 0
    (log,) = tmp_path.glob("BinPack-v2/*/seed_0/metrics.jsonl")
    operator = re.findall(r"improvement=(\w+)", words)
    assert log.parent.parent.name.startswith(f"{operator[0]}_nsim_" if operator else "nsim_")
    rows = evaluate.read_log(log)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(x) for row in rows for x in row.values()) and rows[-1]["train/grad_norm"] > 0


def test_a_key_of_another_operator_is_refused_with_a_line(capsys):
    for words, expected in (
        ("c_puct=2", "c_puct=2: expected with improvement=alphazero alone"),
        ("improvement=treepi gumbel_scale=0.5", "gumbel_scale=0.5: expected with improvement=gumbel alone"),
        ("kl_penalty=0.1", "kl_penalty=0.1: expected with loss=cispo alone"),
        ("improvement=alphazero num_workers=3", "num_workers=3: expected a divisor of num_simulations=32"),
        ("improvement=mcts", "improvement=mcts: expected one of gumbel, alphazero, treepi, best_of_n; type"),
    ):
        assert script.main(words.split()) == 2
        assert expected in capsys.readouterr().err
