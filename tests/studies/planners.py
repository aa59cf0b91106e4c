"""Planners and ordinary packing programs on the same instances: how many containers each fills, and in what time.

    pip install ortools py3dbp               # of this study alone
    python tests/studies/planners.py         # 75 minutes on 2 cores, alone; goes on where it was stopped
    python tests/studies/planners.py draw    # only makes the picture, from the results that there are

A planner plays what the network alone leaves open of the first evaluation instances. To compare the planners, `hard`
has nothing but instances that the network fails: at 20 items of 4,096 others, that no choice was based on, and at 50
items of the same 256. The rivals, which know no network, play the first evaluation instances, the slow ones 64 of them.
What each knows:

- CP-SAT (tests/studies/exact_solver.py): the whole problem as a model. It may prove that a packing is the best one.
- Joining: that these instances were made by cuts. Two boxes that are equal on two axes become one, until one box is the
  container. It packs nothing that was not cut so, and says nothing of the order of loading.
- py3dbp: first fit at corners of what is packed. It may turn the items, which nothing else here may.

`rl_search` also starts from worse networks: an untrained one, and those of a run of `preset=cpu` after a tenth and
half of its iterations, if `checkpoints/final` has it (`preset=cpu save_dir=checkpoints/final`). There the moves that
it tries are counted, to be compared with training on.

Results: `tests/studies/planners.json` and `planners.png`; `collect_results.py` makes the README's table.
"""

import dataclasses
import functools
import heapq
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import collect_results  # noqa: E402
import exact_solver  # noqa: E402
import study  # noqa: E402

import evaluate  # noqa: E402

PICTURE = Path(__file__).parent / "planners.png"
CHECKPOINT = ROOT / "checkpoints" / "search_distill_cpu.pkl"
RUN = ROOT / "checkpoints" / "final" / "BinPack-v2" / "nsim_4" / "seed_0"
NUM_INSTANCES = {20: 1024, 50: 256}
NUM_FOR_THE_SLOW = 64
HARD_SEED, NUM_HARD_FROM = 7, 4096
SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)  # Of the preset's training.
MOST_BOXES = 100_000  # Joining gives up there.
NONE_LEFT = 3e-4  # Where the picture has what is filled altogether.


class Arm(NamedTuple):
    """A policy of `evaluate.py` at one budget."""

    policy: str
    words: dict

    def title(self) -> str:
        return " ".join([self.policy, *(f"{key}={value}" for key, value in self.words.items())])


def arms(items: int) -> list[Arm]:
    """From short to long: each planner at three budgets or more."""
    tuned = lambda updates, rollouts, **more: dict(num_updates=updates, num_rollouts=rollouts) | more
    budgets = dict(
        largest_first=[{}],
        lookahead=[{}],
        greedy=[{}],
        best_of_n=[dict(n=n) for n in (8, 32, 128)],
        search=[dict(num_simulations=n) for n in (4, 8, 32)] + [dict(num_simulations=32, tries=8)],
        one_ply=[dict(n=n) for n in (4, 16, 64)],
        beam=[dict(beam_width=width, n=n) for width, n in ((1, 4), (2, 4), (4, 8), (8, 16))],
        rl_search=[tuned(2, 8), tuned(4, 16), tuned(8, 16), tuned(4, 16, tuned="policy_head")],
    )
    if items > 20:
        budgets |= dict(lookahead=[], rl_search=[tuned(1, 4), tuned(1, 8), tuned(2, 8)])
        budgets |= dict(one_ply=[dict(n=n) for n in (2, 4, 8)], search=budgets["search"][:-1])
    return [Arm(policy, words) for policy, of_policy in budgets.items() for words in of_policy]


def play(agent: evaluate.Checkpoint, attempts: list, title: str, keys: np.ndarray) -> dict:
    """Utilisation of each instance, and seconds an instance without compilation."""
    episodes, speed = evaluate.score(title, agent, attempts, keys)
    seconds = float(episodes.steps.mean()) / speed
    returns = np.round(episodes.returns.astype(float), 6).tolist()
    return dict(seconds=seconds, solved=episodes.solved.tolist(), returns=returns)


def measure(agent: evaluate.Checkpoint, arm: Arm, of: str, samples: dict[str, np.ndarray]) -> dict:
    """What an arm fills of a sample: greedy play and the planner after it, or of `hard` the planner alone."""
    attempts, _ = evaluate.make_attempts(arm.policy, agent, (), evaluate.Config(**arm.words))
    return play(agent, attempts[1:] if of == "hard" else attempts, arm.title(), samples[of])


def after_greedy(rows: list[dict], names: dict) -> dict:
    """Greedy play and then the planner, where `hard` are those of these instances that greedy play fails."""
    greedy, hard = (
        next(row for row in rows if names | changed == names_of(row))
        for changed in (dict(policy="greedy", words={}), dict(of="hard"))
    )
    planned = iter(zip(hard["solved"], hard["returns"], strict=True))
    assert len(hard["solved"]) == greedy["solved"].count(False)
    better = lambda *found: max(found, key=lambda pair: pair[1])
    both = [
        (True, x) if solved else better((solved, x), next(planned))
        for solved, x in zip(greedy["solved"], greedy["returns"])
    ]
    seconds = greedy["seconds"] + hard["seconds"] * len(hard["solved"]) / len(both)
    return dict(seconds=seconds, solved=[solved for solved, _ in both], returns=[x for _, x in both])


def measure_and_count(agent: evaluate.Checkpoint, arm: Arm, keys: np.ndarray) -> dict:
    """The same with the moves that `rl_search` tries: those of its rollouts and, with every item that is left then, of
    their completions."""
    make_completion, tried = evaluate.make_completion, []

    def make_counted(*arguments):
        complete, try_out = make_completion(*arguments)

        def counted(params, state, observation):
            left = (state.items_mask & ~state.items_placed).sum()
            jax.debug.callback(lambda left: tried.append(int(left)), left)
            return complete(params, state, observation)

        return counted, try_out

    evaluate.make_completion = make_counted
    try:
        row = measure(agent, arm, "all", dict(all=keys))
    finally:
        evaluate.make_completion = make_completion
    jax.effects_barrier()
    return row | dict(tried=sum(tried) + evaluate.Config(**arm.words).horizon * len(tried))


def solve_exactly(lengths: np.ndarray, container: np.ndarray) -> tuple[float, bool]:
    """Share of the container that CP-SAT packs in ten seconds, and whether it fills it."""
    found, _ = exact_solver.solve(lengths, container, 10)
    share = max((share for _, share in found), default=0.0)
    return share, share > 1 - 1e-6


def join(lengths: np.ndarray, container: np.ndarray) -> tuple[float, bool]:
    """Joins boxes that are equal on two axes, the largest first, until one is as large as the container or nothing new
    comes -> share of the container that the largest box which fits fills, and whether it fills it."""
    volume = lambda size: size[0] * size[1] * size[2]
    whole, most, seen, boxes = int(container.prod()), 0, set(), [{}, {}, {}]
    waiting = [(-volume(size), size, 1 << i) for i, size in enumerate(tuple(map(int, item)) for item in lengths)]
    heapq.heapify(waiting)
    while waiting and most < whole and len(seen) < MOST_BOXES:
        _, size, items = heapq.heappop(waiting)
        if (size, items) in seen:
            continue
        seen.add((size, items))
        most = max(most, volume(size))
        for axis in range(3):
            same = boxes[axis].setdefault((*size[:axis], *size[axis + 1 :]), [])
            for length, others in same:
                if not items & others and length + size[axis] <= container[axis]:
                    joined = (*size[:axis], length + size[axis], *size[axis + 1 :])
                    heapq.heappush(waiting, (-volume(joined), joined, items | others))
            same.append((size[axis], items))
    return most / whole, most == whole


def first_fit(lengths: np.ndarray, container: np.ndarray) -> tuple[float, bool]:
    """py3dbp's packer, larger items first -> share of the container, and whether all items are in."""
    import py3dbp

    packer = py3dbp.Packer()
    packer.add_bin(py3dbp.Bin("container", *map(int, container), 1))
    for i, item in enumerate(lengths):
        packer.add_item(py3dbp.Item(str(i), *map(int, item), 0))
    packer.pack(bigger_first=True, number_of_decimals=0)
    (box,) = packer.bins
    packed = sum(float(item.width * item.height * item.depth) for item in box.items)
    return packed / float(container.prod()), len(box.items) == len(lengths)


RIVALS = {"cp_sat": solve_exactly, "joining": join, "py3dbp": first_fit}
MODULES = {"cp_sat": "ortools.sat.python.cp_model", "joining": "heapq", "py3dbp": "py3dbp"}


def get_ready(name: str, ready: Any) -> None:
    importlib.import_module(MODULES[name])
    ready.wait(60)


def race(name: str, items: int) -> dict:
    """What a rival packs of each instance, and seconds an instance on both cores: CP-SAT uses them, and of the others
    two play at a time."""
    lengths, container = exact_solver.instances(items, NUM_FOR_THE_SLOW if name == "cp_sat" else NUM_INSTANCES[items])
    tasks = [(some, container) for some in lengths]
    if name == "cp_sat":
        importlib.import_module(MODULES[name])
        start = time.perf_counter()
        found = [RIVALS[name](*task) for task in tasks]
    else:
        context = multiprocessing.get_context("spawn")
        ready = context.Barrier(3)
        with context.Pool(2, get_ready, (name, ready)) as pool:  # Nothing is left to import when the time begins.
            ready.wait(60)
            start = time.perf_counter()
            found = pool.starmap(RIVALS[name], tasks, chunksize=4)
    seconds = (time.perf_counter() - start) / len(tasks)
    returns, solved = zip(*found)
    return dict(seconds=seconds, solved=list(solved), returns=[round(share, 6) for share in returns])


def blueprints(agent: evaluate.Checkpoint) -> dict[str, evaluate.Checkpoint]:
    """Networks for `rl_search` to start from, by the share of the preset's training that they had."""
    config = agent.config
    fresh = agent.script.init_train_state(agent.env, agent.network, config).params
    found = {"0": dataclasses.replace(agent, params=jax.device_get(fresh))}
    for share in SHARES:
        path = RUN / f"iter_{round(share * config.max_num_iters):06d}.pkl"
        if path.exists():
            found[f"{share:g}"] = evaluate.load_checkpoint(path)
        else:
            print(f"{path} is not there: left out")
    return found


def keep_programs(script: Any) -> Callable[[], None]:
    """A policy that plays twice is compiled once, until the function that this returns is called: a process has room
    for some programs only."""
    places = (script, "make_greedy_policy"), (script, "make_rollout"), (evaluate, "make_player")
    kept = []
    for module, name in (*places, (evaluate, "make_attempts")):
        kept.append(functools.cache(getattr(module, name)))
        setattr(module, name, kept[-1])

    def forget():
        for function in kept:
            function.cache_clear()
        jax.clear_caches()

    return forget


def names_of(row: dict) -> dict:
    return {key: row[key] for key in ("items", "policy", "words", "of")}


def jobs(rows: list[dict]) -> Iterator[tuple[dict, Callable[[], dict]]]:
    """What is measured: the names of a row, and how its figures are made. `rows` are those that there are by then."""
    for items, number in NUM_INSTANCES.items():
        agent = evaluate.load_checkpoint(CHECKPOINT, max_num_items=items, max_num_ems=max(40, 8 * items // 5))
        keys = evaluate.evaluation_keys(evaluate.Config().seed, number)
        some = evaluate.evaluation_keys(HARD_SEED, NUM_HARD_FROM) if items == 20 else keys
        greedy = play(agent, evaluate.make_attempts("greedy", agent, (), evaluate.Config())[0], "greedy", some)
        samples = dict(hard=some[~np.array(greedy["solved"])], all=keys)
        for arm in arms(items):
            names = dict(items=items, policy=arm.policy, words=arm.words)
            if arm.policy in ("best_of_n", "search", *evaluate.PLANNERS):
                yield names | dict(of="hard"), functools.partial(measure, agent, arm, "hard", samples)
                if some is keys:
                    names |= dict(of="all")
                    yield names, functools.partial(after_greedy, rows, names)
                    continue
            yield names | dict(of="all"), functools.partial(measure, agent, arm, "all", samples)
    for share, blueprint in blueprints(evaluate.load_checkpoint(CHECKPOINT)).items():
        number = NUM_INSTANCES[20] if share != "0" else NUM_FOR_THE_SLOW
        keys = evaluate.evaluation_keys(evaluate.Config().seed, number)
        tuned = [arm for arm in arms(20) if arm.words.get("num_updates") == 4 and share not in ("0.2", "0.3")]
        for arm in [Arm("greedy", {}), *tuned]:
            names = dict(items=20, policy=arm.policy, words=arm.words, of=f"blueprint {share}")
            yield names, functools.partial(measure_and_count, blueprint, arm, keys)
    for items in NUM_INSTANCES:
        for name in RIVALS:
            names = dict(items=items, policy=name, words={}, of="all")
            yield names, functools.partial(race, name, items)


def draw(results: dict) -> None:
    """Share of containers filled against milliseconds an instance, a line for each policy. The share that is left
    unfilled is on a logarithmic scale, since many leave little."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    colors = {name: f"C{i}" if i < 10 else "black" for i, name in enumerate(collect_results.PLANNER_LABELS)}
    for axes, items in zip(figure.subplots(1, 2, sharey=True), NUM_INSTANCES):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in results["rows"]:
            if row["items"] == items and row["of"] == "all" and "tuned" not in row["words"]:
                point = (1000 * row["seconds"], max(1 - float(np.mean(row["solved"])), NONE_LEFT))
                lines.setdefault(row["policy"], []).append(point)
        for name, points in lines.items():
            label = collect_results.PLANNER_LABELS[name]
            axes.plot(*zip(*sorted(points)), marker="o", ms=4, color=colors[name], label=label)
        axes.set(xscale="log", xlabel="milliseconds an instance", title=f"{items} items")
        axes.set(yscale="log", ylim=(1.5, NONE_LEFT / 1.5))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("containers filled")
    ticks = {1.0: "0 %", 0.1: "90 %", 0.01: "99 %", 0.001: "99.9 %", NONE_LEFT: "all"}
    figure.axes[0].set_yticks(list(ticks), list(ticks.values()))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(PICTURE, dpi=110)


def main(argv: list[str]) -> int:
    if argv not in ([], ["draw"]):
        print(f"error: expected nothing or draw, got {' '.join(argv)}", file=sys.stderr)
        return 2
    evaluate.start_jax(1024)
    evaluate.use_compilation_cache(evaluate.CACHE_DIR)
    forget, policy = keep_programs(evaluate.import_script("search_distill")), ""
    rivals = {name: metadata.version(name) for name in ("ortools", "py3dbp")}
    path = collect_results.PLANNERS
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else dict(rows=[])
    for names, make in jobs(results["rows"]) if not argv else ():
        if names in map(names_of, results["rows"]):
            continue
        if names["policy"] != policy:
            forget()
            policy = names["policy"]
        row = names | make()
        results["rows"].append(row | dict(commit=study.made_with()["commit"]))
        results |= dict(
            command="python tests/studies/planners.py", device=f"{os.cpu_count()} cores of {study.cpu_model()}"
        )
        results |= dict(versions=evaluate.library_versions() | rivals)
        path.write_text(json.dumps(results) + "\n")
        filled = f"filled {np.mean(row['solved']):.2%}, utilisation {np.mean(row['returns']):.4%}"
        print(f"{names}: {filled}, {1000 * row['seconds']:.3g} ms", flush=True)
    draw(results)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
