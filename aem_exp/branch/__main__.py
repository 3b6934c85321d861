"""`python -m aem_exp.branch`; see `command`."""

import sys

from aem_exp.branch.command import main

if __name__ == "__main__":
    sys.exit(main())
