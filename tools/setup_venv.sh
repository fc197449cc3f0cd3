#!/bin/sh
# Builds .venv from pyproject.toml under constraints.txt, then writes the stamp file named by $1.
# `make setup` calls it; PYTHON and PIP_ARGS come from there.
# Ends with 2 and one sentence when this machine lacks something, with 1 when the installation fails.
set -u

cd "$(dirname "$0")/.." || exit 1

python=${PYTHON:-python3}
pip_args=${PIP_ARGS:-}
stamp=${1:-.venv/.setup-done}
venv=.venv
owner=$venv/.made-by-phinetune
log=.venv-setup.log

# Settings of the caller that would send packages elsewhere than to .venv.
unset PYTHONHOME PYTHONPATH PIP_TARGET PIP_PREFIX PIP_ROOT PIP_REQUIRE_VIRTUALENV VIRTUAL_ENV
export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore

say() { printf '%s\n' "$*"; }

fail() {
    status=$1
    shift
    printf 'setup: %s\n' "$*" >&2
    exit "$status"
}

cannot_write() { fail 1 "cannot write $PWD/$1; check the folder's permissions and free space."; }

# Deletes .venv, which is known to be ours by now.
drop() { rm -rf "$venv"; }

show_log() { grep -v -e '^WARNING: Location .* is ignored' -e '^ *$' "$log" | tail -n 15 >&2; }

minor_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null; }

supported() {
    case $1 in
        3.10 | 3.11 | 3.12 | 3.13) return 0 ;;
        *) return 1 ;;
    esac
}

# Says how to name another Python; where a fitting one is on the path, names it.
hint() {
    for candidate in python3.13 python3.12 python3.11 python3.10; do
        if [ "$candidate" != "$python" ] && supported "$(minor_of "$candidate")"; then
            printf 'run: make setup PYTHON=%s' "$candidate"
            return
        fi
    done
    printf 'install one and run: make setup PYTHON=/path/to/python3.12'
}

# --- Which Python ---

if ! command -v "$python" >/dev/null 2>&1; then
    fail 2 "'$python' was not found, and phinetune needs Python 3.10 to 3.13; $(hint)"
fi
found=$(minor_of "$python")
if [ -z "$found" ]; then
    fail 2 "'$python' does not start, and phinetune needs Python 3.10 to 3.13; $(hint)"
fi
if ! supported "$found"; then
    fail 2 "'$python' is Python $found, and phinetune needs Python 3.10 to 3.13; $(hint)"
fi

# --- An empty .venv with pip ---

make_venv() {
    { mkdir -p "$venv" && touch "$owner"; } 2>/dev/null || cannot_write "$venv"
    if "$python" -c 'import venv; from ensurepip import bootstrap' 2>/dev/null; then
        "$python" -m venv "$venv" >>"$log" 2>&1 </dev/null && return 0
        show_log
        drop
        if grep -q 'No space left' "$log"; then
            fail 1 "the disk is full; free about 3 GB and run make setup again."
        fi
        fail 1 "'$python -m venv' failed, see above and $log; repair that Python, or $(hint)"
    fi
    borrow_pip && return 0
    install_venv_package
    "$python" -m venv "$venv" >>"$log" 2>&1 </dev/null && return 0
    show_log
    drop
    fail 2 "'$python -m venv' fails even with $package installed; use another Python: $(hint)"
}

# Without ensurepip, a pip that '$python' has (22.3 or newer) can put one into .venv.
borrow_pip() {
    "$python" -c 'import re, venv, pip; v = re.findall("[0-9]+", pip.__version__); assert (int(v[0]), int(v[1])) >= (22, 3)' \
        2>/dev/null || return 1
    "$python" -m venv --without-pip "$venv" >>"$log" 2>&1 </dev/null &&
        "$python" -m pip --python "$venv/bin/python" install -q -c constraints.txt pip >>"$log" 2>&1 </dev/null
}

install_venv_package() {
    package=python$found-venv
    advice="install it (apt-get install $package, as root) and run make setup again"
    case $("$python" -c 'import sys; print(sys.base_prefix)') in
        /usr) ;;
        *) drop; fail 2 "'$python' has no venv and ensurepip modules, which .venv needs; use another Python: $(hint)" ;;
    esac
    if ! command -v apt-get >/dev/null 2>&1; then
        drop
        fail 2 "'$python' has no venv and ensurepip modules, which .venv needs; install your system's package for them."
    fi
    if [ "$(id -u)" -ne 0 ]; then
        drop
        fail 2 "the Debian package $package is missing; $advice."
    fi
    say "Installing the Debian package $package, which $python needs to make .venv …"
    if ! { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package"; } \
        >>"$log" 2>&1 </dev/null; then
        show_log
        drop
        fail 2 "apt-get could not install the Debian package $package, see above and $log; $advice."
    fi
}

if [ -e "$venv" ] && [ ! -e "$owner" ]; then
    fail 2 "$PWD/$venv was not made by make setup; move it away or delete it, then run make setup again."
fi

{ rm -f "$log" && touch "$log"; } 2>/dev/null || cannot_write "$log"
exec 3>&2
trap 'drop; printf "\nsetup: stopped, and .venv deleted; run make setup again.\n" >&3; exit 130' INT TERM HUP

# A finished .venv of the same Python only takes what changed; anything else is built anew.
if [ -e "$stamp" ] && [ "$(minor_of "$venv/bin/python")" = "$found" ] &&
    "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    rm -f "$stamp"
    say "Updating .venv (Python $found) …"
else
    drop
    say "Making .venv (Python $found) …"
    make_venv
    say "Installing phinetune and its libraries (about 1.6 GB, some minutes; 6 GB or more with a CUDA torch) …"
fi

# --- The libraries ---

# The build backend first, so that it is the pinned one on every version of pip. Without --no-compile,
# pip would spend half its time on compiling modules that nothing ever imports.
set -f
if ! {
    "$venv/bin/python" -m pip install -q -c constraints.txt $pip_args setuptools &&
        "$venv/bin/python" -m pip install -q -c constraints.txt --no-compile --no-build-isolation --use-pep517 \
            $pip_args -e '.[dev]'
} >>"$log" 2>&1 </dev/null; then
    show_log
    drop
    if grep -q -i -e 'No space left' -e 'Disk quota exceeded' "$log"; then
        fail 1 "the disk is full; free about 3 GB here and in ${TMPDIR:-/tmp} (12 GB for a CUDA build of torch) and run make setup again."
    fi
    if grep -q -i -e 'NewConnectionError' -e 'Failed to establish' -e 'name resolution' -e 'Max retries' -e 'timed out' \
        -e 'Network is unreachable' -e 'Connection refused' -e 'ProxyError' -e 'SSLError' -e 'Connection broken' "$log"; then
        fail 1 "the package index could not be reached; check the network or proxy and run make setup again."
    fi
    fail 1 "pip could not install the libraries, see above and $log; mend that and run make setup again."
fi

# Shows that the libraries fit this machine, and leaves the compiled form of what they import.
say "Loading the libraries once …"
if ! env -u PYTHONDONTWRITEBYTECODE HF_HUB_OFFLINE=1 "$venv/bin/python" - >>"$log" 2>&1 <<'EOF'
import accelerate, datasets, gguf, pydantic, pytest, sacrebleu, typer
import rich.console, rich.progress, rich.table
from peft import LoraConfig, get_peft_model
from rouge_score import rouge_scorer
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM, Trainer
from trl import SFTConfig, SFTTrainer
EOF
then
    show_log
    drop
    fail 1 "the libraries are installed but do not load on this machine, see above and $log."
fi

touch "$stamp" 2>/dev/null || cannot_write "$stamp"
rm -f "$log"
