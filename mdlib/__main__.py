"""`python -m mdlib`."""

import sys

try:
    from mdlib.cli import main

    main()
except ModuleNotFoundError as error:
    sys.exit(
        f"mdlib: {error.name} is not installed for {sys.executable}: activate the environment (source "
        ".venv/bin/activate, on Windows .venv\\Scripts\\activate), or create it by python setup_environment.py"
    )
