"""Training of the attention U-Net; nothing in the container imports this package."""

from pathlib import Path


class TrainingError(ValueError):
    """Data, a recipe or a run that cannot be used; the message is the reason, in one line."""


def shipped_or_own(folder: Path, name: str, suffix: str) -> Path:
    """Return the path of a shipped file by its name, or of the user's own by its suffix.

    Raises:
        TrainingError: there is no such file.
    """
    path = Path(name) if name.endswith(suffix) else folder / f"{name}{suffix}"
    if not path.is_file():
        shipped = ", ".join(sorted(file.stem for file in folder.glob(f"*{suffix}")))
        raise TrainingError(
            f"no {name} in {folder.name}: name one of {shipped}, or a {suffix} file"
        )
    return path
