r"""How the time and the memory of a searched decision grow with the number of items, here and in another checkout.

    git worktree add ../before COMMIT
    python tests/benchmarks/growth.py before=../before out=tests/benchmarks/growth.json     # half an hour on 2 cores
    python tests/benchmarks/growth.py items=20,50 num_simulations=4 episodes=64 devices=2

Half of each episode is played greedily by the network that the checkout ships, trained on 20 items, and one move by
search. Then the whole batch is searched, up to four times within 20 seconds: a decision half-way takes about as long as
the mean of its episode, and all but the first can use what the search before it found. One key is varied at a time
around the first of its values. Each arm is a process of its own, and the two checkouts take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
ARM = ("items", "devices", "num_simulations", "episodes")


def measure(checkout: str, items: int, devices: int, num_simulations: int, episodes: int) -> dict[str, float]:
    """Seconds of a decision for the whole batch, and bytes of the program's temporary arrays on a device."""
    sys.path.insert(0, checkout)
    import jax
    import numpy as np

    import evaluate
    import train_search_distill_binpack as script

    evaluate.use_compilation_cache(evaluate.CACHE_DIR)
    jax.config.update("jax_num_cpu_devices", devices)
    sizes = dict(max_num_items=items, max_num_ems=max(40, 8 * items // 5))
    agent = evaluate.load_checkpoint(Path(checkout) / "checkpoints" / "search_distill_cpu.pkl", **sizes)
    greedy = script.make_greedy_policy(agent.network, agent.config)
    search = script.make_search_policy(agent.env, agent.network, agent.config, num_simulations, gumbel_scale=1.0)

    def first_half(params: Any, key: jax.Array) -> tuple:
        def body(_, carry):
            state, observation = carry
            action, _, _ = greedy.act(params, key, state, observation, ())
            state, timestep = script.step_flat(agent.env, state, action)
            return state, timestep.observation

        state, timestep = agent.env.reset(key)
        state, observation = jax.lax.fori_loop(0, items // 2, body, (state, timestep.observation))
        return key, state, observation, search.start(params, state, observation)

    def on_devices(function, *axes):
        return jax.pmap(jax.vmap(function, in_axes=(None, *axes)), in_axes=(None, *axes))

    keys = evaluate.evaluation_keys(0, episodes).reshape(devices, -1, 2)
    key, state, observation, memory = on_devices(first_half, 0)(agent.params, keys)
    act = on_devices(search.act, 0, 0, 0, 0).lower(agent.params, key, state, observation, memory).compile()
    action, _, memory = act(agent.params, key, state, observation, memory)
    state, timestep = on_devices(lambda _, *of: script.step_flat(agent.env, *of), 0, 0)((), state, action)
    arguments = key, state, timestep.observation, memory
    legal = np.asarray(timestep.observation.action_mask).any((-1, -2)).sum()
    seconds: list[float] = []
    while len(seconds) < 4 and sum(seconds) < 20:
        start = time.perf_counter()
        jax.block_until_ready(act(agent.params, *arguments))
        seconds.append(time.perf_counter() - start)
    size = act.memory_analysis().temp_size_in_bytes
    return dict(decisions_per_second=int(legal) / statistics.median(seconds[-3:]), megabytes=size / 2**20)


def fitted_power(items: list[int], speeds: list[float]) -> float:
    """p of the law time ~ items**p with the least squared error in logarithms."""
    import numpy as np

    return float(-np.polyfit(np.log(items), np.log(speeds), 1)[0])


def main(argv: list[str]) -> int:
    sys.path.insert(0, str(ROOT))
    from pydantic import Field

    import evaluate

    class Config(evaluate.FrozenModel):
        items: evaluate.Units = Field((20, 50, 100), description="item slots; each with 1.6 times as many spaces")
        devices: evaluate.Units = Field((2, 1), description="CPU devices")
        num_simulations: evaluate.Units = Field((4, 16, 64), description="simulations a decision")
        episodes: evaluate.Units = Field((64, 256, 1024), description="episodes, over all devices")
        before: str = Field("", description="another checkout, measured side by side (empty: none)")
        out: str = Field("", description="file to write the measurements to (empty: none)")

    try:
        config, _ = evaluate.parse_command_line(argv, Config, {})
    except evaluate.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    firsts = {key: getattr(config, key)[0] for key in ARM[1:]}
    arms = [firsts] + [firsts | {key: value} for key in ARM[1:] for value in getattr(config, key)[1:]]
    checkouts = {"now": ROOT} | ({"before": Path(config.before).resolve()} if config.before else {})
    rows = []
    for arm in arms:
        for items in config.items:
            row = dict(items=items, **arm)
            for name, checkout in checkouts.items():
                words = [str(row[key]) for key in ARM]
                command = [sys.executable, __file__, "measure", str(checkout), *words]
                run = subprocess.run(command, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
                if run.returncode:
                    raise SystemExit(run.stderr)
                row[name] = json.loads(run.stdout.splitlines()[-1])
            rows.append(row)
            print(json.dumps(row), flush=True)
    powers = []
    for arm in arms:
        mine = [row for row in rows if arm.items() <= row.items()]
        speeds = {name: [row[name]["decisions_per_second"] for row in mine] for name in checkouts}
        if len(mine) > 1:
            powers.append(arm | {name: fitted_power(list(config.items), speeds[name]) for name in checkouts})
    result = dict(command="python tests/benchmarks/growth.py " + " ".join(argv))
    result |= dict(commits={name: evaluate.commit(checkout) for name, checkout in checkouts.items()})
    result |= dict(versions=evaluate.library_versions(), cores=os.cpu_count(), rows=rows, powers=powers)
    if config.out:
        Path(config.out).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(powers))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(measure(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        sys.exit(main(sys.argv[1:]))
