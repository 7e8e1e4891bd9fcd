"""`python -m apps.graphrec`."""

from apps.graphrec import main

if __name__ == "__main__":
    main.app()
