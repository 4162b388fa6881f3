"""Block-sparse attention on Hopper GPUs: mosaic_gpu (launch), mosaic_gpu_kernel (consumers), mosaic_gpu_producer."""
