# Everything a reader or contributor runs. Needs make and Python 3.11 to 3.14; the rest goes into .venv.

DEMO_FLAGS ?=
PYTEST_FLAGS ?=
PROCESSES ?= 2

# What a change most often breaks, without a model: the records, formulas, settings, the loop and what reads run folders.
QUICK = tests/algorithms tests/config tests/doctor tests/golden tests/loop tests/record tests/rollout tests/training \
  tests/test_buffer.py tests/test_losses.py tests/test_public_names.py tests/test_types.py

# The first of these that works makes .venv. `make test PYTHON=python3.12` asks for one by name.
PYTHONS = "$(PYTHON)" .venv/bin/python python3 python3.13 python3.12 python3.14 python3.11 python
SUPPORTED = import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
CAN_MAKE_VENV = import ensurepip, venv

.PHONY: help quick demo test check format docs constraints clean venv

help:
	@echo "make quick        the tests that tell most in a minute"
	@echo "make demo         train the small model with the embedded task, into a new folder under runs/"
	@echo "make test         all tests, in PROCESSES=2 processes (PYTEST_FLAGS=... adds options)"
	@echo "make check        formatting, lint and types: what must be clean before a commit"
	@echo "make format       rewrite the sources in the project's format"
	@echo "make docs         build the documentation as a site, in site/"
	@echo "make constraints  pin today's versions in constraints.txt"
	@echo "make clean        remove .venv, caches and build products; runs/ stays"
	@echo ""
	@echo "The first demo or test makes .venv (two minutes or so); PYTHON=... chooses the Python."

demo: venv
	@.venv/bin/textpolicy train $(DEMO_FLAGS)

quick: venv
	@.venv/bin/python -m pytest -q -n $(PROCESSES) --dist loadgroup -m "not slow" $(PYTEST_FLAGS) $(QUICK)

test: venv
	@.venv/bin/python -m pytest -n $(PROCESSES) --dist loadgroup $(PYTEST_FLAGS)

check: venv
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: venv
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# In an environment of its own, made by the Python of .venv: the site needs none of the package's dependencies.
docs: .venv-docs/made
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "the site is in site/: open site/index.html, or, with the search, python3 -m http.server --bind 127.0.0.1 -d site"

.venv-docs/made: constraints-docs.txt | venv
	.venv/bin/python -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --only-binary :all: -r constraints-docs.txt
	touch $@

constraints: venv
	.venv/bin/python scripts/bootstrap.py constraints

clean:
	rm -rf .venv .venv-docs site build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@for python in $(PYTHONS); do \
	  "$$python" -c '$(SUPPORTED)' >/dev/null 2>&1 || continue; \
	  if "$$python" -c '$(CAN_MAKE_VENV)' >/dev/null 2>&1; then exec "$$python" scripts/bootstrap.py; fi; \
	  without_venv=$$python; \
	done; \
	if [ -n "$$without_venv" ]; then \
	  echo "$$without_venv cannot make a virtual environment: install its venv module" \
	    "(on Debian and Ubuntu: apt install python3-venv) and run make again." >&2; \
	else \
	  echo "textpolicy needs Python 3.11, 3.12, 3.13 or 3.14 and found none: install one," \
	    "or name it (make test PYTHON=/path/to/python3)." >&2; \
	fi; \
	exit 1
