"""Every improvement operator and loss at equal wall-clock: what the network learns, and what a search adds to it.

    python tests/studies/operators.py          # about four hours on 2 cores; goes on where it was stopped
    python tests/studies/operators.py draw     # only makes the picture, from the results that there are

Each run is `preset=cpu` with the arm's words, on one core, for as many iterations as `MINUTES` allow; the learning rate
decays over them. What an iteration takes is measured first, for all arms one after another, each on a core of its own
and with nothing else on the machine: the mean over the second half of `TIMED` iterations, so without compilation. The
runs themselves may share it; what they took is in the results, too: `tests/studies/operators.json`, of which
`tests/collect_results.py` makes the tables.
"""

import json
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import study  # noqa: I001  It puts the root on the path.

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as search_distill

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "operators.json", HERE / "operators.png"
RUNS = study.ROOT / "checkpoints" / "operators"
MINUTES = 5.0  # of one core, about what the preset needs until it learns little more
TIMED = 24
SEEDS = (0, 1, 2)


class Arm(NamedTuple):
    name: str
    words: str = ""
    script: str = search_distill.__file__


ALPHAZERO, TREEPI = "improvement=alphazero", "improvement=treepi min_target_kl=0 max_policy_kl=0.005"
ARMS = (
    Arm("Gumbel MuZero, 4 simulations"),
    Arm("AlphaZero, 4 simulations", f"{ALPHAZERO} num_simulations=4"),
    Arm("AlphaZero, 4 simulations, 4 workers", f"{ALPHAZERO} num_simulations=4 num_workers=4 c_puct=0.5"),
    Arm("AlphaZero, 16 simulations", f"{ALPHAZERO} num_simulations=16"),
    Arm("AlphaZero, 16 simulations, 4 workers", f"{ALPHAZERO} num_simulations=16 num_workers=4 c_puct=0.5"),
    Arm("TreePI, K=1 (MPO)", f"{TREEPI} search_depth=1"),
    Arm("TreePI, K=3", f"{TREEPI} search_depth=3"),
    Arm("best of 8", "improvement=best_of_n num_simulations=8"),
    Arm("best of 64", "improvement=best_of_n num_simulations=64"),
    Arm("Gumbel MuZero, CISPO", "loss=cispo min_target_kl=0"),
    Arm("Gumbel MuZero, searched values", "value_target=search"),
    Arm("PPO", "", ppo.__file__),
    Arm("PPO, CISPO", "loss=cispo", ppo.__file__),
)
ABLATIONS = {  # For as many iterations as the arm that each changes.
    Arm("Gumbel MuZero, 4 simulations, all decisions", "min_target_kl=0"): "Gumbel MuZero, 4 simulations",
    Arm(
        "AlphaZero, 16 simulations, no noise", f"{ALPHAZERO} num_simulations=16 dirichlet_fraction=0"
    ): "AlphaZero, 16 simulations",
}
SHIPPED = study.ROOT / "checkpoints" / "search_distill_cpu.pkl"
WORKERS = tuple((number, leaf_value) for number in (1, 4, 8) for leaf_value in ("completion", "network"))


def train(arm: Arm, seed: int, iterations: int, core: int, name: str) -> tuple[Path, list[dict]]:
    """The folder and the log of a run, or of an earlier one that came to its end."""
    folder = RUNS / re.sub(r"\W+", "_", f"{arm.name} {arm.words} {name}")
    find = lambda: [*folder.glob(f"BinPack-v2/*/seed_{seed}/metrics.jsonl")]
    if not find() or evaluate.read_log(find()[0])[-1]["iteration"] != iterations:
        every = iterations if name == "timed" else max(iterations // 10, 1)
        words = dict(max_num_iters=iterations, learning_rate_decay_iters=iterations, eval_interval=every, seed=seed)
        words |= dict(save_interval=iterations, save_dir=folder, overwrite="true", preset="cpu")
        if arm.script == search_distill.__file__:
            words["eval_num_simulations"] = 0
        words |= dict(word.split("=") for word in arm.words.split())
        study.run_command(arm.script, words, folder / f"seed_{seed}.log", core)
    return find()[0].parent, evaluate.read_log(find()[0])


def measure_time(arm: Arm, core: int) -> dict:
    """What an iteration takes. It gets shorter while the network learns, most of all in the first ones."""
    _, rows = train(arm, 0, TIMED, core, "timed")
    return {arm.name: statistics.mean(row["perf/iteration_seconds"] for row in rows[-TIMED // 2 :])}


def measure_workers(number: int, leaf_value: str, core: int) -> dict:
    """Decisions per second of AlphaZero's search with 32 simulations by so many workers, learning included, and how
    often a decision waits for an evaluation of leaves."""
    words = f"{ALPHAZERO} num_simulations=32 num_workers={number} leaf_value={leaf_value} init_from={SHIPPED}"
    _, rows = train(Arm("workers", words), 0, 6, core, "timed")
    speed = statistics.mean(row["perf/decisions_per_second"] for row in rows[3:])
    return dict(workers=number, leaf_value=leaf_value, evaluations=32 // number, decisions_per_second=speed)


def measure(arm: Arm, seed: int, seconds: float, core: int) -> dict:
    """One run, and the search with 32 simulations on top of its network, on the evaluation's 1,024 instances."""
    folder, rows = train(arm, seed, max(round(60 * MINUTES / seconds), 2), core, "whole")
    path = folder / "scores.json"
    words = dict(policy="[greedy,search]", json=path)
    study.run_command(evaluate.__file__, words, path.with_suffix(".log"), core, folder)
    greedy, search = json.loads(path.read_text())["rows"]
    curve = [
        [row["iteration"] * seconds / 60, row["eval/greedy/avg_return"]]
        for row in rows[1:]
        if "eval/greedy/avg_return" in row
    ]
    taken = sum(row["perf/iteration_seconds"] for row in rows[2:]) / 60  # Without the iteration that compiles.
    found = dict(iterations=rows[-1]["iteration"], decisions=rows[-1]["frames"], minutes=taken, curve=curve)
    found |= {f"{kind}_{key}": row[key] for kind, row in (("greedy", greedy), ("search", search))
              for key in ("avg_return", "solved_rate")}  # fmt: skip
    return dict(name=arm.name, words=arm.words, seed=seed, commit=study.made_with()["commit"]) | found


def draw(results: dict) -> None:
    """Utilisation of the network alone against minutes: an operator's line is the mean of its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    seen = dict.fromkeys(("Gumbel", "AlphaZero", "TreePI", "best", "PPO"), 0)  # A colour each, and a style each line.
    for arm in ARMS:
        curves = [row["curve"] for row in results["rows"] if row["name"] == arm.name]
        kind = re.match(r"\w+", arm.name).group()
        style = dict(color=f"C{[*seen].index(kind)}", linestyle=("-", "--", ":", "-.")[seen[kind]], label=arm.name)
        seen[kind] += 1
        if curves:
            points = zip(*curves)  # Evaluations of all seeds after the same iteration.
            axes.plot(*zip(*((statistics.mean(x) for x in zip(*point)) for point in points)), **style)
    floors = json.loads(study.collect_results.FLOORS.read_text())["rows"]
    rule = next(row["avg_return"] for row in floors if row["policy"] == "largest_first")
    axes.axhline(rule, color="grey", linewidth=1, label="largest item into the smallest space")
    ticks = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)
    axes.set_yscale("logit")
    axes.set_yticks(ticks, [f"{100 * x:g} %" for x in ticks])
    axes.set_yticks([], minor=True)
    axes.set(xlabel="minutes of one core", ylabel="utilisation, network alone", ylim=(0.8, 0.9992))
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right center")
    figure.savefig(PICTURE, dpi=110)


def main(argv: list[str]) -> int:
    if argv not in ([], ["draw"]):
        print(f"error: expected nothing or draw, got {' '.join(argv)}", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else dict(seconds={}, workers=[], rows=[])

    def write() -> None:
        made_with = study.made_with() | dict(command="python tests/studies/operators.py", minutes=MINUTES)
        made_with["ablations"] = {arm.name: name for arm, name in ABLATIONS.items()}
        RESULTS.write_text(json.dumps(results | made_with, indent=1) + "\n")

    arms = [(arm,) for arm in ARMS if arm.name not in results["seconds"]]
    for found in study.on_all_cores(measure_time, [] if argv else arms):
        seconds = results["seconds"] | found
        results["seconds"] = {arm.name: seconds[arm.name] for arm in ARMS if arm.name in seconds}
        write()
    done = [(row["workers"], row["leaf_value"]) for row in results["workers"]]
    workers = [number for number in WORKERS if number not in done]
    for found in study.on_all_cores(measure_workers, [] if argv else workers):
        results["workers"].append(found)
        write()
    done = {(row["name"], row["seed"]) for row in results["rows"]}
    arms = {arm: arm.name for arm in ARMS} | ABLATIONS
    runs = [(arm, seed, name) for seed in SEEDS for arm, name in arms.items()]
    runs = [(arm, seed, results["seconds"].get(name)) for arm, seed, name in runs if (arm.name, seed) not in done]
    for row in study.on_all_cores(measure, [] if argv else runs):
        results["rows"].append(row)
        write()
        print({key: value for key, value in row.items() if key != "curve"}, flush=True)
    draw(results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
