#!/usr/bin/env python3
"""Runs ctest in a build folder and says in one last line what ./dev counts:

  tests/run_ctest.py BUILD [ctest options]

Prints failed tests with their output, one line SKIPPED NAME: REASON for each skipped test, and
'N passed, N failed, N skipped'. No test at all is a failure."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree


def skip_reason(output):
    """GoogleTest prints 'file:line: Skipped', then the reason on the next line."""
    found = re.search(r": Skipped\n+([^\n]+)", output)
    return found.group(1).strip() if found else "no reason given"


def main():
    build = os.path.abspath(sys.argv[1])
    report = os.path.join(build, "ctest.xml")
    if os.path.exists(report):
        os.unlink(report)
    done = subprocess.run(["ctest", "--test-dir", build, "--output-junit", report, "--quiet",
                           "--timeout", "600", *sys.argv[2:]], check=False)
    passed = failed = skipped = 0
    cases = []
    if os.path.exists(report):
        cases = xml.etree.ElementTree.parse(report).getroot().findall("testcase")
    for case in cases:
        name, status = case.get("name"), case.get("status")
        output = case.findtext("system-out") or ""
        if status == "run":
            passed += 1
        elif status in ("notrun", "disabled"):
            skipped += 1
            print(f"SKIPPED {name}: {skip_reason(output)}")
        else:
            failed += 1
            print(f"FAILED  {name}")
            print("\n".join("    " + line for line in output.strip().splitlines()[-60:]))
    # ctest itself can fail: a test program that is missing, say, is a test of that name.
    if not cases or (done.returncode != 0 and failed == 0):
        print(f"FAILED  ctest: status {done.returncode}, {len(cases)} tests")
        failed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
