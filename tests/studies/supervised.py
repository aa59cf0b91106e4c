"""How well a network learns from the packing that an instance was cut from: a test bed for what the network sees.

    python tests/studies/supervised.py preset=cpu max_num_iters=300 learning_rate_decay_iters=300

The keys are those of `train_search_distill_binpack.py`, and so is the network; there is no search. An action agrees
with a solution if it puts an item where the solution has it. The solutions are the generator's packing and its seven
mirror images. An episode is played by the network among the actions that agree with a solution with which all earlier
ones agree, and the loss is -log of their total probability. Which half of a cut comes first, and which of several
equal items, is left open and stays as noise.

Results: a run more in `tests/studies/supervised.json`, with utilisation and containers filled on the fixed instances.
"""

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "studies")]
import study  # noqa: E402

import evaluate  # noqa: E402
import train_search_distill_binpack as script  # noqa: E402

RESULTS = Path(__file__).parent / "supervised.json"
MIRRORED = np.array(list(itertools.product((False, True), repeat=3)))[..., None]  # [8, 3, 1]


class Rows(NamedTuple):
    """Training rows, leaves [M, ...]."""

    observation: Any
    agrees: jax.Array  # bool [M, A], actions that agree with a solution
    mask: jax.Array  # bool [M], there is one


def make_solved_env(config: script.Config) -> Any:
    """The script's environment, whose states keep in `items_location` where the generator had the items."""
    generator = evaluate.random_generator(config)

    class Solved(type(generator)):
        def __call__(self, key: jax.Array) -> Any:
            state = self.generate_solution(key)
            location = state.items_location
            return self._unpack_items(state).replace(items_location=location)

    generator.__class__ = Solved
    return script.make_env(config, generator)


def make_guided_policy(env: Any, network: Any, config: script.Config) -> evaluate.Policy:
    """Draws from the network among the actions that agree with a solution; its decision is their mask, bool [A]. The
    memory is where the solutions have the items [8, 3, I], and which of them are still possible [8]."""
    predict = script.make_predict(network, config)

    def start(params, state, observation):
        location = jnp.stack(jax.tree.leaves(state.items_location))
        mirrored = jnp.array(env.generator.container_dims)[:, None] - location - jnp.stack(jax.tree.leaves(state.items))
        return jnp.where(MIRRORED, mirrored, location), jnp.ones(len(MIRRORED), bool)

    def act(params, key, state, observation, memory):
        solutions, possible = memory
        shown = state.sorted_ems_indexes[: env.obs_num_ems]
        corner = jnp.stack([state.ems.x1, state.ems.y1, state.ems.z1])[:, shown]  # [3, E]
        is_place = (corner[:, :, None] == solutions[:, :, None, :]).all(1).reshape(len(MIRRORED), -1)  # [8, A]
        agrees = (is_place & possible[:, None]).any(0) & observation.action_mask.reshape(-1)
        logits, _ = predict(params, observation)
        action = jax.random.categorical(key, jnp.where(agrees, logits, script.MASKED))
        return action, agrees, (solutions, possible & is_place[:, action])

    return evaluate.Policy(act, start)


def make_loss(network: Any, config: script.Config) -> Any:
    """Returns loss(size, params, rows) -> (loss, {}): the mean of -log of the probability of the agreeing actions."""

    def loss(size, params, rows: Rows):
        logits, _ = network.apply(params, None, rows.observation, size)
        agree = jnp.where(rows.agrees | ~rows.mask[:, None], jax.nn.log_softmax(logits), -jnp.inf)
        return -(jax.nn.logsumexp(agree, -1) * rows.mask).sum() / config.training_batch_size, {}

    return loss


def make_iteration(env: Any, network: Any, config: script.Config) -> Any:
    """Returns iterate(train state) -> (train state, loss): episodes, then one epoch over their rows."""
    rollout = script.make_rollout(env, make_guided_policy(env, network, config))
    gradients = jax.value_and_grad(make_loss(network, config), argnums=1, has_aux=True)
    size = config.training_batch_size

    @jax.jit
    def iterate(state: script.TrainState):
        key = jax.random.fold_in(state.key, state.iteration)
        play_key, order_key, axes_key = jax.random.split(key, 3)
        played = rollout(state.params, jax.random.split(play_key, config.rollout_batch_size))
        rows = Rows(played.observation, played.decision, played.mask & played.decision.any(-1))
        rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)
        number = len(rows.mask) // size * size
        order = jax.random.permutation(order_key, len(rows.mask))[:number].reshape(-1, size)
        rate = script.learning_rate(config, state.iteration)

        def step(carry, inputs):
            params, opt_state = carry
            batch = jax.tree.map(lambda x: x[inputs[0]], rows)
            batch = batch._replace(observation=jax.vmap(script.permute_axes)(batch.observation, inputs[1]))
            (loss, _), grads = script.gradients_in_parts(gradients, config, batch, params)
            return script.apply_gradients(config, params, opt_state, loss, grads, rate), loss

        permutations = jax.random.randint(axes_key, order.shape, 0, 6)
        (params, opt_state), losses = jax.lax.scan(step, (state.params, state.opt_state), (order, permutations))
        return script.TrainState(params, opt_state, state.key, state.iteration + 1), losses.mean()

    return iterate


def train(config: script.Config) -> list[dict]:
    """The evaluations of a run."""
    env, network = make_solved_env(config), script.make_network(config)
    iterate, state = make_iteration(env, network, config), script.init_train_state(env, network, config)
    play = evaluate.make_player(script.make_rollout(env, script.make_greedy_policy(network, config)))
    keys, began, curve = evaluate.evaluation_keys(config.eval_seed, config.eval_batch_size), time.perf_counter(), []
    for i in range(1, config.max_num_iters + 1):
        state, loss = iterate(state)
        if config.is_due(i, config.eval_interval):
            found = evaluate.summarise(play(evaluate.replicate(state.params), keys))
            rows = i * config.rollout_batch_size * config.max_decisions
            minutes = (time.perf_counter() - began) / 60
            curve.append(dict(iteration=i, rows=rows, minutes=round(minutes, 2), loss=float(loss)))
            curve[-1] |= dict(utilisation=found["avg_return"], filled=found["solved_rate"])
            print(curve[-1], flush=True)
    return curve


def main(argv: list[str]) -> int:
    def command() -> None:
        config, _ = evaluate.parse_command_line(argv, script.Config, script.PRESETS)
        evaluate.start_jax(1)
        evaluate.use_compilation_cache(evaluate.CACHE_DIR)
        made_with = study.made_with() | dict(command=" ".join(["python tests/studies/supervised.py", *argv]))
        runs = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        RESULTS.write_text(json.dumps([*runs, made_with | dict(curve=train(config))], indent=1) + "\n")

    return evaluate.exit_status(command, "rollout_batch_size", "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
