"""Supervised fine-tuning: the warm-up and the fine-tunings are one function; and generation with what they made."""
