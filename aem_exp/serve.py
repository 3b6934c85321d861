"""`python -m aem_exp.serve` starts a server of a run; see `jobs.serve`.

A job runs the code that was frozen in its folder, possibly by another version. Therefore this module path must not change.
"""

import sys

from aem_exp.jobs.serve import main

if __name__ == "__main__":
    sys.exit(main())
