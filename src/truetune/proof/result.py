"""What checks found: a table for the eye, and proof.json."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich.markup import escape
from rich.table import Table

Verdict = Literal["pass", "warn", "fail", "skip"]
STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


@dataclass(frozen=True)
class Check:
    """One line of a proof.

    seen, limit: what was found, and what would still have passed
    mend: of a warning or failure, a clause that names the cause and what to do
    allow: the name by which a failure can be accepted
    details: numbers and rows behind `seen`, for proof.json
    proven: the day on which an earlier run made this check, which this one did not make again
    """

    name: str
    seen: str
    limit: str
    verdict: Verdict
    mend: str = ""
    allow: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    proven: str = ""


@dataclass
class Proof:
    """All checks of a run, in the order in which they ran. `notes`: what was noticed while it ran.

    `seconds` all of them took; `durations` each took that was made, by the name of the first that it gives.
    """

    checks: list[Check] = field(default_factory=list)
    seconds: float = 0.0
    durations: dict[str, float] = field(default_factory=dict)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.verdict == "fail"]

    def to_dict(self) -> dict[str, Any]:
        return _finite({"passed": not self.failures, **asdict(self)})

    def table(self, title: str = "") -> Table:
        table = Table(title=title or f"Proof ({self.seconds:.1f} s)", title_justify="left")
        for column in ("check", "seen", "limit", "verdict"):
            table.add_column(column, overflow="fold")
        for check in self.checks:
            style = STYLES[check.verdict]
            seen = check.seen + (f" (proven before, on {check.proven})" if check.proven else "")
            texts = (escape(text) for text in (check.name, seen, check.limit))  # a token may be [/INST]
            table.add_row(*texts, f"[{style}]{check.verdict}[/{style}]")
        return table

    def warnings(self) -> list[str]:
        return [f"{check.name}: {check.mend}" for check in self.checks if check.verdict == "warn" and check.mend]


def accepted(check: Check, allow: list[str]) -> Check:
    """A failure that the user accepts by name is a warning."""
    if check.verdict == "fail" and check.allow in allow:
        return Check(**{**vars(check), "verdict": "warn", "limit": f"{check.limit} (allowed: {check.allow})"})
    return check


def failure(check: Check) -> str:
    """The sentence that stops a run."""
    way = f", or accept it with allow: [{check.allow}]" if check.allow else ""
    return f"{check.name} failed: {check.seen}, where {check.limit} would pass; {check.mend}{way}."


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
