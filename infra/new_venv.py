"""Make a virtual environment with pip: `python new_venv.py FOLDER`. Debian ships Python without that part."""

import importlib.util
import os
import shutil
import subprocess
import sys

_OLDEST = (3, 11)


def main(folder: str) -> int:
    """Create `folder`; installs Debian's python3-venv first where it is missing and this user may."""
    if sys.version_info < _OLDEST:
        print(f"error: Python {sys.version.split()[0]} is too old; this project needs 3.11 or newer", file=sys.stderr)
        return 1
    if importlib.util.find_spec("ensurepip") is None and not _install_ensurepip():
        print("error: Python has no ensurepip; run: sudo apt-get install python3-venv", file=sys.stderr)
        return 1
    # A new process, because this one has looked for ensurepip already.
    return subprocess.call([sys.executable, "-m", "venv", "--clear", folder])


def _install_ensurepip() -> bool:
    """Whether apt-get could add it."""
    apt = shutil.which("apt-get")
    if apt is None or os.geteuid() != 0:
        return False
    print("Python has no ensurepip: installing Debian's python3-venv", flush=True)
    return all(subprocess.call([apt, *step, "-qq", "-y"]) == 0 for step in (["update"], ["install", "python3-venv"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
