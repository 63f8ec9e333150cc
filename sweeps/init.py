"""A new study file, commented, that passes `check` as it is."""

from pathlib import Path

from research.atomic import write_text
from research.errors import UserError

TEMPLATE = Path(__file__).with_name("template.yaml")


def init(name: str, folder: Path) -> Path:
    """Write `folder`/NAME.yaml; its path comes back.

    UserError if `name` cannot name a directory, if the file is there already (it is never overwritten), or cannot be written.
    """
    if not name or not all(c.isalnum() or c in "-_" for c in name):
        raise UserError(f"NAME = {name!r}: must be letters, digits, - and _: it names the study's directory; --folder says where the file goes")
    path = folder / f"{name}.yaml"
    if path.exists():
        raise UserError(f"{path}: is there already and is not overwritten; give another NAME, or remove it")
    text = TEMPLATE.read_text(encoding="utf-8").replace("{name}", name).replace("{file}", str(path))
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path
