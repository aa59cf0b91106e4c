"""Sorting, an exact solver and networks at 20, 50 and 100 items: quality against time on two cores.

    python tests/studies/exact_solver.py     # first, alone on the machine
    python tests/studies/sizes.py            # half an hour on 2 cores; goes on where it was stopped
    python tests/studies/sizes.py draw       # only makes the picture, from the results that there are

Each row plays the first of the same evaluation instances, alone on the machine. Results: `tests/studies/sizes.json`
and `sizes.png`; `collect_results.py` makes the README's table.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import collect_results  # noqa: E402
import study  # noqa: E402
from exact_solver import ITEMS  # noqa: E402

import evaluate  # noqa: E402

PICTURE = Path(__file__).parent / "sizes.png"


class Player(NamedTuple):
    name: str
    checkpoint: str  # a shipped one; none for a rule
    policy: str
    num_simulations: int = 0


PLAYERS = (
    Player("largest_first", "", "largest_first"),
    Player("ppo", "ppo_cpu.pkl", "greedy"),
    Player("search_distill", "search_distill_cpu.pkl", "greedy"),
    Player("search_distill", "search_distill_cpu.pkl", "search", 4),
    Player("search_distill", "search_distill_cpu.pkl", "search", 32),
)


def num_instances(player: Player, items: int) -> int:
    """256, but fewer or none for searches that take seconds an instance."""
    return {(100, 4): 64, (100, 32): 0}.get((items, player.num_simulations), 256)


def play(player: Player, items: int) -> dict:
    """Utilisation of each instance, and seconds an instance without compilation."""
    sizes = dict(max_num_items=items, max_num_ems=max(40, 8 * items // 5))
    if player.checkpoint:
        checkpoint = evaluate.load_checkpoint(ROOT / "checkpoints" / player.checkpoint, **sizes)
    else:
        checkpoint = evaluate.without_network(evaluate.Sizes(**sizes))
    number, config = num_instances(player, items), evaluate.Config(num_simulations=max(player.num_simulations, 1))
    keys = evaluate.evaluation_keys(config.seed, number)
    attempts, _ = evaluate.make_attempts(player.policy, checkpoint, [], config)
    rollouts = [checkpoint.script.make_rollout(checkpoint.env, policy) for policy, _ in attempts]
    at_a_time = min(number, evaluate.instances_at_a_time())  # None is played twice to fill a batch.
    with mock.patch.object(evaluate, "instances_at_a_time", lambda: at_a_time):
        plays = [*map(evaluate.make_player, rollouts)]
    params = [evaluate.replicate(params) for _, params in attempts]
    for one, its_params in zip(plays, params):
        one(its_params, keys[:2])  # Compiles.
    start = time.perf_counter()
    nothing = np.zeros(number, int)
    episodes = evaluate.Episodes(np.full(number, -1.0, np.float32), nothing, nothing.astype(bool))
    for one, its_params in zip(plays, params):
        episodes = evaluate.keep_better(one, its_params, keys, episodes)
    seconds = (time.perf_counter() - start) / number
    returns = np.round(episodes.returns.astype(float), 6).tolist()
    mean = statistics.mean(returns)
    return dict(utilisation=mean, filled=float(episodes.solved.mean()), seconds=seconds, returns=returns)


def draw(results: dict, exact: dict) -> None:
    """Utilisation against seconds an instance: one line for a network over its numbers of simulations, and one for the
    exact solver over its limits. What packs less than two thirds is off the picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, items in zip(figure.subplots(1, len(ITEMS), sharex=True, sharey=True), ITEMS):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in results["rows"] + collect_results.exact_rows(exact):
            if row["items"] == items:
                lines.setdefault(row["name"], []).append((row["seconds"], row["utilisation"]))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points)), marker="o", label=collect_results.SIZE_LABELS[name])
        axes.set(xscale="log", ylim=(0.68, 1.01), xlabel="seconds an instance", title=f"{items} items")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("utilisation")
    figure.axes[0].yaxis.set_major_formatter("{x:.0%}")
    figure.axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(PICTURE, dpi=110)


def main(argv: list[str]) -> int:
    if argv not in ([], ["draw"]):
        print(f"error: expected nothing or draw, got {' '.join(argv)}", file=sys.stderr)
        return 2
    evaluate.start_jax(256)
    evaluate.use_compilation_cache(evaluate.CACHE_DIR)
    path = collect_results.SIZES
    results = json.loads(path.read_text()) if path.exists() else dict(rows=[])
    done = {(row["name"], row["num_simulations"], row["items"]) for row in results["rows"]}
    for items in ITEMS if not argv else ():
        for player in PLAYERS:
            if (player.name, player.num_simulations, items) in done or not num_instances(player, items):
                continue
            row = dict(name=player.name, items=items, num_simulations=player.num_simulations) | play(player, items)
            results["rows"].append(row | dict(commit=study.made_with()["commit"]))
            made_with = dict(command="python tests/studies/sizes.py", cores=os.cpu_count())
            results |= made_with | dict(versions=evaluate.library_versions())
            path.write_text(json.dumps(results, indent=1) + "\n")
            print({key: value for key, value in row.items() if key != "returns"}, flush=True)
    draw(results, json.loads(collect_results.EXACT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
