#!/usr/bin/env python3
"""Runs the tests on real QEMU and prints one line a test and a last line that counts them.

  tests/interop/run.py [--build DIR] [-k PATTERN]... [--quick] [--list]

A test that failed keeps its folder (images, logs, command lines), and the line names it."""

import argparse
import fnmatch
import os
import signal
import sys
import time
import unittest

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import bed  # noqa: E402  (found through the path set above)


class Result(unittest.TestResult):
    def __init__(self):
        super().__init__()
        self.passed = 0
        self.skipped_count = 0
        self.failed_tests = set()

    def startTest(self, test):
        super().startTest(test)
        self.started = time.monotonic()

    def report(self, test, what):
        name = test.id() if hasattr(test, "id") else str(test)
        print(f"{what[0]:<8}{name}{what[1]}  ({time.monotonic() - self.started:.1f} s)", flush=True)

    def addSuccess(self, test):
        self.passed += 1
        self.report(test, ("ok", ""))

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.skipped_count += 1
        if not hasattr(self, "started"):
            self.started = time.monotonic()
        self.report(test, ("SKIPPED", f": {reason}"))

    def add_failure(self, test, error):
        if not hasattr(self, "started"):
            self.started = time.monotonic()
        self.failed_tests.add(test.id())
        folder = getattr(test, "folder", None)
        kept = f"  kept: {folder}" if isinstance(test, bed.BedTest) and folder else ""
        self.report(test, ("FAILED", kept))
        text = self._exc_info_to_string(error, test)
        print("\n".join("    " + line for line in text.rstrip().splitlines()), flush=True)

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.add_failure(test, error)

    def addError(self, test, error):
        super().addError(test, error)
        self.add_failure(test, error)

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self.add_failure(test, error)

    def stopTest(self, test):
        super().stopTest(test)
        if test.id() not in self.failed_tests and isinstance(test, bed.BedTest):
            test.remove_folder()


def flatten(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from flatten(test)
        else:
            yield test


def is_full_only(test):
    return getattr(getattr(test, test._testMethodName, None), "full_only", False)


def wanted(test, patterns):
    return not patterns or any(pattern in test.id() or fnmatch.fnmatch(test.id(), pattern)
                               for pattern in patterns)


def main():
    parser = argparse.ArgumentParser(description="Runs the tests on real QEMU.")
    parser.add_argument("--build", default=bed.Settings.build, help="where qvmstate was built")
    parser.add_argument("-k", action="append", default=[], metavar="PATTERN",
                        help="only tests whose name has this")
    parser.add_argument("--quick", action="store_true", help="the selection for every change")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    options = parser.parse_args()
    bed.Settings.build = os.path.abspath(options.build)
    os.environ["QVMSTATE_BUILD"] = bed.Settings.build
    bed.Settings.quick = options.quick
    loaded = list(flatten(unittest.TestLoader().discover(HERE, "test_*.py", HERE)))
    # A file that cannot be imported is a failure whatever the pattern.
    tests = [test for test in loaded
             if wanted(test, options.k) or type(test).__name__ == "_FailedTest"]
    left_out = [test for test in tests if options.quick and is_full_only(test)]
    tests = [test for test in tests if test not in left_out]
    if options.list:
        print("\n".join(test.id() for test in tests))
        return 0
    result = Result()
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Ignored in what a shell starts in the background; what is started here would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        unittest.TestSuite(tests).run(result)
    except KeyboardInterrupt:
        for test in tests:
            test.doCleanups()  # ends the VMs and mounts of the test that was cut short
        print("interrupted")
        return 1
    failed = len(result.failed_tests)
    if left_out:
        print(f"{len(left_out)} more tests run without --quick")
    print(f"took {time.monotonic() - started:.0f} s")
    print(f"{result.passed} passed, {failed} failed, {result.skipped_count} skipped")
    return 1 if failed or result.passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
