"""Training of the attention U-Net; nothing in the container imports this package."""


class TrainingError(ValueError):
    """What the user can mend: data, a recipe, a run; the message is the reason, in one line."""
