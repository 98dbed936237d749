"""Export: adapters and data, each with a card, as folders to share."""
