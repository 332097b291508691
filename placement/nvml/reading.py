"""One reading, in this process. The only module that imports pynvml.

The meaning of a failed call, fact by fact:

- The fact is unknown (``None``, ``()``, ``Path.UNKNOWN``), never zero; every other fact is still read.
- The failure is reported, in ``GpuFacts.errors`` or, for pairs and the node, only in ``NodeFacts.problem``;
  but not if it means that this GPU or this driver has no such feature (``_NO_FEATURE``).
- A GPU without NVLink answers NOT_SUPPORTED, or INVALID_ARGUMENT, for every link number. That is zero
  NVLinks, and known, unless the same GPU counts some links elsewhere (field 91): then it is unknown.
- A fact that another call also reports is taken from there: the memory from the older call, the links of a
  GPU from their other ends, the links to a switch from field 147, the profile and the memory of a MIG instance
  from its attributes.
- A GPU that is not registered with its NVSwitch has no links there, and the problem says so.
- A link that is down is not counted. It is a problem if it should be up: see :mod:`placement.nvml.fabric`.
- A failure on a MIG instance is reported in its ``MigFacts.errors``, and for the node under its GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

import pynvml

from placement.core.topology import Path, ordinals
from placement.nvml.fabric import NO_FABRIC, fabric_problem, has_nvls, links_down
from placement.nvml.host import Device, Host, nccl_number
from placement.wire.facts import (
    LINK_UP,
    Fabric,
    GpuFacts,
    LinkState,
    MigFacts,
    NodeFacts,
    NvLinkFacts,
    PairFacts,
)

_NO_FEATURE = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,  # the driver is older than the binding
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,  # the same, for a newer version of a structure
    pynvml.NVML_ERROR_DEPRECATED,
}
_NO_INSTANCE = {pynvml.NVML_ERROR_NOT_FOUND, pynvml.NVML_ERROR_INVALID_ARGUMENT}
_NO_LINK = {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT}
_ABSENT = -1

# Linux knows at most 1024 NUMA nodes and 8192 CPUs (its Kconfig: NODES_SHIFT, NR_CPUS).
_NUMA_WORDS, _CPU_WORDS = 1024 // 64, 8192 // 64

_LINK_COUNT = (pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT, 0)
_SWITCH_LINK_COUNT = (pynvml.NVML_FI_DEV_NVSWITCH_CONNECTED_LINK_COUNT, 0)
_LINK_STATES = tuple((pynvml.NVML_FI_DEV_NVLINK_GET_STATE, n) for n in range(pynvml.NVML_NVLINK_MAX_LINKS))
_STATES: dict[int | None, LinkState] = {
    pynvml.NVML_NVLINK_STATE_INACTIVE: "inactive",
    pynvml.NVML_NVLINK_STATE_ACTIVE: "active",
    pynvml.NVML_NVLINK_STATE_SLEEP: "sleep",
    pynvml.NVML_NVLINK_STATE_ACTIVE_TRAFFIC_DISABLED: "traffic disabled",
}
_ACTIVE = {code for code, state in _STATES.items() if state in LINK_UP}
_LINK_SPEEDS = tuple((pynvml.NVML_FI_DEV_NVLINK_GET_SPEED, n) for n in range(pynvml.NVML_NVLINK_MAX_LINKS))
_OLD_SPEEDS = tuple(
    (first + n, 0)
    for first in (pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_L0, pynvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_L6)
    for n in range(6)
)
"""One field for each of the first twelve links, which GPUs before Hopper have."""
_LINK_VERSION = (pynvml.NVML_FI_DEV_NVLINK_GET_VERSION, 0)
_VERSIONS = {1: "1.0", 2: "2.0", 3: "2.2", 4: "3.0", 5: "3.1", 6: "4.0", 7: "5.0", 8: "6.0"}
"""NVML_NVLINK_VERSION_* of nvml.h; older bindings lack some."""

_ANCESTORS = {
    pynvml.NVML_TOPOLOGY_INTERNAL: Path.PIX,  # two GPUs on one board
    pynvml.NVML_TOPOLOGY_SINGLE: Path.PIX,
    pynvml.NVML_TOPOLOGY_MULTIPLE: Path.PXB,
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: Path.PHB,
    pynvml.NVML_TOPOLOGY_NODE: Path.NODE,
    pynvml.NVML_TOPOLOGY_SYSTEM: Path.SYS,
}
_PEER_OK, _PEER_UNKNOWN = 0, 6
_FABRIC: dict[int, Fabric] = {
    pynvml.NVML_GPU_FABRIC_STATE_NOT_STARTED: "not started",
    pynvml.NVML_GPU_FABRIC_STATE_IN_PROGRESS: "in progress",
    pynvml.NVML_GPU_FABRIC_STATE_COMPLETED: "completed",
}
_HEALTH: dict[int, Fabric] = {
    pynvml.NVML_GPU_FABRIC_HEALTH_SUMMARY_UNHEALTHY: "unhealthy",
    pynvml.NVML_GPU_FABRIC_HEALTH_SUMMARY_LIMITED_CAPACITY: "limited capacity",
}
_PEER_READ, _PEER_WRITE = 0, 1  # pynvml's own NVML_P2P_CAPS_INDEX_READ is a tuple by mistake


def read() -> NodeFacts:
    """Reads the GPUs of this node in this process. May block for ever: see :class:`~placement.nvml.Reader`.

    Used memory is all that is not free, the driver's own included. Never raises: without a usable NVML the
    source is ``"none"`` and ``problem`` says why.
    """
    try:
        pynvml.nvmlInitWithFlags(pynvml.NVML_INIT_FLAG_NO_GPUS)
    except pynvml.NVMLError_LibraryNotFound:
        return NodeFacts(source="none", problem="no NVIDIA driver here: libnvidia-ml.so.1 cannot be loaded")
    except pynvml.NVMLError as error:
        return NodeFacts(source="none", problem=f"NVML does not start: {_sentence(error)}")
    try:
        return _Reading().node()
    finally:
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


@dataclass(frozen=True)
class _NvLinks:
    """How many active NVLinks of one GPU lead to each PCI address, and to NVSwitches; ``None`` if unknown.

    Also its links one by one, including inactive ones, and their version.
    """

    peers: Mapping[str, int] | None
    switch: int | None
    each: tuple[NvLinkFacts, ...] | None = None
    version: str | None = None

    def to(self, bus_id: str | None) -> int | None:
        """How many lead directly to the GPU at that address."""
        if self.peers is None or (bus_id is None and self.peers):
            return None
        return self.peers.get(bus_id, 0) if bus_id else 0


_UNKNOWN_NVLINKS = _NvLinks(peers=None, switch=None)


@dataclass
class _Reading:
    """One pass over all GPUs. Collects failures: (call, error) -> the GPUs of each such call."""

    failures: dict[tuple[str, str], set[tuple[int, ...]]] = field(default_factory=dict)
    host: Host = field(default_factory=Host)

    def ask(
        self,
        gpus: tuple[int, ...],
        call: Callable[..., Any],
        *args: Any,
        report: bool = True,
        fine: Collection[int] = (),
        no_link: Any = None,
    ) -> Any:
        """The answer of a call about ``gpus``; ``None`` if it fails, ``no_link`` if there is no such link.

        ``fine`` are errors that only mean that there is nothing to report.
        """
        try:
            return call(*args)
        except pynvml.NVMLError as error:
            # By number: an error's class is not hashable, and new errors have no class.
            if no_link is not None and error.value in _NO_LINK:
                return no_link
            if report and error.value not in _NO_FEATURE and error.value not in fine:
                self.failures.setdefault((call.__name__, _sentence(error)), set()).add(gpus)
        except UnicodeDecodeError:
            self.failures.setdefault((call.__name__, "the text is damaged"), set()).add(gpus)
        return None

    def node(self) -> NodeFacts:
        driver = self.ask((), pynvml.nvmlSystemGetDriverVersion)
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            uncounted = f"NVML cannot count the GPUs: {_sentence(error)}"
            return NodeFacts(source="none", driver_version=driver, problem=uncounted)
        handles = [self.handle(gpu) for gpu in range(count)]
        bus_ids = [
            None if handle is None else _bus_id(self.ask((gpu,), pynvml.nvmlDeviceGetPciInfo_v3, handle))
            for gpu, handle in enumerate(handles)
        ]
        links: list[_NvLinks] = []
        gpus: list[GpuFacts] = []
        instances: list[MigFacts] = []
        for gpu, handle in enumerate(handles):
            if handle is None:
                links.append(_UNKNOWN_NVLINKS)
                gpus.append(GpuFacts(ordinal=gpu, errors=self.errors_of(gpu)))
                continue
            capability = self.ask((gpu,), pynvml.nvmlDeviceGetCudaComputeCapability, handle)
            nvlinks = self.nvlinks(gpu, handle, capability, bus_ids)
            mig = self.ask((gpu,), pynvml.nvmlDeviceGetMigMode, handle)
            enabled = mig and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE  # of (now, after the next reset)
            parts = self.instance_handles(gpu, handle) if enabled else []
            gpus.append(self.gpu(gpu, handle, bus_ids[gpu], capability, nvlinks, enabled))
            links.append(replace(nvlinks, switch=0) if gpus[gpu].fabric in NO_FABRIC else nvlinks)
            instances += [self.instance(gpu, part, gpus[gpu].memory_total_bytes) for part in parts]
        devices = [self.host.device(gpu.pci_bus_id, gpu.numa_nodes) for gpu in gpus]
        pairs = tuple(
            self.pair(a, b, handles, _between(links[a], links[b], bus_ids[a], bus_ids[b]), devices)
            for a in range(count)
            for b in range(a + 1, count)
        )
        return NodeFacts(
            source="nvml",
            gpus=tuple(gpus),
            instances=tuple(instances),
            pairs=pairs,
            driver_version=driver,
            nics=self.host.nics(devices),
            numa_nodes=self.host.numa_nodes,
            cpu=self.host.cpu,
            nvls=has_nvls(gpus, driver, nccl_number("NCCL_NVLS_ENABLE")),
            problem="; ".join(filter(None, (fabric_problem(gpus), links_down(gpus, pairs), self.problem())))
            or None,
        )

    def handle(self, gpu: int) -> Any:
        try:
            return pynvml.nvmlDeviceGetHandleByIndex(gpu)
        except pynvml.NVMLError as error:
            # Nothing of this GPU can be read, for whatever reason: this is always reported.
            self.failures.setdefault(("nvmlDeviceGetHandleByIndex", _sentence(error)), set()).add((gpu,))
            return None

    def gpu(
        self,
        gpu: int,
        handle: Any,
        bus_id: str | None,
        capability: tuple[int, int] | None,
        nvlinks: _NvLinks,
        mig_enabled: bool | None,
    ) -> GpuFacts:
        one = (gpu,)
        # With MIG on, only privileged users may read the memory of all instances together.
        memory = self.memory(one, handle, fine={pynvml.NVML_ERROR_NO_PERMISSION} if mig_enabled else ())
        return GpuFacts(
            ordinal=gpu,
            uuid=self.ask(one, pynvml.nvmlDeviceGetUUID, handle),
            name=self.ask(one, pynvml.nvmlDeviceGetName, handle),
            memory_total_bytes=memory and memory.total,
            memory_used_bytes=memory and memory.total - memory.free,
            compute_capability=capability,
            pci_bus_id=bus_id,
            minor_number=self.ask(one, pynvml.nvmlDeviceGetMinorNumber, handle),
            pcie_generation=self.ask(one, pynvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            pcie_width=self.ask(one, pynvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            numa_nodes=self.numa_nodes(one, handle, bus_id),
            cpus=_bits(self.ask(one, pynvml.nvmlDeviceGetCpuAffinity, handle, _CPU_WORDS)),
            mig_enabled=mig_enabled,
            nvlink_version=nvlinks.version,
            nvlinks=nvlinks.each,
            nvswitch_links=nvlinks.switch,
            fabric=self.fabric(gpu, handle) if nvlinks.switch else None,
            vgpu=self.vgpu(one, handle),
            errors=self.errors_of(gpu),
        )

    def numa_nodes(self, gpus: tuple[int, ...], handle: Any, bus_id: str | None) -> tuple[int, ...]:
        """The NUMA nodes or CPUs near a GPU, from NVML or else from Linux."""
        scope = pynvml.NVML_AFFINITY_SCOPE_NODE
        found = _bits(self.ask(gpus, pynvml.nvmlDeviceGetMemoryAffinity, handle, _NUMA_WORDS, scope))
        device = None if found else self.host.device(bus_id)
        return found if device is None or device.numa is None else (device.numa,)

    def vgpu(self, gpus: tuple[int, ...], handle: Any) -> bool | None:
        """Whether it is a virtual GPU; a GPU that is passed through to a virtual machine is not."""
        mode = self.ask(gpus, pynvml.nvmlDeviceGetVirtualizationMode, handle)
        return None if mode is None else mode == pynvml.NVML_GPU_VIRTUALIZATION_MODE_VGPU

    def memory(self, gpus: tuple[int, ...], handle: Any, fine: Collection[int] = ()) -> Any:
        newer = self.ask(gpus, pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2, report=False)
        return newer or self.ask(gpus, pynvml.nvmlDeviceGetMemoryInfo, handle, fine=fine)

    def instance_handles(self, gpu: int, handle: Any) -> list[Any]:
        """The MIG instances of one GPU. Their indices have gaps, so all indices are asked for."""
        most = self.ask((gpu,), pynvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0
        call = pynvml.nvmlDeviceGetMigDeviceHandleByIndex
        found = [self.ask((gpu,), call, handle, index, fine=_NO_INSTANCE) for index in range(most)]
        return [part for part in found if part is not None]

    def instance(self, gpu: int, handle: Any, gpu_memory_bytes: int | None) -> MigFacts:
        alone = _Reading()  # so that failures are not mixed with those of other instances of this GPU
        attributes = alone.ask((gpu,), pynvml.nvmlDeviceGetAttributes_v2, handle)
        memory = alone.memory((gpu,), handle)
        nominal = attributes and attributes.memorySizeMB << 20
        facts = MigFacts(
            parent=gpu,
            uuid=alone.ask((gpu,), pynvml.nvmlDeviceGetUUID, handle),
            profile=_profile(
                alone.ask((gpu,), pynvml.nvmlDeviceGetName, handle), attributes, gpu_memory_bytes
            ),
            memory_total_bytes=memory.total if memory else (nominal or None),
            memory_used_bytes=memory and memory.total - memory.free,
            gpu_instance_id=alone.ask((gpu,), pynvml.nvmlDeviceGetGpuInstanceId, handle),
            compute_instance_id=alone.ask((gpu,), pynvml.nvmlDeviceGetComputeInstanceId, handle),
            errors=alone.errors_of(gpu),
        )
        for failure, where in alone.failures.items():
            self.failures.setdefault(failure, set()).update(where)
        return facts

    def pair(
        self,
        a: int,
        b: int,
        handles: Sequence[Any],
        nvlinks: int | None,
        devices: Sequence[Device | None],
    ) -> PairFacts:
        near, far = handles[a], handles[b]
        if near is None or far is None:
            return PairFacts(a=a, b=b, nvlinks=nvlinks)
        level = self.ask((a, b), pynvml.nvmlDeviceGetTopologyCommonAncestor, near, far)
        return PairFacts(
            a=a,
            b=b,
            common_ancestor=_ANCESTORS.get(level, Path.UNKNOWN),
            nvlinks=nvlinks,
            peer_read=_allowed(self.ask((a, b), pynvml.nvmlDeviceGetP2PStatus, near, far, _PEER_READ)),
            peer_write=_allowed(self.ask((a, b), pynvml.nvmlDeviceGetP2PStatus, near, far, _PEER_WRITE)),
            redirected=self.host.redirected(devices[a], devices[b]),
        )

    def nvlinks(
        self, gpu: int, handle: Any, capability: tuple[int, int] | None, bus_ids: Sequence[str | None]
    ) -> _NvLinks:
        """Where the active links of one GPU lead. One unknown link makes all of them unknown."""
        wanted = [_LINK_COUNT, _SWITCH_LINK_COUNT, _LINK_VERSION, *_LINK_STATES, *_LINK_SPEEDS, *_OLD_SPEEDS]
        answers = self.ask((gpu,), pynvml.nvmlDeviceGetFieldValues, handle, wanted) or ()
        fields = {(value.fieldId, value.scopeId): _field(value) for value in answers}

        # As in NCCL: from Hopper on the field has the state, and the call is deprecated.
        if (capability or (0, 0)) >= (9, 0) and _count(fields.get(_LINK_STATES[0])) is not None:
            states = [fields.get(key) for key in _LINK_STATES]
        else:
            call = pynvml.nvmlDeviceGetNvLinkState
            states = [
                self.ask((gpu,), call, handle, link, no_link=_ABSENT) for link in range(len(_LINK_STATES))
            ]
        each = _each(states, fields)
        version = _count(fields.get(_LINK_VERSION))
        if version is None and each:
            version = self.ask((gpu,), pynvml.nvmlDeviceGetNvLinkVersion, handle, 0, fine=_NO_LINK)
        unknown = _NvLinks(None, _count(fields.get(_SWITCH_LINK_COUNT)), each, _VERSIONS.get(version or 0))
        if None in states or (set(states) == {_ABSENT} and _count(fields.get(_LINK_COUNT))):
            return unknown

        peers: Counter[str] = Counter()
        switch = 0
        for link in (link for link, state in enumerate(states) if state in _ACTIVE):
            kind = self.ask((gpu,), pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                switch += 1
                continue
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_IBMNPU:
                continue
            remote = self.ask((gpu,), pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
            bus_id = _bus_id(remote)
            is_gpu = kind == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU
            if bus_id is not None and (is_gpu or bus_id in bus_ids):
                peers[bus_id] += 1
            elif remote is not None and bus_id is None and not is_gpu:
                # Virtual machines and some switches hide the far end; NCCL also takes that for a switch.
                switch += 1
            else:
                return unknown
        return replace(unknown, peers=peers, switch=switch)

    def fabric(self, gpu: int, handle: Any) -> Fabric | None:
        """How far a GPU is registered with its NVSwitch; ``None`` if it need not be (A100), or is unknown."""
        # The newer version also has the health; older drivers do not have it.
        for info in (pynvml.c_nvmlGpuFabricInfo_v3_t(), pynvml.c_nvmlGpuFabricInfo_v2_t()):
            call = pynvml.nvmlDeviceGetGpuFabricInfoV
            if self.ask((gpu,), call, handle, ctypes.byref(info)) is not None:
                break
        else:
            return None
        state = _FABRIC.get(info.state)
        if state != "completed":
            return state
        health = getattr(info, "healthSummary", 0)
        return _HEALTH.get(health, state) if info.status == pynvml.NVML_SUCCESS else "failed"

    def errors_of(self, gpu: int) -> tuple[str, ...]:
        return tuple(f"{call}: {error}" for (call, error), where in self.failures.items() if (gpu,) in where)

    def problem(self) -> str | None:
        """All failures in one sentence, by error."""
        by_error: dict[str, list[str]] = {}
        for (call, error), where in self.failures.items():
            # If all failed pairs have one GPU in common, that GPU is the cause.
            gpus = set.intersection(*map(set, where)) or set().union(*where)
            by_error.setdefault(error, []).append(f"{call} on GPU {ordinals(tuple(gpus))}" if gpus else call)
        errors = (f"{error}: {', '.join(calls)}" for error, calls in by_error.items())
        return "NVML answered in part: " + "; ".join(errors) if by_error else None


def _each(
    states: Sequence[int | None], fields: Mapping[tuple[int, int], int | None]
) -> tuple[NvLinkFacts, ...] | None:
    """The links of one GPU, in NVML's order; ``None`` if their number is unknown."""
    present = [link for link, state in enumerate(states) if state not in (None, _ABSENT)]
    told = _count(fields.get(_LINK_COUNT))
    count = told if None in states or (not present and told) else max(present, default=-1) + 1
    if count is None:
        return None
    # A link that is down has no speed; the driver reports 0.
    return tuple(
        NvLinkFacts(
            state=_STATES.get(state), mb_per_s=_count(fields.get(new)) or _count(fields.get(old)) or None
        )
        for state, new, old in list(zip_longest(states, _LINK_SPEEDS, _OLD_SPEEDS))[:count]
    )


def _between(one: _NvLinks, other: _NvLinks, one_bus_id: str | None, other_bus_id: str | None) -> int | None:
    """NVLinks between two GPUs, as ``nvidia-smi topo -m`` counts them."""
    # Either end can report the direct links.
    direct = [n for n in (one.to(other_bus_id), other.to(one_bus_id)) if n is not None]
    # On a switch two GPUs have as many links as the one with fewer; if one has none, the answer is 0.
    switch = [n for n in (one.switch, other.switch) if n is not None]
    known = [min(direct)] if direct else []
    if len(switch) == 2 or 0 in switch:
        known.append(min(switch))
    return max(known) if len(known) == 2 or any(known) else None


def _profile(name: str | None, attributes: Any, gpu_memory_bytes: int | None) -> str | None:
    """The profile of a MIG instance, from its size: ``1g.10gb``.

    Newer drivers have it at the end of the name. Otherwise it follows from the attributes, as in NVIDIA's go-nvlib
    (``getMigMemorySizeGB``): the GB are those of as many eighths of the GPU's memory as the instance touches.
    """
    _, told, profile = (name or "").rpartition(" MIG ")
    if told:
        return profile
    if not (attributes and gpu_memory_bytes and attributes.gpuInstanceSliceCount and attributes.memorySizeMB):
        return None
    eighths = -(-8 * (attributes.memorySizeMB << 20) // gpu_memory_bytes)
    gpu_gb = -(-gpu_memory_bytes >> 30)
    slices, of = attributes.computeInstanceSliceCount, attributes.gpuInstanceSliceCount
    part = f"{slices}c." if slices not in (0, of) else ""
    return f"{part}{of}g.{(eighths * gpu_gb + 4) // 8}gb"


def _field(value: Any) -> int | None:
    """A field's number. NVML gives each field a return code of its own."""
    if value.nvmlReturn == pynvml.NVML_SUCCESS:
        return int(value.value.uiVal)
    return _ABSENT if value.nvmlReturn in _NO_LINK else None


def _count(number: int | None) -> int | None:
    return None if number == _ABSENT else number


def _bus_id(pci: Any) -> str | None:
    """The address as sysfs writes it. From the numbers, as the text has too few digits for some domains."""
    if pci is None or not pci.busId or pci.busId.upper().startswith("FFFFFFFF"):
        return None
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def _bits(words: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of the bits that are set, in 64-bit words."""
    return tuple(64 * i + bit for i, word in enumerate(words or ()) for bit in range(64) if word >> bit & 1)


def _allowed(status: int | None) -> bool | None:
    return None if status is None or status == _PEER_UNKNOWN else status == _PEER_OK


def _sentence(error: pynvml.NVMLError) -> str:
    return f"{str(error).rstrip('.')} (NVML error {error.value})"
