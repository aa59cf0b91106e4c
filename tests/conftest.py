"""Fixtures for all tests. JAX sees one CPU device, here and in the processes that tests start."""

import fcntl
import functools
import gc
import os
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # And one only: compiled programs are kept for each number of devices.
# This compiles twice as fast, and runs a little slower. At level 0 the small runs take longer than their compilation.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1"
if metadata.version("jaxlib") < "0.11":  # Each of two workers has a core.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false --xla_cpu_multi_thread_eigen=false"
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"binpack-tests-cache-{os.getuid()}")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # Lowering writes less.
os.environ.pop("PYTHONUNBUFFERED", None)  # Without a buffer, output fails in other ways than for most users.
os.environ.update(WANDB_MODE="disabled", WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")

import jax
import numpy as np
import pytest

import evaluate
import train_ppo_binpack as ppo
import train_search_distill_binpack as script

gc.set_threshold(100_000)  # Tracing makes much, and little of it is garbage.
ROOT = Path(__file__).parent.parent
# The options that give back what users run.
AS_FOR_USERS = {"xla_backend_optimization_level": 3}
AS_FOR_USERS |= {"xla_cpu_use_fusion_emitters": True} if "emitters" in os.environ["XLA_FLAGS"] else {}
# A network and search that compile in seconds; every test that does not name its own configuration uses them.
SMALL = dict(
    max_num_iters=4,
    rollout_batch_size=8,
    num_simulations=2,
    leaf_value="network",
    search_width=48,
    max_num_considered_actions=2,
    training_batch_size=32,
    num_epochs=1,
    min_target_kl=1e-3,
    learning_rate=1e-3,  # At larger rates rounding grows into other games, where device counts are compared.
    num_transformer_layers=1,
    transformer_num_heads=2,
    transformer_key_size=8,
    transformer_mlp_units=(16,),
    pair_units=8,
    token_sizes=((40, 20),),
    eval_interval=2,
    eval_batch_size=8,
    eval_num_simulations=0,
    eval_value_scale=10.0,
    save_interval=1,
)
OF_SEARCH = ("num_simulations", "leaf_value", "search_width", "max_num_considered_actions", "eval_num_simulations",
             "eval_value_scale")  # fmt: skip
NOT_OF_PPO = (*OF_SEARCH, "num_epochs", "min_target_kl", "learning_rate")
SMALL_WORDS = [f"{key}={evaluate.as_typed(value)}" for key, value in SMALL.items()]


NOT_OF_TRAINING = {*script.NOT_OF_THE_RESULT, "seed", "wandb_project", "save_interval", "max_skipped_updates",
                   "max_num_iters", "eval_interval", "eval_search_interval"}  # fmt: skip
OF_THE_NETWORK = {"num_transformer_layers", "transformer_num_heads", "transformer_key_size", "transformer_mlp_units",
                  "pair_units", "token_sizes"}  # fmt: skip
programs = {}


def share_programs(module, name: str, is_key: Callable[[str], bool] = lambda key: True) -> None:
    """Calls in this process whose arguments make the same program have one, which is traced once. Of a configuration,
    the keys count that `is_key` names; a network is that of the configuration, and an environment that of its sizes."""
    make = getattr(module, name)

    def identity(argument):
        if isinstance(argument, (script.Config, ppo.Config)):
            return type(argument), *((key, value) for key, value in argument if is_key(key))
        kind = type(argument).__name__
        generator = getattr(argument, "generator", None)
        if kind == "FastBinPack" and type(generator).__name__ == "FastGenerator":
            return kind, argument.obs_num_ems, *vars(generator).items()
        return kind if kind == "Transformed" else argument

    def find_or_make(*arguments):
        key = (module, name, evaluate.instances_at_a_time(), *map(identity, arguments))
        if key not in programs:
            programs[key] = make(*arguments)
        return programs[key]

    setattr(module, name, find_or_make)


for module in (script, ppo):
    share_programs(module, "make_train_iteration", lambda key: key not in NOT_OF_TRAINING)
    share_programs(module, "make_greedy_policy", lambda key: key in OF_THE_NETWORK)
    share_programs(module, "make_rollout")
share_programs(evaluate, "make_player")
jax.pmap = functools.cache(jax.pmap)  # The same function gives the same program.


def forget_many_programs() -> None:
    """A process that keeps hundreds of compiled programs runs out of memory maps, and XLA ends it."""
    used, most = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if not used.exists() or 3 * used.read_bytes().count(b"\n") > int(most.read_text()):
        programs.clear()
        jax.pmap.cache_clear()
        jax.clear_caches()
        gc.collect()


def flat_vector(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(tree)])


def override(*words) -> list[str]:
    """The small form of preset=cpu with the words in it: one program serves nearly all runs of the tests."""
    keys = {word.split("=")[0] for word in words}
    return ["preset=cpu", *(word for word in SMALL_WORDS if word.split("=")[0] not in keys), *words]


@pytest.fixture(scope="session")
def ppo_words():
    """The same for PPO, which has no search to make small, and learns as its preset does."""
    return lambda *words: [x for x in override(*words) if x in words or x.split("=")[0] not in NOT_OF_PPO]


def run_once(tmp_path_factory, main, words: list[str]) -> Path:
    """The folder of a finished run, made by the first worker that asks for it; the others wait."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / main.__module__
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            assert main([*words, "overwrite=true", f"save_dir={folder}.new"]) == 0
            os.rename(f"{folder}.new", folder)
    return folder


@pytest.fixture(scope="session")
def search_run(tmp_path_factory) -> Path:
    """The folder of an undisturbed run of search distillation, four iterations."""
    return run_once(tmp_path_factory, script.main, override()) / "BinPack-v2" / "nsim_2" / "seed_0"


@pytest.fixture(scope="session")
def ppo_run(tmp_path_factory, ppo_words) -> Path:
    """The folder of an undisturbed run of PPO, four iterations."""
    return run_once(tmp_path_factory, ppo.main, ppo_words()) / "BinPack-v2" / "ppo" / "seed_0"


@pytest.fixture(scope="module", autouse=True)
def free_programs():
    yield
    forget_many_programs()


@pytest.fixture(scope="session")
def config():
    return script.Config(**SMALL)


@pytest.fixture(scope="session")
def env():
    return script.make_env(evaluate.Sizes())


@pytest.fixture(scope="session")
def network(config):
    return script.make_network(config)


@pytest.fixture(scope="session")
def params(env, network, config):
    """Random parameters, with a policy that is neither uniform nor certain."""
    return jax.tree.map(lambda x: 1.5 * x, script.init_train_state(env, network, config).params)


@pytest.fixture(scope="session")
def apply(network):
    """(params, observations) -> (logits, value)."""
    return jax.jit(lambda params, observation: network.apply(params, None, observation))


@pytest.fixture(scope="session")
def trajectory(env, params):
    """128 random episodes, with states in the place of decisions."""

    def act(params, key, state, observation, memory):
        logits = jax.numpy.where(script.legal_actions(observation), 0.0, script.MASKED)
        return jax.random.categorical(key, logits), state, memory

    rollout = jax.jit(script.make_rollout(env, evaluate.Policy(act)))
    return rollout(params, jax.random.split(jax.random.PRNGKey(7), 128))


@pytest.fixture(scope="session")
def played(trajectory):
    """States and observations along random episodes, leaves [B, T, ...], with B = 128."""
    return trajectory.decision, trajectory.observation
