"""`python -m apps.seqrec`."""

from apps.seqrec import main

if __name__ == "__main__":
    main.app()
