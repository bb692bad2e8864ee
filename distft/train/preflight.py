"""The name by which jobs queued by 0.1 start this step. To be removed with 0.3."""

import runpy

if __name__ == "__main__":
    runpy.run_module("distft.diagnostics.preflight", run_name="__main__")
