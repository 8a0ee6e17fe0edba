#!/usr/bin/env python3
"""Proves that each rule of lint.py can fail: a small clean tree, and one fault at a time in it."""

import contextlib
import io
import os
import shutil
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import lint  # noqa: E402  (found through the path set above)

CLEAN = {
    "CMakeLists.txt": "qvmstate_layer(io qcow2/io)\nqvmstate_layer(qcow2 qcow2)\n"
                      "qvmstate_layer(vmstate vmstate)\n",
    "qcow2/io/a.h": "#pragma once\n#include <cstdint>\nusing Number = uint64_t;\n",
    "qcow2/io/a.cc": '#include "qcow2/io/a.h"\n',
    "qcow2/b.h": '#pragma once\n#include "qcow2/io/a.h"\n\nNumber twice(Number x);\n',
    "qcow2/b.cc": '#include "qcow2/b.h"\n\nNumber twice(Number x) {\n  return 2 * x;\n}\n',
    "vmstate/c.cc": '#include "qcow2/b.h"\n\nNumber four() {\n  return twice(2);\n}\n',
    "dev": "python3 tests/called.py\n",
    "tests/called.py": "print('called')\n",
    ".clang-format": "BasedOnStyle: Google\nAllowShortFunctionsOnASingleLine: Inline\n",
}
C_ABI = '#pragma once\n#include <cstdint>\n'


class LintTest(unittest.TestCase):
    def setUp(self):
        self.root = tempfile.mkdtemp(prefix="qvm-lint-")
        self.addCleanup(shutil.rmtree, self.root)
        for name, text in CLEAN.items():
            self.write(name, text)

    def write(self, name, text):
        path = os.path.join(self.root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)

    def findings(self, rule):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            _, failed, skipped = lint.run(self.root, [rule])
        if skipped:
            self.skipTest(output.getvalue().strip())
        self.assertEqual(failed, 1 if output.getvalue() else 0)
        return output.getvalue()

    def assert_found(self, rule, name, text, expected):
        self.write(name, text)
        self.assertIn(expected, self.findings(rule))

    def test_the_clean_tree_has_no_findings(self):
        for rule in lint.RULES:
            with self.subTest(rule):
                self.assertEqual(self.findings(rule), "")

    def test_include_to_the_left(self):
        self.write("vmstate/c.h", "#pragma once\n")
        self.assert_found("layers", "qcow2/b.cc", '#include "vmstate/c.h"\n', "qcow2/b.cc:1")

    def test_io_does_not_know_qcow2(self):
        self.assert_found("layers", "qcow2/io/a.cc", '#include "qcow2/b.h"\n', "qcow2/io/a.cc:1")

    def test_include_of_nothing(self):
        self.assert_found("layers", "qcow2/b.cc", '#include "qcow2/gone.h"\n', "no such file")

    def test_folder_that_is_no_layer(self):
        self.assert_found("layers", "vmstate/deep/d.cc", "\n", "is no layer")

    def test_libqcow_in_the_plugin(self):
        self.assert_found("licences", "vmstate/c.cc", "#include <libqcow.h>\n", "vmstate/c.cc")

    def test_header_that_leans_on_its_includer(self):
        self.assert_found("headers", "qcow2/b.h", "#pragma once\nNumber twice(Number x);\n",
                          "qcow2/b.h: does not compile alone")

    def test_header_without_guard(self):
        self.assert_found("headers", "qcow2/io/a.h", "struct Twice {};\n", "qcow2/io/a.h")

    def test_c_abi_that_is_not_c(self):
        self.assert_found("headers", "plugin/qvmstate.h", C_ABI, "alone as c:")

    def test_source_in_no_build_file(self):
        self.assert_found("orphans", "tests/unit/x/x_test.cc", "\n", "tests/unit/x/x_test.cc")

    def test_header_included_by_its_source_only(self):
        self.write("vmstate/d.h", "#pragma once\n")
        self.assert_found("orphans", "vmstate/d.cc", '#include "vmstate/d.h"\n', "vmstate/d.h")

    def test_script_that_nothing_calls(self):
        self.assert_found("orphans", "tests/forgotten.py", "\n", "tests/forgotten.py")

    def test_long_file(self):
        self.assert_found("size", "qcow2/b.cc", "\n" * 901, "qcow2/b.cc: 901 lines")

    def test_note_to_self(self):
        self.assert_found("words", "qcow2/b.cc", "// TO" "DO: more\n", "qcow2/b.cc:1")

    def test_home_of_somebody(self):
        self.assert_found("words", "dev", "cp x /home/" "somebody/x\n", "dev:1")

    def test_folder_of_one_machine(self):
        self.assert_found("words", "qcow2/b.cc", 'auto x = "/project7/' 'x";\n', "qcow2/b.cc:1")

    def test_format(self):
        self.assert_found("format", "qcow2/b.cc", "int  f( ){return 1 ;}\n", "qcow2/b.cc")


def main():
    result = unittest.TextTestRunner(stream=sys.stdout, verbosity=0).run(
        unittest.defaultTestLoader.loadTestsFromTestCase(LintTest))
    failed = len(result.failures) + len(result.errors)
    for test, reason in result.skipped:
        print(f"SKIPPED {test.id()}: {reason}")
    skipped = len(result.skipped)
    print(f"{result.testsRun - failed - skipped} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
