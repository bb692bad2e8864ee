"""The name by which job scripts rendered by 0.1 call attempts.py. To be removed with 0.3.

`python -m distft.schedulers.conclude RUN_DIR EXIT_STATUS BUDGET NODES`, with `begin` or `refused` for the exit status.
"""

import sys

from distft.schedulers import attempts

if __name__ == "__main__":
    folder, word, budget, names = sys.argv[1:]
    if word in ("begin", "refused"):
        attempts.main(folder, budget, word, "0", names)
    else:
        attempts.main(folder, budget, "train", word, names)
