"""Make the virtual environment of a peer, from exact pins and nothing else.

    python -m benchmarks.peers.make_venv

Its interpreter is the one that runs this; an environment that is there already is made anew.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-recbole.txt"
DEFAULT = HERE / ".venv-recbole"
NEWEST = (3, 12)  # of Python: the last that has wheels of the pinned NumPy


def interpreter(folder: Path) -> Path:
    """The Python of a virtual environment."""
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def main() -> None:
    """Make it, and start the peer once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=DEFAULT, help="folder to make (default: %(default)s)")
    folder = parser.parse_args().venv
    if sys.version_info[:2] > NEWEST:
        found = ".".join(str(part) for part in sys.version_info[:2])
        sys.exit(f"Python {found} has no wheels of the pinned packages; run this with Python 3.11 or 3.12")
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        sys.exit(f"{folder} is there and is no virtual environment; name another folder")
    venv.create(folder, clear=True, with_pip=True)
    python = str(interpreter(folder))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # --no-deps: the pins are complete, and what RecBole asks for beyond them is never imported here
    subprocess.run([*pip, "--no-deps", "-r", str(REQUIREMENTS)], check=True)
    subprocess.run([python, "-c", "import recbole.trainer, torch; print('recbole starts')"], check=True)


if __name__ == "__main__":
    main()
