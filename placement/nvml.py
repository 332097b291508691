"""One node's GPU facts, read from NVML. The only module that imports its binding; it needs no Ray.

An NVML call may block for ever inside the driver, where no signal reaches it. So :class:`Reader` lets a child
process read (``python -m placement.nvml``, which prints one JSON document) and gives it a deadline.

What a call that fails means, fact by fact:

- The fact is unknown (``None``, ``()``, ``Path.UNKNOWN``), never zero; every other fact is still read.
- The failure is reported, in :attr:`GpuFacts.errors` or for pairs and the node in :attr:`NodeFacts.problem`,
  unless it says that this GPU or this driver has no such feature (:data:`_NO_FEATURE`).
- NVLinks: a GPU without any says NOT_SUPPORTED, or INVALID_ARGUMENT, to every link number. That is zero
  NVLinks, and known, unless the same GPU counts some links elsewhere (field 91): then it is unknown.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import pynvml
from pydantic import ValidationError

from placement.core.topology import Path, ordinals
from placement.wire.facts import GpuFacts, NodeFacts, PairFacts

_NO_FEATURE = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,  # a driver older than the binding
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,  # the same, for a newer version of a structure
    pynvml.NVML_ERROR_DEPRECATED,
}
_NO_LINK = {pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_INVALID_ARGUMENT}

# Linux knows at most 1024 NUMA nodes and 8192 CPUs (its Kconfig: NODES_SHIFT, NR_CPUS).
_NUMA_WORDS, _CPU_WORDS = 1024 // 64, 8192 // 64

_LINK_COUNT = (pynvml.NVML_FI_DEV_NVLINK_LINK_COUNT, 0)
_SWITCH_LINK_COUNT = (pynvml.NVML_FI_DEV_NVSWITCH_CONNECTED_LINK_COUNT, 0)
_LINK_STATES = tuple((pynvml.NVML_FI_DEV_NVLINK_GET_STATE, n) for n in range(pynvml.NVML_NVLINK_MAX_LINKS))
_ACTIVE = {pynvml.NVML_NVLINK_STATE_ACTIVE, pynvml.NVML_NVLINK_STATE_SLEEP}  # traffic wakes a sleeping link

_ANCESTORS = {
    pynvml.NVML_TOPOLOGY_INTERNAL: Path.PIX,  # two GPUs on one board
    pynvml.NVML_TOPOLOGY_SINGLE: Path.PIX,
    pynvml.NVML_TOPOLOGY_MULTIPLE: Path.PXB,
    pynvml.NVML_TOPOLOGY_HOSTBRIDGE: Path.PHB,
    pynvml.NVML_TOPOLOGY_NODE: Path.NODE,
    pynvml.NVML_TOPOLOGY_SYSTEM: Path.SYS,
}
_PEER_OK, _PEER_UNKNOWN = 0, 6
_PEER_READ, _PEER_WRITE = 0, 1  # pynvml's own NVML_P2P_CAPS_INDEX_READ is a tuple by mistake


def read() -> NodeFacts:
    """Reads the GPUs of this node in this process. May block for ever: see :class:`Reader`.

    Used memory is whatever is not free, the driver's reserve included. Never raises: without a usable NVML
    the source is ``"none"`` and ``problem`` says why.
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
    """The active NVLinks of one GPU: how many lead to each PCI address, and to NVSwitches. None: unknown."""

    peers: Mapping[str, int] | None
    switch: int | None

    def to(self, bus_id: str | None) -> int | None:
        """How many lead straight to the GPU at that address."""
        if self.peers is None or (bus_id is None and self.peers):
            return None
        return self.peers.get(bus_id, 0) if bus_id else 0


@dataclass
class _Reading:
    """One pass over all GPUs; keeps what failed, as sentence -> the GPUs that each such call was about."""

    failures: dict[str, set[tuple[int, ...]]] = field(default_factory=dict)

    def ask(self, gpus: tuple[int, ...], call: Callable[..., Any], *args: Any, no_link: Any = None) -> Any:
        """The answer of an NVML call about ``gpus``, or ``None``; ``no_link`` if there is no such NVLink."""
        try:
            return call(*args)
        except pynvml.NVMLError as error:
            # By number: the class of a known error may be missing in an older binding.
            if no_link is not None and error.value in _NO_LINK:
                return no_link
            if error.value not in _NO_FEATURE or call is pynvml.nvmlDeviceGetHandleByIndex:
                self.failures.setdefault(f"{call.__name__}: {_sentence(error)}", set()).add(gpus)
        except UnicodeDecodeError:
            self.failures.setdefault(f"{call.__name__}: no text", set()).add(gpus)
        return None

    def node(self) -> NodeFacts:
        driver = self.ask((), pynvml.nvmlSystemGetDriverVersion)
        try:
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            problem = f"NVML cannot count the GPUs: {_sentence(error)}"
            return NodeFacts(source="none", driver_version=driver, problem=problem)
        handles = [self.ask((gpu,), pynvml.nvmlDeviceGetHandleByIndex, gpu) for gpu in range(count)]
        bus_ids = [
            None if handle is None else _bus_id(self.ask((gpu,), pynvml.nvmlDeviceGetPciInfo_v3, handle))
            for gpu, handle in enumerate(handles)
        ]
        links: list[_NvLinks] = []
        gpus: list[GpuFacts] = []
        for gpu, handle in enumerate(handles):
            if handle is None:
                links.append(_NvLinks(peers=None, switch=None))
                gpus.append(GpuFacts(ordinal=gpu, errors=self._errors(gpu)))
                continue
            capability = self.ask((gpu,), pynvml.nvmlDeviceGetCudaComputeCapability, handle)
            links.append(self.nvlinks(gpu, handle, capability or (0, 0), bus_ids))
            gpus.append(self.gpu(gpu, handle, bus_ids[gpu], capability, links[-1].switch))
        pairs = [
            self.pair(a, b, handles, _between(links[a], links[b], bus_ids[a], bus_ids[b]))
            for a in range(count)
            for b in range(a + 1, count)
        ]
        return NodeFacts(
            source="nvml", gpus=tuple(gpus), pairs=tuple(pairs), driver_version=driver, problem=self._problem()
        )

    def gpu(
        self,
        gpu: int,
        handle: Any,
        bus_id: str | None,
        capability: tuple[int, int] | None,
        switch_links: int | None,
    ) -> GpuFacts:
        one = (gpu,)
        # Either version will do, so that the first one's failure is of no interest if the second answers.
        second = _Reading()
        memory = second.ask(one, pynvml.nvmlDeviceGetMemoryInfo, handle, pynvml.nvmlMemory_v2)
        memory = memory or self.ask(one, pynvml.nvmlDeviceGetMemoryInfo, handle)
        mig = self.ask(one, pynvml.nvmlDeviceGetMigMode, handle)
        scope = pynvml.NVML_AFFINITY_SCOPE_NODE
        return GpuFacts(
            ordinal=gpu,
            uuid=self.ask(one, pynvml.nvmlDeviceGetUUID, handle),
            name=self.ask(one, pynvml.nvmlDeviceGetName, handle),
            memory_total_bytes=memory and memory.total,
            memory_used_bytes=memory and memory.total - memory.free,
            compute_capability=capability,
            pci_bus_id=bus_id,
            numa_nodes=_bits(self.ask(one, pynvml.nvmlDeviceGetMemoryAffinity, handle, _NUMA_WORDS, scope)),
            cpus=_bits(self.ask(one, pynvml.nvmlDeviceGetCpuAffinity, handle, _CPU_WORDS)),
            mig_enabled=mig and mig[0] == pynvml.NVML_DEVICE_MIG_ENABLE,
            nvswitch_links=switch_links,
            errors=self._errors(gpu),
        )

    def pair(self, a: int, b: int, handles: Sequence[Any], nvlinks: int | None) -> PairFacts:
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
        )

    def nvlinks(
        self, gpu: int, handle: Any, capability: tuple[int, int], bus_ids: Sequence[str | None]
    ) -> _NvLinks:
        one = (gpu,)
        wanted = [_LINK_COUNT, _SWITCH_LINK_COUNT, *_LINK_STATES]
        values = self.ask(one, pynvml.nvmlDeviceGetFieldValues, handle, wanted) or ()
        # Each value has a return code of its own.
        fields = {(v.fieldId, v.scopeId): v.value.uiVal for v in values if v.nvmlReturn == pynvml.NVML_SUCCESS}
        counted_switch = fields.get(_SWITCH_LINK_COUNT)
        unknown = _NvLinks(peers=None, switch=counted_switch)

        active: list[int] = []
        present = 0
        # NCCL's choice too: from Hopper on, the field tells the state, and the call is deprecated.
        by_field = capability >= (9, 0) and _LINK_STATES[0] in fields
        for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
            if by_field:
                state = fields.get(_LINK_STATES[link], -1)
            else:
                state = self.ask(one, pynvml.nvmlDeviceGetNvLinkState, handle, link, no_link=-1)
            if state is None:
                return unknown
            present += state >= 0
            if state in _ACTIVE:
                active.append(link)
        if not present and fields.get(_LINK_COUNT, 0):
            return unknown

        peers: Counter[str] = Counter()
        switch = 0
        for link in active:
            kind = self.ask(one, pynvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
                switch += 1
                continue
            if kind == pynvml.NVML_NVLINK_DEVICE_TYPE_IBMNPU:
                continue
            remote = self.ask(one, pynvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
            bus_id = _bus_id(remote)
            is_gpu = kind == pynvml.NVML_NVLINK_DEVICE_TYPE_GPU
            if bus_id is not None and (is_gpu or bus_id in bus_ids):
                peers[bus_id] += 1
            elif remote is not None and bus_id is None and not is_gpu:
                # Virtual machines and some switches hide the far end; NCCL takes it for a switch as well.
                switch += 1
            else:
                return unknown
        return _NvLinks(peers=peers, switch=switch)

    def _errors(self, gpu: int) -> tuple[str, ...]:
        return tuple(sentence for sentence, where in self.failures.items() if (gpu,) in where)

    def _problem(self) -> str | None:
        parts = []
        for sentence, where in self.failures.items():
            gpus = {gpu for each in where for gpu in each}
            parts.append(f"{sentence} (GPU {ordinals(tuple(gpus))})" if gpus else sentence)
        return "NVML answered in part: " + "; ".join(parts) if parts else None


def _between(one: _NvLinks, other: _NvLinks, one_bus_id: str | None, other_bus_id: str | None) -> int | None:
    """NVLinks between two GPUs, as ``nvidia-smi topo -m`` counts them. Either end can tell the direct ones."""
    direct = [n for n in (one.to(other_bus_id), other.to(one_bus_id)) if n is not None]
    # What a switch offers two GPUs is limited by the one with fewer links; one without any settles it.
    switch = [n for n in (one.switch, other.switch) if n is not None]
    known = [min(direct)] if direct else []
    if len(switch) == 2 or 0 in switch:
        known.append(min(switch))
    return max(known) if len(known) == 2 or any(known) else None


def _bus_id(pci: Any) -> str | None:
    """The address as sysfs writes it. From the numbers: the text has fixed digits, domains may need more."""
    if pci is None:
        return None
    text = pci.busId.decode(errors="replace") if isinstance(pci.busId, bytes) else str(pci.busId)
    if not text or text.upper().startswith("FFFFFFFF"):
        return None
    return f"{pci.domain:04x}:{pci.bus:02x}:{pci.device:02x}.0"


def _bits(words: Sequence[int] | None) -> tuple[int, ...]:
    """The numbers of the bits that are set, in 64-bit words."""
    return tuple(64 * i + bit for i, word in enumerate(words or ()) for bit in range(64) if word >> bit & 1)


def _allowed(status: int | None) -> bool | None:
    return None if status is None or status == _PEER_UNKNOWN else status == _PEER_OK


def _sentence(error: pynvml.NVMLError) -> str:
    return f"{str(error).rstrip('.')} (NVML error {error.value})"


class Reader:
    """Keeps the last good reading of this node's GPUs. Thread-safe.

    Each reading is made by a child process. One that passes its deadline is killed. Where that does not help
    (it hangs inside the driver) it is left alone, and no other is started before it has ended.

    Args:
        deadline_seconds: how long a reading may take. A first one takes up to 30 s where the driver starts the
            GPUs for it (no persistence mode; measured by others: Azure/aks-gpu#105), a warm one below 1 s.
        env: variables set for the child, beside this process's own.
        clock: monotonic seconds; for the age of a reading.
    """

    def __init__(
        self,
        deadline_seconds: float = 30.0,
        env: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deadline = deadline_seconds
        # Whatever this process can import, the child can; its working directory is no place to import from.
        paths = [str(FilePath(__file__).parents[1]), *filter(None, sys.path)]
        self._env = {**os.environ, **(env or {}), "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        self._clock = clock
        self._changed = threading.Condition()
        self._last: tuple[NodeFacts, float] | None = None
        self._failure: str | None = None
        self._reading = self._closed = False
        self._child: subprocess.Popen[str] | None = None

    def facts(self) -> NodeFacts:
        """The last good reading with its age, and in ``problem`` why the newest one failed, if it did.

        The first call starts a reading and waits for it, at most for the deadline. Never raises: if no reading
        was ever made, the source is ``"none"``.
        """
        with self._changed:
            if self._last is None and self._failure is None:
                self.refresh()
                self._changed.wait_for(lambda: not self._reading, self._deadline)
            if self._last is None:
                return NodeFacts(source="none", problem=self._failure or self._too_late())
            reading, read_at = self._last
            update = {"age_seconds": self._clock() - read_at, "problem": self._failure or reading.problem}
            return reading.model_copy(update=update)

    def refresh(self) -> None:
        """Starts a new reading in the background, unless one is under way or stuck. Returns at once."""
        with self._changed:
            if self._closed or self._reading:
                return
            if self._child is not None and self._child.poll() is None:
                return
            self._reading = True
        threading.Thread(target=self._read, name="nvml-reader", daemon=True).start()

    def close(self) -> None:
        """Ends a reading that is under way. The last one can still be asked for."""
        with self._changed:
            self._closed = True
            if self._child is not None:
                self._child.kill()

    def _read(self) -> None:
        started = self._clock()
        reading, failure = None, None
        try:
            reading = self._read_in_child()
        except subprocess.TimeoutExpired:
            failure = self._too_late()
        except (OSError, ValueError) as error:
            failure = str(error)
        with self._changed:
            self._reading = False
            if reading is not None and reading.source == "none" and self._last is not None:
                reading, failure = None, reading.problem
            self._failure = failure
            if reading is not None:
                self._last = reading, started
            self._changed.notify_all()

    def _read_in_child(self) -> NodeFacts:
        pipe = subprocess.PIPE
        command = [sys.executable, "-P", "-m", "placement.nvml"]
        with self._changed:
            if self._closed:
                raise ValueError("the reader is closed")
            child = self._child = subprocess.Popen(
                command, env=self._env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
            )
        try:
            output, errors = child.communicate(timeout=self._deadline)
        except subprocess.TimeoutExpired:
            child.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=1.0)
            for stream in (child.stdout, child.stderr):
                if stream is not None:
                    stream.close()
            raise
        try:
            return NodeFacts.model_validate_json(output)
        except ValidationError:
            said = errors.strip().splitlines() or ["it said nothing"]
            raise ValueError(f"the NVML process ended with code {child.returncode}: {said[-1]}") from None

    def _too_late(self) -> str:
        return f"NVML did not answer within {self._deadline:g} s"


if __name__ == "__main__":
    print(read().model_dump_json())
