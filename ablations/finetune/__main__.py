"""``python -m ablations.finetune``, as it was called before."""

import sys
import warnings

from ablations.measure.finetune.__main__ import main

if __name__ == "__main__":
    text = "python -m ablations.finetune is now python -m ablations.measure.finetune"
    warnings.warn(text, DeprecationWarning, stacklevel=1)  # shown, for it is of __main__
    sys.exit(main())
