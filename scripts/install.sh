#!/bin/sh
# Install this project into a virtual environment: scripts/install.sh VENV REQUIREMENT, e.g. .venv '.[dev]'.
# PYTHON=python3.12 chooses an interpreter; without it the first of python3, python3.14 … that is new enough is taken.
set -eu

venv=$1
requirement=$2

fail() {
    echo "rekindle: $*" >&2
    exit 1
}

is_new_enough() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    found=$("${PYTHON:-python3}" --version 2>&1) || found="none"
    fail "Python 3.11 or newer is needed as ${PYTHON:-python3}; found: $found. Install one, or name it: make PYTHON=/path/to/python3.12"
}

make_venv() {
    python=$(find_python)
    echo "Making $venv with $("$python" --version) …"
    "$python" -m venv "$venv" || {
        rm -rf "$venv"
        fail "$python cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv"
    }
}

# llama.cpp comes as C++ source and is compiled here once; pip keeps the result for the next environment.
announce_build() {
    wanted=$(sed -n 's/^llama[_-]cpp[_-]python==//p' constraints.txt)
    installed=$("$venv/bin/python" -c 'from importlib.metadata import version; print(version("llama-cpp-python"))' 2>/dev/null) || installed=none
    if [ "$installed" = "$wanted" ] || "$venv/bin/pip" cache list llama_cpp_python 2>/dev/null | grep -q -- "$wanted"; then
        return
    fi
    compiler=${CXX:-}
    for candidate in c++ g++ clang++; do
        [ -n "$compiler" ] || ! command -v "$candidate" >/dev/null 2>&1 || compiler=$candidate
    done
    [ -n "$compiler" ] || fail "a C++ compiler is needed to build llama.cpp; on Debian and Ubuntu: apt install build-essential; on macOS: xcode-select --install"
    echo "llama.cpp $wanted will now be compiled with $compiler on $CMAKE_BUILD_PARALLEL_LEVEL cores."
    echo "This happens once and takes about four minutes on two cores; pip says little meanwhile."
}

[ -x "$venv/bin/python" ] || make_venv
CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(getconf _NPROCESSORS_ONLN)}
export CMAKE_BUILD_PARALLEL_LEVEL
announce_build
echo "Installing $requirement …"
quiet=--quiet
[ ! -t 1 ] || quiet= # somebody looks on: pip shows how far it is
"$venv/bin/python" -m pip install ${quiet:+"$quiet"} --disable-pip-version-check --constraint constraints.txt --editable "$requirement"
# As pip does for all else: where PYTHONDONTWRITEBYTECODE is set, each start would compile it anew.
"$venv/bin/python" -m compileall -q src
