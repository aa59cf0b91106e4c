"""The search: exact in compact form, right on cases with a known answer, and an improvement of the policy."""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import mctx
import numpy as np
import pytest

import evaluate
import train_search_distill_binpack as script


def rows(played, keep) -> tuple:
    """States and observations of the rows [B, T] that `keep` selects, flattened."""
    states, observations = played
    index = np.argwhere(np.asarray(keep))
    pick = lambda x: x[index[:, 0], index[:, 1]]
    return jax.tree.map(pick, states), jax.tree.map(pick, observations)


def act_on(policy, params, states, observations, seed=0):
    """Runs a policy on a batch of states."""
    keys = jax.random.split(jax.random.PRNGKey(seed), observations.ems_mask.shape[0])

    def act(key, state, observation):
        return policy.act(params, key, state, observation, policy.start(params, state, observation))[:2]

    return jax.jit(jax.vmap(act))(keys, states, observations)


def full_width_search(env, network, config, params, states, observations, num_simulations):
    """The reference: mctx on all 800 actions with the network's value, nothing of the script's search."""

    def evaluate(observation):
        return network.apply(params, None, observation)

    def expand(params, key, action, state):
        state, timestep = jax.vmap(functools.partial(script.step_flat, env))(state, action)
        logits, value = evaluate(timestep.observation)
        output = mctx.RecurrentFnOutput(
            reward=timestep.reward, discount=timestep.discount * config.discount, prior_logits=logits, value=value
        )
        return output, state

    logits, value = evaluate(observations)
    qtransform = functools.partial(
        mctx.qtransform_completed_by_mix_value,
        value_scale=config.value_scale,
        maxvisit_init=config.maxvisit_init,
        rescale_values=config.rescale_values,
    )
    output = mctx.gumbel_muzero_policy(
        params=(),
        rng_key=jax.random.PRNGKey(0),
        root=mctx.RootFnOutput(prior_logits=logits, value=value, embedding=states),
        recurrent_fn=expand,
        num_simulations=num_simulations,
        invalid_actions=~script.legal_actions(observations),
        qtransform=qtransform,
        max_num_considered_actions=config.max_num_considered_actions,
        gumbel_scale=0.0,
    )
    return output.action, output.action_weights, output.search_tree.node_values[:, 0]


def test_evaluations_search_widely_without_noise_at_a_scale_of_their_own(env, network, config, monkeypatch):
    """In training and in evaluate.py. With completions they look at as many actions as simulations, up to 16."""
    made = []

    def make(env, network, config, n, gumbel_scale, plays):
        made.append((config.value_scale, config.max_num_considered_actions, n, gumbel_scale, plays))

    monkeypatch.setattr(script, "make_search_policy", make)
    for leaf_value, scale, expected in (("network", 7.0, 7.0), ("completion", 7.0, 7.0), ("completion", 0.0, 0.25)):
        keys = dict(leaf_value=leaf_value, value_scale=0.25, eval_value_scale=scale, eval_num_simulations=5)
        config = config.model_copy(update=keys | dict(max_num_considered_actions=4))
        script.make_playing_search(env, network, config, 3)
        script.make_evaluate(env, network, config)
        checkpoint = evaluate.Checkpoint(Path("x.pkl"), script.METHOD, 0, 0, config, config, {}, script, env, network)
        evaluate.make_attempts("search", checkpoint, [checkpoint], evaluate.Config(num_simulations=32))
        considered = (4, 4, 4, 4) if leaf_value == "network" else (4, 5, 4, 16)
        assert made == [(expected, m, n, 0.0, True) for m, n in zip(considered, (3, 5, 4, 32))]
        made.clear()


def test_compact_search_equals_full_width_search(env, network, config, params, played):
    config = config.model_copy(update=dict(max_num_considered_actions=4, search_width=64))
    states, observations = played
    count = np.asarray(observations.action_mask).sum((-2, -1))
    states, observations = rows(played, (count > 0) & (count <= 40))  # Interior nodes then stay within K as well.
    assert len(observations.ems_mask) >= 150
    states, observations = jax.tree.map(lambda x: x[:150], (states, observations))
    policy = script.make_search_policy(env, network, config, 6, 0.0)  # Four children and two of theirs.
    action, decision = act_on(policy, params, states, observations)
    weights = np.zeros((len(action), 800), np.float32)
    np.put_along_axis(weights, np.asarray(decision.actions), np.asarray(decision.weights), -1)
    reference = jax.jit(functools.partial(full_width_search, env, network, config, num_simulations=6))
    *expected, value = map(np.asarray, reference(params, states, observations))

    def differs(action, weights) -> np.ndarray:
        return (np.asarray(action) != expected[0]) | (np.abs(np.asarray(weights) - expected[1]) > 1e-4).any(-1)

    ranked = np.sort(expected[1], -1)
    tied = ranked[:, -1] - ranked[:, -2] < 1e-4  # And what noise of the size of rounding changes.
    for seed in range(2):
        noise = np.random.default_rng(seed)
        other = jax.tree.map(lambda x: x * (1 + 1e-6 * noise.normal(size=x.shape)).astype(x.dtype), params)
        tied |= differs(*reference(other, states, observations)[:2])
    differing = differs(action, weights) & ~tied
    # Equal items give equal priors, of which rounding in either search visits another one first.
    swapped = differing & (np.abs(np.sort(weights, -1) - ranked) < 1e-4).all(-1)
    assert tied.mean() < 0.1 and swapped.mean() < 0.01 and not (differing & ~swapped).any()
    same = ~(tied | differing)
    np.testing.assert_allclose(decision.value[same], value[same], atol=1e-4)  # What the root is worth by the search.


def best_return(step, state, observation) -> float:
    """The largest return from a state, by trying everything."""
    best = 0.0
    for action in np.flatnonzero(np.asarray(observation.action_mask).reshape(-1)):
        after, timestep = step(jax.tree.map(lambda x: x, state), jnp.int32(action))
        best = max(best, float(timestep.reward) + best_return(step, after, timestep.observation))
    return best


def test_search_finds_the_optimum_of_small_endgames(env, network, config, params, played):
    """Two items from the end, with simulations to spare, search plays what exhaustive search finds."""
    config = config.model_copy(update=dict(max_num_considered_actions=16, value_scale=100.0, leaf_value="completion"))
    states, observations = played
    count = np.asarray(observations.action_mask).sum((-2, -1))
    items = np.asarray(observations.action_mask).any(-2).sum(-1)
    states, observations = rows(played, (count >= 2) & (count <= 6) & (items == 2))
    states, observations = jax.tree.map(lambda x: x[:16], (states, observations))
    policy = script.make_search_policy(env, network, config, 128, 0.0)
    actions, _ = act_on(policy, params, states, observations)
    step = jax.jit(functools.partial(script.step_flat, env))
    optimal, choices = 0, 0
    for i, action in enumerate(np.asarray(actions)):
        state, observation = jax.tree.map(lambda x: x[i], (states, observations))
        best = best_return(step, state, observation)
        after, timestep = step(jax.tree.map(lambda x: x, state), jnp.int32(action))
        achieved = float(timestep.reward) + best_return(step, after, timestep.observation)
        optimal += abs(achieved - best) < 1e-6
        choices += 1
    assert choices >= 10 and optimal == choices


def test_search_improves_expected_q_at_every_state(env, network, config, params, played):
    """With every legal action visited once, E[Q] under the search's weights is at least that under the prior
    (Danihelka et al. 2022, section 4), Q being exact: the reward plus the greedy completion."""
    config = config.model_copy(update=dict(max_num_considered_actions=8, leaf_value="completion"))
    states, observations = played
    count = np.asarray(observations.action_mask).sum((-2, -1))
    states, observations = rows(played, count == 8)
    assert len(observations.ems_mask) >= 8
    policy = script.make_search_policy(env, network, config, 8, 0.0)
    _, decision = act_on(policy, params, states, observations)

    def q_value(state, action):
        state, timestep = script.step_flat(env, state, action)
        return timestep.reward + timestep.discount * policy.start(params, state, timestep.observation)[0].value

    repeated = jax.tree.map(lambda x: jnp.repeat(x, 8, 0), states)
    q = jax.jit(jax.vmap(q_value))(repeated, decision.actions[:, :8].reshape(-1)).reshape(-1, 8)
    prior = np.exp(np.asarray(decision.prior))[:, :8]
    weights = np.asarray(decision.weights)[:, :8]
    np.testing.assert_allclose([prior.sum(-1), weights.sum(-1)], 1.0, atol=1e-5)
    gain = (np.asarray(q) * (weights - prior)).sum(-1)
    assert (gain > -1e-6).all() and gain.max() > 1e-4


@pytest.fixture(scope="module")
def carry(env, network, config, params):
    """(plays, keys, states, observations) -> what a search hands on, and what evaluating that state anew gives."""
    config = config.model_copy(update=dict(leaf_value="completion"))

    def carry(plays, key, state, observation):
        policy = script.make_search_policy(env, network, config, 4, jnp.where(plays, 0.0, 1.0), plays)
        root, lines = policy.start(params, state, observation)
        action, _, (carried, lines) = policy.act(params, key, state, observation, (root, lines))
        state, timestep = script.step_flat(env, state, action)
        fresh, _ = policy.start(params, state, timestep.observation)
        is_greedy = action == root.actions[0]
        is_root, is_carried = ((lines.hash == x.line.hash).all((1, 2)) for x in (root, carried))
        known = is_root[0] & is_carried.any()  # The lines of the search's nodes, for the next one.
        return carried, fresh, script.has_legal_action(timestep.observation), is_greedy, root.line.solved, known

    return jax.jit(jax.vmap(carry, (None, 0, 0, 0)))


@pytest.mark.parametrize("plays", [False, True])
def test_the_carried_root_equals_a_new_one(plays, carry, played):
    """What a search hands on as the next root is what evaluating that state anew gives, though a completion that meets
    the root's is not played on. In playing, a root whose completion places every item is played greedily."""
    states, observations = rows(played, script.has_legal_action(played[1]))
    states, observations = jax.tree.map(lambda x: x[:64], (states, observations))
    some_solved = states.items_placed | observations.action_mask.any(1)
    keys = jax.random.split(jax.random.PRNGKey(1), 64)
    found = carry(plays, keys, states.replace(items_mask=some_solved), observations)
    carried, fresh, goes_on, is_greedy, solved, known = found
    assert known[goes_on].all() and int(goes_on.sum()) > 40 and float(fresh.value.max()) > 0.05
    assert 5 < int((is_greedy & goes_on).sum()) < int(goes_on.sum()) and 0 < int(solved.sum()) < 64
    assert is_greedy[solved].all() if plays else not is_greedy[solved].all()
    np.testing.assert_array_equal(carried.line.solved, fresh.line.solved)
    np.testing.assert_array_equal(carried.actions, fresh.actions)
    np.testing.assert_allclose(carried.logits, fresh.logits, atol=1e-5)
    np.testing.assert_allclose(carried.value, fresh.value, atol=1e-6)


def test_a_completion_that_meets_a_line_goes_on_like_it(env, network, config, params, played):
    """Be it the parent's or one of the last search's. The greedy child, given its parent's line with other rewards
    after the child's first move, plays that move and takes these. It hands on the hashes of the whole line."""
    states, observations = rows(played, np.asarray(played[1].action_mask).any(2).sum(2) == 4)
    states, observations = jax.tree.map(lambda x: x[:32], (states, observations))
    config, passes = config.model_copy(update=dict(leaf_value="completion", discount=0.5)), []
    count = lambda *arguments: jax.debug.callback(passes.append, 0) or network.apply(*arguments)
    start, make_child = script.make_tree_functions(env, network._replace(apply=count), config, 3)
    own, no_lines = jax.jit(jax.vmap(start, (None, 0, 0)))(params, states, observations)
    placed = 1 + np.asarray(states.items_placed).sum(1, keepdims=True)  # In the child.
    depth = np.arange(own.line.reward.shape[1]) - placed
    line = own.line._replace(reward=jnp.where(depth > 0, 2.0, own.line.reward), solved=~own.line.solved)
    no_line = jax.tree.map(lambda x: x[:, 0], no_lines)
    one_of_them = jax.tree.map(lambda x, y: x.at[:, 1].set(y), no_lines, line)
    moves = (np.asarray(own.line.reward) > 0).sum(1, where=depth >= 0)
    first = np.take_along_axis(np.asarray(own.line.reward), placed, 1)[:, 0]
    expected = first + (2.0 * 0.5**depth).sum(1, where=depth > 0) * (moves > 1)
    child = jax.jit(jax.vmap(lambda lines, blocks, *of: make_child((params, lines, blocks), *of, 0)[-1]))
    for lines, parents in ((no_lines, line), (one_of_them, no_line)):
        jax.effects_barrier()
        passes.clear()
        found = child(lines, observations.blocks, states, own._replace(line=parents))
        jax.effects_barrier()
        np.testing.assert_allclose(found.value, expected, rtol=1e-6)
        np.testing.assert_array_equal(found.line.solved, own.line.solved ^ (moves > 1))
        np.testing.assert_array_equal(found.line.hash[depth >= 0], own.line.hash[depth >= 0])
        assert 5 < (moves > 1).sum() < len(moves) and len(passes) <= 2 < moves.max()


def test_the_nodes_of_the_first_simulations_are_made_together(env, network, config, params, played):
    """A search that visits four actions once passes as often as the longest of their completions, not as all."""
    states, observations = rows(played, np.asarray(played[1].action_mask).any(2).sum(2) > 8)
    state, observation = jax.tree.map(lambda x: x[0], (states, observations))
    config, passes = config.model_copy(update=dict(leaf_value="completion", max_num_considered_actions=4)), []
    count = lambda *arguments: jax.debug.callback(passes.append, 0) or network.apply(*arguments)
    counted = network._replace(apply=count)
    start, make_child = script.make_tree_functions(env, counted, config, 5)
    root, lines = jax.jit(start)(params, state, observation)

    def passes_of(function, *arguments) -> int:
        jax.effects_barrier()
        passes.clear()
        jax.block_until_ready(function(*arguments))
        jax.effects_barrier()
        return len(passes)

    child = jax.jit(lambda index: make_child((params, lines, observation.blocks), state, root, index))
    key = jax.random.PRNGKey(0)
    noise = jax.random.gumbel(jax.random.split(key)[1], root.logits.shape)  # As mctx draws it.
    for scale in (0.0, 1.0):
        search = jax.jit(script.make_search_policy(env, counted, config, 4, scale).act)
        together = passes_of(search, params, key, state, observation, (root, lines))
        first = np.argsort(-(root.logits + scale * noise))[:4]
        one_by_one = [passes_of(child, index) for index in first]
        assert together == max(one_by_one) and sum(one_by_one) > 1.5 * together > 6
    assert first.max() > 3


@pytest.mark.slow
def test_nothing_below_a_completion_that_fills_lowers_its_value(env, network, config, params, played, monkeypatch):
    """In playing, the Q of an action whose completion places every item stays what that completion packs, however many
    simulations follow. The root's Q are returned in the place of the search's weights."""
    search = mctx.gumbel_muzero_policy

    def q_as_weights(**arguments):
        output = search(**arguments)
        return output.replace(action_weights=output.search_tree.summary().qvalues)

    monkeypatch.setattr(mctx, "gumbel_muzero_policy", q_as_weights)
    states, observations = rows(played, script.has_legal_action(played[1]))
    states, observations = jax.tree.map(lambda x: x[:64], (states, observations))
    states = states.replace(items_mask=states.items_placed | observations.action_mask.any(1))
    config = config.model_copy(update=dict(leaf_value="completion", max_num_considered_actions=4))
    policy = script.make_playing_search(env, network, config, 24)

    def play(key, state, observation):
        root, lines = policy.start(params, state, observation)
        actions = root.actions[:4]

        def child(action):
            after, timestep = script.step_flat(env, state, action)
            node, _ = policy.start(params, after, timestep.observation)
            return node.line.solved, timestep.reward + node.value

        fills, packs = jax.vmap(child)(actions)
        looked_at = script.legal_actions(observation)[actions] & (~root.line.solved | (jnp.arange(4) == 0))
        q = policy.act(params, key, state, observation, (root, lines))[1].weights[:4]
        return fills & looked_at, packs, q

    keys = jax.random.split(jax.random.PRNGKey(1), 64)
    fills, packs, q = jax.jit(jax.vmap(play))(keys, states, observations)
    assert 5 < int(fills.sum()) < fills.size
    np.testing.assert_allclose(q[fills], packs[fills], atol=1e-6)


def test_a_state_hash_forgets_the_order_and_nothing_else(played):
    states, observations = played
    state = jax.tree.map(lambda x: x[0, 9], states)
    assert int(state.ems_mask.sum()) > 2 and 2 < int((state.items_mask & ~state.items_placed).sum())
    expected = np.asarray(evaluate.state_hash(state))
    rng = np.random.default_rng(0)
    spaces, items = (rng.permutation(len(mask)) for mask in (state.ems_mask, state.items_mask))
    slots = dict(ems=spaces, ems_mask=spaces, items=items, items_mask=items, items_placed=items)
    moved = state.replace(**{key: jax.tree.map(lambda x: x[i], getattr(state, key)) for key, i in slots.items()})
    gone = int(np.flatnonzero(state.items_placed)[0])
    unseen = state.items._replace(x_len=state.items.x_len.at[gone].add(1))
    for same in (moved, state.replace(items=unseen), state.replace(items_location=state.ems)):
        assert (np.asarray(evaluate.state_hash(same)) == expected).all()
    there = int(np.flatnonzero(state.ems_mask)[-1])
    waiting = int(np.flatnonzero(state.items_mask & ~state.items_placed)[-1])

    def longer(tree, slot: int) -> list:
        """The tree with one of its lengths a millimetre longer, for each of its lengths."""
        leaves, structure = jax.tree.flatten(tree)
        changed = [[x.at[slot].add(int(x is leaf)) for x in leaves] for leaf in leaves]
        return [jax.tree.unflatten(structure, row) for row in changed]

    others = [state.replace(ems=ems) for ems in longer(state.ems, there)]
    others += [state.replace(items=items) for items in longer(state.items, waiting)]
    others += [state.replace(ems_mask=state.ems_mask.at[there].set(False))]
    others += [state.replace(items_placed=state.items_placed.at[waiting].set(True))]
    hashes = {tuple(np.asarray(evaluate.state_hash(other)).tolist()) for other in others}
    assert len(hashes) == len(others) == 11 and tuple(expected.tolist()) not in hashes


def test_terminal_nodes_have_no_value(params, apply, played):
    states, observations = rows(played, ~script.has_legal_action(played[1]))
    logits, value = apply(params, observations)
    assert (np.asarray(value) == 0).all() and np.isfinite(np.asarray(logits)).all()


def test_noise_explores_in_collection_and_evaluation_has_none(env, network, config, params, played):
    states, observations = rows(played, script.has_legal_action(played[1]))
    states, observations = jax.tree.map(lambda x: x[:64], (states, observations))

    @jax.jit  # The scale as an argument: one program for all four.
    def search(scale, seed):
        policy = script.make_search_policy(env, network, config, 2, scale)
        return act_on(policy, params, states, observations, seed)[0]

    assert (search(1.0, 0) != search(1.0, 1)).any()
    assert (search(0.0, 0) == search(0.0, 1)).all()

    make_search = functools.partial(script.make_playing_search, env, network, config)
    tries = evaluate.numbered(make_search, 2)
    numbered = jax.jit(lambda number, seed: act_on(tries, (params, number), states, observations, seed)[0])
    assert (numbered(0, 0) == numbered(0, 1)).all()
    assert (numbered(0, 0) == search(0.0, 1)).mean() > 0.8  # Two programs round otherwise, and children tie.
    later = [numbered(*arguments) for arguments in ((1, 0), (2, 0), (1, 1))]
    assert all((x != y).any() for x, y in itertools.combinations([search(0.0, 0), *later], 2))
