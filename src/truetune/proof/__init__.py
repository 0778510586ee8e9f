"""Is it right? Checks that run before a training and beside it; docs/proof.md says what each proves."""
