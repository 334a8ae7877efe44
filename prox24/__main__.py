"""`python -m prox24`."""

import sys

from prox24._cli.main import main

sys.exit(main())
