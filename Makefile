# make demo: sets everything up and pre-trains on drawn scenes; make test: the tests;
# make soak: the long ones (kills, launchers, memory); make lint: the linter.
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test soak lint clean

.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: .venv/.installed
	$(PY) demo/scenes.py --output_dir demo/data --segmentation 250 --changes 100
	$(PY) dino_mc.py --data_path demo/data/train --output_dir demo/output \
		--arch test_resnet --img_size 64 --local_crops_number 2 \
		--batch_size_per_gpu 32 --epochs 12 --warmup_epochs 1 --lr 8e-3 --weight_decay_end 0.1 --drop_path 0 \
		--momentum_teacher 0.98 --teacher_temp 0.03 \
		--out_dim 1024 --use_bn_in_head --freeze_last_layer 0
	$(PY) eval_knn.py --data_path demo/data --weights demo/output image_stats random --output_dir demo/output
	$(PY) eval_segmentation.py --data_path demo/data/segmentation --classes demo/data/segmentation/classes.txt \
		--weights demo/output random pixels --output_dir demo/output/segmentation --img_size 96 --epochs 6

test: .venv/.installed
	$(PY) -m pytest -q

soak: .venv/.installed
	$(PY) -m pytest -q -s -m slow

lint: .venv/.installed
	.venv/bin/ruff check .

clean:
	rm -rf demo/data demo/output
