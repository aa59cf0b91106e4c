"""The study's variants fit the training script."""

import ast
import sys

import pytest
from conftest import ROOT

import train_search_distill_binpack as script

sys.path.insert(0, str(ROOT / "tests" / "studies"))
import study


@pytest.mark.parametrize("variant", study.VARIANTS, ids=lambda variant: variant.name)
def test_a_variant_is_another_run_of_the_preset(variant):
    ast.parse(study.text_of(variant))
    base, _ = script.parse_command_line(["preset=cpu"], script.Config, script.PRESETS)
    config, _ = script.parse_command_line(["preset=cpu", *variant.words], script.Config, script.PRESETS)
    assert (config != base) == bool(variant.words)
    assert variant is study.VARIANTS[0] or variant.words or variant.lines
    assert variant.against in [other.name for other in study.VARIANTS]
