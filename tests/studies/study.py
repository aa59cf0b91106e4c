"""What each choice of `preset=cpu` is worth: one change at a time, three seeds, the same 1,024 evaluation instances.

    python tests/studies/study.py            # about three hours on 2 cores; goes on where it was stopped
    python tests/studies/study.py long       # two hours more: some of them for as long as the preset runs
    python tests/studies/study.py table      # only makes the table, from the results that there are

A variant is the training script with overrides, or with some of its lines replaced, so that no option is needed that
nobody would set. Each plays `ITERATIONS` iterations, with the learning rate decaying as late: equal episodes. One
that is better than what it is compared with but costs notably more, or worse and costs less, plays again for as many
iterations as the other has time for: equal wall-clock. Every core makes runs of its own.

Results: `tests/studies/cpu_preset.json` and `tests/studies/README.md`. The runs themselves stay in `checkpoints/study`.
"""

import hashlib
import json
import math
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scipy import stats  # Comes with jax.

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import collect_results  # noqa: E402
from collect_results import mean_and_error  # noqa: E402

import evaluate  # noqa: E402
import train_search_distill_binpack as script  # noqa: E402

HERE, RUNS = Path(__file__).parent, ROOT / "checkpoints" / "study"
SCRIPT = Path(script.__file__)
PRESET, _ = evaluate.parse_command_line(["preset=cpu"], script.Config, script.PRESETS)
RESULTS, TABLE = HERE / "cpu_preset.json", HERE / "README.md"
ITERATIONS = 40
LAST_CHECKPOINT = f"{ITERATIONS}_iterations/BinPack-v2/*/seed_0/*.pkl"
SEEDS = (0, 1, 2)
SAME_COST = (0.95, 1.05)  # Times that of what a variant is compared with.


class Variant(NamedTuple):
    question: str
    name: str
    words: tuple[str, ...] = ()
    lines: tuple[tuple[str, str], ...] = ()  # (old, new) in the training script; each old text occurs once.
    against: str = "base"  # Name of the variant that it differs from in one thing.
    timed: bool = False  # Whether an iteration is another amount of work than of that one.


VISITED_ONLY = (
    (
        "        output = jax.tree.map(lambda x: x[0], output)\n",
        """        output = jax.tree.map(lambda x: x[0], output)
        visits = output.search_tree.children_visits[0]
        seen = jnp.where(visits > 0, output.action_weights, 0.0)
        output = output.replace(action_weights=seen / jnp.maximum(seen.sum(), 1e-9))
""",
    ),
)


HALF_SEARCHED = (
    (
        '    target = decision.value if config.value_target == "search" else returns\n',
        "    target = 0.5 * (decision.value + returns)\n",
    ),
)


def replay(num_iterations: int) -> tuple[tuple[str, str], ...]:
    """Minibatches from the rows of the last iterations together, as many of them as before."""
    return (
        ("    iteration: jax.Array  # int32 [], iterations done\n", "    iteration: jax.Array\n    rows: Any = None\n"),
        (
            "        rows = minibatch_rows(order_key, samples.mask, config)  # [S, M]\n",
            """        push = lambda rows, new: jnp.concatenate([rows[len(new):], new])
        samples = jax.tree.map(push, state.rows, samples)
        order = jnp.argsort(jnp.where(samples.mask, jax.random.uniform(order_key, samples.mask.shape), 2.0))
        steps = config.num_epochs * (config.rollout_batch_size * config.max_decisions // config.training_batch_size)
        rows = order[jnp.arange(steps * config.training_batch_size) % samples.mask.sum()].reshape(steps, -1)
""",
        ),
        (
            "        return TrainState(params, opt_state, state.key, state.iteration + 1), metrics\n",
            "        return TrainState(params, opt_state, state.key, state.iteration + 1, samples), metrics\n",
        ),
        (
            "    evaluate, state = make_evaluate(env, network, config), replicate(state)\n",
            f"""    _, first = env.reset(state.key)
    count, width = {num_iterations} * config.rollout_batch_size * config.max_decisions, config.search_width
    blank = lambda x: jnp.zeros((count, *x.shape), x.dtype)
    none, zeros = jnp.float32(0.0), jnp.zeros(width)
    decision = Decision(jnp.zeros(width, jnp.int32), zeros, zeros, jnp.int32(0), none)
    empty = Samples(*jax.tree.map(blank, (first.observation, decision, none, none, none, jnp.bool_(False), none)))
    evaluate, state = make_evaluate(env, network, config), replicate(state._replace(rows=empty))
""",
        ),
    )


AVERAGED = (
    ("    iteration: jax.Array  # int32 [], iterations done\n", "    iteration: jax.Array\n    average: Any = None\n"),
    (
        "        return TrainState(params, opt_state, state.key, state.iteration + 1), metrics\n",
        """        average = jax.tree.map(lambda old, new: old + 0.2 * (new - old), state.average, params)
        return TrainState(params, opt_state, state.key, state.iteration + 1, average), metrics
""",
    ),
    (
        "    evaluate, state = make_evaluate(env, network, config), replicate(state)\n",
        """    evaluate, state = make_evaluate(env, network, config), replicate(state._replace(average=state.params))
""",
    ),
    ("evaluate(state.params, progress.iteration)", "evaluate(state.average, progress.iteration)"),
)
SIX_VIEWS = (
    (
        "(argmax(predict(params, observation)[0]), None, memory))\n",
        """(
        argmax(sum(jax.nn.log_softmax(predict(params, permute_axes(observation, jnp.int32(i)))[0]) for i in range(6))),
        None, memory,
    ))
""",
    ),
)


# The network plays four times the instances that are needed, and those come first that it did not fill.
HARD_INSTANCES = (
    (
        """        episodes = device_slice(jnp.arange(config.rollout_batch_size))
        trajectory = rollout(params, jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, episodes))
""",
        """        tried = device_slice(jnp.arange(4 * config.rollout_batch_size))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, tried)
        filled = make_rollout(env, make_greedy_policy(network, config))(params, keys).solved
        trajectory = rollout(params, keys[jnp.argsort(filled)][: len(keys) // 4])
""",
    ),
)


def simulations(number: int) -> tuple[str, ...]:
    """So many, each of another action of the root."""
    return (f"num_simulations={number}", f"max_num_considered_actions={number}")


RESCALED = ("rescale_values=true", "value_scale=0.1")
# Only here has the value's head a use. A decision costs about as many passes as with completions.
VALUE_HEAD = ("leaf_value=network", "num_simulations=32", "max_num_considered_actions=16", "min_target_kl=0")

HARD = "failed ones first, of four times as many"
VH, ALL, CONSTANT = "value head, 32 simulations, 16 considered actions", "every decision (min_target_kl=0)", "constant"

VARIANTS = [
    Variant("", "base"),
    Variant("scale of Q", "mctx's own: rescaled, 0.1", RESCALED),
    Variant("scale of Q", "mctx's own, every decision", (*RESCALED, "min_target_kl=0"), (), ALL),
    Variant("scale of Q", "value_scale=10", ("value_scale=10",)),
    Variant("scale of Q", "maxvisit_init=10, as value_scale=0.11", ("maxvisit_init=10",)),
    Variant("simulations and considered actions", "2 and 2", simulations(2), timed=True),
    Variant("simulations and considered actions", "8 and 8", simulations(8), timed=True),
    Variant("leaf values", VH, VALUE_HEAD, (), ALL, True),
    Variant("target of the value", "searched value of the root", (*VALUE_HEAD, "value_target=search"), (), VH),
    Variant("target of the value", "half searched value, half return", VALUE_HEAD, HALF_SEARCHED, VH),
    Variant("target of the policy", ALL, ("min_target_kl=0",)),
    Variant("target of the policy", "every decision, 16 epochs", ("min_target_kl=0", "num_epochs=16"), timed=True),
    Variant("target of the policy", "weights of visited actions only", ("min_target_kl=0",), VISITED_ONLY, ALL),
    Variant("use of samples", "4 epochs", ("num_epochs=4",), timed=True),
    Variant("use of samples", "those of the last 4 iterations", (), replay(4)),
    Variant("learning rate", CONSTANT, ("learning_rate_decay_iters=0",)),
    Variant("learning rate", "average of 9 iterations or so", ("learning_rate_decay_iters=0",), AVERAGED, CONSTANT),
    Variant("symmetry", "not used", ("permute_axes=false",)),
    Variant("symmetry", "six views averaged at evaluation, six passes", (), SIX_VIEWS),
    Variant("Gumbel noise", "none", ("gumbel_scale=0",)),
    Variant("instances", HARD, (), HARD_INSTANCES, timed=True),
    Variant("network", "two layers", ("num_transformer_layers=2",), timed=True),
]  # fmt: skip
# What was better at the same cost, or may be worth its cost only once the network is good.
LONG = (CONSTANT, "none", "8 and 8", HARD)
BASE_KEYS = (
    "num_simulations",
    "max_num_considered_actions",
    "leaf_value",
    "rescale_values",
    "value_scale",
    "maxvisit_init",
    "min_target_kl",
    "num_epochs",
    "learning_rate",
    "permute_axes",
    "gumbel_scale",
    "num_transformer_layers",
)  # What the variants change.


def folder_of(variant: Variant) -> Path:
    """Named after what the runs depend on, too, so that those of another version are not taken for this one's."""
    code = text_of(variant) + Path(evaluate.__file__).read_text()
    version = hashlib.sha256(f"{code} {variant.words}".encode()).hexdigest()[:8]
    name = f"{variant.question} {variant.name} {version}"
    return RUNS / "_".join("".join(x if x.isalnum() else " " for x in name).split())


def text_of(variant: Variant) -> str:
    """The training script with the variant's lines."""
    text = SCRIPT.read_text()
    for old, new in variant.lines:
        if text.count(old) != 1:
            raise ValueError(f"{variant.name}: expected once in {SCRIPT.name}, got {text.count(old)} times:\n{old}")
        text = text.replace(old, new)
    return text


def script_of(variant: Variant) -> Path:
    """The training script, or a copy of it with the variant's lines."""
    if not variant.lines:
        return SCRIPT
    folder_of(variant).mkdir(parents=True, exist_ok=True)
    path = folder_of(variant) / SCRIPT.name
    path.write_text(text_of(variant))
    return path


def rows_of(folder: Path, seed: int, iterations: int) -> list[dict] | None:
    """The log of a run that has come to its end."""
    paths = list(folder.glob(f"BinPack-v2/*/seed_{seed}/metrics.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return rows if rows and rows[-1]["iteration"] == iterations else None


def run_command(script: Path | str, words: dict, log: Path, core: int, *paths: Path) -> None:
    """`script` with these paths and key=value words, on one core; what it prints goes into `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(script), *map(str, paths), *(f"{key}={value}" for key, value in words.items())]
    environment = os.environ | {"WANDB_MODE": "disabled", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    on_core = lambda: os.sched_setaffinity(0, {core})
    with open(log, "w") as file:
        status = subprocess.run(command, stdout=file, stderr=file, env=environment, preexec_fn=on_core).returncode
    if status:
        raise RuntimeError(f"status {status}, see {log}")


def train(variant: Variant, folder: Path, core: int, **words: object) -> None:
    """The variant's training on one core, with `words` over those of every run of the study."""
    every = dict(preset="cpu", learning_rate_decay_iters=words["max_num_iters"], eval_num_simulations=0, save_minutes=0)
    words = every | dict(save_dir=folder) | words | dict(word.split("=", 1) for word in variant.words)
    run_command(script_of(variant), words, folder / f"seed_{words['seed']}.log", core)


def run(variant: Variant, seed: int, iterations: int, core: int) -> dict:
    """One run on a core, or an earlier one: its last evaluation, and what its search reached while it collected."""
    folder = folder_of(variant) / f"{iterations}_iterations"
    every = {key: iterations for key in ("max_num_iters", "eval_interval", "save_interval")}
    rows = rows_of(folder, seed, iterations)
    if rows is None:
        train(variant, folder, core, seed=seed, overwrite="true", **every)
        rows = rows_of(folder, seed, iterations)
    late = rows[1:][-5:]
    greedy = rows[-1]["eval/greedy/avg_return"]
    print(f"{variant.question:36} {variant.name:40} {iterations:4} {seed} {greedy:.4f}", flush=True)
    return dict(
        seed=seed,
        iterations=iterations,
        decisions=rows[-1]["frames"],
        search=statistics.mean(row["rollout/avg_return"] for row in late),
        taught=statistics.mean(row["train/taught_share"] for row in late),
        greedy=greedy,
        filled=rows[-1]["eval/greedy/solved_rate"],
    )


def cost_of(variant: Variant, core: int) -> float:
    """Time of an iteration next to that of what it is compared with: both go on from their last checkpoint and share a
    core, since cores that others use, too, are not equally fast."""
    measured = folder_of(variant) / "cost.json"
    if measured.exists():
        return json.loads(measured.read_text())
    pair = (variant, next(other for other in VARIANTS if other.name == variant.against))
    last = ITERATIONS + 10

    def go_on(variant: Variant, name: str, until: int) -> list[dict]:
        folder, (newest,) = RUNS / f"timing_{core}_{name}", folder_of(variant).glob(LAST_CHECKPOINT)
        shutil.rmtree(folder, ignore_errors=True)
        every = dict(eval_interval=last, save_interval=last, learning_rate_decay_iters=last)
        train(variant, folder, core, seed=0, resume=newest, max_num_iters=until, **every)
        return rows_of(folder, 0, until)

    def seconds(variant: Variant, name: str) -> float:
        rows = go_on(variant, name, last)
        timed = [row for row in rows if ITERATIONS + 1 < row["iteration"] <= ITERATIONS + 6]  # As long as both run.
        return statistics.median(row["perf/iteration_seconds"] for row in timed)

    for choice in pair:  # Compiles, so that neither does while the other is timed.
        go_on(choice, "one", ITERATIONS + 1)
    with ThreadPoolExecutor(2) as pool:
        mine, others = pool.map(seconds, pair, ("one", "other"))
    print(f"{variant.question:36} {variant.name:40} {mine:.2f} s beside {others:.2f} s", flush=True)
    measured.write_text(json.dumps(mine / others))
    return mine / others


def on_all_cores(function: Callable[..., Any], items: list[tuple]) -> Iterator:
    """function(*item, core) of each item, in order; as many at a time as there are cores."""
    cores = queue.SimpleQueue()
    for core in os.sched_getaffinity(0):
        cores.put(core)

    def on_one(item: tuple) -> Any:
        core = cores.get()
        try:
            return function(*item, core)
        finally:
            cores.put(core)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        yield from pool.map(on_one, items)


def seeds_of(variant: Variant, iterations: int, core: int) -> list[dict]:
    return [run(variant, seed, iterations, core) for seed in SEEDS]


def iterations_of_equal_time(row: dict, others: list[dict]) -> int | None:
    """As many as the others' time allows; none where equal time cannot turn the order round."""
    cost = row["cost"] or 1.0
    better = statistics.mean(differences(row["runs"], others)) > 0
    turns = cost > SAME_COST[1] if better else cost < SAME_COST[0]
    return max(round(ITERATIONS / cost), 2) if turns else None


def differences(runs: list[dict], others: list[dict]) -> list[float]:
    """Of runs with the same seed, in utilisation of the network alone."""
    return [a["greedy"] - b["greedy"] for a, b in zip(runs, others, strict=True)]


def cpu_model() -> str:
    """As Linux names it."""
    return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)


def made_with(words: str = "") -> dict:
    """What the figures come from."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout
    changed = "-dirty" if git("status", "--porcelain", "--", "*.py") else ""
    return dict(
        command=f"python tests/studies/study.py{words}",
        commit=git("rev-parse", "HEAD").strip() + changed,
        versions=evaluate.library_versions(),
        device=f"one core of {cpu_model()} for each run",
    )


def measure() -> Iterator[dict]:
    """The results, once all variants have run and again after each that ran at equal wall-clock."""
    for variant in VARIANTS:  # A line that does not fit is found before the first run.
        script_of(variant)
    runs = list(on_all_cores(seeds_of, [(variant, ITERATIONS) for variant in VARIANTS]))
    timed = [variant for variant in VARIANTS if variant.timed]
    costs = dict(zip(timed, on_all_cores(cost_of, [(variant,) for variant in timed])))
    rows = [
        dict(**variant._asdict(), runs=of_variant, cost=costs.get(variant), equal_time=None)
        for variant, of_variant in zip(VARIANTS, runs)
    ]
    results = made_with() | dict(variants=rows)
    yield results
    runs_of = {row["name"]: row["runs"] for row in rows}
    iterations = [iterations_of_equal_time(row, runs_of[row["against"]]) for row in rows]
    again = [i for i, number in enumerate(iterations) if number]
    for i, of_variant in zip(again, on_all_cores(seeds_of, [(VARIANTS[i], iterations[i]) for i in again]), strict=True):
        rows[i]["equal_time"] = of_variant
        yield results


def measure_long() -> dict:
    """Runs of `LONG` for as long as the preset takes, whose own runs are those of the README."""
    variants = [variant for variant in VARIANTS if variant.name in LONG]
    costs = {row["name"]: row["cost"] or 1.0 for row in json.loads(RESULTS.read_text())["variants"]}
    items = [
        (variant, seed, round(PRESET.max_num_iters / costs[variant.name])) for variant in variants for seed in SEEDS
    ]
    found = list(on_all_cores(run, items))
    runs = [found[i : i + len(SEEDS)] for i in range(0, len(found), len(SEEDS))]
    base = [
        dict(greedy=run["last"]["eval/greedy/avg_return"], filled=run["last"]["eval/greedy/solved_rate"])
        for run in collect_results.of_method(json.loads(collect_results.RESULTS.read_text()), "search_distill")
    ]
    variants = [dict(**variant._asdict(), runs=found) for variant, found in zip(variants, runs)]
    return made_with(" long") | dict(iterations=PRESET.max_num_iters, base=base, variants=variants)


def percent(values: list[float]) -> str:
    return "{:.2f} ± {:.2f}".format(*mean_and_error([100 * x for x in values]))


def table(results: dict) -> str:
    """One line a variant: means over seeds, and paired differences with their standard errors."""
    runs_of = {variant["name"]: variant["runs"] for variant in results["variants"]}
    base = runs_of["base"]
    settings = [f"{key}={evaluate.as_typed(getattr(PRESET, key))}" for key in BASE_KEYS]
    rows = [
        (row, row[runs], runs_of[row["against"]]) for row in results["variants"][1:] for runs in ("runs", "equal_time")
    ]
    rows = [(row, runs, others) for row, runs, others in rows if runs]
    trained = [x for x in rows if x[1][0]["search"] != x[2][0]["search"]]  # Not those that only play otherwise.
    decisions = [
        statistics.mean(run["decisions"] for run in row["runs"]) / statistics.mean(run["decisions"] for run in others)
        for row, _, others in rows
    ]

    def chance(of_value_head: bool) -> str:
        """The error pooled over such rows, and the differences beyond chance (Student's t; Bonferroni)."""
        chosen = [x for x in trained if ("leaf_value=network" in x[0]["words"]) == of_value_head]
        errors = [mean_and_error(differences(runs, others))[1] for _, runs, others in chosen]
        pooled = 100 * math.sqrt(statistics.mean(error**2 for error in errors))
        limits = [stats.t.ppf(1 - 0.025 / n, len(errors) * (len(SEEDS) - 1)) * pooled for n in (1, len(rows))]
        return "{:.2f} ({:.2f}, {:.2f})".format(pooled, *limits)

    seeds = ", ".join(str(run["seed"]) for run in base)
    fewest, most = (f"{100 * (x - 1):+.0f}" for x in (min(decisions), max(decisions)))
    lines = [
        "# What each choice of `preset=cpu` is worth",
        "",
        f"One choice is changed at a time. Each run has {base[0]['iterations']} iterations of 64 episodes, over which"
        f" the learning rate decays. Seeds: {seeds}. Evaluation: 1,024 fixed instances. This is the early part of"
        " learning; over a whole run the order may be another one. The network did not see [blocks](view.md) then.",
        "",
        f"Made by `{results['command']}` at commit {results['commit'][:12]} (runs are kept for commits with the same"
        f" code), on {results['device']}. Base is `{' '.join(settings)}`. Its learning rate decays to zero on a"
        " cosine.",
        "",
        "The columns:",
        "",
        "- **network**: utilisation of the network alone in %, ± the standard error over seeds.",
        "- **difference**: mean over runs with the same seed, from the row named under 'against', at equal numbers of"
        f" episodes. (Numbers of decisions differ by {fewest} to {most} %.)",
        "- **at equal time**: the same where time could turn the order round. That is for a better choice that costs"
        f" more than {SAME_COST[1]} times as much, and for a worse one that costs less than {SAME_COST[0]} times as"
        " much. In brackets: the iterations that the other's time allows.",
        "- **filled**: containers filled completely, in %.",
        "- **search**: utilisation of the search in % while it collected, noise included, over the last five"
        " iterations. Where failed instances come first, it plays harder ones than elsewhere.",
        "- **learned**: share in % of those iterations' decisions that the network learned from. In brackets: how"
        " often from each. The number of gradient steps does not depend on the share.",
        "- **cost**: time of an iteration, over that of the row named under 'against'. Both went on from their last"
        " iteration side by side on one core. An empty cell was not measured and counts as equal.",
        "",
        "How sure the differences are: with three seeds, the error of one difference is itself uncertain. Pooled over"
        " all choices that train otherwise, it is the first of these figures. In brackets is what exceeds chance at"
        f" the 5 % level: for a difference that is the only one looked at, and for one picked from all {len(rows)}."
        " (The latter is rough, since most of them share the runs of base.)",
        "",
        f"- With completions: {chance(False)}.",
        f"- With the value head: {chance(True)}.",
        "",
        "To know when reading the table:",
        "",
        "- Q is the value of an action in the search, and `value_scale` says how far it moves the policy. Where each"
        " action is visited once, as by 4 simulations of 4 legal actions, `maxvisit_init` and `value_scale` are one"
        " factor, `(maxvisit_init + 1) * value_scale`.",
        "- The value head is searched with more simulations and actions than completions, since it costs less to ask."
        " Three keys differ.",
        "- Decisions of earlier iterations are learned from as they were chosen then, whatever the network knows by"
        " now.",
        "",
        "| question | choice | network | against | difference | at equal time | filled | search | learned | cost |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for variant in results["variants"]:
        runs, again, others = variant["runs"], variant["equal_time"], runs_of[variant["against"]]
        at_equal_time = "not measured" if iterations_of_equal_time(variant, others) else ""
        if again:
            at_equal_time = f"{percent(differences(again, others))} ({again[0]['iterations']})"
        cells = [
            variant["question"],
            variant["name"],
            percent([x["greedy"] for x in runs]),
            "" if runs is base else variant["against"],
            "" if runs is base else percent(differences(runs, others)),
            at_equal_time,
            f"{100 * statistics.mean(x['filled'] for x in runs):.1f}",
            f"{100 * statistics.mean(x['search'] for x in runs):.2f}",
            f"{100 * statistics.mean(x['taught'] for x in runs):.0f} ({uses(variant):.0f})",
            f"{variant['cost']:.2f}" if variant["cost"] else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "long" in results:
        lines += ["", *long_table(results["long"])]
    return "\n".join(lines) + "\n"


def uses(variant: dict) -> float:
    """How often the network learns from a decision, of those that it learns from."""
    epochs = dict(word.split("=", 1) for word in variant["words"]).get("num_epochs", PRESET.num_epochs)
    steps = PRESET.rollout_batch_size * PRESET.max_decisions // PRESET.training_batch_size
    decisions = statistics.mean(run["taught"] * run["decisions"] / run["iterations"] for run in variant["runs"])
    return int(epochs) * steps * PRESET.training_batch_size / decisions


def long_table(results: dict) -> list[str]:
    """The same of the runs that take as long as the preset's, against its own."""
    base = results["base"]
    lines = [
        f"Some of them for as long as the {results['iterations']} iterations of the preset took:"
        f" `{results['command']}`, commit {results['commit'][:12]}, {results['device']}. The preset's own runs are the"
        f" {len(base)} that the README had then; means are compared, not runs of the same seed.",
        "",
        "| question | choice | iterations | network | difference | filled |",
        "|---|---|---|---|---|---|",
    ]
    rows = [dict(question="", name="base", runs=base), *results["variants"]]
    mean, error = mean_and_error([100 * run["greedy"] for run in base])
    for row in rows:
        network, filled = (percent([run[key] for run in row["runs"]]) for key in ("greedy", "filled"))
        here, its_error = mean_and_error([100 * run["greedy"] for run in row["runs"]])
        difference = "" if row["runs"] is base else f"{here - mean:.2f} ± {math.hypot(error, its_error):.2f}"
        iterations = row["runs"][0].get("iterations", results["iterations"])
        lines.append(f"| {row['question']} | {row['name']} | {iterations} | {network} | {difference} | {filled} |")
    return lines


def main(argv: list[str]) -> int:
    if argv not in ([], ["long"], ["table"]):
        print(f"error: expected nothing, long or table, got {' '.join(argv)}", file=sys.stderr)
        return 2
    old = json.loads(RESULTS.read_text())
    if argv == ["long"]:
        found = [old | dict(long=measure_long())]
    else:
        found = () if argv else (old | results for results in measure())
    for results in found:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    TABLE.write_text(table(json.loads(RESULTS.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
