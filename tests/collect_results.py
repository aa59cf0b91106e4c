r"""Collects finished runs of `preset=cpu` into `tests/results/cpu_preset.json` and makes the README's table and curves
from it and `tests/results/floors.json`, and its tables of speeds and of faults.

    python tests/collect_results.py "2 cores of an AMD EPYC" checkpoints/BinPack-v2/nsim_4 checkpoints/BinPack-v2/ppo

takes a description of the machine and a folder of each method that holds `seed_*`. What another machine found stays
beside it, and the tables are over the runs of all: where numbers are rounded otherwise, a seed is another run. The best
run of each method becomes `checkpoints/METHOD_cpu.pkl`.
Without arguments only the tables and the curves are made. The floors come from

    python evaluate.py policy=random,largest_first,lookahead json=tests/results/floors.json

the figures of the shipped checkpoints with search on top from

    python evaluate.py checkpoints/search_distill_cpu.pkl checkpoints/ppo_cpu.pkl policy=greedy,search \
        json=tests/results/checkpoints.json

and on instances that no choice was made on from

    python evaluate.py checkpoints/search_distill_cpu.pkl checkpoints/ppo_cpu.pkl seed=7 num_episodes=4096 \
        json=tests/results/fresh_instances.json

those of PPO with as many decisions as search distillation from three runs

    python train_ppo_binpack.py preset=cpu max_num_iters=309 learning_rate_decay_iters=309 seed=SEED save_dir=FOLDER
    python evaluate.py FOLDER/BinPack-v2/ppo/seed_* json=tests/results/ppo_equal_decisions.json

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
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

RESULTS = ROOT / "tests" / "results" / "cpu_preset.json"
FLOORS = ROOT / "tests" / "results" / "floors.json"
SHIPPED = ROOT / "tests" / "results" / "checkpoints.json"
FRESH = ROOT / "tests" / "results" / "fresh_instances.json"
EQUAL_DECISIONS = ROOT / "tests" / "results" / "ppo_equal_decisions.json"
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
PLAY = ".venv/bin/python evaluate.py checkpoints/search_distill_cpu.pkl checkpoints/ppo_cpu.pkl"
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
    """Puts the checkpoint of the folder's best run, without the optimizer's state, where users find it, unless another
    machine has a better one."""
    best = max(group["runs"], key=utilisation)
    if utilisation(best) < max(map(utilisation, of_method(results, group["method"]))):
        return
    contents = evaluate.search_distill.read_checkpoint(evaluate.load_checkpoint(folder / f"seed_{best['seed']}").path)
    name = f"{contents['method']}_cpu.pkl"
    evaluate.search_distill.write_checkpoint(CHECKPOINTS / name, contents | {"opt_state": []})


def at(run: dict, hours: float) -> float:
    """Utilisation of the network alone after so many hours, on the line between two evaluations."""
    if hours < run["curve"][0]["hours"]:
        raise ValueError(f"expected hours from the first evaluation on, {run['curve'][0]['hours']}, got {hours}")
    for before, after in zip(run["curve"], run["curve"][1:]):
        if before["hours"] <= hours <= after["hours"]:
            share = (hours - before["hours"]) / (after["hours"] - before["hours"])
            return before["utilisation"] + share * (after["utilisation"] - before["utilisation"])
    return run["curve"][-1]["utilisation"]


def table(results: dict, floors: dict, benchmark: dict, scores: dict, fresh: dict, equal_decisions: dict) -> str:
    """The README's table and what belongs to it."""
    devices = by_device(results)
    lines = [
        f"| `preset=cpu`, {' / '.join(devices)} | decisions | minutes | utilisation | filled completely |",
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
    return "\n".join(
        [
            *lines,
            "",
            *(f"- {text}" for text in notes(results, benchmark, equal_decisions)),
            "",
            f"`checkpoints/` has the best run of each, {shipped(results)}. {on_fresh_instances(fresh)}"
            f" {with_search(scores)} To play all of these again:",
            "",
            "```bash",
            f"{PLAY}    # the networks alone, half a minute",
            *(f"{PLAY} {words(played)}" for played in (scores, fresh)),
            "```",
        ]
    )


def words(scores: dict) -> str:
    """What the command of such figures says beside the checkpoints and the file."""
    _, _, text = scores["command"].partition("ppo_cpu.pkl ")
    return text.rpartition(" json=")[0]


def shipped(results: dict) -> str:
    """The seed and the figure of the network alone of each method's best run."""
    found = []
    for method in METHODS:
        runs = [(run, device) for device, of_device in by_device(results).items() for run in of_device.get(method, [])]
        run, device = max(runs, key=lambda found: utilisation(found[0]))
        found.append(
            f"`{method}_cpu.pkl` (seed {run['seed']}, network alone {100 * utilisation(run):.2f} %, on {device})"
        )
    return " and ".join(found)


def score(row: dict) -> str:
    """Mean and standard error over instances."""
    return f"{100 * row['avg_return']:.2f} ± {100 * row['avg_return_se']:.2f} %"


def paired(row: dict, other: dict) -> str:
    """Mean difference over instances and its 95 % interval, percentage points."""
    mean, low, high = (100 * x for x in evaluate.difference(np.array(row["returns"]), np.array(other["returns"])))
    return f"{mean:.2f} percentage points, 95 % interval [{low:.2f}, {high:.2f}]"


def with_search(scores: dict) -> str:
    """What both shipped networks reach with search on top."""
    first, second = (row for row in scores["rows"] if row["policy"] == "search")
    return (
        f"With the same {scores['num_simulations']}-simulation search on top both come close to the end of the scale,"
        f" {score(first)} and {score(second)} on the {scores['num_episodes']:,} instances of the table (difference"
        f" {paired(first, second)})."
    )


def on_fresh_instances(scores: dict) -> str:
    """What both shipped networks reach on instances that no choice was made on, and their paired difference."""
    first, second = scores["rows"]
    return (
        f"On {scores['num_episodes']:,} instances (`seed={scores['seed']}`) by which neither the recipe nor these runs"
        f" were chosen, the networks alone reach {score(first)} and {score(second)}. The difference of these two"
        f" networks is {paired(first, second)}; errors over instances say nothing about other seeds of training."
    )


def notes(results: dict, benchmark: dict, equal_decisions: dict) -> list[str]:
    """What the table's figures are, and what the curves say of time and decisions."""
    devices, search = by_device(results), of_method(results, "search_distill")
    seeds = ", ".join(str(run["seed"]) for run in results["groups"][0]["runs"])
    errors = [100 * run["last"]["eval/greedy/avg_return_se"] for group in results["groups"] for run in group["runs"]]
    played = benchmark["arms"][0]["decisions_per_second"] * statistics.median(benchmark["arms"][0]["seconds"])
    # Steps of a batch, less those that are played.
    tried = benchmark["phases"]["batched_steps"] - evaluate.search_distill.MAX_DECISIONS
    moves = tried * results["groups"][0]["config"]["rollout_batch_size"] / played
    minutes = 60 * max(run["curve"][0]["hours"] for run in search)
    least = 100 * min(run["curve"][0]["utilisation"] for run in search)
    commands = " and ".join(dict.fromkeys(f"`{group['command']}`" for group in results["groups"]))
    on_each = " on each machine (rounding differs between machines, so a seed is another run there)"
    texts = [
        f"The networks' figures and curves are those of {commands}, SEED = {seeds}{on_each * (len(devices) > 1)}."
        " ± is the standard error over these runs (for the rules: over instances). The error of a network's mean over"
        f" instances is {min(errors):.2f} to {max(errors):.2f} %.",
        f"Decisions are moves that were played; the search tries {moves:.0f} more for each, which the minutes count."
        " Minutes are those of collecting and learning; compilation is included (after the first seed much of it comes"
        " from the cache), evaluation is not. With search on top, the better of two episodes counts, the network's and"
        " the search's.",
        f"At its first evaluation, after {minutes:.1f} minutes at most, the network of search distillation packs at"
        f" least {least:.1f} % in every run.",
    ]
    limits, differences, means = [], [], []
    for of_device in devices.values():  # Hours are those of one machine.
        if all(method in of_device for method in METHODS):
            limit = min(run["curve"][-1]["hours"] for runs in of_device.values() for run in runs)
            values = {method: [100 * at(run, limit) for run in of_device[method]] for method in METHODS}
            limits.append(f"{60 * limit:.1f}")
            differences.append([a - b for a, b in zip(values["search_distill"], values["ppo"], strict=True)])
            means.append(values)
    if limits:
        figures = " and ".join(
            "{} {:.2f} ± {:.2f} %".format(METHODS[method], *mean_and_error([x for of in means for x in of[method]]))
            for method in METHODS
        )
        mean, error = mean_and_error([x for of_device in differences for x in of_device])
        each = " and ".join("{:.2f} ± {:.2f}".format(*mean_and_error(x)) for x in differences)
        each = f" ({each} on the machines by themselves)" if len(differences) > 1 else ""
        texts.append(
            f"At equal wall-clock, {' / '.join(limits)} minutes, the networks alone reach: {figures}. The difference of"
            f" runs with the same seed on the same machine is {mean:.2f} ± {error:.2f} percentage points{each}."
        )
    of_ppo, error = mean_and_error([100 * row["avg_return"] for row in equal_decisions["rows"]])
    trained = equal_decisions["rows"][0]["training"]["config"]
    keys = "max_num_iters", "learning_rate_decay_iters"
    changed = " ".join(f"{key}={trained[key]}" for key in keys)
    decisions = statistics.mean(row["training"]["frames"] for row in equal_decisions["rows"])
    texts.append(
        f"With {round(decisions, -3):,.0f} decisions, about as many as search distillation, and its learning rate"
        f" decaying over them, PPO's network alone reaches {of_ppo:.2f} ± {error:.2f} % (`python"
        f" train_ppo_binpack.py preset=cpu {changed} seed=SEED`)."
    )
    texts.append(
        "Collected by `tests/collect_results.py` into `tests/results/`: `cpu_preset.json`, `floors.json`,"
        " `ppo_equal_decisions.json`, and for the figures below `checkpoints.json` and `fresh_instances.json`. Each"
        " file says by which command, commit and versions it was made."
    )
    return texts


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
        "Of the arms, *Jumanji's EMS update* is its own loop over the empty maximal spaces; *800-wide search* keeps",
        "all 800 actions in the tree's nodes; *host-side shuffling* gathers the minibatches with numpy, which costs",
        "nothing where host and device share a memory; *every pass at full size*",
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
    made = (
        f"From `{benchmark['command']}` at commit {benchmark['commit'][:7]}, with the checkpoint of that commit. The"
        " time of a decision is the median ratio of iterations that ran side by side."
    )
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
    read = lambda path: json.loads(path.read_text())  # noqa: E731
    benchmark = read(BENCHMARK)
    return dict(
        results=table(read(RESULTS), read(FLOORS), benchmark, read(SHIPPED), read(FRESH), read(EQUAL_DECISIONS)),
        speed=speed(benchmark),
        reliability=reliability(read(RELIABILITY)),
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
    points = lambda run: np.array([[point[key] for key in CURVE] for point in run["curve"]])  # noqa: E731
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
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    draw(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
