"""``python -m lit_rebasin.cli.child PARENT WORDS...``, the command ``lit-rebasin WORDS...`` that ends with the process which began it."""

import sys

from lit_rebasin.cli import main
from lit_rebasin.cli.workers import end_with_parent

if __name__ == "__main__":
    end_with_parent(int(sys.argv.pop(1)))
    sys.exit(main())
