"""`python -m gq_horovod`: the command `gq-horovod`."""

import sys

from .cli import main

sys.exit(main())
