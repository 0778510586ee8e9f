"""Loss -> step -> checkpoint: TRL's trainer with our head, attention, batches and parameter groups."""
