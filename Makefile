# make demo   segments a synthetic CT and leaves pictures and a table in demo/
# make test   lint and every test
# make docker the container image, abdoseg:latest

VENV := .venv
PYTHON := $(VENV)/bin/python
IMAGE := abdoseg:latest
DEMO_SEED := 2023

.PHONY: setup demo test docker test-docker clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt requirements-dev.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: setup
	rm -rf demo
	$(PYTHON) -m benchmark.phantom --output demo --cases 1 --seed $(DEMO_SEED)
	PYTHON=$(CURDIR)/$(PYTHON) sh predict.sh --input $(CURDIR)/demo/images \
		--output $(CURDIR)/demo/predictions --weights $(CURDIR)/weights/phantom-slim.safetensors --preview
	$(PYTHON) -m benchmark.demo demo

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
