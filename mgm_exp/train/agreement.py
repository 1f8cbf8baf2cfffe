"""Whether all processes are at the same optimizer step and take their samples from the same batch."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from mgm_exp.errors import TrainingFailed


def batch_fingerprint(samples: Sequence[int], data: str) -> int:
    """A number of 52 bits (exact in float64) that says which samples of which data a global batch holds.

    Args:
        samples: Numbers of all samples of the step, over all processes.
        data: Fingerprint of the rows that they are numbers of.
    """
    digest = hashlib.sha256(f"{data}:{','.join(map(str, samples))}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 12


def check_agreement(steps: Sequence[float], fingerprints: Sequence[float]) -> None:
    """Compares what every process says of its step; the same answer on all of them.

    Args:
        steps: Rank -> the step it is at, from 0.
        fingerprints: Rank -> :func:`batch_fingerprint` of its step.

    Raises:
        TrainingFailed: They differ; names those that are not with the majority (of two: the second).
    """
    found = list(zip((int(step) for step in steps), (int(value) for value in fingerprints), strict=True))
    (usual, count), *others = Counter(found).most_common()
    if not others:
        return
    odd = [rank for rank, pair in enumerate(found) if pair != usual]
    details = "; ".join(
        f"process {rank} is at step {found[rank][0] + 1} with batch {found[rank][1]:013x}" for rank in odd[:4]
    )
    raise TrainingFailed(
        f"The processes are out of step: {details}{', ...' if len(odd) > 4 else ''}; {count} other(s) are at step "
        f"{usual[0] + 1} with batch {usual[1]:013x}.",
        advice="Their data or their checkpoint differ: see that every machine reads the same files.",
    )
