"""The benchmark: what it counts, and what it refuses."""

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, override

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import throughput

import evaluate
import train_search_distill_binpack as script


@pytest.mark.slow
def test_visits_are_those_that_the_search_makes(config, params):
    """Without completions: a pass for the first root and, until all episodes have ended, about one for each decision,
    whose first nodes are made together. A simulation takes a step with these and one where it looks its node up."""
    config = config.model_copy(update=dict(token_sizes=((8, 12), (40, 20))))
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    passes, steps = throughput.count_visits(config, params, keys)
    assert 10 < sum(passes.values()) <= 1 + 19 and steps == 8 * 19 * (1 + 2 * config.num_simulations)
    assert passes[8, (40, 20)] == 1 and passes[16, (8, 12)] > 1 and passes[16, (40, 20)] > 5  # Late and early states.


def test_the_environment_of_an_arm_differs_in_the_update_alone(env, config):
    other, key = throughput.jumanji_env(config), jax.random.PRNGKey(0)
    (state, timestep), expected = (jax.jit(x.reset)(key) for x in (other, env))
    for action in (0, 1):
        text = [jax.jit(functools.partial(script.step_flat, x)).lower(state, action).as_text() for x in (other, env)]
        assert text[0].count("while") > text[1].count("while")
        (state, timestep), expected = (script.step_flat(x, state, jnp.int32(action)) for x in (other, env))
        jax.tree.map(np.testing.assert_array_equal, (state, timestep), expected)


@pytest.mark.slow
def test_an_arm_has_the_decisions_of_a_run(search_run):
    """With every pass of the network at full size, as many as the first iteration of the run."""
    config, _ = evaluate.parse_command_line(override("token_sizes=[[8,12],[40,20]]"), throughput.Config, script.PRESETS)
    arms = throughput.make_arms(config)
    assert [arm.config.search_width for arm in arms] == [48, 48, 800, 48, 800, 48]
    row = json.loads((search_run / "metrics.jsonl").read_text().splitlines()[1])
    assert arms[5].config.token_sizes == config.token_sizes[-1:] == ((40, 20),) and len(config.token_sizes) > 1
    (found,) = throughput.measure_arms(arms[5:], throughput.make_state(config), 1)
    assert found["decisions_per_second"] * found["seconds"][0] == pytest.approx(row["frames"])


def test_a_mistake_gives_one_line_and_status_2(tmp_path, capsys):
    assert throughput.main(["preset=cpu", "round=3"]) == 2
    assert capsys.readouterr().err == "error: unknown key 'round'; did you mean 'rounds'?\n"
