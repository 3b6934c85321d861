"""`python -m aem_exp.evaluate`; see `command`."""

import sys

from aem_exp.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
