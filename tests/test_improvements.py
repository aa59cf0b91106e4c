"""The improvement operators: known answers on small trees, and equality with mctx where it has the same search."""

import functools
import math
import re
import types

import chex
import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest
from conftest import flat_vector, override

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as script

ACTIONS = 3
ORDER = (2, 0, 1)  # The action in each place of a node.
NUM_STATES = sum(ACTIONS**depth for depth in range(4))  # A tree of three moves: state s leads to 3 s + 1, 2 and 3.


@chex.dataclass
class State:
    number: jax.Array
    blocks: None = None


@pytest.fixture
def toy(monkeypatch, config):
    """A game with known values: (rewards [states], the move to each; values [states]; the configuration)."""
    noise = np.random.default_rng(0)
    rewards, values = (jnp.array(noise.uniform(0, 0.3, NUM_STATES), jnp.float32) for _ in range(2))
    logits = jnp.array(noise.normal(0, 0.2, (NUM_STATES, ACTIONS)), jnp.float32)

    def start(params, state, _):
        return script.Node(jnp.array(ORDER), logits[state.number], values[state.number], line=state.number), ()

    def make_child(_, state, node, index, wanted):
        state = State(number=3 * state.number + 1 + index)
        reward = jnp.where(wanted, rewards[state.number], jnp.nan)  # What is not wanted must not be used.
        return reward, jnp.float32(1.0), state, start((), state, ())[0]

    monkeypatch.setattr(script, "make_tree_functions", lambda *_: (start, make_child))
    monkeypatch.setattr(script, "legal_actions", lambda observation: jnp.ones(ACTIONS, bool))
    return np.array(rewards, np.float64), np.array(values, np.float64), np.array(logits, np.float64), config


def searched(make, config, key=0, **keys):
    """What the operator returns at the root; for several keys, an array of each."""
    policy = make(None, None, config.model_copy(update=keys))
    state, observation = State(number=jnp.int32(0)), evaluate.Observation(*[None] * 7)
    memory = policy.start((), state, observation)
    act = jax.jit(lambda seed: policy.act((), jax.random.PRNGKey(seed), state, observation, memory))
    return act(key) if jnp.ndim(key) == 0 else jax.vmap(act)(key)


@pytest.fixture
def each_once(monkeypatch):
    """TreePI samples every action once at each node."""
    categorical = jax.random.categorical
    sample = lambda key, logits, shape=None: jnp.arange(ACTIONS) if shape else categorical(key, logits)
    monkeypatch.setattr(jax.random, "categorical", sample)


def test_treepi_backs_up_soft_values_as_brute_force_does(toy, each_once):
    """With all nodes up to the depth reached."""
    rewards, values, _, config = toy
    alpha = 0.2

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


def test_treepi_follows_the_samples_in_proportion_to_exponentiated_values(toy, each_once):
    """Of two rollouts the second looks below the best action alone, if the temperature is low."""
    rewards, values, _, config = toy
    q = (rewards + values)[1 : 1 + ACTIONS]
    best = q.argmax()
    below = 3 * (1 + best) + 1 + np.arange(ACTIONS)
    alpha = 1e-3
    soft = lambda q: q.max() + alpha * math.log(np.exp((q - q.max()) / alpha).mean())
    q[best] = rewards[1 + best] + soft((rewards + values)[below])
    for key in range(4):
        keys = dict(num_sampled_actions=ACTIONS, num_simulations=2, search_depth=2, soft_temperature=alpha)
        _, decision, _ = searched(script.make_treepi, config, key=key, **keys)
        np.testing.assert_allclose(decision.value, soft(q), rtol=1e-5)


def test_treepi_gives_no_weight_to_what_it_did_not_sample_and_acts_by_the_weights(toy):
    keys = dict(num_sampled_actions=2, search_depth=1, soft_temperature=0.3)
    action, decision, (node, _) = searched(script.make_treepi, toy[-1], key=jnp.arange(60), **keys)
    taken, weights = np.asarray(decision.taken), np.asarray(decision.weights)
    assert set((weights > 0).sum(-1)) == {1, 2} and (np.array(ORDER)[taken] == np.asarray(action)).all()
    assert (np.asarray(node.line) == 1 + taken).all()
    weight = np.take_along_axis(weights, taken[:, None], -1)[:, 0]
    assert weight.min() > 0 and 0.0 < (weight < 0.5).mean() < 0.5


def test_treepi_samples_from_the_policy_and_weighs_by_exponentiated_values(toy):
    """With many samples: the target is the policy times exp(Q / alpha), as in MPO."""
    rewards, values, logits, config = toy
    keys = dict(num_sampled_actions=20_000, search_depth=1, soft_temperature=0.1)
    action, decision, (node, lines) = searched(script.make_treepi, config, **keys)
    children = 1 + np.arange(ACTIONS)
    expected = np.exp(logits[0] + (rewards[children] + values[children]) / 0.1)
    np.testing.assert_allclose(decision.weights, expected / expected.sum(), atol=0.02)
    np.testing.assert_allclose(node.value, values[1 + int(decision.taken)], rtol=1e-6)
    assert ORDER[int(decision.taken)] == int(action)
    assert lines.shape == (20_001,) and set(lines.tolist()) == {0, *children}  # Of every node, for the next search.


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
    assert int(action) == ORDER[int(expected.action[0])]
    np.testing.assert_allclose(decision.value, expected.search_tree.node_values[0, 0], rtol=1e-5)


def test_virtual_losses_spread_the_workers_over_the_leaves(toy, monkeypatch):
    """Three workers start from an empty tree and take its three actions; without virtual losses they take one."""
    config = toy[-1]
    keys = dict(num_simulations=3, num_workers=3, dirichlet_fraction=0.0)
    _, decision, (_, lines) = searched(script.make_alphazero, config, **keys)
    np.testing.assert_allclose(decision.weights, np.full(ACTIONS, 1 / 3), rtol=1e-6)
    assert sorted(lines.tolist()) == [0, 1, 2, 3]
    puct = script.puct
    monkeypatch.setattr(script, "puct", lambda tree, virtual, *rest: puct(tree, jnp.zeros_like(virtual), *rest))
    _, decision, _ = searched(script.make_alphazero, config, **keys)
    assert sorted(decision.weights) == [0, 0, 1]


def tree_of(make_child, parents, indices, wanted=True):
    """A root and the children that `grow` makes of it."""
    start, _ = script.make_tree_functions()
    state = State(number=jnp.int32(0))
    tree = script.start_tree(state, start((), state, ())[0], 1 + len(indices))
    return script.grow(make_child, (), tree, 1, jnp.array(parents), jnp.array(indices), wanted)


def test_a_child_that_is_chosen_twice_is_evaluated_once(toy):
    wanted = []
    _, make_child = script.make_tree_functions()

    def counted(*of):
        jax.debug.callback(lambda x: wanted.append(bool(x)), of[-1])
        return make_child(*of)

    tree = tree_of(counted, [0, 0, 0, 0], [2, 1, 2, 2])
    jax.effects_barrier()
    assert sum(wanted) == 2 and len(wanted) == 4
    assert tree.child[0].tolist() == [0, 2, 4] and not np.isnan(script.child_values(tree, 0)).any()
    wanted.clear()
    tree = tree_of(counted, [0, 0], [1, 2], wanted=False)
    jax.effects_barrier()
    assert not any(wanted) and not tree.child.any()


@pytest.mark.parametrize("workers", (1, 4, 8))
def test_a_decision_waits_for_one_evaluation_a_round_of_workers(toy, monkeypatch, workers):
    """`grow` is called for as many leaves as there are workers; the root comes from the search before."""
    rounds, grow = [], script.grow

    def counted(make_child, known, tree, num_nodes, parents, *rest):
        jax.debug.callback(lambda n: rounds.append((int(n), len(parents))), num_nodes)
        return grow(make_child, known, tree, num_nodes, parents, *rest)

    monkeypatch.setattr(script, "grow", counted)
    jax.block_until_ready(searched(script.make_alphazero, toy[-1], num_simulations=32, num_workers=workers))
    jax.effects_barrier()
    assert sorted(rounds) == [(1 + i * workers, workers) for i in range(32 // workers)]


def test_values_that_differ_by_rounding_alone_do_not_move_the_search(toy):
    """The prior decides among them, as it does among equal values."""
    _, make_child = script.make_tree_functions()
    tree = tree_of(make_child, [0, 0, 0], [0, 1, 2])
    tree = tree._replace(visits=jnp.ones(4), reward=jnp.zeros(4), discount=jnp.ones(4))
    scores = [
        script.puct(tree._replace(value=jnp.array(values, jnp.float32)), jnp.zeros((4, ACTIONS)), 0, 1.25)
        for values in ([0.9, 0.9, 0.9, 0.9], [0.9, 0.9, np.nextafter(np.float32(0.9), np.float32(1.0)), 0.9])
    ]
    np.testing.assert_allclose(*scores, atol=2e-3)


def test_noise_goes_to_legal_actions_alone(toy, monkeypatch):
    """However concentrated: an action that is not legal is never visited."""
    legal = jnp.array([True, False, True])
    monkeypatch.setattr(script, "legal_actions", lambda observation: legal)
    for key in range(5):
        keys = dict(num_simulations=6, dirichlet_alpha=1e-3, dirichlet_fraction=1.0)
        _, decision, _ = searched(script.make_alphazero, toy[-1], key=key, **keys)
        assert decision.weights[ORDER.index(1)] == 0.0 and np.isfinite(decision.weights).all()


def test_parallel_workers_are_those_of_a_slow_reference(toy, monkeypatch):
    """Of 24 simulations by four workers, with terminal states, a discount, and workers that meet at a leaf."""
    rewards, values, logits, config = toy
    discount, terminal = 0.8, {2, 5, *range(13, NUM_STATES)}

    class Reference:
        def __init__(self, state, reward=0.0, discount=0.0, parent=None):
            self.state, self.reward, self.discount, self.parent = state, reward, discount, parent
            self.children, self.virtual, self.visits, self.sum = {}, np.zeros(ACTIONS), 0, 0.0

        value = property(lambda self: self.sum / self.visits)

        def q(self, i):
            child = self.children.get(i)
            return child.reward + child.discount * child.value if child else self.value

    def leaf_value(state):
        return 0.0 if state in terminal or state < 0 else values[state]

    def step(state, i):
        after = 3 * state + 1 + i
        if state in terminal or state < 0:
            return -1, 0.0, 0.0
        return after, rewards[after], 0.0 if after in terminal else discount

    def select(node):
        q = np.array([node.q(i) for i in range(ACTIONS)])
        low, high = min(node.value, q.min()), max(node.value, q.max())
        visits = np.array([node.children[i].visits if i in node.children else 0 for i in range(ACTIONS)])
        q = np.where(visits > 0, q - low, 0.0) / max(high - low, 1e-4)
        prior = np.exp(logits[max(node.state, 0)]) / np.exp(logits[max(node.state, 0)]).sum()
        total = node.visits + node.virtual.sum()
        weight = math.sqrt(total) * (1.0 + math.log((total + 19653) / 19652))
        losses = q * visits / np.maximum(visits + node.virtual, 1)
        return int(np.argmax(losses + weight * prior / (visits + node.virtual + 1)))

    root, meetings = Reference(0), 0
    root.visits, root.sum = 1, values[0]
    for _ in range(6):
        leaves, passed = [], []
        for _ in range(4):
            node = root
            while True:
                i = select(node)
                node.virtual[i] += 1
                passed.append(node)
                if i not in node.children:
                    break
                node = node.children[i]
            leaves.append((node, i))
        meetings += len(leaves) - len({(id(node), i) for node, i in leaves})
        for node in passed:
            node.virtual[:] = 0
        for node, i in leaves:
            node.children.setdefault(i, Reference(*step(node.state, i), node))
        for node, i in leaves:
            node, total = node.children[i], leaf_value(node.children[i].state)
            while node:
                node.sum, node.visits = node.sum + total, node.visits + 1
                node, total = node.parent, node.reward + node.discount * total
    assert meetings > 0

    def start(params, state, _):
        state = state.number
        known = jnp.isin(state, jnp.array([-1, *terminal]))
        value = jnp.where(known, 0.0, jnp.array(values, jnp.float32)[state])
        return script.Node(jnp.arange(ACTIONS), jnp.array(logits, jnp.float32)[jnp.maximum(state, 0)], value, False), ()

    def make_child(_, state, node, i, wanted):
        after = jnp.where(jnp.isin(state.number, jnp.array([-1, *terminal])), -1, 3 * state.number + 1 + i)
        ends = jnp.isin(after, jnp.array([-1, *terminal]))
        reward = jnp.where(after < 0, 0.0, jnp.array(rewards, jnp.float32)[after])
        reward = jnp.where(wanted, reward, jnp.nan)
        return reward, jnp.where(ends, 0.0, discount), State(number=after), start((), State(number=after), ())[0]

    monkeypatch.setattr(script, "make_tree_functions", lambda *_: (start, make_child))
    keys = dict(num_simulations=24, num_workers=4, dirichlet_fraction=0.0, c_puct=1.0)
    _, decision, _ = searched(script.make_alphazero, config, **keys)
    expected = [root.children[i].visits if i in root.children else 0 for i in range(ACTIONS)]
    np.testing.assert_allclose(np.array(decision.weights) * 24, expected, atol=1e-4)
    np.testing.assert_allclose(decision.value, root.value, rtol=1e-5)


def test_the_kl_is_nothing_at_the_acting_policy_and_cispo_is_the_capped_policy_gradient(
    network, config, params, played
):
    """Though the search keeps fewer actions than are legal."""
    keys = dict(loss="cispo", max_policy_kl=0.01, epsilon_high=1.5, value_loss_weight=0.0, kl_penalty=0.0)
    config = config.model_copy(update=keys | dict(training_batch_size=40))
    observation = jax.tree.map(lambda x: x[:40, 1], played[1])
    logits, _ = network.apply(params, None, observation)
    top, actions = jax.lax.top_k(logits, 5)
    assert (np.asarray(observation.action_mask).sum((-2, -1)) > 5).mean() > 0.9
    rng = np.random.default_rng(0)
    taken, advantage = jnp.array(rng.integers(0, 2, 40)), jnp.array(rng.normal(size=40), jnp.float32)

    def loss(params, kl_weight, advantage, prior):
        decision = script.Decision(actions, jnp.zeros(top.shape), prior, taken, advantage)
        ones = jnp.ones(40)
        samples = script.Samples(observation, decision, advantage, advantage, kl_weight * ones, ones > 0, ones)
        return script.make_loss(network, config)((40, 20), params, samples)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    prior = jax.nn.log_softmax(top)
    (_, metrics), grads = gradient(params, 1.0, jnp.zeros(40), prior)
    np.testing.assert_allclose(metrics["policy_kl"], 0.0, atol=1e-6)
    np.testing.assert_allclose(flat_vector(grads), 0.0, atol=1e-5)
    other = jax.nn.log_softmax(top + jnp.array(rng.normal(size=top.shape), jnp.float32))
    (total, metrics), _ = gradient(params, 2.0, advantage, other)
    p, log_q, a = (np.asarray(x, np.float64) for x in (jnp.exp(other), prior, advantage))
    kl = (p * (np.asarray(other) - log_q)).sum(-1).mean()
    pick = lambda x: np.asarray(x)[np.arange(40), np.asarray(taken)]
    ratio = np.exp(pick(prior) - pick(other))
    assert 0 < (ratio > 1.5).sum() < 40
    log_prob = pick(jnp.take_along_axis(jax.nn.log_softmax(logits), actions, -1))
    policy_loss = -(np.minimum(ratio, 1.5) * a * log_prob).mean()
    np.testing.assert_allclose(metrics["policy_kl"], kl, rtol=1e-3)
    np.testing.assert_allclose(metrics["policy_loss"], policy_loss, rtol=1e-3)
    np.testing.assert_allclose(total, policy_loss + 2.0 * kl, rtol=1e-3)


def test_cispo_weighs_an_action_by_its_return_minus_the_acting_value(trajectory):
    shape = trajectory.mask.shape
    actions, ones, values = jnp.zeros((*shape, 1), jnp.int32), jnp.ones((*shape, 1)), jnp.full(shape, 0.25)
    trajectory = trajectory._replace(decision=script.Decision(actions, ones, 0.0 * ones, actions[..., 0], values))
    samples = script.make_samples(trajectory, script.Config(loss="cispo", kl_penalty=0.3), values)
    returns = np.asarray(trajectory.reward)[:, ::-1].cumsum(1)[:, ::-1].reshape(-1)
    np.testing.assert_allclose(samples.advantage, returns - 0.25, atol=1e-5)
    np.testing.assert_allclose(samples.kl_weight, 0.3, rtol=1e-6)
    assert not script.make_samples(trajectory, script.Config(kl_penalty=0.3)).kl_weight.any()


def test_the_value_learns_what_the_search_found_if_asked(trajectory):
    shape = trajectory.mask.shape
    actions, ones, value = jnp.zeros((*shape, 1), jnp.int32), jnp.ones((*shape, 1)), jnp.full(shape, 0.25)
    trajectory = trajectory._replace(decision=script.Decision(actions, ones, 0.0 * ones, actions[..., 0], value))
    assert (script.make_samples(trajectory, script.Config(value_target="search")).returns == 0.25).all()
    assert not (script.make_samples(trajectory, script.Config()).returns == 0.25).any()


def test_the_multiplier_brings_the_kl_to_its_bound():
    """With a toy policy whose KL falls as the multiplier grows."""
    optimizer = script.make_optimizer(script.Config(max_policy_kl=0.01))
    state = optimizer.init(jnp.zeros(3))
    assert float(state[-1]) == 1.0
    for _ in range(60):
        policy_kl = 0.5 / state[-1]
        _, state = optimizer.update(jnp.ones(3), state, policy_kl=policy_kl)
    np.testing.assert_allclose(policy_kl, 0.01, rtol=0.01)
    for other in (1.0, 0.0):  # However long it is above or below, the bound holds soon after.
        for _ in range(300):
            _, state = optimizer.update(jnp.ones(3), state, policy_kl=jnp.float32(other))
        np.testing.assert_allclose(state[-1], 1e3 if other else 1e-3, rtol=1e-6)
    for _ in range(30):
        policy_kl = 0.5 / state[-1]
        _, state = optimizer.update(jnp.ones(3), state, policy_kl=policy_kl)
    np.testing.assert_allclose(policy_kl, 0.01, rtol=0.01)


def test_a_larger_multiplier_keeps_an_iteration_nearer_to_the_acting_policy(env, network):
    words = override("num_simulations=1", "max_policy_kl=0.005", "learning_rate=0.003")
    config, _ = evaluate.parse_command_line(words, script.Config, script.PRESETS)
    state = script.init_train_state(env, network, config)
    iterate = jax.pmap(script.make_train_iteration(env, network, config), axis_name=script.DEVICES)

    def policy_kl(multiplier):
        *others, _ = state.opt_state.inner_state
        opt_state = state.opt_state._replace(inner_state=(*others, jnp.float32(multiplier)))
        _, metrics = iterate(evaluate.replicate(state._replace(opt_state=opt_state)))
        return evaluate.host_copy(metrics)["train/policy_kl"]

    assert policy_kl(1e3) < 0.5 * policy_kl(1e-3)


def test_best_of_n_takes_the_first_sample_of_equal_episodes_and_greedy_play_where_it_is_better(config, monkeypatch):
    """Where every order of the items packs the same, sums differ by rounding."""
    sizes = jnp.array(np.random.default_rng(0).uniform(0.01, 0.1, 12), jnp.float32)
    scores = jnp.linspace(1.0, 0.0, 12)
    env = types.SimpleNamespace(generator=types.SimpleNamespace(max_num_items=13))

    @chex.dataclass
    class Items:
        key: jax.Array
        left: jax.Array

    def step_flat(bonus, env, state, action):
        reward = sizes[action] + bonus * (action == 12 - state.left.sum())
        state = state.replace(left=state.left.at[action].set(False))
        return state, types.SimpleNamespace(observation=state.left, reward=reward)

    predict = lambda params, left: (jnp.where(left, scores, script.MASKED), 0.0)
    monkeypatch.setattr(script, "make_predict", lambda *_: predict)
    in_order = list(range(12))
    for bonus in (0.0, 1.0):  # For an item that is taken when greedy play takes it.
        monkeypatch.setattr(script, "step_flat", functools.partial(step_flat, bonus))
        starts = [script.make_best_of_n(env, None, config.model_copy(update=dict(num_simulations=n))).start
                  for n in (1, 32)]  # fmt: skip
        for seed in range(4):
            state = Items(key=jax.random.PRNGKey(seed), left=jnp.ones(12, bool))
            (only, _, _), (actions, returns, _) = (jax.jit(start)((), state, state.left) for start in starts)
            np.testing.assert_allclose(returns[0], sizes.sum() + 12 * bonus, rtol=1e-6)
            assert actions.tolist() == only.tolist() and (actions.tolist() == in_order) == (bonus > 0)


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
                s, t = step(s, script.argmax(logits + noise * (number < count)))
                total += float(t.reward)
            returns.append(total)
        memory, total = jax.jit(policy.start)(params, state, timestep.observation), 0.0
        for _ in range(19):
            action, decision, memory = act(params, None, state, timestep.observation, memory)
            if timestep.observation.action_mask.any():
                assert decision.actions[decision.taken] == action and decision.weights.sum() == 1.0
                assert decision.weights[decision.taken] == 1.0
                np.testing.assert_allclose(decision.value, max(returns) - total, atol=1e-5)
            state, timestep = step(state, action)
            total += float(timestep.reward)
        np.testing.assert_allclose(total, max(returns), atol=1e-5)
        greedy_is_best += returns[-1] == max(returns)
    assert greedy_is_best < 6


@pytest.mark.parametrize(
    "words",
    [
        "improvement=alphazero num_simulations=4 num_workers=2",
        "improvement=treepi num_sampled_actions=3 search_depth=2 max_policy_kl=0.005 learning_rate=1e-9",
        "improvement=best_of_n loss=cispo value_target=search learning_rate=1e-9",
    ],
)
def test_each_operator_and_loss_trains(words, tmp_path):
    """Two iterations, in a folder that names the operator. A policy that does not move has no KL to the acting one,
    though they see the states under random permutations."""
    assert script.main([*override(*words.split(), "max_num_iters=2"), f"save_dir={tmp_path}"]) == 0
    (log,) = tmp_path.glob("BinPack-v2/*/seed_0/metrics.jsonl")
    (operator,) = re.findall(r"improvement=(\w+)", words)
    assert log.parent.parent.name.startswith(f"{operator}_nsim_")
    rows = evaluate.read_log(log)
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert all(math.isfinite(x) for row in rows for x in row.values()) and rows[-1]["train/grad_norm"] > 0
    assert ("train/policy_kl" in rows[-1]) == ("loss=cispo" in words or "max_policy_kl" in words)
    assert rows[-1].get("train/policy_kl", 0.0) < 1e-5


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
    for words, expected in (
        ("epsilon_high=3", "epsilon_high=3: expected with loss=cispo alone; type loss=cispo, or drop epsilon_high"),
        ("loss=cispo clip_eps=0.1", "clip_eps=0.1: expected with loss=ppo alone; type loss=ppo, or drop clip_eps"),
    ):
        assert ppo.main(words.split()) == 2
        assert expected in capsys.readouterr().err
