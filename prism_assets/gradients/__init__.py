"""The gradient engine alone: per-example gradients of LoRA parameters, preconditioned and sketched. It imports no asset
and no lake."""
