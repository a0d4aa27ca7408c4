# make demo   segments a synthetic CT and leaves pictures and a table in demo/
# make test   lint, types and every test
# make quick  lint and the tests that are not marked slow, in some 20 seconds
# make docker the container image, abdoseg:latest

VENV := .venv
PYTHON := $(VENV)/bin/python
IMAGE := abdoseg:latest

# One process a core, up to four, each with one thread; a process that runs out of tests takes over
# half of another's.
WORKERS := $(shell n=$$(nproc); echo $$((n < 4 ? n : 4)))
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

# Once more as on a processor without bfloat16.
HELD_TO_FP32 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
PREDICTION_TESTS := $(patsubst %,tests/inference/test_%.py,prediction service default_weights resuming)

.PHONY: setup browser dciodvfy demo test quick docker test-docker clean

setup: $(VENV)/.dev

# .dev has everything, .demo what the demonstration needs.
$(VENV)/.%: requirements-%.txt $(wildcard requirements*.txt)
	[ -x $(PYTHON) ] || python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# Install a Debian package for a test, if we are root; $(1) is the command that shows it is there.
define debian
@command -v $(1) >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	echo "Installing the Debian package $(2)"; \
	apt-get -q update >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get -q install -y \
	--no-install-recommends $(2) >/dev/null; else false; fi \
	|| echo "$(1) is missing and needs root to be installed: apt-get install $(2)"
endef

# For the test of the report page.
browser:
	$(call debian,chromium,chromium)

# The checker for the tests of DICOM SEG, which are skipped without it.
dciodvfy:
	$(call debian,dciodvfy,dicom3tools)

demo: $(VENV)/.demo
	$(PYTHON) -m benchmark demo

test: setup browser dciodvfy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	PYTHONWARNDEFAULTENCODING=1 $(PYTEST)
	$(HELD_TO_FP32) $(PYTEST) $(PREDICTION_TESTS)

quick: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTEST) -m "not slow"

docker:
	docker build -t $(IMAGE) .

# Needs a Docker engine and the image; runs it as the challenge's organisers do, and hardened.
test-docker:
	$(PYTHON) -m pytest tests/container

clean:
	rm -rf $(VENV) demo
