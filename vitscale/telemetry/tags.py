"""The names metrics go by, the same in every sink. They are stable: dashboards rely on them (docs/monitoring.md).

A name ends in its unit where it has one: _s, _bytes, _steps, _per_s, _fraction (of the time, 0 to 1).
"""

TRAIN_LOSS = "train/loss"
TRAIN_LOSS_EMA = "train/loss_ema"
TRAIN_LR = "train/lr"
TRAIN_GRAD_NORM = "train/grad_norm"
TRAIN_IMAGES_SEEN = "train/images_seen"
TRAIN_EPOCH = "train/epoch"
TRAIN_SKIPPED_STEPS = "train/skipped_steps"
TRAIN_SPIKES = "train/spikes"

VAL_LOSS = "val/loss"
VAL_TOP1 = "val/top1"
VAL_TOP5 = "val/top5"
VAL_AVERAGE_LOSS = "val/average_loss"
VAL_AVERAGE_TOP1 = "val/average_top1"
VAL_AVERAGE_TOP5 = "val/average_top5"

PERF_IMAGES_PER_S = "perf/images_per_s"
PERF_MFU = "perf/mfu"
PERF_EXECUTED_MFU = "perf/executed_mfu"
PERF_STEP_TIME_S = "perf/step_time_s"
PERF_DATA_WAIT_FRACTION = "perf/data_wait_fraction"
PERF_FORWARD_FRACTION = "perf/forward_fraction"
PERF_BACKWARD_FRACTION = "perf/backward_fraction"
PERF_COMMUNICATION_FRACTION = "perf/communication_fraction"
PERF_OPTIMIZER_FRACTION = "perf/optimizer_fraction"
PERF_CHECKPOINT_FRACTION = "perf/checkpoint_fraction"
PERF_OTHER_FRACTION = "perf/other_fraction"
PERF_PAUSE_S = "perf/pause_s"

DATA_SUBSTITUTIONS = "data/substitutions"
DATA_READY_BATCHES = "data/ready_batches"
DATA_READ_BYTES_PER_S = "data/read_bytes_per_s"
DATA_READ_AMPLIFICATION = "data/read_amplification"

MACHINE_DEVICE_PEAK_BYTES = "machine/device_peak_bytes"
MACHINE_HOST_PEAK_BYTES = "machine/host_peak_bytes"
MACHINE_SLOWEST_RANK = "machine/slowest_rank"
MACHINE_SLOWEST_RANK_STEP_S = "machine/slowest_rank_step_s"
MACHINE_SLOWEST_RANK_LAG = "machine/slowest_rank_lag"

# The engine names its norms by part of the model: grad_norm/blocks.attn and so on.
GRAD_NORM_PARTS, UPDATE_NORM_PARTS, WEIGHT_NORM_PARTS = "grad_norm/", "update_norm/", "weight_norm/"

PICTURE_PREDICTIONS = "pictures/predictions"
PICTURE_ATTENTION = "pictures/attention"
PICTURE_POS_EMBED = "pictures/pos_embed_similarity"
