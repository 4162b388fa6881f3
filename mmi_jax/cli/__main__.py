"""`python -m mmi_jax.cli`, the same as `mmi`."""

import sys

from mmi_jax.cli.app import main

sys.exit(main())
