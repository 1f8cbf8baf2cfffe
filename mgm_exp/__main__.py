"""``python -m mgm_exp``: one run, or a sweep with ``-m``."""

import sys

from mgm_exp.command import main

if __name__ == "__main__":
    sys.exit(main())
