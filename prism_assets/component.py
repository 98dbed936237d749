"""The Dagster component: a project from a `defs.yaml`.

type: prism_assets.PrismProject
attributes:
  config: prism.yaml
  key_prefix: acme
"""

from pathlib import Path

import dagster as dg


class PrismProject(dg.Component, dg.Resolvable, dg.Model):
    """All assets, jobs, sensors and schedules of a `prism.yaml`."""

    config: str = "prism.yaml"  # relative to the folder of defs.yaml
    key_prefix: str | list[str] = []
    group_prefix: str = ""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """The definitions of the project. Raises SettingsError where its file must be changed."""
        from prism_assets.definitions import build_definitions
        from prism_assets.settings import load_settings

        settings = load_settings(Path(context.path) / self.config)
        # A component is merged with definitions that may have an executor of their own.
        return build_definitions(settings, key_prefix=self.key_prefix, group_prefix=self.group_prefix, executor=None)
