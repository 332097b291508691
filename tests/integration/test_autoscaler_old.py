"""Nothing is asked where there is no autoscaler, nor of the first one, which would bring whatever node."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import ray
from ray.util.placement_group import placement_group_table

from placement.runtime.asking import Asked, State
from placement.runtime.autoscaler import NO_AUTOSCALER, OLD_AUTOSCALER
from placement.runtime.demand import Demand
from placement.runtime.needs import Need, Way
from tests.cloud.cloud import cloud, host_of
from tests.integration.conftest import settled

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(("version", "reason"), [(0, NO_AUTOSCALER), (1, OLD_AUTOSCALER)])
def test_nothing_is_asked_and_the_reason_is_told(version: int, reason: str) -> None:
    with tempfile.TemporaryDirectory(prefix="placement-") as folder, cloud(Path(folder), version) as address:
        ray.init(address, _node_ip_address=host_of(address), log_to_driver=False, logging_level="ERROR")
        try:
            demand = Demand("ask-")
            demand.want({"d:0:0": Need("4 GPUs", (Way(((("GPU", 4.0),),)),))}, ())
            expected = Asked(State.NOT_ASKED, reason)
            assert settled(lambda: demand.poll()["d:0:0"] == expected), demand.report()
            assert {} == placement_group_table()
            demand.withdraw()
        finally:
            ray.shutdown()
