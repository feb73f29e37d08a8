"""`python -m pgpo`."""

import sys

from pgpo.cli import main

sys.exit(main())
