"""`planted_script.py FOLDER SCRIPT ...`: a script of launch/ with FOLDER in front of sys.path.

PYTHONPATH would be too late, because the ranks are forked from a process that is already running.
"""

import runpy
import sys

if __name__ == "__main__":
    _, folder, *sys.argv = sys.argv
    sys.path.insert(0, folder)
    runpy.run_path(sys.argv[0], run_name="__main__")
