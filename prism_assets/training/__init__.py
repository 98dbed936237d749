"""Fine-tuning on a selection: a LoRA adapter from tokenised examples."""
