"""The commands of the README and of the script's docstring run as written, with small overrides added."""

import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import collect_results
import jax
import nbclient
import nbformat
import pytest

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as script

FEW = "max_num_iters=1 eval_batch_size=2 eval_num_simulations=0".split()
ROOT = Path(__file__).parent.parent
RUN = ("train_search_distill_binpack.py", "train_search_distill_binpack.py preset=cpu")  # PPO: in test_devices.py.
README = (ROOT / "README.md").read_text()


def bash_lines() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line.replace("$seed", "0") for block in blocks for line in block.splitlines()]


def commands(name: str = r"train_\w+") -> list[str]:
    """Every call of a script in a bash block of the README, and in the training scripts' docstrings, in order."""
    lines = bash_lines() + script.__doc__.splitlines() + ppo.__doc__.splitlines()
    lines = [line for line in lines if not line.startswith("srun")]  # test_devices.py has the several processes.
    calls = [re.search(rf"(?:^|\s)(?:\S*/)?python ({name}\.py[^#&|]*)", line) for line in lines]
    return list(dict.fromkeys(call.group(1).strip() for call in calls if call))


def test_the_readme_has_the_commands_that_users_need():
    assert "train_search_distill_binpack.py preset=cpu" in commands()
    assert any("--help" in command for command in commands())
    assert "train_ppo_binpack.py preset=cpu" in commands()
    assert len(commands()) >= 8 and set(RUN) <= set(commands()) and len(commands("evaluate")) >= 4


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command):
    name, *words = shlex.split(command)
    module = {"train_ppo_binpack.py": ppo, "train_search_distill_binpack.py": script}[name]
    if "--help" not in words:
        config, preset = module.parse_command_line(words, module.Config, module.PRESETS)
        assert preset == ("cpu" if "preset=cpu" in words else "full")
        assert not words or config != module.Config()


@pytest.mark.parametrize("command", [command for command in commands() if command in RUN])
def test_command_runs_as_written(command, tmp_path):
    """For one iteration of few episodes, with the network and the search that it names. The other commands differ from
    these, or from runs of other tests, in values."""
    name, *words = shlex.split(command)
    shutil.copy(ROOT / name, tmp_path)
    full = command == "train_search_distill_binpack.py"
    few = "rollout_batch_size=16 training_batch_size=64" if full else "rollout_batch_size=4 training_batch_size=32"
    command = [sys.executable, name, *words, *FEW, *few.split(), *([] if full else ["token_sizes=[[40,20]]"])]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Traceback" not in run.stderr and "Warning" not in run.stderr
    path = max(tmp_path.glob("*/BinPack-v2/*/seed_*/iter_*.pkl"))
    assert path.name == "iter_000001.pkl"
    layers = [x for x in jax.tree.leaves(script.read_checkpoint(path)["model"][0]) if x.ndim == 3]
    assert len(layers) > 5 and {len(x) for x in layers} == {4 if full else 1}
    assert not full or all((x[0] != x[1]).any() for x in layers)
    if full:
        assert "preset=cpu is a complete run" in run.stdout


@pytest.fixture
def trained_folder(search_run, ppo_run, tmp_path, monkeypatch) -> Path:
    """The scripts, and finished runs where the README's commands look for them; the working folder."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for run_dir, folder in (
        (search_run, "BinPack-v2/nsim_4"), (ppo_run, "BinPack-v2/ppo"),
        (search_run, "full/BinPack-v2/nsim_32"), (ppo_run, "full/BinPack-v2/ppo"),
    ):  # fmt: skip
        shutil.copytree(run_dir, tmp_path / "checkpoints" / folder / "seed_0")
    for path in ROOT.glob("checkpoints/*_cpu.pkl"):
        shutil.copy(path, tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_evaluation_commands_are_understood_and_the_first_gives_the_tables_figures(trained_folder):
    """What each policy and file is, test_evaluate.py tests."""
    for command in commands("evaluate"):
        words = [path for word in shlex.split(command)[1:] for path in sorted(glob.glob(word)) or [word]]
        paths = [word for word in words if Path(word).exists()]
        assert paths or "random" in command
        script.parse_command_line([word for word in words if word not in paths], evaluate.Config, {})
    command = shlex.split(commands("evaluate")[0])
    environment = os.environ | {"XLA_FLAGS": ""}  # It plays all 1,024 instances.
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.count("\n") == 3
    promised = re.findall(r"`(\w+_cpu).pkl` \(seed \d, network alone ([\d.]+) %,", README)
    assert len(promised) == 2
    for line, (name, utilisation) in zip(run.stdout.splitlines()[1:], promised, strict=True):
        assert line.split()[0] == name and abs(100 * float(line.split()[2]) - float(utilisation)) < 0.1, run.stdout


def test_a_notebook_of_the_readmes_snippets_runs_from_top_to_bottom(trained_folder):
    """In a real kernel. The pickle's cell comes first and needs numpy alone."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 3
    snippets.sort(key=lambda snippet: not snippet.startswith("import pickle"))
    check = "import sys; assert 'numpy' in sys.modules and not {'jax', 'haiku', 'evaluate'} & sys.modules.keys()"
    cells = [snippets[0], check, *snippets[1:]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(trained_folder)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.outputs)
    assert "search_distill" in printed and "packed 0." in printed
    assert "text/html" in notebook.cells[-1].outputs[-1].data


def test_the_tables_are_made_from_the_committed_files():
    assert collect_results.with_tables(README) == README
    results, floors = (json.loads(path.read_text()) for path in (collect_results.RESULTS, collect_results.FLOORS))
    for group in results["groups"]:
        assert len(group["runs"]) >= 3 and group["commit"]
    assert floors["num_episodes"] == 1024 and floors["seed"] == script.Config().eval_seed


def test_curves_are_read_between_their_evaluations():
    points = [dict(hours=hours, decisions=0, utilisation=value) for hours, value in ((1, 0.5), (2, 0.7), (4, 0.9))]
    run = dict(curve=points)
    assert [collect_results.at(run, hours) for hours in (1, 1.5, 3, 4, 5)] == pytest.approx([0.5, 0.6, 0.8, 0.9, 0.9])
    with pytest.raises(ValueError, match="first evaluation"):
        collect_results.at(run, 0.9)


def test_requirements_and_versions_in_use_agree():
    """The packages that the tests run with lie within the bounds that the requirements state."""
    from importlib import metadata

    from packaging.requirements import Requirement

    files = (ROOT / "requirements.txt", ROOT / "tests/requirements.txt")
    lines = [line for file in files for line in file.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]
    assert len(requirements) >= 10
    for requirement in requirements:
        assert metadata.version(requirement.name) in requirement.specifier, requirement
