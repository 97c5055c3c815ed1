"""`python -m parplan`, and `torchrun -m parplan validate ...`."""

import sys

from parplan.cli import main

sys.exit(main())
