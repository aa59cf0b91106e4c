"""The benchmark: what it counts, and what it refuses."""

import sys

import jax
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import throughput

import train_search_distill_binpack as script


def test_visits_are_those_that_the_search_makes(config, model):
    """Without completions: a pass for the first root and one for each simulation, and no step that is not needed."""
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    passes, steps = throughput.count_visits(config, model, keys)
    assert sum(passes.values()) == 1 + 19 * config.num_simulations and steps == 19 * (1 + config.num_simulations)
    assert list(passes) == list(script.SIZES) and passes[8, 10] > 5 and passes[16, 20] > 5  # Late and early states.


def test_arms_play_the_same_episodes(config):
    arms = throughput.make_arms(throughput.Config(**config.model_dump()))
    assert [arm.config.search_width for arm in arms] == [48, 48, 800, 48, 800, 48]
    state = throughput.make_state(arms[0].config)
    device, host = (arms[i].iterate(state) for i in (0, 3))
    assert device["decisions"] == host["decisions"] > 8 * 10
    rows = throughput.measure_arms([arms[0], arms[3]], state, 1)
    assert rows[0]["ratio"] == 1.0 and all(row["decisions_per_second"] > 1 for row in rows)


def test_a_mistake_gives_one_line_and_status_2(tmp_path, capsys):
    assert throughput.main(["preset=cpu", "round=3"]) == 2
    assert capsys.readouterr().err == "error: unknown key 'round'; did you mean 'rounds'?\n"
