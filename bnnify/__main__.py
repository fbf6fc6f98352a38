"""``python -m bnnify`` is the command ``bnnify-cli``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
