"""`python -m aem_exp.tracking`; see `command`."""

import sys

from aem_exp.tracking.command import main

if __name__ == "__main__":
    sys.exit(main())
