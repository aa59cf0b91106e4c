"""Collects finished runs of `preset=cpu` into `tests/results/cpu_preset.json` and writes the README's table from it
and from `tests/results/floors.json`.

    python tests/collect_results.py "2 cores of an AMD EPYC" checkpoints/BinPack-v2/nsim_4 checkpoints/BinPack-v2/ppo

takes a description of the machine and folders that hold `seed_*`; the runs of one folder differ in their seed only.
Without arguments only the table is made. The floors come from

    python evaluate.py policy=random,largest_first,lookahead json=tests/results/floors.json
"""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results" / "cpu_preset.json"
FLOORS = ROOT / "tests" / "results" / "floors.json"
FLOOR_LABELS = {
    "random": "random legal actions",
    "largest_first": "largest item into the smallest space",
    "lookahead": "one-ply look-ahead with that rule, 16 actions",
}
OWN_KEYS = ("seed", "save_dir", "resume", "overwrite", "compilation_cache_dir", "wandb_project")
GREEDY = "eval/greedy/avg_return"


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def collect(folder: Path) -> dict:
    """The runs of one folder: command, commit, versions, and of each run its curve and last row."""
    sys.path.insert(0, str(ROOT))
    import evaluate

    runs, commands = [], set()
    for run_dir in sorted(folder.glob("seed_*")):
        checkpoint = evaluate.load_checkpoint(run_dir)
        script = evaluate.METHODS[checkpoint.method]
        config = checkpoint.config.model_dump(mode="json")
        expected = script.Config(**script.PRESETS["cpu"]).model_dump(mode="json")
        changed = {key: value for key, value in config.items() if key not in OWN_KEYS and value != expected[key]}
        words = "".join(f" {key}={script._as_typed(value)}" for key, value in changed.items())
        commands.add(f"python {Path(script.__file__).name} preset=cpu{words} seed=SEED")
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        if rows[-1]["iteration"] != config["max_num_iters"]:
            sys.exit(f"{run_dir}: expected a finished run, got one that stands at iteration {rows[-1]['iteration']}")
        curve = [{key: row[key] for key in ("iteration", "frames", "hours", GREEDY)} for row in rows if GREEDY in row]
        last = {key: value for key, value in rows[-1].items() if key.startswith(("eval/", "rollout/"))}
        one = dict(seed=config["seed"], minutes=60 * rows[-1]["hours"], frames=rows[-1]["frames"])
        runs.append(one | dict(last=last, curve=curve))
    if len(commands) != 1:
        sys.exit(f"{folder}: expected seed_* that differ in their seed only, got {sorted(commands) or 'none'}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()
    versions = evaluate.search_distill.read_checkpoint(checkpoint.path)["versions"]
    return dict(
        command=commands.pop(), method=checkpoint.method, commit=commit, versions=versions, config=config, runs=runs
    )


def at(run: dict, key: str, value: float) -> float:
    """Greedy utilisation of a run when `key` (frames or hours) has a value, on the line between two evaluations."""
    curve = run["curve"]
    for before, after in zip(curve, curve[1:]):
        if before[key] <= value <= after[key]:
            share = (value - before[key]) / (after[key] - before[key])
            return before[GREEDY] + share * (after[GREEDY] - before[GREEDY])
    return curve[-1][GREEDY]


def table(results: dict, floors: dict) -> str:
    """The README's table: mean and standard error over seeds; the floors have theirs over instances."""
    lines = [
        f"| `preset=cpu`, {results['device']} | decisions | minutes | utilisation | filled completely |",
        "|---|---|---|---|---|",
    ]
    for row in floors["rows"]:
        mean, error = 100 * row["avg_return"], 100 * row["avg_return_se"]
        lines.append(
            f"| {FLOOR_LABELS[row['policy']]} | | | {mean:.2f} ± {error:.2g} % | {100 * row['solved_rate']:.1f} % |"
        )
    for group in results["groups"]:
        runs, config = group["runs"], group["config"]
        frames, minutes = (sum(run[key] for run in runs) / len(runs) for key in ("frames", "minutes"))
        method = {"ppo": "PPO", "search_distill": "search distillation"}[group["method"]]
        cost = f"{round(frames, -3):,.0f} | {minutes:.1f}"
        simulations = config.get("eval_num_simulations")
        for name, label in (("greedy", "network alone"), ("search", f"with {simulations}-simulation search on top")):
            if f"eval/{name}/avg_return" not in runs[0]["last"]:
                continue
            mean, error = mean_and_error([100 * run["last"][f"eval/{name}/avg_return"] for run in runs])
            solved, solved_error = mean_and_error([100 * run["last"][f"eval/{name}/solved_rate"] for run in runs])
            figures = f"{mean:.2f} ± {error:.2g} % | {solved:.1f} ± {solved_error:.2g} %"
            lines.append(f"| {method}, {label} | {cost} | {figures} |")
    seeds = ", ".join(str(run["seed"]) for run in results["groups"][0]["runs"])
    return "\n".join(
        [
            *lines,
            "",
            f"± is the standard error over seeds {seeds} (for the rules: over instances). {sentences(results)}",
        ]
    )


def sentences(results: dict) -> str:
    """What the curves say of time: in words, below the table."""
    groups = {group["method"]: group["runs"] for group in results["groups"]}
    search, ppo = groups["search_distill"], groups["ppo"]
    first = lambda bar: max(_minutes_to(run, bar) for run in search)
    hours = min(run["curve"][-1]["hours"] for run in search + ppo)
    parts = []
    for label, runs in (("search distillation", search), ("PPO", ppo)):
        mean, error = mean_and_error([100 * at(run, "hours", hours) for run in runs])
        parts.append(f"{label} {mean:.2f} ± {error:.2g} %")
    return (
        f"The network of search distillation was past 88.5 % after {first(0.885):.1f} minutes and past 96 % after"
        f" {first(0.96):.1f} with every seed, compilation included. After the same {60 * hours:.1f} minutes the"
        f" networks alone stand at: {', '.join(parts)}. With search on top, the better of two episodes counts (the"
        " network's and the search's)."
    )


def _minutes_to(run: dict, bar: float) -> float:
    """Minutes until the first evaluation above a bar."""
    return next((60 * row["hours"] for row in run["curve"] if row[GREEDY] > bar), math.inf)


def with_table(readme: str, results: dict, floors: dict) -> str:
    return re.sub(
        r"(<!-- results table: .*? -->\n).*?(<!-- end of results table -->)",
        lambda match: match.group(1) + table(results, floors) + "\n" + match.group(2),
        readme,
        flags=re.DOTALL,
    )


def main(argv: list[str]) -> None:
    if argv:
        device, *folders = argv
        groups = [collect(Path(folder)) for folder in folders]
        RESULTS.write_text(json.dumps(dict(device=device, groups=groups), indent=1) + "\n")
    readme = ROOT / "README.md"
    results, floors = (json.loads(path.read_text()) for path in (RESULTS, FLOORS))
    readme.write_text(with_table(readme.read_text(), results, floors))


if __name__ == "__main__":
    main(sys.argv[1:])
