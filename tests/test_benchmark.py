"""The benchmark: what it counts, and what it refuses."""

import sys

import jax
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import throughput


def test_visits_are_those_that_the_search_makes(config, model):
    """Without completions: a pass for the first root and one for each simulation, and no step that is not needed."""
    keys = jax.random.split(jax.random.PRNGKey(0), 8)
    visits = throughput.count_visits(config, model, keys)
    assert visits == {"network": 1 + 19 * config.num_simulations, "environment": 19 * (1 + config.num_simulations)}


def test_the_arms_change_one_thing_each_and_play_the_same_number_of_decisions(config):
    arms = throughput.make_arms(throughput.Config(**config.model_dump()))
    assert [arm.config.search_width for arm in arms] == [48, 48, 800, 48, 800]
    state = throughput.make_state(arms[0].config)
    row = throughput.measure_arms([arms[0]], state, 1)[0]
    assert row["ratio"] == 1.0 and row["decisions_per_second"] > 1 and len(row["seconds"]) == 1


def test_a_mistake_gives_one_line_and_status_2(tmp_path, capsys):
    assert throughput.main(["preset=cpu", "round=3"]) == 2
    assert capsys.readouterr().err == "error: unknown key 'round'; did you mean 'rounds'?\n"
