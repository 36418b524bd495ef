"""The parts of ``examples/pretrain_backbone.py``: the training run, and what each kind of shard needs."""
