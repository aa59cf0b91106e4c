r"""Makes the tables of the READMEs and the curves from the measured files, and adds runs of `preset=cpu` to these.

    python tests/collect_results.py                       # only the tables and the curves
    python tests/collect_results.py "2 cores of an AMD EPYC" checkpoints/BinPack-v2/nsim_4 checkpoints/BinPack-v2/ppo

The second form takes a description of the machine and a folder of each method that holds `seed_*`. It adds these
finished runs to `tests/results/cpu_preset.json` and keeps those of other machines. The tables are over the runs of all
machines: each rounds in its own way, so a seed gives another run there. The best run of each method becomes
`checkpoints/METHOD_cpu.pkl`.

`TABLES` says which table stands in which README. The floors come from

    python evaluate.py policy=random,largest_first,lookahead json=tests/results/floors.json

the figures of the shipped checkpoints with search on top from

    python evaluate.py checkpoints/search_distill_cpu.pkl checkpoints/ppo_cpu.pkl policy=greedy,search \
        json=tests/results/checkpoints.json

and on instances that no choice was made on from

    python evaluate.py checkpoints/search_distill_cpu.pkl checkpoints/ppo_cpu.pkl seed=7 num_episodes=4096 \
        json=tests/results/fresh_instances.json

the tables of speeds from tests/benchmarks/throughput.py and growth.py, that of larger instances from
tests/studies/exact_solver.py and sizes.py, those of operators and of planners from tests/studies/operators.py and
planners.py, that of faults from tests/measure_reliability.py, and that of situations from tests/measure_situations.py.
"""

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

TABLES = {
    "README.md": ("results", "operators", "sizes", "planners"),
    "tests/studies/operators.md": ("settings", "ablations", "workers"),
    "tests/studies/planners.md": ("hard", "blueprints"),
    "tests/results/README.md": ("runs", "comparison", "checkpoints", "reliability"),
    "tests/results/situations.md": ("situations",),
    "tests/benchmarks/README.md": ("speed", "growth"),
}
RESULTS = ROOT / "tests" / "results" / "cpu_preset.json"
FLOORS = ROOT / "tests" / "results" / "floors.json"
SHIPPED = ROOT / "tests" / "results" / "checkpoints.json"
FRESH = ROOT / "tests" / "results" / "fresh_instances.json"
BENCHMARK = ROOT / "tests" / "benchmarks" / "cpu.json"
GROWTH = ROOT / "tests" / "benchmarks" / "growth.json"
SIZES = ROOT / "tests" / "studies" / "sizes.json"
OPERATORS = ROOT / "tests" / "studies" / "operators.json"
EXACT = ROOT / "tests" / "studies" / "exact_solver.json"
PLANNERS = ROOT / "tests" / "studies" / "planners.json"
RELIABILITY = ROOT / "tests" / "results" / "reliability.json"
SITUATIONS = ROOT / "tests" / "results" / "situations.json"
CURVES = ROOT / "tests" / "results" / "curves.png"
CHECKPOINTS = ROOT / "checkpoints"
FLOOR_LABELS = {
    "random": "random legal actions",
    "largest_first": "largest item into the smallest space",
    "lookahead": "the best of that rule's 16 first choices, each completed by the rule",
}
SIZE_LABELS = {
    "largest_first": "largest item into the smallest space",
    "cp_sat": "OR-tools' CP-SAT",
    "ppo": "PPO",
    "search_distill": "search distillation",
}
TRAINED = {"20_50": ", trained at 20, then at 50", "50": ", trained at 50 from scratch"}
PLANNER_LABELS = {
    "largest_first": "the rule: largest item into the smallest space",
    "lookahead": "the rule with look-ahead",
    "greedy": "network alone",
    "best_of_n": "best of n samples",
    "search": "Gumbel MuZero search",
    "one_ply": "one-ply look-ahead",
    "beam": "beam search",
    "rl_search": "fine-tuning where it stands",
    "cp_sat": "OR-tools' CP-SAT, up to 10 s",
    "joining": "joining of boxes",
    "py3dbp": "py3dbp, which turns items",
}
BUDGET_KEYS = dict(
    num_simulations="simulations",
    num_updates="updates",
    num_rollouts="rollouts",
    beam_width="states",
    n="actions",
    tries="tries",
)
LIMITS = (0.03, 0.1, 0.3, 0.5, 1.0, 3.0, 10.0)  # Seconds of a planner for each instance that greedy play fails.
OWN_KEYS = ("seed", "save_dir", "resume", "overwrite", "compilation_cache_dir", "wandb_project")
CURVE = ("decisions", "hours", "utilisation", "filled")
PLAY = "python evaluate.py checkpoints/search_distill_cpu.pkl checkpoints/ppo_cpu.pkl"
METHODS = {"search_distill": "search distillation", "ppo": "PPO"}


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / max(len(values) - 1, 1)
    return mean, math.sqrt(variance / len(values))


def collect(folder: Path) -> dict:
    """The runs of one folder: command, commit, versions, and of each run its curve and last row."""
    runs = []
    for run_dir in sorted(folder.glob("seed_*")):
        checkpoint = evaluate.load_checkpoint(run_dir)
        script = checkpoint.script
        config = checkpoint.config.model_dump(mode="json")
        preset, _ = evaluate.parse_command_line(["preset=cpu"], script.Config, script.PRESETS)
        expected = preset.model_dump(mode="json")
        changed = [key for key, value in config.items() if key not in OWN_KEYS and value != expected[key]]
        if changed:
            sys.exit(f"{run_dir}: expected a run of preset=cpu, got one with other values of {', '.join(changed)}")
        log = evaluate.read_log(run_dir / "metrics.jsonl")
        row = log[-1]
        if row["iteration"] != config["max_num_iters"]:
            sys.exit(f"{run_dir}: expected a finished run, got one that stands at iteration {row['iteration']}")
        filled = [row["eval/greedy/solved_rate"] for row in log[1:] if "eval/greedy/solved_rate" in row]
        points = zip(evaluate.read_curve(run_dir).tolist(), filled, strict=True)
        curve = [dict(zip(CURVE, (*point, share))) for point, share in points]
        of_interest = ("iteration", "frames", "hours", "eval/", "rollout/")
        last = {key: value for key, value in row.items() if key.startswith(of_interest)}
        runs.append(dict(seed=config["seed"], last=last, curve=curve))
    if not runs:
        sys.exit(f"{folder}: expected a folder that holds seed_*, got none")
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    if not commit or commit.endswith("-dirty"):
        sys.exit(f"{folder}: expected runs inside the clean checkout that made them, got {commit or 'no commit'} there")
    versions = evaluate.read_checkpoint(checkpoint.path)["versions"]
    command = f"python {Path(script.__file__).name} preset=cpu seed=SEED"
    return dict(command=command, method=checkpoint.method, commit=commit, versions=versions, config=config, runs=runs)


def of_method(results: dict, method: str) -> list[dict]:
    """The runs of all machines."""
    return [run for group in results["groups"] if group["method"] == method for run in group["runs"]]


def utilisation(run: dict) -> float:
    """Of the network alone, at the end."""
    return run["last"]["eval/greedy/avg_return"]


def by_device(results: dict) -> dict[str, dict[str, list[dict]]]:
    """The runs of each machine and method, in the order of the tables."""
    found = {group["device"]: {} for group in results["groups"]}
    for group in results["groups"]:
        found[group["device"]][group["method"]] = group["runs"]
    return found


def ship(folder: Path, group: dict, results: dict) -> None:
    """Ships the folder's best run, unless another machine has a better one."""
    best = max(group["runs"], key=utilisation)
    if utilisation(best) < max(map(utilisation, of_method(results, group["method"]))):
        return
    ship_run(folder / f"seed_{best['seed']}", f"{group['method']}_cpu.pkl")


def ship_run(folder: Path, name: str) -> None:
    """Puts the newest checkpoint of a run, without the optimizer's state and its folder, where users find it."""
    contents = evaluate.read_checkpoint(evaluate.load_checkpoint(folder).path)
    config = contents["config"] | {"save_dir": "checkpoints"}
    evaluate.write_checkpoint(CHECKPOINTS / name, contents | {"opt_state": [], "config": config})


def at(run: dict, hours: float) -> float:
    """Utilisation of the network alone after so many hours, on the line between two evaluations."""
    if hours < run["curve"][0]["hours"]:
        raise ValueError(f"expected hours from the first evaluation on, {run['curve'][0]['hours']}, got {hours}")
    for before, after in zip(run["curve"], run["curve"][1:]):
        if before["hours"] <= hours <= after["hours"]:
            share = (hours - before["hours"]) / (after["hours"] - before["hours"])
            return before["utilisation"] + share * (after["utilisation"] - before["utilisation"])
    return run["curve"][-1]["utilisation"]


def where(results: dict) -> str:
    """Seeds and machines of the runs."""
    seeds = ", ".join(str(run["seed"]) for run in results["groups"][0]["runs"])
    return f"seeds {seeds} on {', and again on '.join(by_device(results))}"


def results_table(results: dict, floors: dict, benchmark: dict) -> str:
    """What the methods reach, and what its figures are."""
    devices = by_device(results)
    lines = [
        f"| two CPU cores, `preset=cpu` | decisions | minutes{' (slower / faster)' if len(devices) > 1 else ''}"
        " | utilisation | filled completely |",
        "|---|---|---|---|---|",
    ]
    for row in floors["rows"]:
        lines.append(f"| {FLOOR_LABELS[row['policy']]} | | | {score(row)} | {100 * row['solved_rate']:.1f} % |")
    configs = {group["method"]: group["config"] for group in results["groups"]}
    for method, config in configs.items():
        runs = of_method(results, method)
        decisions = statistics.mean(run["curve"][-1]["decisions"] for run in runs)
        minutes = [
            60 * statistics.mean(run["curve"][-1]["hours"] for run in of_device[method])
            for of_device in devices.values()
            if method in of_device
        ]
        cost = f"{round(decisions, -3):,.0f} | {' / '.join(f'{x:.1f}' for x in minutes)}"
        simulations = config.get("eval_num_simulations")
        for name, label in (("greedy", "network alone"), ("search", f"with {simulations}-simulation search on top")):
            if f"eval/{name}/avg_return" not in runs[0]["last"]:
                continue
            mean, error = mean_and_error([100 * run["last"][f"eval/{name}/avg_return"] for run in runs])
            solved, solved_error = mean_and_error([100 * run["last"][f"eval/{name}/solved_rate"] for run in runs])
            digits = 2 if error >= 0.005 else 3
            figures = f"{mean:.{digits}f} ± {error:.{digits}f} % | {solved:.1f} ± {solved_error:.1f} %"
            lines.append(f"| {METHODS[method]}, {label} | {cost} | {figures} |")
    tried = tried_moves(results, benchmark)
    of_each = " (one figure for each machine)" if len(devices) > 1 else ""
    notes = [
        f"± is the standard error. A network's is over its runs: {where(results)}. A rule's is over the instances.",
        f"A decision is one played move. The search tries {tried:.0f} more for each; the minutes{of_each} include them"
        " and compilation, but no evaluation.",
        "With search on top, the better of two episodes counts: the network's own and the search's.",
    ]
    return "\n".join([*lines, "", *(f"- {text}" for text in notes)])


def tried_moves(results: dict, benchmark: dict) -> float:
    """Moves that the search tries for each one that is played: steps of a batch, less those that are played."""
    played = benchmark["arms"][0]["decisions_per_second"] * statistics.median(benchmark["arms"][0]["seconds"])
    tried = benchmark["phases"]["batched_steps"] - evaluate.Sizes().max_decisions
    return tried * results["groups"][0]["config"]["rollout_batch_size"] / played


def runs_table(results: dict) -> str:
    """Where the figures of the networks come from."""
    runs = of_method(results, "search_distill")
    errors = [100 * run["last"]["eval/greedy/avg_return_se"] for group in results["groups"] for run in group["runs"]]
    minutes = math.ceil(600 * max(run["curve"][0]["hours"] for run in runs)) / 10
    least = math.floor(1000 * min(run["curve"][0]["utilisation"] for run in runs)) / 10
    commands = " and ".join(dict.fromkeys(f"`{group['command']}`" for group in results["groups"]))
    lines = [
        f"- Commands: {commands}, with {where(results)}. Machines round differently, so a seed gives another run"
        " on each.",
        "- ± is the standard error over all runs of a method, on all machines. The error of one network's mean over the"
        f" instances is {min(errors):.2f} to {max(errors):.2f} %.",
        "- Minutes are those of collecting and learning. They include compilation, which is short after the first seed:"
        " much of it then comes from the cache.",
        "- With search on top, the search plays the instances that the network alone does not fill. The better of the"
        " two episodes counts.",
        f"- The first evaluation comes after {minutes} minutes at most. By then the network of search distillation"
        f" packs at least {least} % in every run.",
    ]
    return "\n".join(lines)


def checkpoints_table(results: dict, scores: dict, fresh: dict) -> str:
    """Which runs are shipped, what they reach, and how to play them again."""
    lines = [
        "`checkpoints/` holds the best run of each method, without the optimizer's state:",
        "",
        *(f"- {text}" for text in shipped(results)),
        "- `search_distill_cpu_50.pkl`: the first of these, [trained on](../studies/sizes.md) at 50 items (seed 0)",
        "",
        on_fresh_instances(fresh),
        "",
        with_search(scores),
    ]
    lines += ["", "To play all of these again:", "", "```bash", f"{PLAY}    # the networks alone, half a minute"]
    return "\n".join([*lines, *(f"{PLAY} {words(played)}" for played in (scores, fresh)), "```"])


def words(scores: dict) -> str:
    """What the command of such figures says beside the checkpoints and the file."""
    _, _, text = scores["command"].partition("ppo_cpu.pkl ")
    return text.rpartition(" json=")[0]


def shipped(results: dict) -> list[str]:
    """The seed and the figure of the network alone of each method's best run."""
    found = []
    for method in METHODS:
        runs = [(run, device) for device, of_device in by_device(results).items() for run in of_device.get(method, [])]
        run, device = max(runs, key=lambda found: utilisation(found[0]))
        network = f"network alone {100 * utilisation(run):.2f} %"
        found.append(f"`{method}_cpu.pkl` (seed {run['seed']}, {network}, on {device})")
    return found


def score(row: dict) -> str:
    """Mean and standard error over instances."""
    return f"{100 * row['avg_return']:.2f} ± {100 * row['avg_return_se']:.2f} %"


def paired(row: dict, other: dict) -> str:
    """Mean difference over instances and its 95 % interval, percentage points."""
    mean, low, high = (100 * x for x in evaluate.difference(np.array(row["returns"]), np.array(other["returns"])))
    return f"{mean:.2f} percentage points (95 % interval [{low:.2f}, {high:.2f}])"


def with_search(scores: dict) -> str:
    """What both shipped networks reach with search on top."""
    first, second = (row for row in scores["rows"] if row["policy"] == "search")
    return (
        f"With the same {scores['num_simulations']}-simulation search on top, both come close to 100 %: {score(first)}"
        f" and {score(second)}, on the {scores['num_episodes']:,} instances of the first table. The difference is"
        f" {paired(first, second)}."
    )


def on_fresh_instances(scores: dict) -> str:
    """What both shipped networks reach on instances that no choice was made on, and their paired difference."""
    first, second = scores["rows"]
    return (
        "The best of several runs looks better than it is on the instances that chose it. On"
        f" {scores['num_episodes']:,} others (`seed={scores['seed']}`), by which neither the recipe nor these runs were"
        f" chosen, the networks alone reach {score(first)} and {score(second)}. The difference of these two networks is"
        f" {paired(first, second)}. This interval is over instances; it says nothing about other seeds of training."
    )


def comparison_table(results: dict) -> str:
    """Both methods at equal wall-clock on each machine that has both."""
    limits, differences, means = [], [], []
    for of_device in by_device(results).values():  # Hours are those of one machine.
        if all(method in of_device for method in METHODS):
            limit = min(run["curve"][-1]["hours"] for runs in of_device.values() for run in runs)
            values = {method: [100 * at(run, limit) for run in of_device[method]] for method in METHODS}
            limits.append(f"{60 * limit:.1f}")
            differences.append([a - b for a, b in zip(values["search_distill"], values["ppo"], strict=True)])
            means.append(values)
    figures = " and ".join(
        "{:.2f} ± {:.2f} % ({})".format(*mean_and_error([x for of in means for x in of[method]]), METHODS[method])
        for method in METHODS
    )
    mean, error = mean_and_error([x for of_device in differences for x in of_device])
    each = " and ".join("{:.2f} ± {:.2f}".format(*mean_and_error(x)) for x in differences)
    each = f" ({each} on the single machines)" if len(differences) > 1 else ""
    return (
        f"At equal wall-clock, {' / '.join(limits)} minutes, the networks alone reach {figures}. The difference of"
        f" runs with the same seed on the same machine is {mean:.2f} ± {error:.2f} percentage points{each}."
    )


def speed_table(benchmark: dict) -> str:
    """A run of tests/benchmarks/throughput.py, and what the phases say."""
    lines = [f"| {benchmark['device']} | decisions/s | time of a decision |", "|---|---|---|"]
    for row in benchmark["arms"]:
        lines.append(f"| {row['arm']} | {row['decisions_per_second']:,.0f} | {row['ratio']:.2f} |")
    phases, environment = benchmark["phases"], benchmark["environment"]
    whole = statistics.median(benchmark["arms"][0]["seconds"])
    share = lambda seconds: f"{100 * seconds / whole:.0f} %"
    unexplained = whole - phases["collect"] - phases["gradient_steps"]
    lines += [
        "",
        "- *Jumanji's EMS update* is its own loop over the empty maximal spaces.",
        "- *800-wide search* keeps all 800 actions in the nodes of the tree.",
        "- *host-side shuffling* gathers the minibatches with numpy. This costs nothing where host and device share a"
        " memory.",
        "- *every pass at full size* takes all 40 spaces and 20 items, however few are legal.",
        "- The time of a decision is the median ratio of iterations that ran side by side.",
        "",
        f"An iteration takes {whole:.1f} s. Timed by themselves, the search's network passes take"
        f" {share(phases['network'])} of it, environment steps {share(phases['environment'])}, the search's trees and"
        f" whatever else collecting does {share(phases['tree_and_rest'])}, and gradient steps"
        f" {share(phases['gradient_steps'])}. The other {share(unexplained)} are not explained by these parts.",
        "",
        f"- The network passes reach {100 * phases['share_of_floor']:.0f} % of the FLOP per second of large matrix"
        " products, one on each device.",
        f"- {100 * phases['padding_share']:.1f} % of the searched decisions are padding, after the end of an episode.",
        f"- A step of the environment takes {environment['microseconds']:.0f} µs a state at batch 1,024. Jumanji's own"
        f" takes {environment['jumanji_microseconds']:.0f} µs.",
        "",
        "| seconds that a new process takes | tracing | compiling | from the cache |",
        "|---|---|---|---|",
    ]
    for key, name in (("compilation", "`preset=cpu`"), ("compilation_of_the_full_run", "the full run")):
        cost = benchmark[key]
        times = f"{cost['cold_tracing']:.0f} | {cost['cold_compiling']:.0f} | {cost['warm_compiling']:.1f}"
        lines.append(f"| {name}, an iteration | {times} |")
    made = f"Measured at commit {benchmark['commit'][:7]}, with the checkpoint of that commit:"
    return "\n".join([*lines, "", made, "", "```bash", benchmark["command"], "```"])


def growth_table(found: dict) -> str:
    """A run of tests/benchmarks/growth.py with an earlier checkout beside it."""
    lines = [
        "| items | devices | simulations | episodes | decisions/s | before | times as fast | MB a device | before |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        now, before = row["now"], row["before"]
        speeds = now["decisions_per_second"], before["decisions_per_second"]
        cells = [row[key] for key in ("items", "devices", "num_simulations", "episodes")]
        cells += [*(f"{float(f'{x:.3g}'):,g}" for x in speeds), f"{speeds[0] / speeds[1]:.2f}"]
        cells += [f"{x['megabytes']:.0f}" for x in (now, before)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    power = found["powers"][0]
    commits = found["commits"]
    return "\n".join(
        [
            *lines,
            "",
            f"In the first of these settings the time of a decision grows with the number of items to the power"
            f" {power['now']:.2f} (before: {power['before']:.2f}).",
            "",
            f"Measured at commit {commits['now'][:7]}, and before at commit {commits['before'][:7]}, on"
            f" {found['cores']} CPU cores:",
            "",
            "```bash",
            found["command"],
            "```",
        ]
    )


def reliability_table(found: dict) -> str:
    """A run of tests/measure_reliability.py."""
    lines = ["| fault | injected | survived | lost |", "|---|---|---|---|"]
    for row in found["kinds"].values():
        lines.append(f"| {row['faults']} | {row['injected']:,} | {row['survived']:,} | {row['lost']:,} |")
    device = "; ".join(sorted({row["device"] for row in found["kinds"].values()}))
    minutes = [row["minutes"] for row in found["kinds"].values()]
    of_two = max(sum(minutes) / 2, *minutes)
    made = f"Device: {device}. Time: {of_two:.0f} minutes, with two kinds of fault at a time."
    return "\n".join([*lines, "", made])


def situations_table(found: dict) -> str:
    rows = found["rows"]
    failed = sum(row["failed_before"] for row in rows)
    lines = [
        f"Tried: {len(rows)} situations. {failed} of them failed at commit {found['commit'][:12]}; all work now.",
        "",
    ]
    lines += ["| kind | situation | outcome | before |", "|---|---|---|---|"]
    for row in rows:
        situation = row["situation"].replace("|", "\\|")
        lines.append(f"| {row['kind']} | {situation} | {row['outcome']} | {'failed' if row['failed_before'] else ''} |")
    return "\n".join(lines)


def exact_rows(exact: dict) -> list[dict]:
    """The exact solver's results, a row for each size and time limit, as those of tests/studies/sizes.py."""
    rows = []
    for items in sorted({row["items"] for row in exact["rows"]}):
        mine = [row for row in exact["rows"] if row["items"] == items]
        for i, limit in enumerate(exact["seconds"]):
            returns = [row["utilisation"][i] for row in mine]
            filled = statistics.mean(x > 1 - 1e-6 for x in returns)
            seconds = statistics.mean(min(row["last_at"], limit) if row["proven"] else limit for row in mine)
            found = dict(utilisation=statistics.mean(returns), filled=filled, seconds=seconds, returns=returns)
            rows.append(dict(name="cp_sat", items=items, limit=limit) | found)
    return rows


def means_over_seeds(rows: list[dict]) -> list[dict]:
    """One row for those that differ in the seed alone: means, of the utilisation instance by instance."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        key = tuple(row[key] for key in ("name", "trained", "num_simulations", "tries", "items"))
        groups.setdefault(key, []).append(row)
    mean = lambda mine, key: statistics.mean(row[key] for row in mine)
    of_seeds = lambda mine: [statistics.mean(returns) for returns in zip(*(row["returns"] for row in mine))]
    return [
        mine[0]
        | {key: mean(mine, key) for key in ("utilisation", "filled", "seconds")}
        | dict(returns=of_seeds(mine), seeds=len(mine))
        for mine in groups.values()
    ]


def sizes_table(sizes: dict, exact: dict) -> str:
    """A line a method: utilisation, share filled and time of an instance for each number of items."""

    def label(row: dict) -> str:
        number = row.get("num_simulations")
        kind = f", with {number}-simulation search on top" if number else ", network alone"
        kind = TRAINED.get(row.get("trained"), "") + kind
        kind += f", up to {row['tries']} times" if row.get("tries", 1) > 1 else ""
        limit = f", up to {row.get('limit')} s"
        return SIZE_LABELS[row["name"]] + (kind if row["name"] in METHODS else limit if "limit" in row else "")

    def cell(row: dict) -> str:
        mean, error = mean_and_error([100 * x for x in row["returns"]])
        return f"{mean:.1f} ± {error:.1f} %, {100 * row['filled']:.3g} %, {duration(row['seconds'])}"

    rows: dict[str, dict[int, dict]] = {}
    of_methods = means_over_seeds(sizes["rows"]) + exact_rows(exact)
    for row in sorted(of_methods, key=lambda row: ([*SIZE_LABELS].index(row["name"]), row.get("trained", ""))):
        rows.setdefault(label(row), {})[row["items"]] = row
    columns = sorted({row["items"] for row in sizes["rows"]})
    lines = [f"| utilisation, filled, time | {' | '.join(f'{n} items' for n in columns)} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, of_size in rows.items():
        cells = [cell(of_size[items]) if items in of_size else "not measured" for items in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1000 * seconds:.2g} ms"


def budget(row: dict) -> str:
    """The keys of a planner that make its budget."""
    names = BUDGET_KEYS | (dict(n="samples") if row["policy"] == "best_of_n" else {})
    words = {key: value for key, value in row["words"].items() if key != "tuned"}
    found = [f"{value} {names[key][: -1 if value == 1 else None]}" for key, value in words.items()]
    return ", ".join(found + ["the policy head alone"] * ("tuned" in row["words"]))


def of_policy(planners: dict, **names: Any) -> dict[str, list[dict]]:
    """The rows with these names by policy, each from the shortest to the longest time."""
    found: dict[str, list[dict]] = {}
    for row in sorted(planners["rows"], key=lambda row: row["seconds"]):
        if names.items() <= row.items():
            found.setdefault(row["policy"], []).append(row)
    return found


def planners_table(planners: dict) -> str:
    """A line a policy: at each budget the share of containers that it fills, and its time."""
    sizes = sorted({row["items"] for row in planners["rows"]})
    found = {items: of_policy(planners, items=items, of="all") for items in sizes}
    lines = [f"| filled, time of an instance | {' | '.join(f'{items} items' for items in sizes)} |"]
    lines.append("|---" * (len(sizes) + 1) + "|")
    for policy, name in PLANNER_LABELS.items():
        cells = []
        for items in sizes:
            rows = found[items].get(policy, [])
            figures = [f"{100 * statistics.mean(row['solved']):.1f} %, {duration(row['seconds'])}" for row in rows]
            named = [f"{budget(row)}: {text}" if row["words"] else text for row, text in zip(rows, figures)]
            cells.append("<br>".join(named) or "not measured")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- At {items} items {fastest_of_the_best(found[items])}" for items in sizes)])


def fastest_of_the_best(found: dict[str, list[dict]]) -> str:
    """Which planner fills the most containers, and its rate against the exact solver's."""
    (exact,) = found["cp_sat"]
    rows = [row for policy in ("search", "best_of_n", "one_ply", "beam", "rl_search") for row in found[policy]]
    best = min(rows, key=lambda row: (-sum(row["solved"]), row["seconds"]))
    words = " ".join([f"policy={best['policy']}", *(f"{key}={value}" for key, value in best["words"].items())])
    filled, of_exact = ("{:,} of {:,}".format(sum(row["solved"]), len(row["solved"])) for row in (best, exact))
    return (
        f"`{words}` is the fastest of the planners that fill the most, {filled}: {1 / best['seconds']:.3g} instances a"
        f" second, {exact['seconds'] / best['seconds']:.0f} times as many as CP-SAT, which fills {of_exact}."
    )


def hard_table(planners: dict) -> str:
    """Where greedy play fails: each planner at the largest budget that a time allows, and how many it fills more or
    less than the search. What a shorter time has already is left out."""
    heads = ("items", "time", "planner", "time of an instance", "filled", "difference", "from the search with")
    lines, seen = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"], []
    for items in sorted({row["items"] for row in planners["rows"]}):
        found = of_policy(planners, items=items, of="hard")
        for limit in LIMITS:
            fits = lambda row, limit=limit: row["seconds"] <= limit and "tuned" not in row["words"]
            longest = {policy: row for policy, rows in found.items() for row in rows if fits(row)}
            search = longest.get("search")
            for policy, row in longest.items():
                if (row, search) in seen:
                    continue
                seen.append((row, search))
                solved = 100 * np.array(row["solved"], float)
                cells = [f"{items}", f"up to {duration(limit)}", f"{PLANNER_LABELS[policy]}, {budget(row)}"]
                cells += [duration(row["seconds"]), f"{solved.mean():.1f} %", "", ""]
                if search not in (None, row):
                    mean, low, high = evaluate.difference(solved, 100 * np.array(search["solved"], float))
                    cells[-2] = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
                    cells[-1] = f"{budget(search)}, {duration(search['seconds'])}"
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def blueprints_table(planners: dict) -> str:
    """Networks that had a share of the training: alone, and with `rl_search` and the moves that it tries."""
    lines = ["| share of the training | plays | utilisation | filled | moves tried in all |", "|---" * 5 + "|"]
    for of in sorted({row["of"] for row in planners["rows"] if row["of"].startswith("blueprint")}):
        for rows in of_policy(planners, of=of).values():
            for row in rows:
                share = f"{100 * float(of.split()[1]):.0f} %"
                mean, error = (100 * x for x in mean_and_error(row["returns"]))
                name = ", ".join(filter(None, (PLANNER_LABELS[row["policy"]], budget(row))))
                figures = f"{mean:.2f} ± {error:.2f} % | {100 * statistics.mean(row['solved']):.1f} %"
                tried = f"{row['tried']:,}" if row["words"] else ""
                lines.append(f"| {share} | {name} | {figures} | {tried} |")
    return "\n".join(lines)


def rows_by_name(operators: dict) -> dict[str, list[dict]]:
    """The runs of each operator, then those of the ablations."""
    names = (*operators["seconds"], *operators["ablations"])
    return {name: [row for row in operators["rows"] if row["name"] == name] for name in names}


def lines_of_operators(operators: dict, names: Iterable[str]) -> str:
    """A line each: means over seeds with their standard errors."""
    heads = (f"{operators['minutes']:.0f} minutes of one core", "iterations", "network alone", "filled")
    lines = [f"| {' | '.join(heads)} | with 32-simulation search on top | filled |", "|---" * 6 + "|"]
    keys = dict(greedy_avg_return=2, greedy_solved_rate=1, search_avg_return=3, search_solved_rate=1)
    found = rows_by_name(operators)
    for name in names:
        cells = [name, f"{found[name][0]['iterations']}"]
        for key, digits in keys.items():
            mean, error = mean_and_error([100 * row[key] for row in found[name]])
            cells.append(f"{mean:.{digits}f} ± {error:.{digits}f} %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ablations_table(operators: dict) -> str:
    """Each below the operator that it changes."""
    names = dict.fromkeys(name for pair in operators["ablations"].items() for name in pair[::-1])
    return lines_of_operators(operators, names)


def settings_table(operators: dict) -> str:
    """What each run was, over `preset=cpu`."""
    lines = ["| | keys | seconds of an iteration | iterations | decisions | minutes of the runs |", "|---" * 6 + "|"]
    for name, mine in rows_by_name(operators).items():
        decisions, minutes = (statistics.mean(row[key] for row in mine) for key in ("decisions", "minutes"))
        keys = f"`{mine[0]['words']}`" if mine[0]["words"] else ""
        seconds = f"{operators['seconds'][name]:.2f}" if name in operators["seconds"] else ""
        lines.append(f"| {name} | {keys} | {seconds} | {mine[0]['iterations']} | {decisions:,.0f} | {minutes:.1f} |")
    return "\n".join(lines)


def workers_table(operators: dict) -> str:
    """What parallel workers are worth, by the value of their leaves."""
    heads = ("workers", "evaluations that a decision waits for", "decisions/s, completions", "decisions/s, value head")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    rows = {(row["workers"], row["leaf_value"]): row for row in operators["workers"]}
    for number in sorted({number for number, _ in rows}):
        found = [rows[number, leaf_value] for leaf_value in ("completion", "network")]
        speeds = [f"{row['decisions_per_second']:.1f}" for row in found]
        lines.append(f"| {' | '.join([str(number), str(found[0]['evaluations']), *speeds])} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """All tables by name, from the committed files."""
    read = lambda path: json.loads(path.read_text())
    results, benchmark = read(RESULTS), read(BENCHMARK)
    operators, planners = read(OPERATORS), read(PLANNERS)
    return dict(
        results=results_table(results, read(FLOORS), benchmark),
        runs=runs_table(results),
        comparison=comparison_table(results),
        checkpoints=checkpoints_table(results, read(SHIPPED), read(FRESH)),
        reliability=reliability_table(read(RELIABILITY)),
        situations=situations_table(read(SITUATIONS)),
        speed=speed_table(benchmark),
        growth=growth_table(read(GROWTH)),
        sizes=sizes_table(read(SIZES), read(EXACT)),
        operators=lines_of_operators(operators, operators["seconds"]),
        ablations=ablations_table(operators),
        settings=settings_table(operators),
        workers=workers_table(operators),
        planners=planners_table(planners),
        hard=hard_table(planners),
        blueprints=blueprints_table(planners),
    )


def with_tables(name: str) -> str:
    """The text of a README, with its tables as they should be."""
    readme, found = (ROOT / name).read_text(), tables()
    for table in TABLES[name]:
        readme, count = re.subn(
            rf"(<!-- {table} table: .*? -->\n).*?(<!-- end of {table} table -->)",
            lambda match, text=found[table]: match.group(1) + text + "\n" + match.group(2),
            readme,
            flags=re.DOTALL,
        )
        assert count == 1, f"{name}: expected one place for the {table} table, found {count}"
    return readme


def draw(results: dict) -> None:
    """The curves of all runs."""
    points = lambda run: np.array([[point[key] for key in CURVE[:3]] for point in run["curve"]])
    groups = {
        f"{METHODS[method]}, {device}": [points(run) for run in runs]
        for device, of_device in by_device(results).items()
        for method, runs in of_device.items()
    }
    evaluate.draw_curves(str(CURVES), groups)


def main(argv: list[str]) -> None:
    if argv:
        device, *folders = argv
        groups = [dict(device=device, **collect(Path(folder))) for folder in folders]
        methods = [group["method"] for group in groups]
        if len(set(methods)) < len(methods):
            sys.exit(f"expected one folder of each method, got those of {', '.join(methods)}")
        old = json.loads(RESULTS.read_text())["groups"]
        old = [group for group in old if group["device"] != device or group["method"] not in methods]
        results = dict(groups=sorted(old + groups, key=lambda group: [*METHODS].index(group["method"])))
        for folder, group in zip(folders, groups):
            ship(Path(folder), group, results)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for name in TABLES:
        (ROOT / name).write_text(with_tables(name))
    draw(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
