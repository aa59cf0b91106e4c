"""Targets, loss, minibatches and the training iteration."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import flat_vector, override

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as script

BOTH = pytest.mark.parametrize("module", [script, ppo], ids=lambda module: module.METHOD)


def make_rows(observations, seed: int, num_rows: int) -> script.Samples:
    """Training rows on the states of played episodes, with random targets of the right form."""
    rng = np.random.default_rng(seed)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], observations)
    legal = np.asarray(script.legal_actions(flat))
    actions = np.argsort(~legal, -1, kind="stable")[:, :48].astype(np.int32)
    weights = rng.random(actions.shape).astype(np.float32) * np.take_along_axis(legal, actions, -1)
    weights /= weights.sum(-1, keepdims=True)
    returns = rng.random(len(actions)).astype(np.float32)
    mask, kl = script.has_legal_action(flat), jnp.array(rng.random(len(actions)), jnp.float32)
    decision = script.Decision(jnp.array(actions), jnp.array(weights), jnp.log(weights), actions[:, 0], returns)
    zeros = jnp.zeros(len(actions))
    return script.Samples(flat, decision, jnp.array(returns), zeros, zeros, mask, kl)


@pytest.fixture(scope="module")
def decisions(played):
    """The observations of the random episodes' decisions, without padding, [1, N, ...]."""
    real = np.asarray(script.has_legal_action(played[1]))
    return jax.tree.map(lambda x: x[real][None], played[1])


@pytest.fixture(scope="module")
def config_of_60(config):
    """Every test that takes a gradient gives 60 rows, for which it is compiled once."""
    return config.model_copy(update=dict(training_batch_size=60))


def loss_and_gradient(network, config, params, samples, size=(40, 20)):
    function = jax.value_and_grad(script.make_loss(network, config), argnums=1, has_aux=True)
    return jax.jit(functools.partial(function, size))(params, samples)


@pytest.mark.parametrize("discount", [1.0, 0.9, 0.0])
def test_returns_equal_a_python_loop(discount):
    reward = np.random.default_rng(0).random((5, 19)).astype(np.float32)
    expected = np.zeros((5, 19))
    for b in range(5):
        following = 0.0
        for t in reversed(range(19)):
            following = reward[b, t] + discount * following
            expected[b, t] = following
    np.testing.assert_allclose(script.discounted_returns(jnp.array(reward), discount), expected, rtol=1e-5)


def test_loss_equals_a_plain_loop(network, config_of_60, params, apply, decisions):
    samples = make_rows(decisions, 0, 60)
    (loss, metrics), _ = loss_and_gradient(network, config_of_60, params, samples)
    policy_loss, value_loss = 0.0, 0.0
    for i in range(60):
        row = jax.tree.map(lambda x: x[i], samples)
        logits, value = apply(params, row.observation)
        logits = np.asarray(logits, np.float64)
        log_probs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        policy_loss -= (
            sum(w * log_probs[a] for a, w in zip(row.decision.actions.tolist(), row.decision.weights.tolist()) if w)
            / 60
        )
        value_loss += (float(value) - float(row.returns)) ** 2 / 60
    assert metrics.keys() == {"policy_loss", "value_loss"}
    np.testing.assert_allclose(metrics["policy_loss"], policy_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["value_loss"], value_loss, rtol=1e-4)
    np.testing.assert_allclose(loss, policy_loss + config_of_60.value_loss_weight * value_loss, rtol=1e-4)


def test_targets_of_real_rows_do_not_depend_on_what_follows_the_end(trajectory):
    """A trajectory's padding rows have mask False and reward 0, so that returns stop at the end of the episode."""
    nothing = jnp.zeros((*trajectory.mask.shape, 48))
    trajectory = trajectory._replace(
        decision=script.Decision(nothing.astype(jnp.int32), nothing, nothing, nothing[..., 0], None)
    )
    mask, reward = np.asarray(trajectory.mask), np.asarray(trajectory.reward)
    assert not mask.all() and (reward[~mask] == 0).all() and (reward[mask] > 0).all()
    assert (mask[:, :-1] >= mask[:, 1:]).all()
    samples = script.make_samples(trajectory, script.Config())
    first_rows = np.asarray(samples.returns).reshape(mask.shape)[:, 0]
    np.testing.assert_allclose(first_rows, reward.sum(1), rtol=1e-5)
    assert (np.asarray(samples.mask) == mask.reshape(-1)).all()


def test_gradients_are_finite_on_finished_rows(network, config_of_60, params, played):
    finished = np.argwhere(~np.asarray(script.has_legal_action(played[1])))[:60]
    samples = make_rows(jax.tree.map(lambda x: x[finished[:, 0], finished[:, 1]][None], played[1]), 0, 60)
    nothing = jnp.zeros_like(samples.decision.weights)
    samples = samples._replace(decision=samples.decision._replace(weights=nothing))
    assert not samples.mask.any() and len(samples.mask) == 60
    for size in (script.Config().token_sizes[0], (40, 20)):
        (loss, _), gradient = loss_and_gradient(network, config_of_60, params, samples, size)
        assert np.isfinite(flat_vector((loss, gradient))).all()


def test_the_gradient_in_parts_is_that_of_the_whole(network, config_of_60, params, decisions):
    """Rows of early and late states, each part at a size of its own."""
    config = config_of_60.model_copy(update=dict(token_sizes=((8, 12), (40, 20))))
    samples = make_rows(decisions, 0, 60)
    samples = jax.tree.map(lambda x: x[np.random.default_rng(0).permutation(60)], samples)
    assert 0 < int(script.index_of_smallest_size(config.token_sizes, samples.observation).sum()) < 60
    gradients = jax.value_and_grad(script.make_loss(network, config), argnums=1, has_aux=True)
    in_parts = jax.jit(functools.partial(script.gradients_in_parts, gradients, config))
    (loss, metrics), found = in_parts(samples, params)
    (expected_loss, expected_metrics), expected = loss_and_gradient(network, config, params, samples)
    for a, b in ((loss, expected_loss), *((metrics[key], expected_metrics[key]) for key in expected_metrics)):
        np.testing.assert_allclose(a, b, rtol=1e-4)
    np.testing.assert_allclose(flat_vector(found), flat_vector(expected), rtol=1e-2, atol=1e-4)


@BOTH
def test_parts_hold_each_row_once_and_run_at_the_smallest_size_that_holds_them(module, decisions):
    config = module.Config(token_sizes=((8, 12), (40, 20)))
    samples = make_rows(decisions, 0, 64)
    needed = np.asarray(module.index_of_smallest_size(config.token_sizes, samples.observation))

    def gradients(size, params, part):
        """Sums over rows that tell which part ran at which size; the part itself as its gradient."""
        too_small = module.index_of_smallest_size(config.token_sizes, part.observation).max() > (size == (40, 20))
        here = jnp.arange(2) == config.token_sizes.index(size)
        return (part.returns.sum(), {"too_small": too_small, "rows": here * len(part.returns)}), part.returns[
            :3
        ] * params

    (total, metrics), grads = module.gradients_in_parts(gradients, config, samples, jnp.float32(2.0))
    np.testing.assert_allclose(total, samples.returns.sum(), rtol=1e-5)
    assert not metrics["too_small"].any() and metrics["rows"].sum() == 64
    assert metrics["rows"][1] == -(-needed.sum() // 16) * 16 < 64
    first = np.argsort(needed, kind="stable").reshape(4, 16)[:, :3]
    np.testing.assert_allclose(grads, 2.0 * np.asarray(samples.returns)[first].sum(0), rtol=1e-5)


@BOTH
def test_an_update_that_is_not_finite_is_not_applied_and_the_next_one_is(module, env, network):
    config = module.Config()
    state = module.init_train_state(env, network, config)
    params, opt_state = state.params, state.opt_state
    gradient = jnp.ones(sum(x.size for x in jax.tree.leaves(params)))
    step = jax.jit(functools.partial(module.apply_gradients, config, rate=jnp.float32(0.1)))
    for count, (loss, grads) in enumerate(
        [(jnp.nan, gradient), (0.0, gradient.at[3].set(jnp.inf)), (jnp.inf, gradient)]
    ):
        params, opt_state = step(params, opt_state, jnp.float32(loss), grads)
        assert (flat_vector(params) == flat_vector(state.params)).all()
        assert opt_state.total_notfinite == opt_state.notfinite_count == count + 1 and not opt_state.last_finite
        before, after = flat_vector(state.opt_state.inner_state), flat_vector(opt_state.inner_state)
        assert (before == after).all()
    params, opt_state = step(params, opt_state, jnp.float32(0.0), gradient)
    np.testing.assert_allclose(flat_vector(params), flat_vector(state.params) - 0.1, atol=1e-4)  # Adam's first step.
    assert opt_state.total_notfinite == 3 and opt_state.notfinite_count == 0 and opt_state.last_finite


@BOTH
def test_an_iteration_counts_the_updates_that_it_skips(module, env, network, ppo_words):
    """Those of this iteration, and those in a row up to now, while parameters and optimizer stay as they are."""
    words = override() if module is script else ppo_words()
    config, _ = evaluate.parse_command_line(words, module.Config, module.PRESETS)
    state = module.init_train_state(env, network, config)
    broken = {name: jax.tree.map(lambda x: x * (np.nan if "value" in name else 1), of_module)
              for name, of_module in state.params.items()}  # fmt: skip
    before = state.opt_state._replace(notfinite_count=jnp.int32(2), total_notfinite=jnp.int32(5))
    iterate = jax.pmap(module.make_train_iteration(env, network, config), axis_name=module.DEVICES, donate_argnums=0)
    after = iterate(evaluate.replicate(state._replace(params=broken, opt_state=before)))
    after, metrics = evaluate.host_copy(after)
    steps = config.num_epochs * (config.rollout_batch_size * config.max_decisions // config.training_batch_size)
    assert metrics["train/skipped_updates"] == steps and metrics["skipped_in_a_row"] == 2 + steps
    np.testing.assert_array_equal(flat_vector(after.params), flat_vector(broken))
    np.testing.assert_array_equal(flat_vector(after.opt_state.inner_state), flat_vector(before.inner_state))


def test_value_is_bounded_by_the_volume_of_the_items_that_still_fit(params, apply, played):
    observations = played[1]
    wild = jax.tree.map(lambda x: 10.0 * x, params)
    logits, value = apply(wild, observations)
    x, y, z = map(np.asarray, observations.items)
    bound = (x * y * z * np.asarray(observations.action_mask).any(-2)).sum(-1)
    assert (np.asarray(value) >= 0).all() and (np.asarray(value) <= bound + 1e-6).all()
    legal = np.asarray(script.legal_actions(observations))
    illegal_mass = np.where(legal, 0.0, np.asarray(jax.nn.softmax(logits))).sum(-1)
    assert illegal_mass[np.asarray(script.has_legal_action(observations))].max() == 0.0


@BOTH
def test_minibatches_hold_real_rows_only_and_an_epoch_uses_each_once(module):
    """Nothing of padding is learned from: it is in no minibatch."""
    config = module.Config(rollout_batch_size=8, num_epochs=3, training_batch_size=16)  # 9 x 16 slots for 8 x 19 rows.
    mask = np.random.default_rng(0).random(config.rollout_batch_size * config.max_decisions) < 0.97
    rows = np.asarray(module.minibatch_rows(jax.random.PRNGKey(0), jnp.array(mask), config))
    assert rows.shape == (27, 16) and mask[rows].all()
    epochs = rows.reshape(3, -1)
    for epoch in epochs:
        assert len(set(epoch)) == min(mask.sum(), epoch.size)
    assert not np.array_equal(epochs[0], epochs[1])
    few = np.zeros_like(mask)
    few[[3, 50, 99]] = True
    rows = np.asarray(module.minibatch_rows(jax.random.PRNGKey(0), jnp.array(few), config))
    assert set(rows.ravel()) == {3, 50, 99} and np.bincount(rows[:9].ravel())[[3, 50, 99]].tolist() == [48, 48, 48]


def test_only_decisions_that_the_search_moved_are_learned_from(config, trajectory, played):
    """Of real rows those whose target diverges from the prior; where they are few, those where it does so most."""
    samples = make_rows(played[1], 0, 60)
    mask, kl = np.asarray(samples.mask), np.asarray(samples.target_kl)

    def learned(least, training_batch_size=32, samples=samples):
        changes = dict(min_target_kl=least, training_batch_size=training_batch_size)
        return np.asarray(script.select_taught(samples, config.model_copy(update=changes)).mask)

    assert 0 < (mask & (kl < 0.5)).sum() < mask.sum() < 60
    assert (learned(0.5) == (mask & (kl >= 0.5))).all()
    assert (learned(0.0) == mask).all() and (learned(2.0, 8 * 60) == mask).all()
    for minibatch, at_least in ((32, 4), (1, 1)):
        most = np.zeros_like(mask)
        most[np.argsort(np.where(mask, -kl, 0.0))[:at_least]] = True
        assert (learned(2.0, minibatch) == most).all() and most.sum() == at_least
    broken = samples._replace(target_kl=samples.target_kl.at[np.flatnonzero(mask & (kl < 0.5))[0]].set(jnp.nan))
    assert learned(0.5, samples=broken).sum() == (mask & (kl >= 0.5)).sum() + 1

    rng = np.random.default_rng(0)
    weights, prior = (rng.dirichlet(np.ones(5), trajectory.mask.shape).astype(np.float32) for _ in range(2))
    weights[..., 3] = 0.0
    weights /= weights.sum(-1, keepdims=True)
    prior[0] = weights[0]
    actions = jnp.zeros(weights.shape, jnp.int32)
    decision = script.Decision(actions, jnp.array(weights), jnp.log(jnp.maximum(prior, 1e-30)), actions[..., 0], None)
    found = script.make_samples(trajectory._replace(decision=decision), script.Config()).target_kl
    w, p = weights.astype(np.float64), np.maximum(prior, 1e-30).astype(np.float64)
    expected = np.where(w > 0, w * (np.log(np.where(w > 0, w, 1.0)) - np.log(p)), 0.0).sum(-1)
    np.testing.assert_allclose(found, expected.ravel(), rtol=1e-4, atol=1e-6)
    assert (np.asarray(found) >= 0).all() and np.abs(expected[0]).max() < 1e-6


def test_training_changes_every_parameter(env, search_run):
    checkpoint = evaluate.read_checkpoint(search_run / "iter_000001.pkl")
    config = script.Config(**checkpoint["config"])
    start = script.init_train_state(env, script.make_network(config), config).params
    pairs = zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(checkpoint["model"][0]), strict=True)
    for (path, before), after in pairs:
        assert not np.array_equal(before, after), jax.tree_util.keystr(path)


def test_the_first_instances_of_a_large_evaluation_are_those_of_a_small_one(env, network, config, params):
    play = evaluate.make_player(script.make_rollout(env, script.make_greedy_policy(network, config)))
    replicated = evaluate.replicate(params)
    many, few = (play(replicated, evaluate.evaluation_keys(config.eval_seed, count)) for count in (70, 6))
    assert all(np.array_equal(a[:6], b) for a, b in zip(many, few))
    means = evaluate.summarise(many)
    assert 0.2 < means["avg_return"] < 1.0 and 5 < means["packed_items"] < 19
    expected = np.std(many.returns, ddof=1) / 70**0.5
    assert means["avg_return_se"] == pytest.approx(expected, rel=1e-5)


def test_padding_of_a_batch_changes_no_episode_and_has_no_decisions(env, network, config, params):
    """So a device may play 2 instances with a program for 8."""
    rollout = jax.jit(script.make_rollout(env, script.make_greedy_policy(network, config)))
    keys = evaluate.evaluation_keys(3, 8)
    is_padding = np.arange(8) % 4 > 0
    whole, padded = (rollout(params, x) for x in (keys, np.where(is_padding[:, None], evaluate.NO_INSTANCE, keys)))
    for x, y in zip(jax.tree.leaves(padded), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(x[~is_padding], y[~is_padding])
    assert whole.mask[is_padding].any(1).all()
    assert not padded.mask[is_padding].any() and not padded.reward[is_padding].any()


def test_search_on_top_plays_what_greedy_leaves_and_keeps_the_better(config):
    greedy = evaluate.Episodes(np.array([1.0, 0.5, 0.8]), np.array([19, 9, 15]), np.array([True, False, False]))
    asked = []

    def play_search(params, keys):
        asked.append(np.asarray(keys).tolist())
        return evaluate.Episodes(np.array([0.9, 0.7]), np.array([17, 13]), np.array([False, False]))

    merged = evaluate.keep_better(play_search, None, np.arange(3), greedy)
    assert asked == [[1, 2]]
    assert merged.returns.tolist() == [1.0, 0.9, 0.8] and merged.steps.tolist() == [19, 17, 15]
    assert greedy.returns.tolist() == [1.0, 0.5, 0.8]


def test_learning_reduces_the_loss(tmp_path):
    """On a fixed seed the search's play and the network's come to pack more, and the cross-entropy falls."""
    few = ["max_num_iters=20", "eval_interval=20", "save_interval=20"]
    assert script.main(override(*few, f"save_dir={tmp_path}")) == 0
    rows = [json.loads(line) for line in (tmp_path / "BinPack-v2" / "nsim_2" / "seed_0" / "metrics.jsonl").open()]
    first, last = (
        {key: np.mean([row[key] for row in part]) for key in rows[1] if "eval" not in key}
        for part in (rows[1:9], rows[-8:])
    )
    assert last["rollout/avg_return"] > first["rollout/avg_return"] + 0.05
    assert rows[-1]["eval/greedy/avg_return"] > rows[0]["eval/greedy/avg_return"] + 0.1
    assert last["train/policy_loss"] < 0.95 * first["train/policy_loss"]
