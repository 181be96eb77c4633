# `make demo` and `make test` need nothing but python3 and make; both set up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test first_half second_half clean

# The whole pipeline, small: dense -> pruned -> regrown by both methods; then a mask that moves while it trains -> one
# figure; 6 minutes on two free CPU cores.
# Interrupted, it goes on where it stopped; `make clean` makes it start anew.
DEMO := --m_name resnet20 --dataset photos --val_split 0.5 --root demo --finetune_lr 0.003 --finetune_epochs 2
PRUNE := $(DEMO) --resume --max_epochs 4 --finetune_schedule cosine
REGROW := $(DEMO) --target_sparsity 0.97 --search_budget 6 --mini_finetune_epochs 1 --ssim_batches 4

demo: $(VENV)/.installed
	$(BIN)/python main.py $(PRUNE) --sparsity 0.9 0.97 0.99
	$(BIN)/python rl_regrowth_nas.py $(REGROW) --resume
	$(BIN)/python rl_saliency_regrowth.py $(REGROW) --resume
	mkdir -p demo/moving/resnet20 && cp -r demo/resnet20/checkpoint demo/moving/resnet20/
	$(BIN)/python main.py $(PRUNE) --root demo/moving --sparsity 0.97 --mask_schedule bidirectional --update_every 4
	$(BIN)/python experiments/collect_results.py --m_name resnet20 --roots demo demo/moving --save_dir demo

# Two processes, a core each. The files named here take about half of the time, all others the rest. Each shows its
# output when it is done, in one piece; the exit status tells of both. `python -m pytest` runs everything in one process.
FIRST_HALF := benchmark export main regrowth_scripts vgg16_tables

test: $(VENV)/.installed $(VENV)/.installed_export
	@echo "running the tests in two halves; progress: tail -f $(VENV)/*_half.log"
	@$(MAKE) --no-print-directory -k -j2 first_half second_half

first_half: TESTS := $(FIRST_HALF:%=tests/test_%.py)
second_half: TESTS := $(FIRST_HALF:%=--ignore=tests/test_%.py)
first_half second_half:
	@echo "$@:" > $(VENV)/$@.log
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -p no:cacheprovider $(TESTS) >> $(VENV)/$@.log 2>&1; \
	status=$$?; cat $(VENV)/$@.log; exit $$status

clean:
	rm -rf demo .pytest_cache

# Reinstalled when requirements.txt changes; the stamp is written last, so a broken installation is tried again.
$(VENV)/.installed: requirements.txt
	@echo "installing requirements.txt into $(VENV): some minutes, up to 6 GB (the CUDA build of PyTorch); once only"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

# Without these packages (no network, say) the tests that need them are skipped; the next `make test` tries again.
$(VENV)/.installed_export: requirements-export.txt $(VENV)/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -r $< && touch $@ || echo "tests of ONNX will be skipped"
