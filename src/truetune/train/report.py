"""What was asked for and what is in effect, side by side."""

from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from truetune.train.optim import ParameterGroup


@dataclass
class Line:
    part: str
    asked: str
    in_effect: str
    why: str = ""


@dataclass
class TrainReport:
    """Printed at the start of a run and kept in its record.

    `stock`: why this run is plain TRL; empty when it is ours.
    `fused_losses`, `packed_batches`, `padded_batches`, `attention_calls`: what really ran, counted as it ran.
    """

    stock: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    groups: list[ParameterGroup] = field(default_factory=list)
    padded_because: dict[str, int] = field(default_factory=dict)
    fused_losses: int = 0
    packed_batches: int = 0
    padded_batches: int = 0
    attention_calls: dict[str, int] = field(default_factory=dict)

    def add(self, part: str, asked: str, in_effect: str, why: str = "") -> None:
        self.lines.append(Line(part, asked, in_effect, why))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def parts_table(self) -> Table:
        table = Table(title="Asked for and in effect", title_justify="left")
        for column in ("part", "asked", "in effect", "why"):
            table.add_column(column, overflow="fold")
        for line in self.lines:
            table.add_row(line.part, line.asked, line.in_effect, line.why)
        return table

    def groups_table(self) -> Table:
        table = Table(title="Trained parameters", title_justify="left")
        table.add_column("group")
        for column in ("tensors", "parameters", "learning rate", "weight decay"):
            table.add_column(column, justify="right")
        for group in self.groups:
            sizes = (f"{group.tensors:,}", f"{group.parameters:,}")
            table.add_row(group.name, *sizes, f"{group.learning_rate:.3g}", f"{group.weight_decay:g}")
        return table


def by_reason(reasons: list[str]) -> list[str]:
    """ "A: it is not installed", "B: it is not installed" -> "A, B: it is not installed"."""
    names: dict[str, list[str]] = {}
    for line in reasons:
        name, _, reason = line.partition(": ")
        names.setdefault(reason, []).append(name)
    return [f"{', '.join(those)}: {reason}" for reason, those in names.items()]
