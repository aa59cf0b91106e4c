"""PPO: its estimators against plain loops, its runs, and that it learns."""

import functools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NOT_OF_PPO, SMALL

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as search_distill

RNG = np.random.default_rng(0)
OLD, NEW = np.log(RNG.uniform(0.01, 1.0, 200)), np.log(RNG.uniform(0.01, 1.0, 200))
ADVANTAGE = RNG.normal(size=200)


@pytest.fixture(scope="module")
def ppo_config():
    return ppo.Config(**{key: value for key, value in SMALL.items() if key not in NOT_OF_PPO})


SOURCES = [Path(script.__file__).read_text() for script in (ppo, search_distill)]


def test_twin_sections_are_the_same_in_both_scripts_and_no_large_part_of_them():
    twins = [_twin_sections(source) for source in SOURCES]
    assert twins[0] == twins[1] and len(twins[0]) == 3
    assert sum(source.count("twin section: ") for source in SOURCES) == 2 * 3
    for source, sections in zip(SOURCES, twins, strict=True):
        lines = [body.count("\n") for body in sections.values()]
        assert min(lines) > 20 and sum(lines) <= 0.49 * source.count("\n")


def _twin_sections(source: str) -> dict[str, str]:
    """Title and body of each; a section goes from its banner to the next one."""
    pieces = re.split(r"^(# =+ .+ =+)\n", source, flags=re.MULTILINE)
    assert len(pieces) > 10 and all(len(banner) == 120 for banner in pieces[1::2])
    return {title.strip("# ="): body for title, body in zip(pieces[1::2], pieces[2::2]) if "twin section" in title}


@pytest.mark.parametrize("discount, gae_lambda", [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_advantages_equal_a_plain_loop(discount, gae_lambda):
    """A_t as the sum over k of (discount * lambda)^k times the k-th next one-step error, episodes of unequal length."""
    reward, value = RNG.random((6, 19)).astype(np.float32), RNG.random((6, 19)).astype(np.float32)
    lengths = [19, 18, 7, 1, 12, 19]
    for b, length in enumerate(lengths):
        reward[b, length:] = value[b, length:] = 0.0
    expected = np.zeros((6, 19))
    for b, length in enumerate(lengths):
        for t in range(length):
            for k in range(length - t):
                after = value[b, t + k + 1] if t + k + 1 < length else 0.0
                error = reward[b, t + k] + discount * after - value[b, t + k]
                expected[b, t] += (discount * gae_lambda) ** k * error
    found = ppo.generalised_advantages(jnp.array(reward), jnp.array(value), discount, gae_lambda)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_clipped_surrogate_equals_a_plain_loop(ppo_config):
    expected = []
    for old, new, advantage in zip(OLD, NEW, ADVANTAGE):
        ratio = math.exp(new) / math.exp(old)
        limited = max(0.8, min(1.2, ratio))
        expected.append(-min(ratio * advantage, limited * advantage))
    found = ppo.policy_loss(ppo_config, jnp.array(NEW), jnp.array(OLD), jnp.array(ADVANTAGE))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_cispo_and_its_gradient_equal_a_plain_loop(ppo_config):
    """The weight is capped and takes no part in the gradient, and no action loses its gradient."""
    config = ppo_config.model_copy(update=dict(loss="cispo"))
    weight = [min(math.exp(new) / math.exp(old), 5.0) for old, new in zip(OLD, NEW)]
    assert 10 < sum(w == 5.0 for w in weight) < 190
    expected = [-w * a * new for w, a, new in zip(weight, ADVANTAGE, NEW)]
    loss = lambda new: ppo.policy_loss(config, new, jnp.array(OLD), jnp.array(ADVANTAGE))
    np.testing.assert_allclose(loss(jnp.array(NEW)), expected, rtol=1e-4)
    gradient = jax.grad(lambda new: loss(new).sum())(jnp.array(NEW, jnp.float32))
    np.testing.assert_allclose(gradient, [-w * a for w, a in zip(weight, ADVANTAGE)], rtol=1e-4)


def metrics_of_rows(config, logits, value, action, old_log_prob, old_value, returns) -> dict[str, np.ndarray]:
    """What the loss says of each row, [N], for a network that gives the logits [A] and each row's value."""
    network = SimpleNamespace(apply=lambda params, rng, value, size: (logits, value))
    loss = ppo.make_loss(network, config.model_copy(update=dict(training_batch_size=1)))
    none = jnp.zeros(len(action), jnp.int32)
    decision = ppo.Decision(jnp.array(action), jnp.array(old_log_prob), jnp.array(old_value), none)
    samples = ppo.Samples(jnp.array(value), decision, jnp.array(returns), jnp.array(returns), none == 0)
    return jax.tree.map(np.asarray, jax.jit(jax.vmap(lambda row: loss(None, None, row)[1]))(samples))


def test_value_loss_equals_a_plain_loop(ppo_config):
    value, old, returns = RNG.random((3, 200))
    expected = []
    for v, o, r in zip(value, old, returns):
        near = max(o - 0.2, min(o + 0.2, v))
        expected.append(max((v - r) ** 2, (near - r) ** 2))
    nothing = np.zeros(200, np.int32)
    found = metrics_of_rows(ppo_config, jnp.zeros(1), value, nothing, np.zeros(200), old, returns)["value_loss"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_approximate_kl_is_unbiased_never_negative_and_less_noisy_than_the_log_ratio(ppo_config):
    """Against the exact KL divergence of two distributions over 50 actions."""
    old, new = (np.log(p / p.sum()) for p in np.exp(0.3 * RNG.normal(size=(2, 50))))
    exact = sum(math.exp(o) * (o - n) for o, n in zip(old, new))
    actions = RNG.choice(50, size=200_000, p=np.exp(old)).astype(np.int32)
    zeros = np.zeros(len(actions))
    estimates = metrics_of_rows(ppo_config, jnp.array(new), zeros, actions, old[actions], zeros, zeros)["approx_kl"]
    loop = [math.exp(new[a] - old[a]) - 1 - (new[a] - old[a]) for a in actions[:500]]
    np.testing.assert_allclose(estimates[:500], loop, rtol=1e-3, atol=1e-6)
    assert estimates.min() >= 0.0 and abs(estimates.mean() - exact) < 0.02 * exact
    assert estimates.std() < 0.5 * (old[actions] - new[actions]).std()


def test_entropy_counts_legal_actions_only():
    logits = np.full((3, 800), ppo.MASKED, np.float32)
    logits[0, :4] = 1.0
    logits[1, [5, 700]] = np.log([0.25, 0.75])
    logits[2, 9] = 3.0
    expected = [math.log(4), -0.25 * math.log(0.25) - 0.75 * math.log(0.75), 0.0]
    np.testing.assert_allclose(ppo.entropy(jnp.array(logits)), expected, atol=1e-5)
    gradient = jax.grad(lambda x: ppo.entropy(x).sum())(jnp.array(logits))
    assert np.isfinite(gradient).all()


def test_moments_are_those_of_the_real_rows():
    """With which the advantages of an iteration are normalised."""
    x, mask = RNG.normal(3.0, 7.0, 500).astype(np.float32), RNG.random(500) < 0.7
    x[~mask] = 1e6
    mean, variance = ppo.masked_moments(jnp.array(x), jnp.array(mask))
    np.testing.assert_allclose([mean, variance], [x[mask].mean(), x[mask].var()], rtol=1e-4)


@pytest.mark.parametrize("kind", ["ppo", "cispo"])
def test_loss_equals_a_plain_loop(kind, network, params, apply, played, ppo_config):
    """Over the rows of a minibatch, seen under the identity permutation."""
    config = ppo_config.model_copy(update=dict(loss=kind, epsilon_high=1.5, training_batch_size=60))
    real = np.asarray(ppo.has_legal_action(played[1]))
    observations = jax.tree.map(lambda x: x[real][:60], played[1])
    legal, zeros = np.asarray(ppo.legal_actions(observations)), jnp.zeros(60, jnp.int32)
    actions = np.array([RNG.choice(np.flatnonzero(row)) for row in legal], np.int32)
    old_log_prob, old_value, advantage, returns = RNG.normal(size=(4, 60)).astype(np.float32)
    decision = ppo.Decision(jnp.array(actions), jnp.array(old_log_prob - 3.0), jnp.array(old_value), zeros)
    samples = ppo.Samples(observations, decision, jnp.array(advantage), jnp.array(returns), zeros == 0)
    function = functools.partial(ppo.make_loss(network, config), (40, 20))
    loss, metrics = jax.jit(function)(params, samples)

    logits, value = (np.asarray(x, np.float64) for x in apply(params, observations))
    expected = dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"), 0.0)
    for i in range(60):
        probs = np.exp(logits[i][legal[i]] - logits[i].max())
        probs /= probs.sum()
        log_prob = math.log(probs[np.flatnonzero(legal[i]).tolist().index(actions[i])])
        log_ratio = log_prob - (old_log_prob[i] - 3.0)
        ratio = math.exp(log_ratio)
        surrogate = min(ratio * advantage[i], max(0.8, min(1.2, ratio)) * advantage[i])
        expected["policy_loss"] -= surrogate if kind == "ppo" else min(ratio, 1.5) * advantage[i] * log_prob
        near = max(old_value[i] - 0.2, min(old_value[i] + 0.2, value[i]))
        expected["value_loss"] += max((value[i] - returns[i]) ** 2, (near - returns[i]) ** 2)
        expected["entropy"] -= sum(p * math.log(p) for p in probs)
        expected["approx_kl"] += ratio - 1 - log_ratio
        expected["clip_fraction"] += abs(ratio - 1) > 0.2 if kind == "ppo" else ratio > 1.5
    expected = {name: x / 60 for name, x in expected.items()}
    for name, x in expected.items():
        assert float(metrics[name]) == pytest.approx(x, rel=2e-4), name
    assert metrics.keys() == expected.keys() and 0.1 < expected["clip_fraction"] < 0.95
    total = expected["policy_loss"] + 0.5 * expected["value_loss"] - 0.01 * expected["entropy"]
    assert float(loss) == pytest.approx(total, rel=2e-4)


def test_targets_and_the_loss_of_an_iteration_that_learns_nothing(env, network, ppo_words, ppo_run):
    """Where the learning rate has decayed to 0, each ratio is 1 (the network sees an action under the view that it was
    drawn from), and the surrogate is minus the mean of the trained rows' normalised advantages."""
    still, _ = evaluate.parse_command_line(ppo_words(), ppo.Config, ppo.PRESETS)
    last = still.learning_rate_decay_iters
    state = ppo.init_train_state(env, network, still)
    state = state._replace(iteration=jnp.int32(last), key=jax.random.PRNGKey(1))
    iterate = jax.pmap(ppo.make_train_iteration(env, network, still), axis_name=ppo.DEVICES, donate_argnums=0)
    row = evaluate.host_copy(iterate(evaluate.replicate(state))[1])
    assert row["train/learning_rate"] == row["train/clip_fraction"] == 0.0 <= row["train/approx_kl"] < 1e-8

    collect_key, shuffle_key = jax.random.split(jax.random.fold_in(state.key, last))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(collect_key, jnp.arange(still.rollout_batch_size))
    rollout = jax.jit(ppo.make_rollout(env, ppo.make_sampling_policy(network, still)))
    trajectory = rollout(state.params, keys)
    monte_carlo = ppo.make_samples(trajectory, still.model_copy(update=dict(gae_lambda=1.0, discount=0.9)))
    expected = search_distill.discounted_returns(trajectory.reward, 0.9).reshape(-1)
    np.testing.assert_allclose(monte_carlo.returns, expected, atol=1e-5)

    samples = ppo.make_samples(trajectory, still)
    mask, advantage = np.asarray(samples.mask), np.asarray(samples.advantage)
    assert not mask.all() and (advantage[~mask] == 0).all()
    normalised = (advantage - advantage[mask].mean()) / advantage[mask].std()
    rows = np.asarray(ppo.minibatch_rows(shuffle_key, samples.mask, still))
    assert float(row["train/policy_loss"]) == pytest.approx(-normalised[rows].mean(), abs=1e-4)
    # Rows that repeat, since episodes were short, keep that mean away from 0, so that it shows the deviation as well.
    assert abs(normalised[rows].mean()) > 2e-3 and abs(advantage[rows].mean() - normalised[rows].mean()) > 2e-3
    explained = 1 - advantage[mask].var() / np.asarray(samples.returns)[mask].var()
    assert float(row["train/explained_variance"]) == pytest.approx(explained, abs=1e-4)


def test_learning_raises_the_return_and_explains_the_value(ppo_words, tmp_path):
    assert (
        ppo.main([*ppo_words("max_num_iters=20", "eval_interval=20", "save_interval=20"), f"save_dir={tmp_path}"]) == 0
    )
    rows = [json.loads(line) for line in (tmp_path / "BinPack-v2" / "ppo" / "seed_0" / "metrics.jsonl").open()]
    first, last = (np.mean([row["rollout/avg_return"] for row in part]) for part in (rows[1:11], rows[-10:]))
    assert last > first + 0.04 and rows[-1]["eval/greedy/avg_return"] > rows[0]["eval/greedy/avg_return"] + 0.1
    assert np.mean([row["train/explained_variance"] for row in rows[-10:]]) > 0.5


def test_a_run_logs_what_the_other_method_logs_and_what_is_its_own(ppo_run, search_run):
    mine, theirs = ([json.loads(line) for line in (run / "metrics.jsonl").open()] for run in (ppo_run, search_run))
    own = {"train/entropy", "train/approx_kl", "train/clip_fraction", "train/explained_variance"}
    searched = {"train/target_entropy", "train/target_kl", "train/taught_share"}
    assert mine[4].keys() - own == theirs[4].keys() - searched and own <= mine[4].keys()
    assert all(np.isfinite(value) for row in mine for value in row.values())
    assert ppo_run.parts[-3:] == ("BinPack-v2", "ppo", "seed_0")
    assert evaluate.find_checkpoints(ppo_run)[-1].name == "iter_000004.pkl"


def test_a_checkpoint_of_search_distillation_is_refused(search_run, tmp_path, capsys, ppo_words):
    path = search_run / "iter_000004.pkl"
    assert ppo.main([*ppo_words(f"resume={path}"), f"save_dir={tmp_path}"]) == 2
    assert capsys.readouterr().err == (
        f"error: {path}: expected method=ppo, got search_distill; give a checkpoint that has it\n"
    )


def test_defaults_are_those_of_the_full_run_and_shared_keys_mean_the_same_in_both_scripts():
    expected = dict(
        num_epochs=4, clip_eps=0.2, gae_lambda=0.95, entropy_coef=0.01, value_coef=0.5, value_clip_eps=0.2,
        learning_rate=3e-4, max_grad_norm=1.0, rollout_batch_size=1024, training_batch_size=4096, max_num_iters=800,
        loss="ppo", epsilon_high=5.0,
    )  # fmt: skip
    config = ppo.Config()
    assert {key: getattr(config, key) for key in expected} == expected
    mine, theirs = ({key: repr(x) for key, x in m.Config.model_fields.items()} for m in (ppo, search_distill))
    assert {key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key]} == {
        "learning_rate",
        "num_epochs",
        "loss",
    }
    own = {"clip_eps", "gae_lambda", "entropy_coef", "value_coef", "value_clip_eps"}
    assert mine.keys() - theirs.keys() == own
