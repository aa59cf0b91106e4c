"""The three programs and these tests are formatted, and the programs are no longer than they should be."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

MOST_LINES = {"train_search_distill_binpack.py": 1450, "train_ppo_binpack.py": 1025, "evaluate.py": 2255}
MOST_LINES_OF_A_FUNCTION = 80


@pytest.mark.parametrize("words", [["format", "--check"], ["check"]], ids=" ".join)
def test_ruff_finds_nothing(words):
    command = [sys.executable, "-m", "ruff", *words, "--no-cache", "."]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", MOST_LINES)
def test_programs_and_their_functions_are_short(name):
    source = (ROOT / name).read_text()
    assert source.count("\n") <= MOST_LINES[name]
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert len(functions) > 30 and max(lengths.values()) <= MOST_LINES_OF_A_FUNCTION, max(lengths, key=lengths.get)
