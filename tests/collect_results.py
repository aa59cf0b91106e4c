r"""Collects finished runs of `preset=cpu` into `tests/results/cpu_preset.json` and makes the README's table and curves
from it and `tests/results/floors.json`, and its tables of speeds and of faults.

    python tests/collect_results.py "2 cores of an AMD EPYC" checkpoints/BinPack-v2/nsim_4 checkpoints/BinPack-v2/ppo

takes a description of the machine and a folder of each method that holds `seed_*`. The best run of each becomes
`checkpoints/METHOD_cpu.pkl`. A method that no folder has stays as it is; hours are compared where both methods had the
same machine.
Without arguments only the tables and the curves are made. The floors come from

    python evaluate.py policy=random,largest_first,lookahead json=tests/results/floors.json

the figures of the shipped checkpoints with search on top from

    python evaluate.py checkpoints/search_distill_cpu.pkl checkpoints/ppo_cpu.pkl policy=greedy,search \
        json=tests/results/checkpoints.json

the table of speeds from tests/benchmarks/throughput.py, that of faults from tests/measure_reliability.py.
"""

import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "results" / "cpu_preset.json"
FLOORS = ROOT / "tests" / "results" / "floors.json"
SHIPPED = ROOT / "tests" / "results" / "checkpoints.json"
BENCHMARK = ROOT / "tests" / "benchmarks" / "cpu.json"
RELIABILITY = ROOT / "tests" / "results" / "reliability.json"
CURVES = ROOT / "tests" / "results" / "curves.png"
CHECKPOINTS = ROOT / "checkpoints"
FLOOR_LABELS = {
    "random": "random legal actions",
    "largest_first": "largest item into the smallest space",
    "lookahead": "one-ply look-ahead with that rule, 16 actions",
}
OWN_KEYS = ("seed", "save_dir", "resume", "overwrite", "compilation_cache_dir", "wandb_project")
CURVE = ("decisions", "hours", "utilisation")
METHODS = {"search_distill": "search distillation", "ppo": "PPO"}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def collect(folder: Path) -> dict:
    """The runs of one folder: command, commit, versions, and of each run its curve and last row."""
    sys.path.insert(0, str(ROOT))
    import evaluate

    runs = []
    for run_dir in sorted(folder.glob("seed_*")):
        checkpoint = evaluate.load_checkpoint(run_dir)
        script = evaluate.METHODS[checkpoint.method]
        config = checkpoint.config.model_dump(mode="json")
        expected = script.Config(**script.PRESETS["cpu"]).model_dump(mode="json")
        changed = [key for key, value in config.items() if key not in OWN_KEYS and value != expected[key]]
        if changed:
            sys.exit(f"{run_dir}: expected a run of preset=cpu, got one with other values of {', '.join(changed)}")
        row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
        if row["iteration"] != config["max_num_iters"]:
            sys.exit(f"{run_dir}: expected a finished run, got one that stands at iteration {row['iteration']}")
        curve = [dict(zip(CURVE, point)) for point in evaluate.read_curve(run_dir).tolist()]
        last = {key: value for key, value in row.items() if key.startswith(("eval/", "rollout/"))}
        runs.append(dict(seed=config["seed"], last=last, curve=curve))
    if not runs:
        sys.exit(f"{folder}: expected a folder that holds seed_*, got none")
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    if not commit or commit.endswith("-dirty"):
        sys.exit(f"{folder}: expected runs inside the clean checkout that made them, got {commit or 'no commit'} there")
    versions = evaluate.search_distill.read_checkpoint(checkpoint.path)["versions"]
    command = f"python {Path(script.__file__).name} preset=cpu seed=SEED"
    return dict(command=command, method=checkpoint.method, commit=commit, versions=versions, config=config, runs=runs)


def ship(folder: Path) -> None:
    """Puts the checkpoint of the folder's best run, without the optimizer's state, where users find it."""
    import evaluate

    def last(run_dir: Path) -> dict:
        return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])

    best = max(folder.glob("seed_*"), key=lambda run_dir: last(run_dir)["eval/greedy/avg_return"])
    contents = evaluate.search_distill.read_checkpoint(evaluate.load_checkpoint(best).path)
    name = f"{contents['method']}_cpu.pkl"
    evaluate.search_distill.write_checkpoint(CHECKPOINTS / name, contents | {"opt_state": []})


def at(run: dict, key: str, value: float) -> float:
    """Utilisation of the network alone when decisions or hours have a value, on the line between two evaluations."""
    if value < run["curve"][0][key]:
        raise ValueError(f"expected {key} from the first evaluation on, {run['curve'][0][key]}, got {value}")
    for before, after in zip(run["curve"], run["curve"][1:]):
        if before[key] <= value <= after[key]:
            share = (value - before[key]) / (after[key] - before[key])
            return before["utilisation"] + share * (after["utilisation"] - before["utilisation"])
    return run["curve"][-1]["utilisation"]


def table(results: dict, floors: dict, benchmark: dict, scores: dict) -> str:
    """The README's table: mean and standard error over seeds; the floors have theirs over instances."""
    devices = dict.fromkeys(group["device"] for group in results["groups"])
    machine = f", {next(iter(devices))}" if len(devices) == 1 else ""  # Of several, each row names its own.
    lines = [
        f"| `preset=cpu`{machine} | decisions | minutes | utilisation | filled completely |",
        "|---|---|---|---|---|",
    ]
    for row in floors["rows"]:
        mean, error = 100 * row["avg_return"], 100 * row["avg_return_se"]
        lines.append(
            f"| {FLOOR_LABELS[row['policy']]} | | | {mean:.2f} ± {error:.2f} % | {100 * row['solved_rate']:.1f} % |"
        )
    for group in results["groups"]:
        runs, config = group["runs"], group["config"]
        decisions, hours = (sum(run["curve"][-1][key] for run in runs) / len(runs) for key in ("decisions", "hours"))
        method = METHODS[group["method"]] + ("" if machine else f" ({group['device']})")
        cost = f"{round(decisions, -3):,.0f} | {60 * hours:.1f}"
        simulations = config.get("eval_num_simulations")
        for name, label in (("greedy", "network alone"), ("search", f"with {simulations}-simulation search on top")):
            if f"eval/{name}/avg_return" not in runs[0]["last"]:
                continue
            mean, error = mean_and_error([100 * run["last"][f"eval/{name}/avg_return"] for run in runs])
            solved, solved_error = mean_and_error([100 * run["last"][f"eval/{name}/solved_rate"] for run in runs])
            figures = f"{mean:.2f} ± {error:.2f} % | {solved:.1f} ± {solved_error:.1f} %"
            lines.append(f"| {method}, {label} | {cost} | {figures} |")
    errors = [100 * run["last"]["eval/greedy/avg_return_se"] for group in results["groups"] for run in group["runs"]]
    least, most = min(errors), max(errors)
    commands = " and ".join(f"`{group['command']}`" for group in results["groups"])
    seeds = ", ".join(str(run["seed"]) for run in results["groups"][0]["runs"])
    return "\n".join(
        [
            *lines,
            "",
            f"± is the standard error over seeds {seeds} (for the rules: over instances). The error of a network's mean"
            f" over instances is {least:.2f} to {most:.2f} %. {sentences(results, benchmark)}",
            "",
            f"These are figures of `tests/results/cpu_preset.json`, which has commands, commits, versions and curves:"
            f" {commands}, collected by `tests/collect_results.py`.",
            "",
            f"`checkpoints/` has the best run of each, {shipped(results)}. {with_search(scores)}",
        ]
    )


def shipped(results: dict) -> str:
    """The seed and the figure of the network alone of each method's best run."""
    groups = {group["method"]: group["runs"] for group in results["groups"]}
    found = []
    for method in METHODS:
        run = max(groups[method], key=lambda run: run["last"]["eval/greedy/avg_return"])
        figure = 100 * run["last"]["eval/greedy/avg_return"]
        found.append(f"`{method}_cpu.pkl` (seed {run['seed']}, network alone {figure:.2f} %)")
    return " and ".join(found)


def with_search(scores: dict) -> str:
    """What both shipped networks reach with search on top."""
    found = [
        f"{100 * row['avg_return']:.2f} ± {100 * row['avg_return_se']:.2f} % with {row['checkpoint']}"
        for row in scores["rows"]
        if row["policy"] == "search"
    ]
    return (
        f"With the same {scores['num_simulations']}-simulation search on top they reach {' and '.join(found)} (± over"
        " instances): exact completions make up for the weaker network, and what distillation buys shows where the"
        " network plays alone."
    )


def sentences(results: dict, benchmark: dict) -> str:
    """What the curves say of time and decisions, below the table."""
    groups = {group["method"]: group["runs"] for group in results["groups"]}
    devices = {group["method"]: group["device"] for group in results["groups"]}
    search, ppo = groups["search_distill"], groups["ppo"]
    played = benchmark["arms"][0]["decisions_per_second"] * statistics.median(benchmark["arms"][0]["seconds"])
    moves = benchmark["phases"]["batched_steps"] * results["groups"][0]["config"]["rollout_batch_size"] / played

    def at_equal(key: str) -> str:
        value = min(run["curve"][-1][key] for run in search + ppo)
        means = (mean_and_error([100 * at(run, key, value) for run in runs]) for runs in (search, ppo))
        name = f"wall-clock, {60 * value:.1f} minutes" if key == "hours" else f"decisions, {round(value, -3):,.0f}"
        figures = "search distillation {:.2f} ± {:.2f} %, PPO {:.2f} ± {:.2f} %".format(*(x for m in means for x in m))
        return f"at equal {name}: {figures}"

    minutes = 60 * max(run["curve"][0]["hours"] for run in search)
    least = 100 * min(run["curve"][0]["utilisation"] for run in search)
    text = (
        f"Decisions are moves that were played; the search tries {moves:.0f} more for each, which the minutes count."
        " Minutes are those of collecting and learning; compilation is included (after the first seed much of it comes"
        f" from the cache), evaluation is not. At its first evaluation, after {minutes:.1f} minutes, the network of"
        f" search distillation packs at least {least:.1f} % with every seed. The networks alone"
    )
    if devices["search_distill"] == devices["ppo"]:
        text += f" {at_equal('hours')};"
    return (
        f"{text} {at_equal('decisions')} (the longer run's learning rate has not decayed by then). With search on top,"
        " the better of two episodes counts (the network's and the search's)."
    )


def speed(benchmark: dict) -> str:
    """The README's table of a run of tests/benchmarks/throughput.py, and what the phases say."""
    lines = [f"| {benchmark['device']} | decisions/s | time of a decision |", "|---|---|---|"]
    for row in benchmark["arms"]:
        lines.append(f"| {row['arm']} | {row['decisions_per_second']:,.0f} | {row['ratio']:.2f} |")
    phases, environment = benchmark["phases"], benchmark["environment"]
    whole = statistics.median(benchmark["arms"][0]["seconds"])
    share = lambda seconds: f"{100 * seconds / whole:.0f} %"  # noqa: E731
    unexplained = whole - phases["collect"] - phases["gradient_steps"]
    sentences = [
        "Of the arms, *800-wide search* keeps all 800 actions in the tree's nodes; *host-side shuffling* gathers the",
        "minibatches with numpy, which costs nothing where host and device share a memory; *every pass at full size*",
        f"takes all 40 spaces and 20 items, whatever is legal. An iteration takes {whole:.1f} s. Timed by themselves,",
        f"the search's network passes are {share(phases['network'])} of it, environment steps",
        f"{share(phases['environment'])}, gradient steps {share(phases['gradient_steps'])}, the search's trees and",
        f"whatever else collecting does {share(phases['tree_and_rest'])}; the other {share(unexplained)} appear only",
        f"when all run together. A pass reaches {100 * phases['share_of_floor']:.0f} % of the FLOP per second of large",
        f"matrix products, one on each device; {100 * phases['padding_share']:.1f} % of the searched decisions are",
        f"padding. A step of the environment takes {environment['microseconds']:.0f} µs a state at batch 1,024,",
        f"Jumanji's own {environment['jumanji_microseconds']:.0f} µs.",
    ]
    table = ["| seconds that a new process takes | tracing | compiling | from the cache |", "|---|---|---|---|"]
    for key, name in (("compilation", "`preset=cpu`"), ("compilation_of_the_full_run", "the full run")):
        cost = benchmark[key]
        times = f"{cost['cold_tracing']:.0f} | {cost['cold_compiling']:.0f} | {cost['warm_compiling']:.1f}"
        table.append(f"| {name}, an iteration | {times} |")
    made = f"From `{benchmark['command']}`."
    return "\n".join([*lines, "", " ".join(sentences), "", *table, "", made])


def reliability(found: dict) -> str:
    """The README's table of a run of tests/measure_reliability.py."""
    lines = ["| fault | injected | survived | lost |", "|---|---|---|---|"]
    for row in found["kinds"].values():
        lines.append(f"| {row['faults']} | {row['injected']:,} | {row['survived']:,} | {row['lost']:,} |")
    device = ", ".join(sorted({row["device"] for row in found["kinds"].values()}))
    minutes = [row["minutes"] for row in found["kinds"].values()]
    of_two = max(sum(minutes) / 2, *minutes)
    return "\n".join([*lines, "", f"{device}; {of_two:.0f} minutes with two kinds at a time."])


def tables() -> dict[str, str]:
    """The README's tables by name, from the committed files."""
    files = (RESULTS, FLOORS, BENCHMARK, SHIPPED, RELIABILITY)
    results, floors, benchmark, scores, faults = (json.loads(path.read_text()) for path in files)
    return dict(
        results=table(results, floors, benchmark, scores), speed=speed(benchmark), reliability=reliability(faults)
    )


def with_tables(readme: str) -> str:
    for name, text in tables().items():
        readme, count = re.subn(
            rf"(<!-- {name} table: .*? -->\n).*?(<!-- end of {name} table -->)",
            lambda match, text=text: match.group(1) + text + "\n" + match.group(2),
            readme,
            flags=re.DOTALL,
        )
        assert count == 1, f"README.md: expected one place for the {name} table, found {count}"
    return readme


def draw(results: dict) -> None:
    """The README's curves."""
    sys.path.insert(0, str(ROOT))
    import evaluate

    several = len({group["device"] for group in results["groups"]}) > 1
    evaluate.draw_curves(
        str(CURVES),
        {
            METHODS[group["method"]] + (f", {group['device']}" if several else ""): [
                np.array([[point[key] for key in CURVE] for point in run["curve"]]) for run in group["runs"]
            ]
            for group in results["groups"]
        },
    )


def main(argv: list[str]) -> None:
    if argv:
        device, *folders = argv
        groups = [dict(device=device, **collect(Path(folder))) for folder in folders]
        methods = [group["method"] for group in groups]
        if len(set(methods)) < len(methods):
            sys.exit(f"expected one folder of each method, got those of {', '.join(methods)}")
        for folder in folders:
            ship(Path(folder))
        groups += [group for group in json.loads(RESULTS.read_text())["groups"] if group["method"] not in methods]
        groups.sort(key=lambda group: [*METHODS].index(group["method"]))
        RESULTS.write_text(json.dumps(dict(groups=groups), indent=1) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    draw(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
