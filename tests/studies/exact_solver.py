"""An exact solver on the same instances: OR-tools' CP-SAT, at 20, 50 and 100 items.

    pip install ortools                              # of this study alone
    python tests/studies/exact_solver.py             # up to two hours on 2 cores; goes on where it was stopped

Each item may be left out; any two that are packed are apart along some axis, and along each axis no cross-section of
the container is overfull (a cumulative constraint, implied by the rest, that prunes much). The packed volume is
maximised. One search of the longest time tells what each shorter one reaches, since the search does not depend on its
limit. The instances are the first that `evaluate.py` plays. Results: `tests/studies/exact_solver.json`.
"""

import itertools
import json
import os
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402

RESULTS = Path(__file__).parent / "exact_solver.json"
ITEMS, SECONDS, NUM_INSTANCES, NUM_WORKERS = (20, 50, 100), (1, 10, 60), 32, 2


def instances(max_num_items: int, number: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The first evaluation instances: lengths of the items [n, 3] of each and of the container [3], whole
    millimetres."""
    import jax

    sizes = evaluate.Sizes(max_num_items=max_num_items, max_num_ems=max(40, 8 * max_num_items // 5))
    env = evaluate.without_network(sizes).env
    keys = evaluate.evaluation_keys(evaluate.Config().seed, number)
    reset = lambda key: env.reset(jax.random.fold_in(key, sizes.max_decisions))[0]  # As `make_rollout` does.
    state = jax.device_get(jax.jit(jax.vmap(reset))(keys))
    lengths = np.stack(state.items, -1).astype(int)
    container = np.array([int(np.asarray(getattr(state.container, f"{axis}2"))[0]) for axis in "xyz"])
    return [items[mask] for items, mask in zip(lengths, state.items_mask)], container


def solve(lengths: np.ndarray, container: np.ndarray, seconds: float) -> tuple[list[tuple[float, float]], bool]:
    """Packs items [I, 3] -> the times at which the packed share of the volume grew, with the shares, and whether the
    last one was proven to be the best. Building the model counts."""
    from ortools.sat.python import cp_model

    start = time.perf_counter()
    model, volume = cp_model.CpModel(), lengths.prod(1)
    packed = [model.new_bool_var(f"packed_{i}") for i in range(len(lengths))]
    at = [[model.new_int_var(0, int(box - n), "") for n, box in zip(item, container)] for item in lengths]
    spans = [
        [model.new_optional_fixed_size_interval_var(x, int(n), p, "") for x, n in zip(where, item)]
        for where, item, p in zip(at, lengths, packed)
    ]
    for axis in range(3):
        others = [i for i in range(3) if i != axis]
        sections, most = lengths[:, others].prod(1), container[others].prod()
        model.add_cumulative([span[axis] for span in spans], sections.tolist(), int(most))
    for i, j in itertools.combinations(range(len(lengths)), 2):
        apart = [
            (first, second, axis)
            for axis in range(3)
            for first, second in ((i, j), (j, i))
            if lengths[i, axis] + lengths[j, axis] <= container[axis]
        ]
        choices = [model.new_bool_var("") for _ in apart]
        for (first, second, axis), choice in zip(apart, choices):
            end = at[first][axis] + int(lengths[first, axis])
            model.add(end <= at[second][axis]).only_enforce_if(choice)
        model.add_bool_or([*choices, packed[i].negated(), packed[j].negated()])
    model.maximize(sum(int(v) * p for v, p in zip(volume, packed)))

    found: list[tuple[float, float]] = []

    class Record(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            found.append((time.perf_counter() - start, self.objective_value / float(container.prod())))

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = NUM_WORKERS
    solver.parameters.max_time_in_seconds = max(seconds - (time.perf_counter() - start), 0.01)
    status = solver.solve(model, Record())
    if found:
        kept = [i for i, p in enumerate(packed) if solver.boolean_value(p)]
        lower = np.array([[solver.value(x) for x in at[i]] for i in kept])
        upper = lower + lengths[kept]
        assert (upper <= container).all() and np.triu(evaluate.overlap(lower, upper, [0, 1, 2]), 1).sum() == 0
    return found, status == cp_model.OPTIMAL


def main(argv: list[str]) -> int:
    if argv:
        print(f"error: expected nothing, got {' '.join(argv)}", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else dict(rows=[])
    done = {(row["items"], row["instance"]) for row in results["rows"]}
    for items in ITEMS:
        lengths, container = instances(items, NUM_INSTANCES)
        for number in range(NUM_INSTANCES):
            if (items, number) in done:
                continue
            found, proven = solve(lengths[number], container, max(SECONDS))
            at = [max([share for t, share in found if t <= limit], default=0.0) for limit in SECONDS]
            row = dict(items=items, instance=number, utilisation=at, last_at=found[-1][0] if found else None)
            results["rows"].append(row | dict(proven=proven))
            results |= dict(command="python tests/studies/exact_solver.py", seconds=SECONDS, workers=NUM_WORKERS)
            results |= dict(ortools=metadata.version("ortools"), cores=os.cpu_count())
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(json.dumps(results["rows"][-1]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
