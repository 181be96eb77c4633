# `make demo` and `make test` need nothing but python3 and make; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.installed
	rm -rf demo
	$(BIN)/python main.py --m_name resnet20 --dataset photos --root demo --max_epochs 6 --sparsity 0.9 0.95 0.99 \
		--finetune_epochs 2 --finetune_lr 0.001

test: $(VENV)/.installed
	$(BIN)/python -m pytest

clean:
	rm -rf demo .pytest_cache

# Reinstalled when requirements.txt changes; the stamp is written last, so a broken installation is tried again.
$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
