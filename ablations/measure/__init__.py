"""All that makes numbers: contexts, evaluation, calibration, speed, metrics, finetuning."""
