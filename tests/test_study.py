"""The study's variants fit the training script, and its table the measured file."""

import ast
import json
import sys

import pytest
from conftest import ROOT

import evaluate
import train_search_distill_binpack as script

sys.path.insert(0, str(ROOT / "tests" / "studies"))
import study


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
