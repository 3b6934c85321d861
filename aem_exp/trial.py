"""`python -m aem_exp.trial` starts a worker of a study; see `sweep.trial`.

A job runs the code that was frozen in its folder, possibly by another version. Therefore this module path must not change.
"""

import sys

from aem_exp.sweep.trial import main

if __name__ == "__main__":
    sys.exit(main())
