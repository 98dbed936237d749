"""The embedded demo: generated string skills, a tiny language model that knows some of them, and an inbox.

- `skills`: the skills, as plain functions, and the examples drawn from them
- `model/`: the checkpoint, a character-level Llama of 0.8M parameters (fp32 safetensors)
- `make_model`: the script that trained it
- `data`: writes the demo's inbox, targets and held-out examples, and its settings
"""
