"""``ironmoe`` and ``python -m ironmoe.bench``."""

import sys


def main() -> None:
    """Run the command line; without its packages, say how to get them."""
    try:
        from ironmoe.bench.cli import app
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("ironmoe"):
            raise
        sys.exit(f"ironmoe: the command line needs the package {error.name!r}: pip install 'ironmoe[bench]'")
    app()


if __name__ == "__main__":
    main()
