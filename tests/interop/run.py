#!/usr/bin/env python3
"""Runs the tests on real QEMU and prints one line a test and a last line that counts them.

  tests/interop/run.py [--build DIR] [-k PATTERN]... [--quick] [--jobs N] [--list]

A test that failed keeps its folder (images, logs, command lines), and the line names it."""

import argparse
import fnmatch
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import unittest

sys.dont_write_bytecode = True
COUNTS = re.compile(r"(\d+) passed, (\d+) failed, (\d+) skipped")
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


def run_here(tests):
    """How many passed, failed, and were skipped."""
    result = Result()
    try:
        unittest.TestSuite(tests).run(result)
    except KeyboardInterrupt:
        for test in tests:
            test.doCleanups()  # ends the VMs and mounts of the test that was cut short
        raise
    return result.passed, len(result.failed_tests), result.skipped_count


class Jobs:
    """Several processes of this program, each with one class of tests after the other."""

    def __init__(self, options, tests):
        classes = {}
        for test in tests:
            name = ".".join(test.id().split(".")[:-1]) + "."
            classes[name] = classes.get(name, 0) + 1
        self.classes = queue.SimpleQueue()
        for name in sorted(classes, key=classes.get, reverse=True):
            self.classes.put(name)
        self.options = options
        self.running = set()
        self.lock = threading.Lock()
        self.counts = [0, 0, 0]  # passed, failed, skipped

    def run(self):
        threads = [threading.Thread(target=self.work) for _ in range(self.options.jobs)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            with self.lock:
                self.classes = queue.SimpleQueue()
                for process in self.running:
                    process.send_signal(signal.SIGINT)
            for thread in threads:
                thread.join()
            raise
        return self.counts

    def work(self):
        while True:
            with self.lock:
                if self.classes.empty():
                    return
                name = self.classes.get()
                process = subprocess.Popen(
                    [sys.executable, os.path.abspath(__file__), "--build", bed.Settings.build, "-k",
                     name, *(["--quick"] if self.options.quick else [])],
                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    text=True)
                self.running.add(process)
            self.follow(process, name)

    def follow(self, process, name):
        counts = None
        for line in process.stdout:
            found = COUNTS.fullmatch(line.rstrip())
            if found:
                counts = [int(number) for number in found.groups()]
            elif line.startswith(("ok ", "SKIPPED", "FAILED", " ")):
                print(line, end="", flush=True)
        status = process.wait()
        with self.lock:
            self.running.discard(process)
            if counts is None or (status != 0 and counts[1] == 0 and counts[0] > 0):
                print(f"FAILED  {name}: ended with {status} before its last line", flush=True)
                counts = [0, 1, 0]
            self.counts = [sum(pair) for pair in zip(self.counts, counts)]


def main():
    parser = argparse.ArgumentParser(description="Runs the tests on real QEMU.")
    parser.add_argument("--build", default=bed.Settings.build, help="where qvmstate was built")
    parser.add_argument("-k", action="append", default=[], metavar="PATTERN",
                        help="only tests whose name has this")
    parser.add_argument("--quick", action="store_true", help="the selection for every change")
    parser.add_argument("--jobs", type=int, default=1, help="so many tests at the same time")
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
    started = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Ignored in what a shell starts in the background; what is started here would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        passed, failed, skipped = (Jobs(options, tests).run() if options.jobs > 1 else
                                   run_here(tests))
    except KeyboardInterrupt:
        print("interrupted")
        return 1
    if left_out:
        print(f"{len(left_out)} more tests run without --quick")
    print(f"took {time.monotonic() - started:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
