"""Sorting, an exact solver and networks at 20, 50 and 100 items: quality against time on two cores.

    python tests/studies/exact_solver.py     # first, alone on the machine
    python tests/studies/sizes.py            # an hour on 2 cores; goes on where it was stopped
    python tests/studies/sizes.py draw       # only makes the picture, from the results that there are

Each row plays the first of the same evaluation instances, alone on the machine. A network whose run is not there is
left out; the runs, with SEED 0 and 1, are those of

    python train_search_distill_binpack.py preset=cpu seed=SEED save_dir=checkpoints/sizes/20
    python train_search_distill_binpack.py preset=cpu_50 seed=SEED save_dir=checkpoints/sizes/20_50 \\
        init_from=checkpoints/search_distill_cpu.pkl
    python train_search_distill_binpack.py preset=cpu_50 seed=SEED save_dir=checkpoints/sizes/50 \\
        max_num_iters=30 learning_rate=4e-3 learning_rate_decay_iters=30
    python train_ppo_binpack.py preset=cpu seed=SEED save_dir=checkpoints/sizes/20

Results: `tests/studies/sizes.json` and `sizes.png`, and the first network that was trained on at 50 items, which is
shipped; `collect_results.py` makes the README's table.
"""

import json
import os
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import jax
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
    trained: str  # the numbers of items that it was trained on; none for a rule
    seed: int
    policy: str
    num_simulations: int = 0
    tries: int = 1

    def checkpoint(self) -> Path:
        """The folder of its run."""
        of_50 = evaluate.Sizes(max_num_items=50, max_num_ems=80).env_name
        env_name = "BinPack-v2" if self.trained == "20" else of_50
        method = "ppo" if self.name == "ppo" else "nsim_4"
        return ROOT / "checkpoints" / "sizes" / self.trained / env_name / method / f"seed_{self.seed}"


PLAYERS = (
    Player("largest_first", "", 0, "largest_first"),
    *(Player("ppo", "20", seed, "greedy") for seed in (0, 1)),
    *(
        Player("search_distill", trained, seed, "search" if number else "greedy", number)
        for trained in ("20", "20_50", "50")
        for number in (0, 4, 32)
        for seed in (0, 1)
    ),
)


def num_instances(player: Player, items: int) -> int:
    """256. Networks trained at 50 items play these alone, and without search those from scratch, which fill few."""
    if player.trained == "50" and player.num_simulations:
        return 0
    return 256 if items == 50 or player.trained in ("", "20") else 0


def play(player: Player, items: int) -> dict:
    """Utilisation of each instance, and seconds an instance without compilation."""
    sizes = dict(max_num_items=items, max_num_ems=max(40, 8 * items // 5))
    if player.trained:
        checkpoint = evaluate.load_checkpoint(player.checkpoint(), **sizes)
    else:
        checkpoint = evaluate.without_network(evaluate.Sizes(**sizes))
    number = num_instances(player, items)
    config = evaluate.Config(num_simulations=max(player.num_simulations, 1), tries=player.tries)
    keys = evaluate.evaluation_keys(config.seed, number)
    attempts, _ = evaluate.make_attempts(player.policy, checkpoint, [], config)
    episodes, speed = evaluate.score(player.name, checkpoint, attempts, keys)
    seconds = float(episodes.steps.mean()) / speed
    returns = np.round(episodes.returns.astype(float), 6).tolist()
    mean = statistics.mean(returns)
    return dict(utilisation=mean, filled=float(episodes.solved.mean()), seconds=seconds, returns=returns)


def draw(results: dict, exact: dict) -> None:
    """Utilisation against seconds an instance: one line for a network over its numbers of simulations, and one for the
    exact solver over its limits. What packs less than two thirds is off the picture."""
    from matplotlib.figure import Figure

    figure, colors = Figure(figsize=(11, 3.8), layout="constrained"), {}
    for axes, items in zip(figure.subplots(1, len(ITEMS), sharex=True, sharey=True), ITEMS):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in collect_results.means_over_seeds(results["rows"]) + collect_results.exact_rows(exact):
            name = collect_results.SIZE_LABELS[row["name"]] + collect_results.TRAINED.get(row.get("trained"), "")
            if row["items"] == items:
                lines.setdefault(name, []).append((row["seconds"], row["utilisation"]))
        for name, points in lines.items():
            color = colors.setdefault(name, f"C{len(colors)}")
            axes.plot(*zip(*sorted(points)), marker="o", label=name, color=color)
        axes.set(xscale="log", ylim=(0.68, 1.01), xlabel="seconds an instance", title=f"{items} items")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("utilisation")
    figure.axes[0].yaxis.set_major_formatter("{x:.0%}")
    # Room for the names is on the left, all lines are in the middle.
    figure.axes[0].legend(handles=figure.axes[1].lines, fontsize=8, loc="lower right")
    figure.savefig(PICTURE, dpi=110)


def main(argv: list[str]) -> int:
    if argv not in ([], ["draw"]):
        print(f"error: expected nothing or draw, got {' '.join(argv)}", file=sys.stderr)
        return 2
    evaluate.start_jax(256)
    evaluate.use_compilation_cache(evaluate.CACHE_DIR)
    path = collect_results.SIZES
    results = json.loads(path.read_text()) if path.exists() else dict(rows=[])
    keys = ("name", "trained", "seed", "num_simulations", "tries", "items")
    done = {tuple(row[key] for key in keys) for row in results["rows"]}
    for items in ITEMS if not argv else ():
        for player in PLAYERS:
            row = dict(items=items) | player._asdict()
            del row["policy"]
            if tuple(row[key] for key in keys) in done or not num_instances(player, items):
                continue
            if player.trained and not player.checkpoint().exists():
                print(f"{player.checkpoint()} is not there: left out")
                continue
            row |= play(player, items)
            jax.clear_caches()  # A process that keeps the programs of all rows runs out of memory maps.
            results["rows"].append(row | dict(commit=study.made_with()["commit"]))
            made_with = dict(command="python tests/studies/sizes.py", cores=os.cpu_count())
            results |= made_with | dict(versions=evaluate.library_versions())
            path.write_text(json.dumps(results, indent=1) + "\n")
            print({key: value for key, value in row.items() if key != "returns"}, flush=True)
    of_50 = next(player for player in PLAYERS if player.trained == "20_50").checkpoint()
    if not argv and of_50.exists():
        collect_results.ship_run(of_50, "search_distill_cpu_50.pkl")
    draw(results, json.loads(collect_results.EXACT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
