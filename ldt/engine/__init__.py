"""DeepSpeed around a denoiser: optimizer step, partition, averages, memory."""
