"""The gradient engine alone: per-example gradients of LoRA parameters, preconditioned and sketched. Knows no asset and no lake."""
