"""``python -m mgm_exp``: one run, or a sweep with ``-m``."""

import sys

from mgm_exp.signals import heed_from_the_start

if __name__ == "__main__":
    heed_from_the_start()
    from mgm_exp.command import main

    sys.exit(main())
