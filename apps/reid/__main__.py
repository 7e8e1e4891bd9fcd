"""`python -m apps.reid`."""

from apps.reid import main

if __name__ == "__main__":
    main.app()
