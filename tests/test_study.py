"""The study's variants fit the training script, and its table the measured file. The rivals at other sizes play the
instances that `evaluate.py` plays."""

import ast
import json
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

import evaluate
import train_search_distill_binpack as script

sys.path.insert(0, str(ROOT / "tests" / "studies"))
import exact_solver
import operators
import planners
import sizes
import study
import supervised


@pytest.mark.parametrize("variant", study.VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_is_another_run_of_the_preset(variant):
    ast.parse(study.text_of(variant))
    base, _ = evaluate.parse_command_line(["preset=cpu"], script.Config, script.PRESETS)
    config, _ = evaluate.parse_command_line(["preset=cpu", *variant.words], script.Config, script.PRESETS)
    assert (config != base) == bool(variant.words)
    assert variant is study.VARIANTS[0] or variant.words or variant.lines
    assert variant.against in [other.name for other in study.VARIANTS]


def test_the_studys_table_is_made_from_the_committed_file():
    results = json.loads(study.RESULTS.read_text())
    assert study.TABLE.read_text() == study.table(results)
    assert [variant["name"] for variant in results["variants"]] == [variant.name for variant in study.VARIANTS]
    assert len(results["commit"]) == len(results["long"]["commit"]) == 40
    for variant in results["variants"] + results["long"]["variants"]:
        for runs in filter(None, (variant["runs"], variant.get("equal_time"))):
            assert [run["seed"] for run in runs] == list(study.SEEDS)


def test_the_exact_solver_gets_the_instances_that_are_played():
    """Cut from a full container, of 19 items each, and those of an episode."""
    lengths, container = exact_solver.instances(20, 3)
    assert all(len(items) == 19 and items.prod(1).sum() == container.prod() for items in lengths)
    agent = evaluate.load_checkpoint(ROOT / "checkpoints" / "search_distill_cpu.pkl")
    rollout = jax.jit(agent.script.make_rollout(agent.env, evaluate.make_random_policy(agent)))
    first = rollout((), evaluate.evaluation_keys(evaluate.Config().seed, 3)).observation.items
    shares = np.stack(first, -1)[:, 0, :19]
    np.testing.assert_allclose(shares, np.stack(lengths) / container, rtol=1e-6)


def test_joining_fills_what_was_cut_and_nothing_else():
    """Three boxes of a cut; one of them too long; and a ring of four around a fifth, which no cut makes."""
    join = lambda boxes, container: planners.join(np.array(boxes), np.array(container))
    cut = [(4, 5, 3), (4, 5, 7), (6, 5, 10)]
    assert join(cut, (10, 5, 10)) == (1.0, True)
    assert join([*cut[:2], (7, 5, 10)], (10, 5, 10)) == (0.7, False)
    ring = [(1, 2, 1), (2, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 1)]
    assert join(ring, (3, 3, 1)) == (6 / 9, False)


def test_a_planner_after_greedy_play_keeps_the_better_of_both():
    names = dict(items=50, policy="beam", words=dict(n=2), of="all")
    greedy = names | dict(policy="greedy", words={}, seconds=1.0, solved=[True, False, False], returns=[1.0, 0.5, 0.75])
    hard = names | dict(of="hard", seconds=3.0, solved=[True, False], returns=[1.0, 0.7])
    found = planners.after_greedy([hard, greedy], names)
    assert found == dict(seconds=3.0, solved=[True, True, False], returns=[1.0, 1.0, 0.75])


def test_every_planner_was_measured_and_none_is_below_greedy_play():
    """On each instance, at both sizes, with three budgets or more."""
    results = json.loads(planners.collect_results.PLANNERS.read_text())
    for items, number in planners.NUM_INSTANCES.items():
        found = planners.collect_results.of_policy(results, items=items, of="all")
        (greedy,) = found["greedy"]
        for policy in ("best_of_n", "search", *evaluate.PLANNERS):
            assert len(found[policy]) >= 3
            for row in found[policy]:
                assert len(row["returns"]) == number and (np.array(row["returns"]) >= greedy["returns"]).all()
        assert {name for name in found if name in planners.RIVALS} == set(planners.RIVALS)
    filled = lambda share, policy: (
        100 * np.mean(planners.collect_results.of_policy(results, of=f"blueprint {share}")[policy][0]["solved"])
    )
    before, tuned, trained = filled(0.1, "greedy"), filled(0.1, "rl_search"), filled(0.2, "greedy")
    readme = (ROOT / "README.md").read_text()
    assert (
        f"from {before:.1f} to {tuned:.1f} %" in readme and f"about the same time lifts it to {trained:.1f} %" in readme
    )
    assert all(len(row["commit"]) == 40 for row in results["rows"])


def test_all_that_the_study_of_sizes_plans_was_measured():
    """With as many instances as planned."""
    results = json.loads(study.collect_results.SIZES.read_text())
    keys = ("name", "trained", "seed", "num_simulations", "items")
    found = {tuple(row[key] for key in keys): len(row["returns"]) for row in results["rows"]}
    planned = {
        (player.name, player.trained, player.seed, player.num_simulations, items): sizes.num_instances(player, items)
        for player in sizes.PLAYERS
        for items in exact_solver.ITEMS
        if sizes.num_instances(player, items)
    }
    assert found == planned
    assert all(len(row["commit"]) == 40 for row in results["rows"])


def test_all_that_the_study_of_operators_plans_was_measured():
    """Each arm as it is planned now, with each seed, for as many iterations as its time allows."""
    results = json.loads(operators.RESULTS.read_text())
    found = {(row["name"], row["words"], row["seed"]): row["iterations"] for row in results["rows"]}
    allowed = {name: round(60 * operators.MINUTES / seconds) for name, seconds in results["seconds"].items()}
    arms = {arm: arm.name for arm in operators.ARMS} | operators.ABLATIONS
    planned = {(arm.name, arm.words, seed): allowed[name] for arm, name in arms.items() for seed in operators.SEEDS}
    assert found == planned and len(results["rows"]) == len(planned)
    assert [(row["workers"], row["leaf_value"]) for row in results["workers"]] == [*operators.WORKERS]
    assert results["ablations"] == {arm.name: name for arm, name in operators.ABLATIONS.items()}
    assert all(len(row["commit"]) == 40 for row in results["rows"])


@pytest.mark.slow
def test_play_that_agrees_with_a_solution_fills_the_container():
    """Of any network: each mirror image starts with an item of its own in the corner, and what is taught is legal."""
    config, _ = evaluate.parse_command_line(["preset=cpu"], script.Config, script.PRESETS)
    env, network = supervised.make_solved_env(config), script.make_network(config)
    params = script.init_train_state(env, network, config).params
    played = jax.jit(script.make_rollout(env, supervised.make_guided_policy(env, network, config)))(
        params, evaluate.evaluation_keys(0, 16)
    )
    assert played.solved.mean() > 0.9
    agrees = np.asarray(played.decision) & np.asarray(played.mask)[..., None]
    assert (agrees <= np.asarray(script.legal_actions(played.observation))).all()
    assert agrees[played.solved].any(-1).sum() == np.asarray(played.mask)[played.solved].sum()
    firsts = agrees[:, 0].sum(-1)
    assert firsts.min() > 1 and firsts.max() <= len(supervised.MIRRORED)

    rows = jax.tree.map(lambda x: x[:, 0], supervised.Rows(played.observation, agrees, agrees.any(-1)))
    loss, _ = supervised.make_loss(network, config)(None, params, rows)
    logits, _ = network.apply(params, None, rows.observation)
    expected = -np.log((np.asarray(jax.nn.softmax(logits)) * rows.agrees).sum(-1)).sum() / config.training_batch_size
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
