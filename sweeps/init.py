"""A new study file, commented, that passes `check` as it is."""

from pathlib import Path

from research.atomic import write_text
from research.errors import UserError
from sweeps.places import MOST_LETTERS, is_name

TEMPLATE = Path(__file__).with_name("template.yaml")


def init(name: str, folder: Path) -> Path:
    """Write `folder`/NAME.yaml; its path comes back.

    UserError if `name` cannot name a directory, if the file is there already (it is never overwritten), or cannot be written.
    """
    if not is_name(name):
        rule = f"must be 1 to {MOST_LETTERS} letters, digits, - and _, no - in front"
        raise UserError(f"NAME = {name!r}: {rule}: it names the study's directory; --folder says where the file goes")
    path = folder / f"{name}.yaml"
    if path.exists():
        raise UserError(f"{path}: is there already and is not overwritten; give another NAME, or remove it")
    text = TEMPLATE.read_text(encoding="utf-8").replace("{name}", name).replace("{file}", str(path))
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path
