"""The engines: store, lake, index, language model. They know nothing of the method and nothing of Dagster."""
