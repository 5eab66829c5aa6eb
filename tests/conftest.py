"""What every test process sets before JAX starts: eight CPU devices, quick compilation, a cache.

`JAX_PLATFORMS=cuda,cpu` (or `tpu,cpu`) runs tests on that accelerator: see `make test-device`.
"""

import gc
import importlib.metadata
import os
import pathlib
import pkgutil

_ROOT = pathlib.Path(__file__).parent.parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    _FLAGS = [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and compute little: LLVM's optimisations cost more than they give.
        "--xla_backend_optimization_level=0",
    ]
    if importlib.metadata.version("jax").startswith("0.10."):
        # The older emitters compile these tests in a third of the time; newer XLA has none.
        _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join(_FLAGS)
if importlib.metadata.version("jax").startswith(("0.10.", "0.11.")):
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
else:
    # jaxlib 0.12.0 has crashed while it wrote a large eight-device executable to the cache.
    os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


import jax  # noqa: E402  (it must see the variables above)
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Few tests, each of minutes: were they dealt out last, one worker would wait for the other.
_FIRST = ("test_notebooks.py", "test_resume.py", "test_power.py", "test_kimi_linear.py")


def pytest_collection_modifyitems(items):
    """The modules that take longest come first; the others stay in their order."""
    items.sort(key=lambda item: item.path.name not in _FIRST)


@pytest.fixture(scope="session")
def fixtures() -> pathlib.Path:
    """The folder of small committed files that tests read."""
    return pathlib.Path(__file__).parent / "fixtures"


# Shapes and dtypes in public signatures are checked while tests run, and only then.
jaxtyping.install_import_hook(["jaxalope.layers", "jaxalope.model"], "beartype.beartype")


@pytest.fixture
def absent_slice():
    """``absent_slice(topology)``: the devices of a TPU slice that is not there. Needs libtpu."""
    pytest.importorskip("libtpu")
    from jaxalope.sharding import absent_devices  # After the hook above, which checks shapes.

    return absent_devices


@pytest.fixture
def absent_gpus():
    """``absent_gpus(topology)``: GPUs that are not there. Needs JAX's CUDA plugin and ptxas."""
    jax_plugins = pytest.importorskip("jax_plugins")
    if not any(x.name.startswith("xla_cuda") for x in pkgutil.iter_modules(jax_plugins.__path__)):
        pytest.skip("JAX's CUDA plugin is not installed")
    from jaxalope.sharding import absent_devices

    return absent_devices


@pytest.fixture
def unchecked_shapes():
    """Turns the shape checks off, for tests of the messages that users get without them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
    """Lets go of compiled programs when they have become many.

    Every CPU executable holds memory maps of its own, and Linux grants a process 65,530 of them: a
    worker that keeps all programs of the suite runs out, and crashes where it next compiles.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 15_000:
        jax.clear_caches()
        gc.collect()
