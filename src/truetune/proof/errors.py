class ProofError(ValueError):
    """A check failed: one sentence, cause and mend."""
