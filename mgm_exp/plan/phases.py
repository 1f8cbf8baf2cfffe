"""What a run does beside training: captions are written, and questions are answered. Memory, operations, seconds.

A model that writes goes through two kinds of passes: one over all that it is given, which computes, and one for each
token that it writes, which reads all weights and all that was kept of the tokens before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mgm_exp.plan.memory import GIB, Moment, peak

# Of a card's bandwidth that reading weights reaches; and seconds that starting a kernel takes. Assumptions.
_BANDWIDTH_SHARE = 0.6
_KERNEL_S = 6e-6
_KERNELS_A_BLOCK = 45


@dataclass(frozen=True)
class Writing:
    """The passes that write a token each.

    Args:
        steps: How many, of one device after the other.
        flops: Operations of one of them.
        bytes: That one of them reads.
        blocks: Of the language model.
    """

    steps: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    blocks: int = 0


@dataclass(frozen=True)
class Phase:
    """Captioning, or a benchmark.

    Args:
        name: ``captioning``, ``evaluate[textvqa]``, ``validation``.
        moments: Where memory of a process can be largest.
        smallest: The same at the smallest batch, which it comes down to by itself when memory ends; empty: it does not.
        count: Images or questions; None: nothing says how many.
        reads: Operations of the passes over what is given, for all of them.
        writes: The passes that write.
        devices: Processes that share the work.
        what: What was assumed, as a sentence; empty: nothing.
    """

    name: str
    moments: list[Moment]
    count: int | None
    reads: float
    writes: Writing
    devices: int = 1
    smallest: list[Moment] = field(default_factory=list)
    what: str = ""

    @property
    def peak(self) -> Moment:
        return peak(self.moments)

    @property
    def least(self) -> Moment:
        """The peak that cannot be avoided."""
        return peak(self.smallest or self.moments)

    @property
    def flops(self) -> float | None:
        """Operations of all devices; None where the number of questions is not known."""
        return None if self.count is None else self.reads + self.writes.steps * self.writes.flops

    def hours(self, flops_per_s: float | None, bandwidth_gb_s: float | None) -> float | None:
        """Hours on so many devices; None where the speed, or how many there are, is not known.

        Args:
            flops_per_s: Operations a second of one device, as training reaches them.
            bandwidth_gb_s: Of its memory, 10^9 bytes a second; None: not known, and written tokens cost operations
                alone.
        """
        if self.count is None or flops_per_s is None:
            return None
        step = self.writes.flops / flops_per_s
        if bandwidth_gb_s is not None:
            reading = self.writes.bytes / (bandwidth_gb_s * 1e9 * _BANDWIDTH_SHARE)
            step = max(step, reading, self.writes.blocks * _KERNELS_A_BLOCK * _KERNEL_S)
        return (self.reads / flops_per_s + self.writes.steps * step) / self.devices / 3600

    def to_json(self, hours: float | None) -> dict[str, object]:
        """Its entry in ``phases[]``."""
        return {
            "name": self.name,
            "count": self.count,
            "flops": self.flops,
            "hours": None if hours is None else round(hours, 4),
            "peak_gib": round(self.peak.total / GIB, 4),
            "moment": self.peak.name,
            "note": self.what,
        }


def weights_alone(name: str, weights: float, activations: float, logits: float = 0.0) -> Moment:
    """A moment of a model that only reads and writes."""
    return Moment(name, weights, 0.0, 0.0, activations, logits, 0.0)
