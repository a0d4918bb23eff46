# The whole workflow. Each target sets up what it needs: .venv is made on the first call.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-weights test check package gpu bench triton-versions docs clean
.DEFAULT_GOAL := demo

# A video and its report from the bundled model, in out/.
demo: .venv/ready
	mkdir -p out
	$(BIN)/sagewan generate "a red ball rolls to the right" --seed 1 -o out/ball.mp4 \
	  --report out/ball.json

# As many tests at a time as there are cores, up to four: each takes one.
test: .venv/ready
	$(BIN)/pytest --numprocesses logical --maxprocesses 4 --dist worksteal

check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheel, as a user gets it: in an empty environment, outside the checkout, and for Windows.
package: .venv/ready
	tools/check_package.sh

# A browser for the tests of the app, from Debian or Ubuntu; without one they are skipped, and say so.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } \
	    >/dev/null 2>&1 || echo "no chromium could be installed: the browser tests are skipped"; }

gpu: .venv/ready
	$(BIN)/pytest -m gpu

# Our kernels and a whole step beside others', on an NVIDIA GPU; docs/measured.md says what came out.
bench: .venv/ready
	$(BIN)/sagewan bench attention --json benchmarks/results/attention.json
	$(BIN)/python tools/attention_chart.py benchmarks/results/attention.json docs/images/attention.svg
	$(BIN)/sagewan bench step --json benchmarks/results/step.json
	$(BIN)/sagewan bench step --growth --json benchmarks/results/step-growth.json
	$(BIN)/python tools/step_chart.py docs/images benchmarks/results/step.json \
	  benchmarks/results/step-growth.json

# A whole step's tables and charts in the documentation, from the last reports of an H100.
STEP_REPORTS := $(foreach kind,480p 720p growth,$(lastword $(sort $(wildcard \
  benchmarks/results/step-$(kind)-h100-*.json))))
step-docs: .venv/ready
	$(BIN)/python -m tools.step_tables $(STEP_REPORTS)
	$(BIN)/python tools/step_chart.py docs/images $(STEP_REPORTS)

# The kernels with every Triton that a supported torch brings; .venv has one of them.
TRITONS := 3.6.0 3.7.1 3.8.0
triton-versions: .venv/ready
	for version in $(TRITONS); do \
	  folder=.venv/triton-$$version; \
	  test -d $$folder || $(BIN)/python -m pip install --quiet --no-deps --target $$folder \
	    triton==$$version || exit 1; \
	  PYTHONPATH=$$folder $(BIN)/pytest tests/kernels/test_ahead.py tests/kernels/test_ahead_linear.py || exit 1; \
	done

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

# The demo model's weights and scores, in build/, on a CUDA GPU; demo/README.md says more.
demo-weights: .venv/ready
	PYTHONPATH=src PATH=$(CURDIR)/$(BIN):$$PATH demo/all.sh build

# The pictures of the README and of the app, made by the commands they show.
docs: .venv/ready browser
	$(BIN)/python tools/pictures.py docs/images/demo.png
	PYTHONPATH=. $(BIN)/python tools/screenshots.py docs/images

clean:
	rm -rf .venv out dist build
