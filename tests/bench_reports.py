"""Reports of `comask bench` with made-up numbers that fill their columns."""

from __future__ import annotations

from comask.runtime.bench.latency import BackendLatency, LatencyReport
from comask.runtime.bench.machine import Machine
from comask.runtime.bench.sweep import SweepReport, SweepRow
from comask.runtime.bench.timing import Percentiles, StreamTiming

MACHINE = Machine(
    cpu="CPU", cores=2, load=0.5, omp_num_threads=None, gpu=None, system="Linux", versions={}
)
PARTS = {"prepare": 10.0, "stage1": 200.0, "stage2": 300.0, "other": 1.0, "results": 2.0,
         "encode": 40.0, "sum": 600.0}  # fmt: skip


def latency_report(*, stream: bool, subject: str = "noise") -> LatencyReport:
    """Of two backends with `stream`, else of one; medians of parts do not add up to that of the sums."""

    def backend(stream: StreamTiming | None) -> BackendLatency:
        return BackendLatency(
            runs_as="", device="cpu", stream=stream, warm_ups=0,
            milliseconds={p: Percentiles(v, 1.2 * v, 2 * v) for p, v in PARTS.items()},
            images_per_second=123.45, ratio=12.34, outside_stages=0.1234, cores_busy=15.5,
            detections_per_image=100.0, resident_bytes=20 << 30, gpu_bytes=20 << 30,
        )  # fmt: skip

    backends = {"torch": backend(None)}
    if stream:
        alone = Percentiles(600.0, 600.0, 600.0)
        backends["tensorrt-rtx:fp16"] = backend(
            StreamTiming(milliseconds=alone, images_per_second=123.4, slots=3, gpu_bytes=20 << 30)
        )
    return LatencyReport(
        bundle="", machine=MACHINE, subject=subject, batch=1, proposals=None, short_side=None,
        runs=5, reference="torch", canvases=[], backends=backends,
    )  # fmt: skip


def sweep_report(*losses: float) -> SweepReport:
    """Settings that get slower as they lose less; all are on the front."""
    rows = [
        SweepRow(
            backend="tensorrt-rtx:fp16", proposals=1000, short_side=1333, batch=16, box_ap=100.0,
            mask_ap=99.9, loss=loss, ms_per_image=999.0 + i, ms_per_batch=15999.0, ratio=12.34,
            chosen=loss == 0, on_front=True, reference=loss == 0,
        )
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    return SweepReport(
        bundle="", machine=MACHINE, data="shapes", images=100, not_decoded=0, runs=5, max_loss=0.5,
        settings=rows, skipped=[], finished=True, verdict="", command="", python="",
    )  # fmt: skip
