class ModelError(ValueError):
    """The model, or what was asked of it, is wrong: one sentence with the cause and the mend."""
