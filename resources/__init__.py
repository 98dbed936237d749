"""The engines: lake, vector store, language model. They are Dagster resources and know nothing of `prism_assets`."""
