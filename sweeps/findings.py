"""What `doctor` says."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

OK: Literal["ok"] = "ok"
WARNING: Literal["warning"] = "warning"
PROBLEM: Literal["problem"] = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about one subject.  A problem spoils a study, a warning may; both come with a remedy."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    sentence: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.level == OK or self.remedy, f"{self.sentence}: has no remedy"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
