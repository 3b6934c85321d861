"""`python -m aem_exp.run`; see `command`."""

import sys

from aem_exp.run.command import main

if __name__ == "__main__":
    sys.exit(main())
