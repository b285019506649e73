import sys

from shear_tron.cli import main

sys.exit(main())
