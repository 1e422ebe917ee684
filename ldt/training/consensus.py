"""What the ranks of a step agree on besides its loss: the sums of their parts, made by the step's one all-reduce."""

from collections.abc import Sequence
from dataclasses import dataclass

HALF = 2**32  # a digest of 64 bits is summed in two halves, which float64 holds exactly


@dataclass(frozen=True)
class StepConsensus:
    """One rank's part before the step, and the sum over all ranks after it.

    digest: of the step's samples and draws, modulo 2⁶⁴; the others count ranks: those asked to stop, those whose part
    of the save on its way is written or has failed, and those that may not commit it.
    """

    digest: int
    stop_requests: int = 0
    saves_over: int = 0
    saves_failed: int = 0
    commits_refused: int = 0

    def pack(self) -> list[int]:
        """The numbers to be summed over ranks."""
        high, low = divmod(self.digest % 2**64, HALF)
        return [high, low, self.stop_requests, self.saves_over, self.saves_failed, self.commits_refused]

    @classmethod
    def unpack(cls, sums: Sequence[float]) -> "StepConsensus":
        """The inverse of `pack`, of the sums."""
        high, low, *counts = map(int, sums)
        return cls((high * HALF + low) % 2**64, *counts)
