"""Instances of other sizes than BinPack-v2's: environment, network, search, runs and evaluation follow the keys."""

import functools
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, override
from measure_environment import compare_episodes

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as script

SHIPPED = ROOT / "checkpoints" / "search_distill_cpu.pkl"
TEN = ("max_num_items=10", "max_num_ems=16", "obs_num_ems=12")
SMALL = (*TEN, "max_num_iters=1", "learning_rate=1e-8")


def test_the_environment_equals_jumanjis_at_another_size():
    """The quick form of measure_environment.py at 50 items, with so few spaces that some overflow."""
    result = compare_episodes("random", 4, seed=5, max_num_items=50, max_num_ems=33, obs_num_ems=30)
    assert result["differing_fields"] == [] and result["steps"] > 4 * 10 and result["overflow_states"] > 0


def test_binpack_v2_is_the_default():
    sizes = script.Config()
    assert sizes.env_name == "BinPack-v2" and sizes.max_decisions == 19
    observation = script.make_env(sizes).reset(jax.random.PRNGKey(0))[1].observation
    assert observation.action_mask.shape == (40, 20)
    assert script.sizes_of_tokens(sizes, observation) == sizes.token_sizes == ((8, 12), (16, 20), (40, 20))
    larger = script.Config(max_num_items=50, max_num_ems=80)
    assert larger.env_name == "BinPack-v2_max_num_items_50_max_num_ems_80"
    assert larger.run_dir() != sizes.run_dir() and larger.max_decisions == 49


@pytest.mark.parametrize("size", [(40, 50), (40, 100), (12, 10), (1, 2), (80, 20)], ids=str)
@pytest.mark.parametrize("token_sizes", [((8, 12), (16, 20), (40, 20)), ((3, 90),)], ids=str)
def test_sizes_of_tokens_grow_up_to_the_whole_observation(size, token_sizes):
    config = script.Config(token_sizes=token_sizes)
    observation = script.make_env(config).reset(jax.random.PRNGKey(0))[1].observation
    sizes = script.sizes_of_tokens(config, observation._replace(action_mask=jnp.ones(size, bool)))
    pairs = [spaces * items for spaces, items in sizes]
    assert sizes[-1] == size and pairs == sorted(pairs) and len(set(sizes)) == len(sizes)
    assert len(sizes) == (6 if size in ((40, 50), (40, 100), (80, 20)) else 1)
    assert all(a <= size[0] and b <= size[1] for a, b in sizes)


@pytest.mark.parametrize("module", [script, ppo], ids=lambda module: module.METHOD)
def test_both_scripts_train_at_another_size(module, ppo_words, tmp_path, capsys):
    small = override if module is script else ppo_words
    assert module.main(small(*SMALL, f"save_dir={tmp_path}")) == 0
    (folder,) = tmp_path.glob("BinPack-v2_max_num_items_10_max_num_ems_16_obs_num_ems_12/*/seed_0")
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < row["rollout/avg_steps"] <= 9 and 0 < row["eval/greedy/avg_return"] <= 1
    assert evaluate.main([str(folder), "num_episodes=4", f"json={tmp_path}/scores.json"]) == 0
    (found,) = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert found["sizes"]["max_num_items"] == 10 and found["packed_items"] <= 9


def test_a_checkpoint_plays_other_sizes(tmp_path, capsys):
    words = [
        "num_episodes=4",
        "max_num_items=10",
        "obs_num_ems=12",
        "leaf_value=network",
        f"json={tmp_path}/scores.json",
    ]
    assert evaluate.main([str(SHIPPED), "policy=search,largest_first", "num_simulations=2", *words]) == 0
    rows = json.loads((tmp_path / "scores.json").read_text())["rows"]
    assert [row["sizes"]["max_num_items"] for row in rows] == [10] * 2 and all(row["packed_items"] <= 9 for row in rows)
    agent = evaluate.load_checkpoint(SHIPPED, max_num_items=10, obs_num_ems=12)
    assert len(agent.play(seed=0)) <= 10
    again = pickle.loads(pickle.dumps(agent))
    assert again.sizes == agent.sizes and again.config.max_num_items == 20


@pytest.mark.parametrize(
    "words, expected",
    [
        (["obs_num_ems=50"], "expected at most max_num_ems=40"),
        (["max_num_items=1"], "max_num_items=1: expected greater than or equal to 2"),
        (["max_num_items=2000"], "expected less than or equal to 1000"),
        (["split_num_same_items=20"], "expected below max_num_items=20"),
    ],
)
def test_sizes_that_cannot_be_are_refused(words, expected, tmp_path, capsys):
    runs = (script.main, [f"save_dir={tmp_path}"]), (evaluate.main, [str(SHIPPED)]), (evaluate.main, ["policy=random"])
    for main, more in runs:
        assert main([*more, *words]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", [script, ppo], ids=lambda module: module.METHOD)
def test_a_hint_names_the_network_of_a_checkpoint_that_lacks_keys(module):
    """What it lacks are defaults."""
    config = module.Config(transformer_num_heads=2, pair_units=8)
    hint = module.network_hint(config, dict(config=dict(pair_units=16)))
    assert hint == "type transformer_num_heads=4 pair_units=16"


def test_checkpoints_of_several_sizes_are_not_compared(search_run, tmp_path, capsys):
    contents = evaluate.read_checkpoint(SHIPPED)
    contents["config"] |= dict(max_num_items=10)
    evaluate.write_checkpoint(tmp_path / "ten.pkl", contents)
    assert evaluate.main([str(SHIPPED), str(tmp_path / "ten.pkl"), "num_episodes=2"]) == 2
    assert "expected checkpoints that play instances of the same sizes" in capsys.readouterr().err


@pytest.mark.parametrize("module", [script, ppo], ids=lambda module: module.METHOD)
def test_a_run_starts_from_the_weights_of_another(module, search_run, ppo_words, tmp_path, capsys):
    """Of either method and of any size; the optimizer is fresh, and the iteration 0."""
    small = functools.partial(override if module is script else ppo_words, *SMALL, f"save_dir={tmp_path}")
    start = evaluate.load_checkpoint(search_run)
    assert module.main([*small(), f"init_from={search_run}"]) == 0
    (path,) = tmp_path.glob("*/*/seed_0/iter_000001.pkl")
    found = evaluate.read_checkpoint(path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found["model"][0], start.params)
    assert found["iteration"] == 1 and max(np.asarray(x).max() for x in found["opt_state"][-3:]) < 100
    capsys.readouterr()
    assert module.main([*small("pair_units=9", "overwrite=true"), f"init_from={search_run}"]) == 2
    assert (
        "init_from: the checkpoint's arrays do not fit this configuration; type pair_units=8" in capsys.readouterr().err
    )
    assert module.main([*small("seed=7"), f"init_from={tmp_path}"]) == 2
    assert "expected a run's folder" in capsys.readouterr().err


def test_the_network_of_50_items_is_shipped():
    agent = evaluate.load_checkpoint(ROOT / "checkpoints" / "search_distill_cpu_50.pkl")
    words = script.PRESETS["cpu_50"].split()
    assert all(f"{key}={getattr(agent.config, key)}" in words for key in ("max_num_items", "max_num_ems"))
    assert agent.iteration == agent.config.max_num_iters == 20
    assert agent.config.init_from == f"checkpoints/{SHIPPED.name}"
