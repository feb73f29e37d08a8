"""The contract test against other versions of TRL: python tests/contract/trl_versions.py 1.14.2 1.15.0

Each is installed into a temporary folder that stands before the installed TRL; everything else stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ("tests/contract/test_trl_seam.py", "tests/unit/test_fields.py")
ALSO = ("requests",)  # TRL 1.14.0 and 1.14.1 import it and do not declare it


def main() -> None:
    for version in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", folder]
            subprocess.run([*pip, "--no-deps", f"trl=={version}"], check=True)
            subprocess.run([*pip, *ALSO], check=True)
            path = os.pathsep.join([folder, str(ROOT / "src")])
            for test in TESTS:
                command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", "--tb=no", test]
                done = subprocess.run(
                    command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
                )
                failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                print(f"TRL {version}  {test}  exit status {done.returncode}", *failed, sep="\n  ")


if __name__ == "__main__":
    main()
