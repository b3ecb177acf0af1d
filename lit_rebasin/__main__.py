"""``python -m lit_rebasin``, the same as the command ``lit-rebasin``."""

import sys

from lit_rebasin.cli import main

if __name__ == "__main__":
    sys.exit(main())
