"""The commands of the READMEs and of the scripts' docstrings run as written, with small overrides added; figures,
names and lines of output are those of the committed files and of the code."""

import functools
import glob
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
READMES = (ROOT / "README.md", *sorted((ROOT / "tests").glob("**/*.md")))
# Where a script is; what its name is in the README's table of places to change.
PLACES = {
    "both scripts": (script, ppo),
    "`train_search_distill_binpack.py`": (script,),
    "`train_ppo_binpack.py`": (ppo,),
    "`evaluate.py`": (evaluate,),
}


def bash_lines() -> list[str]:
    blocks = [block for path in READMES for block in re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)]
    return [line.replace("$seed", "0") for block in blocks for line in block.splitlines()]


def commands(name: str = r"train_\w+") -> list[str]:
    """Every call of a script in a bash block of a README, and in the training scripts' docstrings, in order."""
    lines = bash_lines() + script.__doc__.splitlines() + ppo.__doc__.splitlines()
    lines = [line for line in lines if not line.startswith("srun")]  # test_devices.py has the several processes.
    calls = [re.search(rf"(?:^|\s)(?:\S*/)?python ({name}\.py[^#&|]*)", line) for line in lines]
    return list(dict.fromkeys(call.group(1).strip() for call in calls if call))


def test_the_readme_has_the_commands_that_users_need():
    assert "train_search_distill_binpack.py preset=cpu" in commands()
    assert any("--help" in command for command in commands())
    assert "train_ppo_binpack.py preset=cpu" in commands()
    assert any(command.startswith("train_ppo_binpack.py save_dir=checkpoints/full") for command in commands())
    assert len(commands()) >= 12 and set(RUN) <= set(commands()) and len(commands("evaluate")) >= 9
    assert {"study", "throughput", "collect_results", "measure_reliability", "measure_environment"} <= {
        Path(word).stem for line in bash_lines() for word in line.split() if word.endswith(".py")
    }


def test_the_readme_is_short_and_begins_with_what_one_needs_first():
    lines = README.splitlines()
    assert len(lines) <= 314
    first = "\n".join(lines[:45])
    assert "![" in first and "train_search_distill_binpack.py preset=cpu\n```" in first and "minutes" in first
    command = subprocess.run(
        "grep -A3 '<!-- the test command -->' README.md | grep -m1 pytest",  # As .ci/run does.
        shell=True, cwd=ROOT, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert command.startswith("python3 -m venv .venv && ") and command.endswith("-m pytest tests\n")


def test_the_first_figures_and_the_end_of_a_run_are_those_of_the_committed_files(capsys):
    """The lines are printed by the script itself."""
    results, floors = (json.loads(path.read_text()) for path in (collect_results.RESULTS, collect_results.FLOORS))
    mean = lambda method, key: collect_results.mean_and_error(
        [100 * run["last"][f"eval/{key}"] for run in collect_results.of_method(results, method)]
    )[0]
    alone = f"packs {mean('search_distill', 'greedy/avg_return'):.1f} % of the volume and fills"
    assert f"{alone} {mean('search_distill', 'greedy/solved_rate'):.0f} % of the containers" in README
    with_search = f"packs {mean('search_distill', 'search/avg_return'):.3f} % and fills"
    assert f"{with_search} {mean('search_distill', 'search/solved_rate'):.1f} %" in README
    assert f"PPO's network packs {mean('ppo', 'greedy/avg_return'):.1f} %" in README
    rule = next(row for row in floors["rows"] if row["policy"] == "largest_first")
    assert f"the largest item into the smallest space packs {100 * rule['avg_return']:.1f} %" in README
    rule = next(row for row in floors["rows"] if row["policy"] == "lookahead")
    assert f"and {100 * rule['avg_return']:.1f} % with a look-ahead of one move" in README
    sizes, exact = (json.loads(path.read_text()) for path in (collect_results.SIZES, collect_results.EXACT))
    rows = collect_results.means_over_seeds(sizes["rows"]) + collect_results.exact_rows(exact)
    at = {
        items: [row for row in rows if row["items"] == items and row.get("trained", "20") == "20"]
        for items in (50, 100)
    }
    at = {items: {row.get("num_simulations", f"{row.get('limit')} s"): row for row in at[items]} for items in at}
    searched, solver = at[50][32], at[50]["60 s"]
    search = (
        f"with search it fills {100 * searched['filled']:.1f} % of the containers, in {searched['seconds']:.2f} s each"
    )
    assert f"{search}, where an exact solver fills {100 * solver['filled']:.0f} % in a minute" in README
    searched, solver = at[100][4], at[100]["60 s"]
    search = f"four simulations pack {100 * searched['utilisation']:.1f} % in {searched['seconds']:.1f} s"
    assert f"{search}, where the solver packs {100 * solver['utilisation']:.1f} % in a minute" in README
    assert {len(row["returns"]) for row in sizes["rows"]} == {256}
    further = json.loads((ROOT / "tests/studies/further.json").read_text())["where_blocks_end"]["curve"][0]["filled"]
    assert f"the shipped network, which fills {100 * further:.1f} % there by itself" in README
    hour = json.loads((ROOT / "tests/studies/hour.json").read_text())["runs"]
    filled = [f"{100 * run['last']['eval/greedy/solved_rate']:.1f}" for run in hour]
    assert f"After an hour the network alone fills {' and '.join(filled)} % of these containers" in README

    group = [group for group in results["groups"] if group["method"] == "search_distill"][-1]
    first = next(run for run in group["runs"] if run["seed"] == 0)
    run = evaluate.Run(script.Config(**group["config"] | {"seed": 0, "save_dir": "./checkpoints"}), script.METHOD)
    run._file, run._bar = io.StringIO(), SimpleNamespace(set_postfix_str=lambda text: None, update=lambda: None)
    run.record(first["last"] | {"train/policy_loss": 0.0, "perf/decisions_per_second": 0.0})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 2 and f"```text\n{printed}Done: {run.checkpoint(100)}\n```" in README


def test_links_and_pictures_of_the_readmes_exist():
    for path in READMES:
        for link in re.findall(r"\]\((?!https?:)(.*?)\)", path.read_text()):
            name, _, anchor = link.partition("#")
            target = path.parent / (name or path.name)
            assert target.exists(), f"{path}: {link}"
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", x).lower().replace(" ", "-") for x in titles], link


def resolves(name: str, module) -> bool:
    try:
        functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        return False
    return True


def test_the_places_to_change_are_in_the_code():
    """In the script that each row of the table names, and outside of the table in one of them."""
    (section,) = re.findall(r"^## Where to change what\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    names = lambda text: re.findall(r"`([A-Za-z_][\w.]*)`", text)
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 10
    for _, where, look_at in rows:
        assert names(look_at)
        for name in names(look_at):
            assert all(resolves(name, module) for module in PLACES[where]), f"{name} in {where}"
    for name in names(re.sub(r"^\|.*\n", "", section, flags=re.MULTILINE)):
        assert any(resolves(name, module) for module in (script, ppo, evaluate)) or (ROOT / name).exists(), name
    for path in re.findall(r"`([\w/]+\.py)`", section):
        assert (ROOT / path).exists(), path


def test_every_metric_of_a_run_is_in_the_readme(search_run, ppo_run):
    (section,) = re.findall(r"^### Watching a run\n(.*)", README, re.DOTALL | re.MULTILINE)
    for folder in (search_run, ppo_run):
        for row in evaluate.read_log(folder / "metrics.jsonl"):
            for key in row:
                start, _, name = key.rpartition("/")
                assert f"`{key}`" in section or (f"`{start}/*`" in section and f"`{name}`" in section), key


@pytest.mark.parametrize("command", commands())
def test_command_is_understood(command):
    name, *words = shlex.split(command)
    module = {"train_ppo_binpack.py": ppo, "train_search_distill_binpack.py": script}[name]
    if "--help" not in words:
        config, preset = evaluate.parse_command_line(words, module.Config, module.PRESETS)
        assert preset == next((word[7:] for word in words if word.startswith("preset=")), "full")
        assert not words or config != module.Config()


@pytest.mark.parametrize("command", [command for command in commands() if command in RUN])
def test_command_runs_as_written(command, tmp_path):
    """For one iteration of few episodes, with the network and the search that it names. The other commands differ from
    these, or from runs of other tests, in values."""
    name, *words = shlex.split(command)
    for file in (name, "evaluate.py"):  # A copied experiment is the script and evaluate.py.
        shutil.copy(ROOT / file, tmp_path)
    full = command == "train_search_distill_binpack.py"
    few = "rollout_batch_size=2 training_batch_size=32 token_sizes=[[40,20]]"
    command = [sys.executable, name, *words, *FEW, *few.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Traceback" not in run.stderr and "Warning" not in run.stderr
    path = max(tmp_path.glob("*/BinPack-v2/*/seed_*/iter_*.pkl"))
    assert path.name == "iter_000001.pkl"
    layers = [x for x in jax.tree.leaves(evaluate.read_checkpoint(path)["model"][0]) if x.ndim == 3]
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
    for path in ROOT.glob("checkpoints/*_cpu*.pkl"):
        shutil.copy(path, tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_evaluation_commands_are_understood_and_the_first_gives_the_tables_figures(trained_folder):
    """What each policy and file is, test_evaluate.py tests."""
    for command in commands("evaluate"):
        words = [path for word in shlex.split(command)[1:] for path in sorted(glob.glob(word)) or [word]]
        paths = [word for word in words if Path(word).exists()]
        assert paths or "random" in command
        evaluate.parse_command_line([word for word in words if word not in paths], evaluate.Config, {})
    command = shlex.split(commands("evaluate")[0])
    environment = os.environ | {"XLA_FLAGS": ""}  # It plays all 1,024 instances.
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "") and run.stdout.count("\n") == 3
    promises = (ROOT / "tests" / "results" / "README.md").read_text()
    promised = re.findall(r"`(\w+_cpu).pkl` \(seed \d, network alone ([\d.]+) %,", promises)
    assert len(promised) == 2
    for line, (name, utilisation) in zip(run.stdout.splitlines()[1:], promised, strict=True):
        assert line.split()[0] == name and abs(100 * float(line.split()[2]) - float(utilisation)) < 0.1, run.stdout


@pytest.mark.slow
def test_a_notebook_of_the_readmes_snippets_runs_from_top_to_bottom(trained_folder):
    """In a real kernel. The pickle's cell comes first and needs numpy alone."""
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    snippets.sort(key=lambda snippet: not snippet.startswith("import pickle"))
    check = "import sys; assert 'numpy' in sys.modules and not {'jax', 'haiku', 'evaluate'} & sys.modules.keys()"
    cells = [snippets[0], check, *snippets[1:]]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(trained_folder)}}).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.outputs)
    assert "search_distill" in printed and "packed 0." in printed
    assert "text/html" in notebook.cells[-1].outputs[-1].data


def test_the_tables_are_made_from_the_committed_files():
    assert set(READMES) >= {ROOT / name for name in collect_results.TABLES}
    assert sorted(sum(collect_results.TABLES.values(), ())) == sorted(collect_results.tables())
    for name in collect_results.TABLES:
        assert collect_results.with_tables(name) == (ROOT / name).read_text(), name
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
