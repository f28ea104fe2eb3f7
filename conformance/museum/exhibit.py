"""What the museum shows: a bug that somebody shipped, rebuilt, and the laws that must reject it."""

from dataclasses import dataclass

from conformance.adapters import Adapter

REVIEW = "a review of this kit"
"""The source of what nobody is known to have shipped: earlier laws let it pass."""


@dataclass(frozen=True)
class Exhibit:
    """A wrong implementation. `number` is that of the museum's list, `source` where it was met."""

    number: int
    defect: str
    source: str
    adapter: Adapter
    laws: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "laws", tuple(name.replace("_", " ") for name in self.laws))
