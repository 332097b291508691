"""What every test stands on: a Ray that reads and writes nothing of the user's.

The variables are set here, at import: Ray reads them when it is imported and hands them to every process
it starts. A bare ``ray.init()`` writes an authentication token into the home folder, and a token found there
turns authentication on: hence no authentication, and a home of the tests' own.

No property has a deadline: how long one example takes says how busy the machine is, not what the code does.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_real_home = Path.home()
_home = Path(tempfile.mkdtemp(prefix="placement-home-"))

# pip, which the wheel's test runs, keeps its settings and downloads.
os.environ.setdefault("XDG_CONFIG_HOME", str(_real_home / ".config"))
os.environ.setdefault("XDG_CACHE_HOME", str(_real_home / ".cache"))
os.environ["HOME"] = str(_home)
# Some machines set it; then each process compiles the package anew (0.4 s of a CPU), and pytest rewrites the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Ray would start a worker for each driver, which is what each command of the command line is.
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112
# Figures of its processes, each 2.5 s on every node, which no test reads: a tenth of what a run costs.
os.environ["REPORTER_UPDATE_INTERVAL_MS"] = "600000"
os.environ["RAY_enable_metrics_collection"] = "0"  # noqa: SIM112
# The process in the cluster that stands for a ray:// client starts within 30 s, says Ray; not beside other tests.
os.environ["RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S"] = "120"
# That process is forked by one with gRPC threads, and gRPC's handlers of a fork then end it with a segmentation
# fault now and then (seen with grpcio 1.85: "Starting Ray client server failed", and nothing in its log).
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
# The dashboard starts within 60 s, and each of its nine processes within 30 s, says Ray; not beside other tests.
os.environ["RAY_DASHBOARD_STARTUP_TIMEOUT_S"] = "240"
os.environ["RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT"] = "240"
if "PYTEST_XDIST_WORKER" in os.environ:  # beside others: Ray notes in this folder which cluster is the latest
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="r-")

# The same examples each time, so that a change is not blamed for what another run would have found; to search for
# more: pytest --hypothesis-profile=search tests/properties
settings.register_profile("search", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(
    "placement", settings(), derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("placement")

# A shell's background job ignores Ctrl-C, and so would the processes started here, whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

assert "ray" not in sys.modules, "Ray was imported before tests/conftest.py could set its variables"

from tests.locks import watch  # noqa: E402

watch("placement.runtime")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What mostly waits comes first: what only computes fills the gaps, where several run beside each other."""
    items.sort(key=lambda item: item.get_closest_marker("integration") is None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the home once every fixture, a cluster's shutdown included, is done."""
    shutil.rmtree(_home, ignore_errors=True)
    if "PYTEST_XDIST_WORKER" in os.environ:
        shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
