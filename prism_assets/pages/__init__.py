"""Pages of the documentation that are made from the code: `python -m prism_assets.pages` writes them all into `docs/`.

Each module here prints one (`python -m prism_assets.pages.commands`). Those of settings and formats are made by
`settings.reference` and `corpus.formats_page`. A test compares all of them with what is in `docs/`.
"""


def all_pages() -> dict[str, str]:
    """Markdown by path below `docs/`."""
    from prism_assets.corpus.formats_page import formats_page
    from prism_assets.pages.assets import assets_page
    from prism_assets.pages.commands import commands_page
    from prism_assets.pages.python_api import python_page
    from prism_assets.pages.strategies import strategies_page
    from prism_assets.pages.tables import tables_page
    from prism_assets.settings.reference import settings_page

    return {
        "settings.md": settings_page(),
        "formats.md": formats_page(),
        "reference/commands.md": commands_page(),
        "reference/assets.md": assets_page(),
        "reference/tables.md": tables_page(),
        "reference/strategies.md": strategies_page(),
        "reference/python.md": python_page(),
    }
