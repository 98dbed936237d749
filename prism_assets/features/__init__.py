"""Per-example LoRA gradients of candidates, preconditioned and sketched: the rows that the index holds."""
