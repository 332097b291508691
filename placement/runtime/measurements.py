"""Measured rates of nodes: kept in the ledger; and which nodes use them."""

from __future__ import annotations

import threading
from collections.abc import Collection
from functools import lru_cache

from placement.core.measured import is_suspect, of_all
from placement.core.shape import shape_of
from placement.core.topology import Topology
from placement.runtime import ledger
from placement.runtime.orders import GpuHardware, with_rates
from placement.wire.machine import Machine
from placement.wire.measurements import Measurement, identity_of


class Measurements:
    """One measurement for each host and make; a host whose links have changed is of another make. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._of_make: dict[Machine, dict[tuple[object, ...], Measurement]] = {}

    def restore(self) -> None:
        """Takes over the measurements of an earlier service."""
        for measurement in ledger.measurements():
            self._put(measurement)

    def all(self) -> list[Measurement]:
        """All measurements, by host."""
        with self._lock:
            found = [one for hosts in self._of_make.values() for one in hosts.values()]
        return sorted(found, key=lambda one: (one.host, one.uuids != (), str(one.uuids)))

    def record(self, measurement: Measurement) -> None:
        """Keeps a measurement; earlier rates of other sets of the host stay."""
        ledger.save_measurement(self._put(measurement))

    def forget(self, hosts: Collection[str], identities: Collection[tuple[object, ...]]) -> list[Measurement]:
        """Forgets the rates of hosts, given by name or identity, and returns them."""
        found = [one for one in self.all() if one.host in hosts or one.identity in identities]
        for one in found:
            ledger.forget_measurement(one)
            with self._lock:
                self._of_make[one.machine].pop(one.identity, None)
        return found

    def _put(self, later: Measurement) -> Measurement:
        with self._lock:
            hosts = self._of_make.setdefault(later.machine, {})
            known = hosts.get(later.identity)
            kept = hosts[later.identity] = later if known is None else known.updated(later)
            return kept

    def of(self, name: str, hardware: GpuHardware) -> Measurement | None:
        """The rates measured on a node itself."""
        with self._lock:
            return self._of_make.get(make_of(hardware.topology), {}).get(identity_on(name, hardware))

    def applied(self, name: str, hardware: GpuHardware) -> GpuHardware:
        """The hardware of a node with its rates: those of its make, or its own where these differ by more than noise.

        A suspect rate does not count for other nodes.

        Args:
            name: of the node.
            hardware: the hardware without rates.
        """
        topology = hardware.topology
        if not self._of_make:
            return hardware
        with self._lock:
            hosts = dict(self._of_make.get(make_of(topology), {}))
        own = hosts.get(identity_on(name, hardware))
        predicted = shape_of(topology).mb_per_s
        sound = [
            {gpus: rate for gpus, rate in one.mb_per_s().items() if not is_suspect(rate, predicted(gpus))}
            for one in hosts.values()
        ]
        return with_rates(hardware, of_all({} if own is None else own.mb_per_s(), sound))


def identity_on(name: str, hardware: GpuHardware) -> tuple[object, ...]:
    """The identity by which measurements of a node are found."""
    return identity_of(name, [hardware.uuids.get(gpu) for gpu in range(len(hardware.topology))])


def make_of(topology: Topology) -> Machine:
    """The make of a node."""
    return _make(topology, topology.model)


@lru_cache(maxsize=1024)
def _make(topology: Topology, model: str | None) -> Machine:
    return Machine.make(topology)
