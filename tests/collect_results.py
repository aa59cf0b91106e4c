"""Collects finished runs into `tests/results/cpu_preset.json` and writes the README's table from it
and from `tests/results/environment.json`.

    python tests/collect_results.py checkpoints/BinPack-v2/nsim_4 "2 cores of an AMD EPYC"

takes the runs in the folder's `seed_*` (with the commit of the checkout that they lie in) and a description of the
machine; without arguments only the table is made.
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results" / "cpu_preset.json"
FLOORS = ROOT / "tests" / "results" / "environment.json"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def collect(folder: Path, device: str) -> dict:
    sys.path.insert(0, str(ROOT))
    import train_search_distill_binpack as script

    runs, commands = [], set()
    for run_dir in sorted(folder.glob("seed_*")):
        checkpoint = script.read_checkpoint(script.find_checkpoints(run_dir)[-1], script.METHOD)
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        curve = [
            {key: row[key] for key in ("iteration", "frames", "hours", "eval/greedy/avg_return")}
            for row in rows
            if "eval/greedy/avg_return" in row
        ]
        last = {key: value for key, value in rows[-1].items() if key.startswith(("eval/", "rollout/"))}
        minutes, frames = 60 * rows[-1]["hours"], rows[-1]["frames"]
        config = checkpoint["config"]
        expected = script.Config(**script.PRESETS["cpu"]).model_dump(mode="json")
        own = ("seed", "save_dir", "resume", "overwrite", "compilation_cache_dir", "wandb_project")
        commands.add(" ".join(f"{k}={v}" for k, v in config.items() if k not in own and v != expected[k]))
        runs.append(dict(seed=config["seed"], minutes=minutes, frames=frames, last=last, curve=curve))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()
    if commands != {""}:
        sys.exit(f"expected runs of preset=cpu, got other keys: {commands}")
    command = "python train_search_distill_binpack.py preset=cpu seed=SEED"
    return dict(
        command=command,
        commit=commit,
        device=device,
        versions=checkpoint["versions"],
        config=config,
        runs=runs,
    )


def table(results: dict, floors: dict) -> str:
    """The README's table: mean and standard error over seeds; the floors have theirs over instances."""
    runs = results["runs"]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    minutes = max(run["minutes"] for run in runs)
    title = f"`preset=cpu`, seeds {seeds}, {results['device']}, {minutes:.1f} minutes a run"
    lines = [f"| {title} | utilisation | filled completely |", "|---|---|---|"]
    for name, label in (("random", "random legal actions"), ("heuristic", "largest item into the smallest space")):
        one = floors["by_kind"][name]
        mean, error = 100 * one["utilisation"], 100 * one["utilisation_se"]
        lines.append(f"| {label} ({one['episodes']:,} other instances) | {mean:.2f} ± {error:.2g} % | |")
    simulations = results["config"]["eval_num_simulations"]
    for name, label in (("greedy", "network alone"), ("search", f"with {simulations}-simulation search on top")):
        mean, error = mean_and_error([100 * run["last"][f"eval/{name}/avg_return"] for run in runs])
        solved, solved_error = mean_and_error([100 * run["last"][f"eval/{name}/solved_rate"] for run in runs])
        lines.append(f"| {label} | {mean:.2f} ± {error:.2g} % | {solved:.1f} ± {solved_error:.2g} % |")
    first = lambda bar: max(_minutes_to(run, bar) for run in runs)
    passed = f"The network alone was past 88.5 % after {first(0.885):.1f} minutes and past 96 % after {first(0.96):.1f}"
    return "\n".join(
        [
            *lines,
            "",
            f"± is the standard error over seeds (instances, for the two rules). {passed} with every seed,",
            "compilation included. With search on top, the better of two episodes counts (network's, search's).",
        ]
    )


def _minutes_to(run: dict, bar: float) -> float:
    """Minutes until the first evaluation above a bar."""
    return next((60 * row["hours"] for row in run["curve"] if row["eval/greedy/avg_return"] > bar), math.inf)


def with_table(readme: str, results: dict, floors: dict) -> str:
    return re.sub(
        r"(<!-- results table: .*? -->\n).*?(<!-- end of results table -->)",
        lambda match: match.group(1) + table(results, floors) + "\n" + match.group(2),
        readme,
        flags=re.DOTALL,
    )


def main(argv: list[str]) -> None:
    if argv:
        folder, device = argv
        RESULTS.write_text(json.dumps(collect(Path(folder), device), indent=1) + "\n")
    readme = ROOT / "README.md"
    results, floors = (json.loads(path.read_text()) for path in (RESULTS, FLOORS))
    readme.write_text(with_table(readme.read_text(), results, floors))


if __name__ == "__main__":
    main(sys.argv[1:])
