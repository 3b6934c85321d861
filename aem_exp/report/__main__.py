"""`python -m aem_exp.report`; see `command`."""

import sys

from aem_exp.report.command import main

if __name__ == "__main__":
    sys.exit(main())
