class DataError(ValueError):
    """The data, or what was asked of it, is wrong: one sentence with the cause and the mend."""
