r"""Compares training, bit for bit, with another checkout of the project, or with an earlier state of this one.

    git worktree add ../before COMMIT
    python tests/golden.py ../before                 # about 10 minutes on 2 cores
    python tests/golden.py --record golden.pkl       # keeps this checkout's record
    python tests/golden.py golden.pkl                # and compares with it later

Both scripts train for three iterations of preset=cpu, on one CPU device and on two, and again as two iterations and one
after a resume, with evaluations before and after. Parameters, optimizer state and the number of decisions must be
equal. The logged figures but the times must agree to 1e-6: sums that are only logged may be taken in another order.
Rounding differs between machines and versions of XLA, so both sides run here; the test suite compares its own small
runs with the committed `tests/results/golden.npz` to within rounding.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_search_distill_binpack.py", "train_ppo_binpack.py")
TIMES = ("hours", "perf/decisions_per_second", "perf/iteration_seconds")
WORDS = ["preset=cpu", "eval_batch_size=64", "save_interval=1"]
SEARCH_WORDS = ["eval_num_simulations=4"]


def leaves(tree) -> list:
    """The arrays and numbers of nested containers, in order."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in leaves(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [leaf for branch in tree for leaf in leaves(branch)]
    return [np.asarray(tree)]


def train(checkout: Path, script: str, num_devices: int, save_dir: str, *words: str) -> Path:
    """Runs a script of the checkout; returns the run's folder."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    more = SEARCH_WORDS if "search" in script else []
    command = [sys.executable, script, *WORDS, *more, f"save_dir={save_dir}", *words]
    environment |= {"WANDB_MODE": "disabled", "PYTHONPATH": ""}
    subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL)
    return next(Path(save_dir).glob("BinPack-v2/*/seed_0"))


def record(checkout: Path) -> dict[str, tuple[list, list]]:
    """What each run of the checkout ends with: the arrays of its checkpoint, and its log's figures without times."""
    found = {}
    for script in SCRIPTS:
        for num_devices in (1, 2):
            for name, legs in (("whole", [3]), ("resumed", [2, 3])):
                with tempfile.TemporaryDirectory() as folder:
                    for leg in legs:
                        run_dir = train(checkout, script, num_devices, folder, f"max_num_iters={leg}", "resume=auto")
                    checkpoint = pickle.loads((run_dir / "iter_000003.pkl").read_bytes())
                    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
                arrays = leaves([checkpoint["model"], checkpoint["opt_state"], checkpoint["frames"]])
                figures = leaves([{key: x for key, x in row.items() if key not in TIMES} for row in rows])
                found[f"{script}, {num_devices} devices, {name}"] = arrays, figures
                print(f"ran {checkout.name}: {script}, {num_devices} devices, {name}", flush=True)
    return found


def main(argv: list[str]) -> int:
    if argv[:1] == ["--record"] and len(argv) == 2:
        Path(argv[1]).write_bytes(pickle.dumps(record(ROOT)))
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__)
        return 2
    other = Path(argv[0]).resolve()
    expected = record(other) if other.is_dir() else pickle.loads(other.read_bytes())
    found, differing = record(ROOT), 0
    for name, (arrays, figures) in found.items():
        same = [len(x) for x in (arrays, figures)] == [len(x) for x in expected[name]]
        same = same and all(map(np.array_equal, arrays, expected[name][0]))
        same = same and np.allclose(figures, expected[name][1], rtol=1e-6, atol=1e-9)
        differing += not same
        print(f"{'equal' if same else 'DIFFERENT':9} {name}: {len(arrays)} arrays, {len(figures)} figures")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
