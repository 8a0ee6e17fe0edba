#!/usr/bin/env python3
"""The project's rules that no compiler checks:  tests/lint/lint.py [--root DIR] [RULE]...

  layers     includes point only to the right: plugin, vmstate, qcow2, qcow2/io
  licences   QEMU's process never gets the LGPL 3 of libqcow: only tests and tools may use it
  headers    each header compiles alone; the C ABI also as C
  orphans    each source is built, each header included, each script called by something
  size       no file is longer than 900 lines
  words      no notes to self, no paths of somebody's machine
  format     clang-format has nothing to say

Prints one line a finding, then 'N passed, N failed, N skipped' over the rules. lint_test.py proves
that each rule can fail."""

import argparse
import concurrent.futures
import os
import re
import shutil
import subprocess
import sys

LINES_MAX = 900
# Each layer and the folders that its files may include from.
LAYERS = {
    "qcow2/io": ["qcow2/io"],
    "qcow2": ["qcow2", "qcow2/io"],
    "vmstate": ["vmstate", "qcow2", "qcow2/io"],
    "plugin": ["plugin", "plugin/abi", "plugin/qemu", "vmstate", "qcow2", "qcow2/io"],
    "plugin/qemu": ["plugin", "plugin/qemu", "vmstate", "qcow2", "qcow2/io"],
    "plugin/abi": ["plugin", "plugin/abi", "plugin/qemu", "vmstate", "qcow2", "qcow2/io"],
    "plugin/example": ["plugin"],
    "tools": ["tools", "plugin", "plugin/qemu", "vmstate", "qcow2", "qcow2/io"],
}
LIBQCOW_ALLOWED = ("tests/", "tools/")
C_HEADERS = ["plugin/qvmstate.h"]
# What starts scripts: a script that none of these names is dead. Discovered by name: test_*.py.
SCRIPT_STARTERS = (".py", ".sh", ".txt", ".md", ".json")
SKIPPED_FOLDERS = {".git", "__pycache__", "found"}
BINARY = (".qcow2", ".raw", ".bin", ".img", ".gz", ".png")
# First parts of absolute paths that mean the same on every machine.
SYSTEM_FOLDERS = set("bin boot dev etc lib lib64 media mnt proc run sbin srv sys tmp usr var".split())
# Absolute names that are no paths of this machine: QEMU's object tree, the guest's initramfs, what
# tests know to be missing.
OTHER_NAMES = {"objects", "machine", "modules", "checker", "init", "chroot",
               "nonexistent", "nowhere", "vm"}


class Skipped(Exception):
    """A rule cannot be checked on this machine; the text says why."""


class Tree:
    def __init__(self, root):
        self.root = root
        self.files = []
        for folder, folders, names in os.walk(root):
            at_top = folder == root
            folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and
                          not (at_top and name.startswith("build"))]
            self.files += [os.path.relpath(os.path.join(folder, name), root) for name in names
                           if name not in SKIPPED_FOLDERS]  # .git is a file in a worktree
        self.files = sorted(name for name in self.files
                            if not name.endswith(BINARY) and name != "compile_commands.json")
        self.texts = {}

    def text(self, name):
        if name not in self.texts:
            with open(os.path.join(self.root, name), encoding="utf-8", errors="replace") as file:
                self.texts[name] = file.read()
        return self.texts[name]

    def ending(self, *endings):
        return [name for name in self.files if name.endswith(endings)]

    def includes(self, name):
        """(line number, file) of each include with quotes. Tests may name a file from their own
        folder or from tests/ on."""
        starts = [""]
        if name.startswith("tests/"):
            starts += ["tests/", os.path.dirname(name) + "/"]
        for number, line in enumerate(self.text(name).splitlines(), 1):
            found = re.match(r'\s*#\s*include\s+"([^"]+)"', line)
            if found:
                names = [start + found.group(1) for start in starts]
                yield number, next((name for name in names if name in self.files), names[0])


def check_layers(tree):
    for name in tree.ending(".cc", ".h", ".c"):
        allowed = LAYERS.get(os.path.dirname(name))
        if allowed is None:
            if name.split("/")[0] in ("plugin", "vmstate", "qcow2", "tools"):
                yield f"{name}: its folder is no layer; name it in tests/lint/lint.py"
            continue
        for number, include in tree.includes(name):
            if os.path.dirname(include) not in allowed:
                yield f"{name}:{number}: may not include {include}: not to the right of its layer"
            elif include not in tree.files:
                yield f"{name}:{number}: {include}: no such file"


def check_licences(tree):
    for name in tree.ending(".cc", ".h", ".c"):
        if not name.startswith(LIBQCOW_ALLOWED) and re.search(r"#\s*include\s+[<\"]lib(qcow|bfio)",
                                                              tree.text(name)):
            yield f"{name}: libqcow (LGPL 3) may not come into QEMU (GPL 2 only)"


def compile_alone(root, name, language):
    folders = ["-I", root]
    if name.startswith("tests/"):
        folders += ["-I", os.path.join(root, "tests")]
    compiler, standard = ("g++", "-std=c++20") if language == "c++" else ("gcc", "-std=c11")
    text = f'#include "{name}"\n#include "{name}"\n'
    done = subprocess.run([compiler, standard, "-fsyntax-only", "-Wall", "-Wextra", "-Werror",
                           "-D_FILE_OFFSET_BITS=64", "-DQVMSTATE_VERSION=\"\"", *folders,
                           "-x", language, "-"], input=text, capture_output=True, text=True,
                          check=False, cwd=root)  # where what has no folder is looked for first
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.splitlines() if "error" in line]
    return f"{name}: does not compile alone as {language}: {(errors or ['no message'])[0]}"


def check_headers(tree):
    if shutil.which("g++") is None:
        raise Skipped("g++ is not installed")
    work = [(name, "c++") for name in tree.ending(".h")]
    work += [(name, "c") for name in C_HEADERS if name in tree.files]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda item: compile_alone(tree.root, *item), work)
    yield from filter(None, found)


def check_orphans(tree):
    cmake = "\n".join(tree.text(name) for name in tree.files
                      if os.path.basename(name) == "CMakeLists.txt")
    globs = set(re.findall(r"[\w./]+", cmake))
    for name in tree.ending(".cc"):
        folder = os.path.dirname(name)
        inside = folder.removeprefix("tests/")
        base, stem = os.path.basename(name), os.path.splitext(os.path.basename(name))[0]
        is_target = base in globs or f"{os.path.basename(folder)}/{base}" in globs or \
            (folder == "tests/fuzz" and stem in globs)
        if not (is_target or folder in globs or inside in globs or f"/{folder}/" in globs):
            yield f"{name}: no CMakeLists.txt builds it"
    sources = tree.ending(".cc", ".h", ".c")
    including = {name: {include for _, include in tree.includes(name)} for name in sources}
    for name in tree.ending(".h"):
        own = os.path.splitext(name)[0]
        if not any(name in including[other] and os.path.splitext(other)[0] != own
                   for other in sources):
            yield f"{name}: only its own source, or nothing, includes it"
    starters = [name for name in tree.files if name.endswith(SCRIPT_STARTERS) or name == "dev" or
                name.startswith(".ci/")]
    for name in tree.ending(".py", ".sh"):
        base, stem = os.path.basename(name), os.path.splitext(os.path.basename(name))[0]
        if re.fullmatch(r"test_\w+\.py", base):
            continue
        if not any(re.search(rf"\b{re.escape(stem)}\b", tree.text(other))
                   for other in starters if other != name):
            yield f"{name}: nothing names {base}"


def check_size(tree):
    for name in tree.files:
        lines = tree.text(name).count("\n")
        if lines > LINES_MAX:
            yield f"{name}: {lines} lines, more than {LINES_MAX}"


def check_words(tree):
    notes = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")
    homes = re.compile(r"(?<![\w.$}~/-])/(?:home|root|Users)/[\w.-]+")
    absolute = re.compile(r"""(?<=["'`\s=(])/([a-z][\w.-]*)/[\w.-]""")
    for name in tree.files:
        for number, line in enumerate(tree.text(name).splitlines(), 1):
            if notes.search(line):
                yield f"{name}:{number}: a note to self: {line.strip()}"
            if homes.search(line) and not name.startswith("tests/lint/"):
                yield f"{name}:{number}: somebody's home: {line.strip()}"
            for found in absolute.finditer(line):
                top = found.group(1)
                if top not in SYSTEM_FOLDERS | OTHER_NAMES and not name.startswith("tests/lint/"):
                    yield f"{name}:{number}: a path of one machine: {line.strip()}"


def check_format(tree):
    if shutil.which("clang-format") is None:
        raise Skipped("clang-format is not installed")
    names = [os.path.join(tree.root, name) for name in tree.ending(".cc", ".h")]
    if not names:
        return
    done = subprocess.run(["clang-format", "--dry-run", "--style=file", *names],
                          capture_output=True, text=True, check=False)
    wrong = sorted({line.split(":")[0] for line in done.stderr.splitlines()
                    if "-Wclang-format-violations" in line})
    for name in wrong:
        yield f"{os.path.relpath(name, tree.root)}: run ./dev fmt"
    if done.returncode != 0 and not wrong:
        yield f"clang-format: {done.stderr.strip()[:200]}"


RULES = {
    "layers": check_layers,
    "licences": check_licences,
    "headers": check_headers,
    "orphans": check_orphans,
    "size": check_size,
    "words": check_words,
    "format": check_format,
}


def run(root, rules):
    """(passed, failed, skipped); prints what was found."""
    tree = Tree(root)
    passed = failed = skipped = 0
    for rule in rules:
        try:
            findings = list(RULES[rule](tree))
        except Skipped as reason:
            print(f"SKIPPED {rule}: {reason}")
            skipped += 1
            continue
        for finding in findings:
            print(f"{rule}: {finding}")
        if findings:
            failed += 1
        else:
            passed += 1
    return passed, failed, skipped


def main():
    parser = argparse.ArgumentParser(description="Checks the project's own rules.")
    here = os.path.dirname(os.path.abspath(__file__))
    parser.add_argument("--root", default=os.path.dirname(os.path.dirname(here)))
    parser.add_argument("rules", nargs="*", metavar="RULE", help=", ".join(RULES))
    options = parser.parse_args()
    unknown = set(options.rules) - set(RULES)
    if unknown:
        parser.error(f"no such rule: {', '.join(sorted(unknown))}")
    passed, failed, skipped = run(os.path.abspath(options.root), options.rules or list(RULES))
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
