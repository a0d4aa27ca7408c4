# make demo   segments a synthetic CT and leaves pictures and a table in demo/
# make test   lint and every test
# make docker the container image, abdoseg:latest

VENV := .venv
PYTHON := $(VENV)/bin/python
IMAGE := abdoseg:latest

.PHONY: setup demo test docker test-docker clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: setup
	$(PYTHON) -m benchmark.demo

test: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PYTHON) -m pytest

docker:
	docker build -t $(IMAGE) .

# Needs a Docker engine and the image; runs it as the challenge's organisers do, and hardened.
test-docker:
	$(PYTHON) -m pytest tests/container

clean:
	rm -rf $(VENV) demo
