"""`python -m apps.clcrec`."""

from apps.clcrec import main

if __name__ == "__main__":
    main.app()
