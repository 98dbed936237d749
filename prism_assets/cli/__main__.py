"""`python -m prism_assets.cli`: `prism`, for where the command is not on the path."""

from prism_assets.cli import main

if __name__ == "__main__":
    main()
