"""The faults of measure_reliability.py, a few of each kind; that they are told apart from what is well."""

import json
from types import SimpleNamespace

import measure_reliability
import pytest
from measure_reliability import KINDS, RESULTS

import evaluate


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_faults_of_each_kind_are_survived(kind, search_run, tmp_path):
    outcomes = KINDS[kind].inject(KINDS[kind].few, tmp_path)
    assert len(outcomes) == KINDS[kind].few and not any(outcomes), outcomes


def test_a_lost_fault_is_counted(tmp_path, monkeypatch):
    """With a digest that is the same for everything, damage goes unnoticed."""
    same = SimpleNamespace(digest=lambda: bytes(32))
    monkeypatch.setattr(evaluate, "hashlib", SimpleNamespace(sha256=lambda data: same))
    outcomes = measure_reliability.damaged(20, tmp_path)
    assert sum(outcome is not None for outcome in outcomes) > 5


def test_the_committed_table_is_of_the_full_counts():
    found = json.loads(RESULTS.read_text())["kinds"]
    assert found.keys() == KINDS.keys()
    for kind, row in found.items():
        assert row["injected"] == row["survived"] == KINDS[kind].number and row["lost"] == 0, kind
        assert row["faults"] == KINDS[kind].label
