"""`python -m aem_exp.proxy`; see `command`."""

import sys

from aem_exp.proxy.command import main

if __name__ == "__main__":
    sys.exit(main())
