"""`planted_script.py FOLDER SCRIPT ...`: a script of launch/, where FOLDER comes first when modules are looked for.

Not by PYTHONPATH: the ranks are forked from a process that has been started already.
"""

import runpy
import sys

if __name__ == "__main__":
    _, folder, *sys.argv = sys.argv
    sys.path.insert(0, folder)
    runpy.run_path(sys.argv[0], run_name="__main__")
