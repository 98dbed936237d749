"""The reference model: the base weights, and the pinned LoRA warm-up at whose checkpoints gradients are taken."""
