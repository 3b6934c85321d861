"""`python -m aem_exp.sweep`; see `command`."""

import sys

from aem_exp.sweep.command import main

if __name__ == "__main__":
    sys.exit(main())
