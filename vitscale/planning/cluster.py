"""What saves, failures and restarts take on a cluster: a best and a worst case, and where each figure comes from."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from vitscale.planning.goodput import FailureRate, RestartTimes, SaveTimes
from vitscale.planning.updates import FP32_BYTES, UpdateBytes

Basis = Literal["measured", "published", "assumed"]

LLAMA_3_FAILURES_PER_GPU_DAY = 466 / (54 * 16_384)
"""466 interruptions in 54 days on 16,384 H100, 419 of them unexpected (Llama 3, arXiv 2407.21783, section 3.3.4)."""


def checkpoint_bytes(parameters: int, update: UpdateBytes, average: bool) -> int:
    """Bytes of one tag: fp32 weights, the optimizer's state, and the weights' moving average if there is one."""
    weights = FP32_BYTES * parameters * (2 if average else 1)
    return weights + update.element * parameters + update.whole + FP32_BYTES * update.plain


@dataclass(frozen=True)
class ClusterCosts:
    """What a job's saves and restarts are made of; those that grow with the state or the job are rates."""

    failures_per_gpu_day: float
    agree_s: float
    copy_gb_per_gpu_s: float
    storage_gb_per_gpu_s: float
    check_gb_per_s: float
    files_per_s: float
    commit_s: float
    detect_s: float
    requeue_s: float
    node_wait_s: float
    import_s: float
    rendezvous_ms_per_gpu: float
    first_batch_s: float
    compile_s: float
    first_step_s: float

    def failures(self, gpus: int) -> FailureRate:
        """Of a job."""
        return FailureRate(self.failures_per_gpu_day, gpus)

    def stall_s(self, state_bytes: int, gpus: int) -> float:
        """The ranks agree, and each copies its part of the state to the host."""
        return self.agree_s + state_bytes / gpus / (1e9 * self.copy_gb_per_gpu_s)

    def write_s(self, state_bytes: int, gpus: int) -> float:
        """Each rank writes its file and leaves a record; rank 0 looks into all files and commits."""
        return state_bytes / gpus / (1e9 * self.storage_gb_per_gpu_s) + 2 * gpus / self.files_per_s + self.commit_s

    def save(self, state_bytes: int, gpus: int, interval_s: float) -> SaveTimes:
        """Of a job that trains for `interval_s` between two saves."""
        return SaveTimes(interval_s, self.stall_s(state_bytes, gpus), self.write_s(state_bytes, gpus))

    def restart(self, state_bytes: int, gpus: int) -> RestartTimes:
        """Of a job; rank 0 checks the whole tag before the ranks read their parts of it."""
        check_s = state_bytes / (1e9 * self.check_gb_per_s)
        read_s = state_bytes / gpus / (1e9 * self.storage_gb_per_gpu_s)
        return RestartTimes(
            detect_s=self.detect_s,
            requeue_s=self.requeue_s,
            import_s=self.import_s,
            rendezvous_s=self.rendezvous_ms_per_gpu * gpus / 1e3,
            first_batch_s=self.first_batch_s,
            read_s=check_s + read_s + gpus / self.files_per_s,
            compile_s=self.compile_s,
            first_step_s=self.first_step_s,
            node_wait_s=self.node_wait_s,
            node_share=1.0,
        )


BEST = ClusterCosts(
    failures_per_gpu_day=LLAMA_3_FAILURES_PER_GPU_DAY,
    agree_s=0.05,
    copy_gb_per_gpu_s=20,
    storage_gb_per_gpu_s=2000 / 16_384,
    check_gb_per_s=8,
    files_per_s=20_000,
    commit_s=1,
    detect_s=5,
    requeue_s=11,
    node_wait_s=0,
    import_s=5,
    rendezvous_ms_per_gpu=5e3 / 2048,
    first_batch_s=0.078 + 0.29,
    compile_s=15,
    first_step_s=2,
)
"""Everything at hand: a large file system, warm caches, spare nodes, failures that end the job at once."""

WORST = ClusterCosts(
    failures_per_gpu_day=LLAMA_3_FAILURES_PER_GPU_DAY,
    agree_s=1,
    copy_gb_per_gpu_s=2,
    storage_gb_per_gpu_s=10 / 1024,
    check_gb_per_s=1,
    files_per_s=1000,
    commit_s=30,
    detect_s=480 + 60,
    requeue_s=34 + 121,
    node_wait_s=0,
    import_s=60,
    rendezvous_ms_per_gpu=361e3 / 2048,
    first_batch_s=10.1 + 2.49,
    compile_s=180,
    first_step_s=30,
)
"""Small shared storage, cold caches, every failure a hang that the watchdog has to end. Spare nodes are there still."""


class Origin(NamedTuple):
    """Where a figure comes from."""

    what: str
    unit: str
    basis: Basis
    source: str


ORIGINS: dict[str, Origin] = {
    "failures_per_gpu_day": Origin("failures", "a GPU-day", "published", "Llama 3: 466 in 54 days on 16,384 GPUs"),
    "agree_s": Origin("stall: ranks agree", "s", "assumed", "a collective, and its slowest rank"),
    "copy_gb_per_gpu_s": Origin("stall: copy to host", "GB/s a GPU", "assumed", "PCIe 5 x16, 64 nominal"),
    "storage_gb_per_gpu_s": Origin(
        "shared storage",
        "GB/s a GPU",
        "published",
        "Llama 3's 2 TB/s over 16,384 GPUs; worst assumed, 10 GB/s at 1,024",
    ),
    "check_gb_per_s": Origin(
        "check of a tag", "GB/s", "assumed", "by rank 0's node in 8 threads, which hash 1.5 each (measured)"
    ),
    "files_per_s": Origin("files opened or made", "a second", "assumed", "a parallel file system's metadata server"),
    "commit_s": Origin("commit", "s", "assumed", "manifest, flushes, rename"),
    "detect_s": Origin("detection", "s", "assumed", "a process dies; worst, a hang: watchdog.step_s and answer_s"),
    "requeue_s": Origin("requeue", "s", "measured", "Slurm 22.05: requeued; worst, a lost node and cred_expire"),
    "node_wait_s": Origin("wait for a node", "s", "assumed", "a spare node is free"),
    "import_s": Origin("imports", "s", "measured", "CPU time here; worst assumed, cold shared storage"),
    "rendezvous_ms_per_gpu": Origin(
        "rendezvous", "ms a GPU", "published", "MegaScale, 2,048 GPUs: 5 s tuned, 361 s with Megatron's groups"
    ),
    "first_batch_s": Origin("index, first batch", "s", "measured", "14.2 M rows, mapped; worst, converted anew"),
    "compile_s": Origin("compilation", "s", "assumed", "one block, cached or not; no GPU was measured"),
    "first_step_s": Origin("first step", "s", "assumed", "beyond a usual one: contexts, NCCL, autotuning"),
}
"""By field of `ClusterCosts`."""
