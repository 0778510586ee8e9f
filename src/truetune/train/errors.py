class TrainError(ValueError):
    """What was asked of the training cannot be had: one sentence with the cause and the mend."""
